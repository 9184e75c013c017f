"""Copies between devices: how long their sources are held, and how far ahead they set out."""

from types import SimpleNamespace

import pytest
import torch

from harmony_lightning import EmulatedCluster
from harmony_lightning.hardware.device import Lane
from harmony_lightning.hardware.out_of_memory import told_by_type
from harmony_lightning.runtime.microbatch import sending_ahead
from harmony_lightning.runtime.transfer import Departures, Landings, bring_in, send


@pytest.mark.parametrize(
    ("num_microbatches", "limit_nbytes", "num_held"), [(6, 0, 1), (6, 300, 3), (6, 1000, 5), (2, 1000, 1), (4, 1000, 3)]
)
def test_sources_of_copies_to_other_devices_are_held_while_they_may_be_needed(num_microbatches, limit_nbytes, num_held):
    cluster = EmulatedCluster(1, "1MiB")
    (device,) = cluster.devices
    departures = Departures(cluster.devices, limit_nbytes, lambda: num_microbatches)
    with cluster.activate():
        for _ in range(6):
            for lane in (Lane.PEER_OUT, Lane.SWAP_OUT):
                departures.hold(device, lane, torch.empty(100, dtype=torch.uint8, device=device.torch_device))
            departures.turn(device)
        # Beside those of the present microbatch: of the last one, and of more if they go to other devices.
        assert device.allocated_bytes() == 100 * (num_held + 1)
        departures.let_go()
        assert departures.is_empty
        assert device.allocated_bytes() == 0


class _Microbatch:
    def __init__(self, name, log):
        self.name, self.log, self.luggage_nbytes = name, log, 10

    def send_ahead(self):
        self.log.append(f"{self.name} sent")


@pytest.mark.parametrize(
    ("num_ahead", "limit_nbytes", "expected"),
    [
        (0, 0, "a sent, a, b sent, b, c sent, c, d sent, d"),
        (1, 0, "a sent, b sent, a, c sent, b, d sent, c, d"),
        (1, 30, "a sent, b sent, c sent, a, d sent, b, c, d"),
        (1, 1000, "a sent, b sent, c sent, d sent, a, b, c, d"),
    ],
)
def test_what_follows_sets_out_as_far_as_there_is_memory(num_ahead, limit_nbytes, expected):
    log = []
    for (microbatch,) in sending_ahead([[_Microbatch(name, log)] for name in "abcd"], num_ahead, limit_nbytes):
        log.append(microbatch.name)
    assert ", ".join(log) == expected


@pytest.mark.parametrize(("limit_nbytes", "is_set_aside"), [(2**20, True), (2**10, False)])
def test_what_arrives_for_the_next_pack_does_not_wait_for_the_pack_before(limit_nbytes, is_set_aside):
    cluster = EmulatedCluster(2, "1GiB", preset="3090", fake=True, check_races=False)
    source, target = cluster.devices
    departures, landings = Departures(cluster.devices), Landings(cluster.devices, limit_nbytes)
    with cluster.activate():
        tensor = torch.empty(2**16, device=source.torch_device)
        square = torch.empty(4096, 4096, device=target.torch_device)
        send(tensor, source, target, departures, None, landings).take()  # shows what arrives
        for _ in range(2):
            landings.turn(target)
        assert target.allocated_bytes() == square.nbytes + is_set_aside * tensor.nbytes
        with target.lane(Lane.COMPUTE, "microbatch"):
            square @ square
        arrival = send(tensor, source, target, departures, None, landings)
        landings.turn(target)
        assert target.allocated_bytes() == square.nbytes + (1 + is_set_aside) * tensor.nbytes
        landings.let_go()
        assert target.allocated_bytes() == square.nbytes + tensor.nbytes
        del arrival
        departures.let_go()
        (compute,) = (span for span in cluster.activities() if span.name == "microbatch")
        copy = max((span for span in cluster.activities() if span.lane == "peer-out"), key=lambda span: span.start)
    assert (copy.end < compute.end) == is_set_aside


def test_nothing_is_set_aside_for_what_is_unlike_the_last():
    cluster = EmulatedCluster(2, "1MiB")
    source, target = cluster.devices
    landings = Landings(cluster.devices, 2**20)
    with cluster.activate():
        rows = torch.arange(6.0).to(source.torch_device).view(2, 3)
        landings.take(rows, target)
        landings.turn(target)
        memory, _ = landings.take(rows.t(), target)
        assert (memory.shape, memory.stride()) == (rows.t().shape, rows.t().stride())


def test_a_host_without_memory_to_pin_is_not_taken_for_a_device_without_memory(monkeypatch):
    """No room that a device made would help."""

    def pinned(*args, **kwargs):
        assert kwargs["pin_memory"]
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty_like", pinned)
    device = SimpleNamespace(torch_device=torch.device("cuda", 0))
    with pytest.raises(MemoryError, match="the host has no 4 KiB that can be pinned: CUDA error"):
        told_by_type(bring_in, torch.zeros(1024), device)
