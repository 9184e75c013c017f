"""Slots of one plan give way to those of the next."""

import dataclasses

import pytest
from torch import nn

from harmony_lightning import EmulatedCluster, HarmonyConfig
from harmony_lightning.prepare import Workload, prepare
from harmony_lightning.runtime.engine import Engine


@pytest.mark.parametrize("is_loaded", [True, False])
def test_freed_memory_goes_back_before_slots_are_made_anew(monkeypatch, is_loaded):
    in_use: list[int] = []
    """Of the GPU, whenever what torch keeps of freed memory is given back."""
    cluster = EmulatedCluster(1, "2KiB")
    (device,) = cluster.devices
    monkeypatch.setattr(
        EmulatedCluster, "trim_device_memory", lambda _: in_use.append(device.allocated_bytes()), raising=False
    )
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    engine = Engine(net, cluster)
    workload = Workload(microbatch_size=1, num_microbatches=1)
    decomposition, plan = prepare(net, cluster, HarmonyConfig(), workload)
    engine.load(plan, decomposition)
    assert not in_use
    with cluster.activate():
        engine.state.weights.allocate(device)
    assert device.allocated_bytes() > 0
    other = dataclasses.replace(plan, resident=(0,))
    if is_loaded:
        engine.load(other, decomposition)
    else:
        engine.take_up(other)
    assert in_use == [0]
    engine.take_up(other)
    assert in_use == [0]
    engine.close()
