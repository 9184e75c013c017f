"""Emulated GPUs: the numbers of plain CPU, the limits, the refusals and the byte counts of a GPU."""

import contextlib
import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from harmony_lightning.errors import ConfigurationError, DeviceOutOfMemoryError, UnsupportedError
from harmony_lightning.hardware.device import Lane
from harmony_lightning.hardware.emulated import EmulatedCluster, EmulatedMode, EmulatedTensor, Traffic, storage_key


@pytest.fixture
def cluster() -> Iterator[EmulatedCluster]:
    cluster = EmulatedCluster(num_gpus=2, memory="1MiB")
    with cluster.activate():
        yield cluster


# --- the numbers -----------------------------------------------------------------------------------------------------


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * 2 + x * 0


class _Call(nn.Module):
    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.parts)


def _index_put(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[torch.tensor([0, 1]), torch.tensor([1, 1])] = x[0, 0] * 3
    y[:, 2] += 1
    return y


def _packed_lstm(x: torch.Tensor, lstm: nn.Module) -> torch.Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2, 1]), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], batch_first=True)[0]


def _autocast(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return linear(x).float()


def _out(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        target = torch.empty(0, device=x.device)
        torch.mul(x, 3, out=target)
    return x * target


TOKENS = (4, 5, 8)
IMAGE = (2, 3, 8, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), TOKENS),
    "layer_norm": (lambda: nn.LayerNorm(8), TOKENS),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), IMAGE),
    "batch_norm": (lambda: nn.BatchNorm2d(3), IMAGE),
    "group_norm": (lambda: nn.GroupNorm(1, 3), IMAGE),
    "attention": (lambda: _Call(lambda x, mha: mha(x, x, x)[0], nn.MultiheadAttention(8, 2, batch_first=True)), TOKENS),
    "lstm": (lambda: _Call(lambda x, lstm: lstm(x)[0], nn.LSTM(8, 6, num_layers=2)), TOKENS),
    "lstm_packed": (lambda: _Call(_packed_lstm, nn.LSTM(8, 6, batch_first=True)), TOKENS),
    "gru": (lambda: _Call(lambda x, gru: gru(x)[0], nn.GRU(8, 6, bidirectional=True)), TOKENS),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), TOKENS),
    "sdpa_causal": (lambda: _Call(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), (2, 2, 5, 8)),
    "embedding": (lambda: _Call(lambda x, e: e((x * 3).long().abs() % 7) * x.sum(), nn.Embedding(7, 4)), (4, 5)),
    "cross_entropy": (lambda: _Call(lambda x: F.cross_entropy(x, x.argmax(1))), (4, 8)),
    "max_pool": (lambda: _Call(lambda x: F.max_pool2d(x, 2)), IMAGE),
    "interpolate": (lambda: _Call(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), IMAGE),
    "index_put_host_indices": (lambda: _Call(_index_put), (4, 5)),
    "index": (lambda: _Call(lambda x: x[x > 0] * 2 + x[:, [0, 1]].sum() + x[..., None, 1:3].sum()), (4, 5)),
    "index_host_mask": (lambda: _Call(lambda x: x[torch.tensor([True, False, True, False])]), (4, 5)),
    "topk": (lambda: _Call(lambda x: x.topk(3)[0]), (4, 5)),
    "scatter": (lambda: _Call(lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x)), (4, 5)),
    "where_nonzero": (lambda: _Call(lambda x: torch.where(x > 0, x, torch.tensor(0.5)) + len(x.nonzero())), (4, 5)),
    "einsum": (lambda: _Call(lambda x: torch.einsum("ij,kj->ik", x, x)), (4, 5)),
    "split_cat": (lambda: _Call(lambda x: torch.cat([c.relu() for c in reversed(x.chunk(2, -1))], -1)), (4, 6)),
    "bfloat16": (lambda: _Call(lambda x: (x.bfloat16() @ x.bfloat16().T).float()), (4, 5)),
    "autocast": (lambda: _Call(_autocast, nn.Linear(8, 6)), TOKENS),
    "complex": (
        lambda: _Call(lambda x: torch.view_as_real((torch.fft.fft(x).conj() * (1 + 2j)).resolve_conj())),
        (4, 5),
    ),
    "dropout": (lambda: _Call(lambda x: F.dropout(x, 0.5) + torch.rand_like(x) + torch.bernoulli(x.sigmoid())), (4, 5)),
    "in_place_on_view": (lambda: _Call(lambda x: (y := x * 1, y[0].mul_(3), y.t_().add_(1))[0]), (4, 5)),
    "out": (lambda: _Call(_out), (4, 5)),
    "autograd_function": (lambda: _Call(_Double.apply), (4, 5)),
    "checkpoint": (
        lambda: _Call(
            lambda x, linear: checkpoint(lambda y: F.dropout(linear(y)).tanh(), x, use_reentrant=False), nn.Linear(8, 8)
        ),
        TOKENS,
    ),
    "checkpoint_reentrant": (
        lambda: _Call(lambda x, linear: checkpoint(lambda y: linear(y).tanh(), x, use_reentrant=True), nn.Linear(8, 8)),
        TOKENS,
    ),
}


def _results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(3)
    x.requires_grad_()
    out = module(x)
    (out * out).sum().backward()
    return [out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_bitwise_those_of_the_cpu(case: str, cluster: EmulatedCluster) -> None:
    make, shape = CASES[case]
    torch.manual_seed(1)
    module, x = make(), torch.randn(shape)
    twin = copy.deepcopy(module).to("cpu:1")
    expected = _results(module, x.clone())
    results = _results(twin, x.to("cpu:1"))
    assert len(results) == len(expected)
    for result, plain in zip(results, expected, strict=True):
        assert type(result) is EmulatedTensor and result.device == torch.device("cpu", 1)
        assert result.dtype == plain.dtype and result.stride() == plain.stride()
        assert torch.equal(result.cpu(), plain)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_autocast_reaches_what_a_composite_operation_calls(cluster: EmulatedCluster, guard: Callable[[], Any]) -> None:
    device, lstm = cluster.devices[0].torch_device, nn.LSTM(4, 4)
    x, y = torch.randn(3, 4), torch.randn(4, 4)
    results = []
    for on in ("cpu", device):
        with guard(), torch.autocast("cpu", dtype=torch.bfloat16):
            half = x.to(on) @ y.to(on)
            results += [torch.einsum("ij,jk->ik", half, y.to(on)), lstm.to(on)(half)[0]]
    for expected, actual in zip(results[:2], results[2:], strict=True):
        assert actual.device == device
        assert actual.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(actual.cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_bitwise_that_of_the_cpu(guard: Any, cluster: EmulatedCluster) -> None:
    module, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    twin = copy.deepcopy(module).to("cpu:0")
    with guard():
        assert torch.equal(twin(x.to("cpu:0")).cpu(), module(x))


def test_functional_call_with_device_weights(cluster: EmulatedCluster) -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(3, 4)
    state = {name: t.detach().to("cpu:0") for name, t in [*module.named_parameters(), *module.named_buffers()]}
    weight = state["0.weight"].requires_grad_()
    out = torch.func.functional_call(module, state, (x.to("cpu:0"),))
    out.pow(2).sum().backward()
    expected = module(x)
    expected.pow(2).sum().backward()
    assert torch.equal(out.cpu(), expected) and torch.equal(weight.grad.cpu(), module[0].weight.grad)
    assert torch.equal(state["1.running_mean"].cpu(), module[1].running_mean)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_optimizers_step_device_weights(options: dict[str, bool], cluster: EmulatedCluster) -> None:
    module = nn.Linear(4, 4)
    twin = copy.deepcopy(module).to("cpu:0")
    x = torch.randn(3, 4)
    for model, batch in ((module, x), (twin, x.to("cpu:0"))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        for _ in range(2):
            optimizer.zero_grad()
            model(batch).pow(2).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert torch.equal(twin.weight.cpu(), module.weight)


def test_generators_pass_through(cluster: EmulatedCluster) -> None:
    x = torch.rand(5, device="cpu:0", generator=torch.Generator().manual_seed(7))
    assert torch.equal(x.cpu(), torch.rand(5, generator=torch.Generator().manual_seed(7)))


# --- where tensors are made and how they are read --------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cpu:1"),
        lambda: torch.randn(2, device=torch.device("cpu", 1)),
        lambda: torch.arange(2, device="cpu:1"),
        lambda: torch.tensor([1.0, 2.0], device="cpu:1"),
        lambda: torch.as_tensor([1.0, 2.0], device="cpu:1"),
        lambda: torch.zeros_like(torch.ones(2), device="cpu:1"),
        lambda: torch.ones(2).new_zeros(2, device="cpu:1"),
        lambda: torch.ones(2, device="cpu:1").new_tensor([1, 2]),
        lambda: torch.ones(2, device="cpu:1").new_full((2,), 3),
        lambda: torch.ones(2, device="cpu:0").to("cpu:1", torch.float64),
        lambda: nn.Linear(2, 2, device="cpu:1").bias,
        lambda: torch.empty(2, device="cpu:1", pin_memory=False),
    ],
)
def test_tensors_are_made_on_the_device(make: Callable[[], torch.Tensor], cluster: EmulatedCluster) -> None:
    tensor = make()
    assert type(tensor) is EmulatedTensor and tensor.home is cluster.devices[1]


def test_host_work_stays_on_the_host(cluster: EmulatedCluster) -> None:
    x = torch.zeros(2, device="cpu:0")
    for tensor in (torch.ones(2) + 1, torch.zeros(2, device="cpu"), torch.zeros_like(x, device="cpu"), x.cpu()):
        assert type(tensor) is torch.Tensor
    assert torch.zeros(2, pin_memory=True).pin_memory().sum() == 0
    assert x.to("meta").device.type == "meta"


def test_reading_values(cluster: EmulatedCluster) -> None:
    x = torch.tensor([1.5, 2.0], device="cpu:0", requires_grad=True)
    assert x.requires_grad and x.is_leaf
    assert x[0].item() == 1.5 and float(x.detach()[1]) == 2.0 and bool(x[0] > 1) and x.detach().tolist() == [1.5, 2.0]
    assert f"{x[0]:.2f}" == "1.50" and "gpu0" in repr(x) and [v.item() for v in x] == [1.5, 2.0]
    assert x.inner(x).item() == 6.25
    assert torch.equal(x, x.clone()) and x.is_same_size(x.clone()) and x.data_ptr() == x.detach().data_ptr()
    with pytest.raises(RuntimeError, match="detach"):
        x.numpy()
    assert x.numpy(force=True).tolist() == x.detach().numpy().tolist() == [1.5, 2.0]
    assert numpy.asarray(x.detach(), dtype="int64").tolist() == [1, 2]


def test_lists_of_numbers_on_devices_make_tensors(cluster: EmulatedCluster) -> None:
    x, y = torch.tensor(1.5, device="cpu:0"), torch.tensor(2, device="cpu:1")
    assert torch.tensor([x, y]).tolist() == torch.tensor([x, 2.0], device="cpu:1").tolist() == [1.5, 2]
    assert torch.tensor([y, y]).dtype is torch.int64 and torch.tensor([y > 1, y > 2]).tolist() == [True, False]
    assert torch.as_tensor([[x], [x]]).shape == (2, 1) and torch.tensor([x * 1j]).tolist() == [1.5j]
    assert cluster.devices[0].traffic.device_to_host_bytes > 0
    with pytest.raises(ValueError, match="one element"):
        torch.tensor([x.expand(2)])


def test_between_steps_tensors_meet_where_one_is_written_and_on_the_host_otherwise() -> None:
    cluster = EmulatedCluster(2)
    with cluster.activate():
        x, y = torch.ones(2, 3, device="cpu:0"), torch.ones(2, 3, device="cpu:1")
    host = torch.full((2, 3), 2.0)
    assert torch.allclose(x, host / 2) and type(x + host) is torch.Tensor and type(torch.stack([x, y])) is torch.Tensor
    before = [device.traffic.host_to_device_bytes for device in cluster.devices]
    assert x.add_(host) is x and x.home is cluster.devices[0] and x.numpy().tolist() == [[3, 3, 3], [3, 3, 3]]
    assert [device.traffic.host_to_device_bytes for device in cluster.devices] == [before[0] + host.nbytes, before[1]]
    assert host.mul_(y) is host and (x * torch.tensor(2.0)).device == x.device
    with pytest.raises(RuntimeError, match="same device"):
        torch._foreach_add_([x, host], [host, x])


def test_tensors_work_when_no_mode_is_active() -> None:
    cluster = EmulatedCluster(2)
    with cluster.activate():
        x = torch.arange(4.0).to("cpu:0").requires_grad_()
    (grad,) = torch.autograd.grad(torch.stack([x, x]).pow(2).sum(), x)
    assert grad.cpu().tolist() == [0, 4, 8, 12] and x.sum().item() == 6
    assert type(x.to("cpu")) is torch.Tensor and x.detach().to("cpu:1").home is cluster.devices[1]
    assert type(copy.deepcopy(x)) is EmulatedTensor and torch.zeros(2, device="cpu:0").__class__ is torch.Tensor


def test_torch_is_as_before_after_activation() -> None:
    before = torch.tensor, torch.as_tensor, torch.asarray
    with pytest.raises(KeyError), EmulatedCluster().activate():
        raise KeyError
    assert (torch.tensor, torch.as_tensor, torch.asarray) == before


# --- what a GPU refuses ----------------------------------------------------------------------------------------------


def test_mixed_devices_are_refused(cluster: EmulatedCluster) -> None:
    x, y, host = torch.ones(2, 3, device="cpu:0"), torch.ones(2, 3, device="cpu:1"), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"aten.add.Tensor.*same device.*\(2, 3\) on gpu0, \(2, 3\) on gpu1"):
        x + y
    with pytest.raises(RuntimeError, match=r"\(2, 3\) on gpu0, \(2, 3\) on host"):
        x * host
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([host, y])
    with pytest.raises(RuntimeError, match="same device"):
        F.embedding(torch.tensor([0]), x)


def test_a_cluster_that_is_not_strict_copies_host_tensors(caplog: pytest.LogCaptureFixture) -> None:
    cluster = EmulatedCluster(2, "1MiB", strict=False)
    with cluster.activate():
        x, y, host = torch.ones(2, 3, device="cpu:0"), torch.ones(2, 3, device="cpu:1"), torch.ones(2, 3)
        assert (x * host).device == torch.cat([host, x]).device == x.device and type(host.add_(x)) is torch.Tensor
        assert x.add_(host) is x and x.tolist() == [[3, 3, 3], [3, 3, 3]]
        assert cluster.devices[0].traffic == Traffic(host_to_device_bytes=72, device_to_host_bytes=48)
        with pytest.raises(RuntimeError, match="same device"):
            x + y
        with pytest.raises(RuntimeError, match="same device"):
            torch.addmm(x, y, host)
    assert pickle.loads(pickle.dumps(cluster)).machine.is_strict is False
    assert caplog.text.count("CUDA would refuse") == 1


def test_host_scalars_mix_with_device_tensors_but_take_nothing_from_them(cluster: EmulatedCluster) -> None:
    x, scalar = torch.ones(2, device="cpu:0"), torch.tensor(3.0)
    assert (x * scalar).tolist() == [3, 3] and (scalar - x).device == x.device
    assert x.mul_(scalar).tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="same device"):
        scalar.add_(x[0])


def test_indices_and_devices_that_do_not_exist(cluster: EmulatedCluster) -> None:
    with pytest.raises(ConfigurationError, match="cpu:2 is no device of this cluster, which has gpu0, gpu1"):
        torch.zeros(1, device="cpu:2")
    with pytest.raises(ConfigurationError, match="cpu:9"):
        torch.zeros(1).to("cpu:9")


def test_sparse_and_pinning_are_refused(cluster: EmulatedCluster) -> None:
    with pytest.raises(UnsupportedError, match="sparse"):
        torch.eye(2, device="cpu:0").to_sparse()
    with pytest.raises(RuntimeError, match=r"pin"):
        torch.eye(2, device="cpu:0").pin_memory()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_going_over_the_limit_raises_and_charges_nothing(cluster: EmulatedCluster) -> None:
    device = cluster.devices[0]
    held = torch.zeros(128 * 1024, device="cpu:0")  # half of the memory
    with pytest.raises(DeviceOutOfMemoryError, match=r"gpu0 .*CUDA.* out of memory.*768 KiB.*512 KiB.*limit is 1 MiB"):
        torch.zeros(192 * 1024, device="cpu:0")
    half = held + 1
    with pytest.raises(DeviceOutOfMemoryError, match="out of memory"):
        held + half
    assert device.allocated_bytes() == device.peak_bytes() == 1024 * 1024
    assert cluster.devices[1].allocated_bytes() == 0
    del half
    assert device.allocated_bytes() == held.nbytes


def test_peak_and_lifetime(cluster: EmulatedCluster) -> None:
    device = cluster.devices[0]
    x = torch.zeros(1000, device="cpu:0")
    y = x + 1
    assert device.allocated_bytes() == 8000
    del y
    assert (device.allocated_bytes(), device.peak_bytes()) == (4000, 8000)
    device.reset_peak()
    assert device.peak_bytes() == 4000
    view = x[500:].view(50, 10).t()
    del x
    assert device.allocated_bytes() == 4000
    del view
    assert device.allocated_bytes() == 0


def test_training_leaks_nothing(cluster: EmulatedCluster) -> None:
    device = cluster.devices[0]
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).to("cpu:0")
    weights = sum(p.nbytes for p in module.parameters())
    assert device.allocated_bytes() == weights
    module(torch.ones(4, 8, device="cpu:0")).sum().backward()
    assert device.allocated_bytes() == 2 * weights
    module.zero_grad()
    assert device.allocated_bytes() == weights
    module.to("cpu:1")
    assert (device.allocated_bytes(), cluster.devices[1].allocated_bytes()) == (0, weights)
    module.to("cpu")
    assert cluster.devices[1].allocated_bytes() == 0 and type(module[0].weight) is nn.Parameter
    gc.collect()


def test_several_outputs_are_charged_each(cluster: EmulatedCluster) -> None:
    values, indices = torch.rand(10, device="cpu:0").sort()
    assert cluster.devices[0].allocated_bytes() == values.nbytes + indices.nbytes
    parts = values.split(5)
    assert cluster.devices[0].allocated_bytes() == values.nbytes + indices.nbytes
    assert parts[0].allocation is values.allocation


def test_views_of_a_flat_buffer_see_what_is_copied_into_it(cluster: EmulatedCluster) -> None:
    buffer = torch.zeros(96, dtype=torch.uint8, device="cpu:0")
    weight = buffer[32:64].view(torch.float32).as_strided((4, 2), (1, 4))
    buffer[32:64].copy_(torch.arange(8.0).view(torch.uint8))
    assert torch.equal(weight.cpu(), torch.arange(8.0).view(2, 4).t())
    weight.add_(1)
    assert torch.equal(buffer[32:64].cpu().view(torch.float32), torch.arange(8.0) + 1)
    assert weight.allocation is buffer.allocation and storage_key(weight) == storage_key(buffer)
    assert storage_key(weight.clone()) != storage_key(buffer)
    assert cluster.devices[0].allocated_bytes() == 96
    parameter = nn.Parameter(weight)
    parameter.pow(2).sum().backward()
    assert storage_key(parameter) == storage_key(buffer) and torch.equal(parameter.grad, 2 * weight)


def test_resize_and_set_keep_the_books(cluster: EmulatedCluster) -> None:
    device = cluster.devices[0]
    x = torch.ones(4, device="cpu:0")
    x.resize_(8)
    assert x.shape == (8,) and x.nbytes == 32 == device.allocated_bytes()
    with pytest.raises(DeviceOutOfMemoryError):
        x.resize_(1024, 1024)
    assert x.shape == x.inner_tensor.shape == (8,) and device.allocated_bytes() == 32
    y = torch.empty(0, device="cpu:0").set_(x)
    assert y.allocation is x.allocation and y.shape == (8,)
    x.unsqueeze_(0)
    assert x.shape == (1, 8) and y.shape == (8,)
    with pytest.raises(DeviceOutOfMemoryError):
        torch.ones(1, 300_000, device="cpu:1", dtype=torch.uint8).to(torch.int64)


def test_data_can_be_swapped(cluster: EmulatedCluster) -> None:
    parameter = nn.Parameter(torch.zeros(2, device="cpu:0"))
    arena = torch.ones(4, device="cpu:0")
    parameter.data = arena[1:4]
    assert parameter.shape == (3,) and parameter.requires_grad and (parameter * 2).tolist() == [2, 2, 2]
    assert parameter.allocation is arena.allocation and cluster.devices[0].allocated_bytes() == 16


# --- bytes over the links --------------------------------------------------------------------------------------------


def test_traffic_is_counted_to_the_byte(cluster: EmulatedCluster) -> None:
    gpu0, gpu1 = cluster.devices
    x = torch.zeros(10).to("cpu:0")
    assert gpu0.traffic == Traffic(host_to_device_bytes=40)
    x.copy_(torch.ones(10, dtype=torch.float64))
    assert gpu0.traffic == Traffic(host_to_device_bytes=80)
    y = x.to("cpu:1", torch.float16)
    assert (gpu0.traffic.peer_bytes, gpu1.traffic) == (0, Traffic(peer_bytes=20))
    host = torch.empty(10, dtype=torch.float16)
    host.copy_(y)
    assert y.sum().item() == 10
    assert gpu1.traffic == Traffic(peer_bytes=20, device_to_host_bytes=22)
    y.copy_(x[:1])
    assert gpu1.traffic.peer_bytes == 40
    x.add_(1).double().clone()
    torch.zeros(10, device="cpu:0").copy_(x)
    assert gpu0.traffic == Traffic(host_to_device_bytes=80)
    x[torch.tensor([1, 2])]
    assert gpu0.traffic.host_to_device_bytes == 96
    torch._foreach_copy_([x, x], [host, host])
    assert gpu0.traffic.host_to_device_bytes == 176


def test_refused_arrivals_are_not_counted(cluster: EmulatedCluster) -> None:
    with pytest.raises(DeviceOutOfMemoryError):
        torch.zeros(1024, 1024).to("cpu:0")
    assert cluster.devices[0].traffic == Traffic()


# --- copies, files, clusters -----------------------------------------------------------------------------------------


def test_deepcopy_keeps_kind_gradient_and_sharing(cluster: EmulatedCluster) -> None:
    module = nn.Linear(2, 2).to("cpu:0")
    module.register_buffer("tied", module.weight.detach()[0])
    module.weight.sum().backward()
    module.weight.decays = False
    twin = copy.deepcopy(module)
    assert twin.weight.decays is False
    assert isinstance(twin.weight, nn.Parameter) and type(twin.weight) is EmulatedTensor and twin.weight.requires_grad
    assert torch.equal(twin.weight.grad, module.weight.grad)
    assert storage_key(twin.tied) == storage_key(twin.weight) != storage_key(module.weight)
    assert storage_key(copy.copy(module.weight)) == storage_key(module.weight)


def test_pickles_are_host_tensors(cluster: EmulatedCluster) -> None:
    module = nn.Linear(2, 2).to("cpu:0")
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded.weight) is nn.Parameter and torch.equal(loaded.weight, module.weight.cpu())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert type(torch.load(file)["weight"]) is torch.Tensor


def test_clusters_side_by_side() -> None:
    first, second = EmulatedCluster(2), EmulatedCluster(1)
    with first.activate():
        x = torch.zeros(2, device="cpu:0")
        with second.activate():
            y = torch.zeros(2, device="cpu:0")
            assert x.to("cpu:1").home is first.devices[1]
            with first.activate():
                assert torch.zeros(2, device="cpu:1").home is first.devices[1]
        with pytest.raises(RuntimeError, match="same device"):
            x + y
    assert second.devices[0].allocated_bytes() == 8 and first.devices[0].allocated_bytes() == 8


def test_activation_nests_without_a_second_mode(cluster: EmulatedCluster) -> None:
    def depth() -> int:
        stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        return sum(isinstance(mode, EmulatedMode) for mode in stack)

    with cluster.activate(), cluster.activate():
        assert depth() == 1
    assert depth() == 1


def test_the_device_protocol() -> None:
    cluster = EmulatedCluster(num_gpus=2, memory="2KiB")
    assert repr(cluster) == "EmulatedCluster(num_gpus=2, memory='2KiB')" and not cluster.host_is_device
    device = cluster.devices[1]
    assert (device.name, device.index, device.memory_bytes) == ("gpu1", 1, 2048)
    assert device.torch_device == torch.device("cpu", 1) and device.random_state() is None
    with device.lane(Lane.SWAP_IN):
        event = device.record(Lane.SWAP_IN)
    device.wait(Lane.COMPUTE, event)
    event.synchronize()
    buffer = cluster.host_buffer(100)
    assert type(buffer) is torch.Tensor and buffer.dtype is torch.uint8 and buffer.shape == (100,)


@pytest.mark.parametrize("options", [{"num_gpus": 0}, {"num_gpus": 1.5}, {"memory": "lots"}, {"memory": 0}])
def test_impossible_clusters_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        EmulatedCluster(**options)


def test_hardware_rooms_import_without_a_gpu() -> None:
    from harmony_lightning.hardware.cuda import CudaCluster
    from harmony_lightning.hardware.host import HostCluster

    with HostCluster().activate(), contextlib.nullcontext():
        assert HostCluster().host_is_device and HostCluster().devices[0].memory_bytes > 2**20
    with pytest.raises(ConfigurationError, match="at least one"):
        CudaCluster([])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_are_copies_where_nothing_is_differentiated(mode: Any) -> None:
    """In inference mode `to` comes whole, where elsewhere it is taken apart before."""
    cluster = EmulatedCluster(num_gpus=2, memory="64KiB")
    with cluster.activate(), mode():
        host = torch.zeros(1000)
        there = host.to("cpu:0")
        other, back = there.add_(1).to("cpu:1"), there.cpu()
        back += 1
        assert [t.sum().item() for t in (host, there, other, back)] == [0, 1000, 1000, 2000]
        assert there.to("cpu:0") is there and there.to("cpu:0", torch.float64).dtype is torch.float64
    first, second = (device.traffic for device in cluster.devices)
    assert (first.host_to_device_bytes, first.device_to_host_bytes, second.peer_bytes) == (4000, 4000 + 4, 4000)
