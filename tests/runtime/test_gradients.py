"""The way of gradients from the device into `Parameter.grad`, without a step around it."""

import pytest
import torch
from torch import nn

from harmony_lightning import DeviceOutOfMemoryError, EmulatedCluster, HarmonyConfig
from harmony_lightning.prepare import Workload, prepare
from harmony_lightning.runtime.engine import Engine


@pytest.fixture
def net():
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))


@pytest.fixture
def engine(net):
    engine = Engine(net, EmulatedCluster(2, "2KiB"))
    decomposition, plan = prepare(
        net, engine.cluster, HarmonyConfig(), Workload(microbatch_size=1, num_microbatches=1), None
    )
    assert len(plan.packs) == 4
    engine.load(plan, decomposition)
    yield engine
    engine.close()


def on(engine, device, value):
    with engine.cluster.activate():
        return torch.full((4, 4), value).to(engine.cluster.devices[device].torch_device)


def drain(engine, pack=None, is_complete=lambda name: True, on_complete=lambda names: None):
    with engine.cluster.activate():
        engine.state.gradients.send(pack, is_complete, on_complete)
        engine.worker.drain()


def test_microbatches_are_added_up_and_leave_once(net, engine):
    store, completed = engine.state.gradients, []
    with engine.cluster.activate():
        for value in (1.0, 2.0, 4.0):
            store.add({"1.weight": on(engine, 1, value)}, 1, 1)
    drain(engine, 1, on_complete=completed.extend)
    assert torch.equal(net[1].weight.grad, torch.full((4, 4), 7.0))
    assert completed == ["1.weight"]
    assert engine.counters.swap_out_bytes == 64


def test_what_was_added_before_memory_ran_short_is_not_added_again(net, engine):
    store, narrow = engine.state.gradients, torch.ones(4, 4, dtype=torch.bfloat16)

    class Full:
        layout, dtype = torch.strided, torch.bfloat16

        def to(self, dtype):
            raise DeviceOutOfMemoryError("full")

    with engine.cluster.activate():
        gradients = {"0.weight": on(engine, 0, 1.0), "1.weight": Full()}  # the second in no slot of pack 0
        with pytest.raises(DeviceOutOfMemoryError):
            store.add(gradients, 0, 0)
        assert list(gradients) == ["1.weight"]
        gradients["1.weight"] = narrow.to(engine.cluster.devices[0].torch_device)
        store.add(gradients, 0, 0)
        assert not gradients
    drain(engine, 0)
    for weight in (net[0].weight, net[1].weight):
        assert torch.equal(weight.grad, torch.ones(4, 4))


def test_what_is_not_complete_waits_for_the_rest(net, engine):
    with engine.cluster.activate():
        engine.state.gradients.add({"1.weight": on(engine, 1, 1.0)}, 1, 1)
    drain(engine, 1, is_complete=lambda name: False)
    assert net[1].weight.grad is None
    with engine.cluster.activate():
        engine.state.gradients.add({"1.weight": on(engine, 0, 2.0)}, 0, 1)
        engine.state.gradients.scale(0.5)
    drain(engine, 1)
    assert torch.equal(net[1].weight.grad, torch.full((4, 4), 1.5))


def test_held_gradients_become_complete_with_finish_only(net, engine):
    completed, gradients = [], [on(engine, 0, 1.0) for _ in range(2)]
    with engine.cluster.activate():
        for gradient in gradients:
            engine.state.gradients.add({"0.weight": gradient}, 0, 0)
            engine.state.gradients.hold()
        engine.worker.drain()
        assert net[0].weight.grad is None
        engine.state.gradients.finish(completed.extend)
        engine.worker.drain()
    assert completed == ["0.weight"]
    assert torch.equal(net[0].weight.grad, torch.full((4, 4), 2.0))


def test_sparse_gradients_go_beside_the_slots(net, engine):
    """Emulated GPUs hold dense tensors only, so these come from the host; on CUDA they are the GPU's."""
    sparse = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 4), (4, 4))
    with engine.cluster.activate():
        engine.state.gradients.add({"0.weight": sparse}, 0, 0)
        engine.state.gradients.add({"0.weight": sparse}, 0, 0)
    drain(engine)
    assert net[0].weight.grad.is_sparse
    assert torch.equal(net[0].weight.grad.to_dense(), 2 * sparse.to_dense())


def test_hooks_come_between_the_last_microbatch_and_grad(net, engine):
    seen = []
    net[0].weight.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 3)
    net[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    net[0].weight.grad = torch.ones(4, 4)
    completed, gradients = [], [on(engine, 0, 1.0) for _ in range(2)]
    with engine.cluster.activate():
        for gradient in gradients:
            engine.state.gradients.add({"0.weight": gradient}, 0, 0)
    drain(engine, 0, on_complete=completed.extend)
    assert (seen, completed) == ([], [])
    with engine.cluster.activate():
        engine.state.gradients.finish(completed.extend)
    assert completed == ["0.weight"]
    assert [float(value.mean()) for value in seen] == [2.0, 7.0]


def test_discarding_forgets_what_hooks_have_not_seen(net, engine):
    net[0].weight.register_hook(lambda gradient: pytest.fail("discarded"))
    with engine.cluster.activate():
        engine.state.gradients.add({"0.weight": on(engine, 0, 1.0)}, 0, 0)
    drain(engine, 0)
    engine.state.gradients.discard()
    with engine.cluster.activate():
        engine.state.gradients.finish(lambda names: None)
    assert net[0].weight.grad is None


def test_the_next_pack_s_gradients_do_not_wait_until_those_before_have_left(net, engine):
    store = engine.state.gradients
    ones, twos = on(engine, 1, 1.0), on(engine, 1, 2.0)
    with engine.cluster.activate(continues=True):
        store.add({"1.weight": ones}, 1, 1)
        memory = {slot.bytes.data_ptr(): slot for slot in store._slots._slots[1]}
        (first,) = (slot for slot in memory.values() if slot.pack == 1)
        store.send(1, lambda name: True, lambda names: None)
        store.add({"3.weight": twos}, 1, 3)
    assert len(memory) == 2 and not first.is_in_use and first.left is not None
    drain(engine, 3)
    assert torch.equal(net[1].weight.grad, torch.ones(4, 4))
    assert torch.equal(net[3].weight.grad, torch.full((4, 4), 2.0))


@pytest.mark.parametrize("follow", ["add", "send", "scale"])
def test_sums_leave_the_device_and_come_back_as_they_were(net, engine, follow):
    store, device = engine.state.gradients, engine.cluster.devices[1]
    first, second = torch.rand(2, 4, 4)
    with engine.cluster.activate(continues=True):
        before = device.allocated_bytes()
        store.add({"1.weight": first.to(device.torch_device)}, 1, 1)
        assert store.leave(device) and not store.leave(device)
        assert device.allocated_bytes() == before
        if follow == "add":
            store.add({"1.weight": second.to(device.torch_device)}, 1, 1)
        if follow == "scale":
            store.scale(3.0)
    drain(engine, 1)
    assert torch.equal(net[1].weight.grad, {"add": first + second, "send": first, "scale": first * 3}[follow])
