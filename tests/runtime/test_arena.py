import io

import pytest
import torch
from torch import nn

from harmony_lightning.hardware.host import HostCluster
from harmony_lightning.runtime.weights.arena import HostArena, lay_out, layout_nbytes, return_freed_memory


def arena_of(**tensors):
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    before = dict(parameters)
    arena = HostArena(parameters, parameters, HostCluster())
    assert all(parameters[name] is parameter for name, parameter in before.items())
    return arena, parameters


VARIED = {
    "matrix": torch.randn(5, 7),
    "half": torch.randn(3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "transposed": torch.randn(4, 6).t(),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "empty": torch.empty(0, 3),
    "sliced": torch.randn(8, 8)[:, ::2],
    "expanded": torch.randn(1, 3).expand(4, 3),
    "integers": torch.arange(5),
    "complex": torch.randn(3, dtype=torch.complex64),
    "flags": torch.tensor([True, False, True]),
}


def test_parameters_keep_identity_and_values():
    expected = {name: tensor.clone() for name, tensor in VARIED.items()}
    _, parameters = arena_of(**VARIED)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.dtype == expected[name].dtype


def test_parameters_and_arena_are_one_memory():
    arena, parameters = arena_of(**VARIED)
    for name, region in arena.layout.items():
        view = region.view(arena.bytes)
        assert torch.equal(view, parameters[name]), name
        if view.numel():
            assert view.data_ptr() == parameters[name].data_ptr()
            parameters[name].zero_()
    assert not arena.layout["matrix"].view(arena.bytes).any()
    assert not arena.layout["sliced"].view(arena.bytes).any()


def test_each_parameter_has_a_storage_of_exactly_its_own_size():
    arena, parameters = arena_of(**VARIED)
    for name, parameter in parameters.items():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
        assert parameter.storage_offset() == 0
    assert arena.bytes.nbytes > 500


def test_saving_one_parameter_saves_that_one():
    _, parameters = arena_of(small=torch.randn(4), large=torch.randn(100_000))
    file = io.BytesIO()
    torch.save(parameters["small"], file)
    assert file.tell() < 4096
    file.seek(0)
    assert torch.equal(torch.load(file), parameters["small"])


def test_dense_strides_are_kept_and_others_made_contiguous():
    _, parameters = arena_of(**VARIED)
    strides = {name: tensor.stride() for name, tensor in VARIED.items()}
    for name in ("matrix", "transposed", "channels_last", "scalar", "complex"):
        assert parameters[name].stride() == strides[name], name
    assert parameters["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert parameters["sliced"].is_contiguous()
    assert parameters["expanded"].is_contiguous()


def test_every_weight_starts_at_a_multiple_of_64_without_overlap():
    arena, parameters = arena_of(**VARIED)
    stop = 0
    for name, region in arena.layout.items():
        assert region.start % 64 == 0, name
        assert region.start >= stop
        assert region.stop - region.start == parameters[name].nbytes
        stop = region.stop
    assert layout_nbytes(arena.layout) == arena.bytes.numel() == -(-stop // 64) * 64
    assert all(p.data_ptr() % 64 == 0 for p in parameters.values() if p.numel())


def test_the_layout_follows_the_names():
    tensors = {"a": torch.zeros(16), "b": torch.zeros(17), "c": torch.zeros(1)}
    assert [(name, r.start, r.stop) for name, r in lay_out(tensors, ("c", "b", "a")).items()] == [
        ("c", 0, 4),
        ("b", 64, 132),
        ("a", 192, 256),
    ]
    assert layout_nbytes({}) == 0


def test_an_arena_of_nothing_is_empty():
    arena, _ = arena_of()
    assert arena.bytes.numel() == 0
    arena, parameters = arena_of(empty=torch.empty(3, 0))
    assert parameters["empty"].shape == (3, 0)


def test_parameters_hold_the_memory_alive_and_optimizers_and_autograd_go_on():
    arena, _ = arena_of()
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    arena = HostArena({"weight": weight}, ["weight"], HostCluster())
    view = arena.layout["weight"].view(arena.bytes)
    del arena
    (weight * 2).sum().backward()
    optimizer.step()
    assert weight.tolist() == view.tolist() == [-1.0] * 4
    assert weight.requires_grad and weight.is_leaf


def test_moving_twice_is_as_good_as_once():
    _, parameters = arena_of(**VARIED)
    expected = {name: parameter.clone() for name, parameter in parameters.items()}
    again = HostArena(parameters, reversed(list(parameters)), HostCluster())
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())
    assert all(torch.equal(r.view(again.bytes), expected[name]) for name, r in again.layout.items())


@pytest.mark.parametrize("_", range(2))
def test_returning_memory_never_fails(_):
    return_freed_memory()
