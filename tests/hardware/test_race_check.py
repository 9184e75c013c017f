"""What the race check refuses, and what it lets pass."""

import gc

import pytest
import torch

from harmony_lightning import EmulatedCluster, RaceError
from harmony_lightning.hardware.device import Lane


@pytest.fixture
def cluster():
    return EmulatedCluster(2, "1MiB")


def copy_in(device, host, target):
    with device.lane(Lane.SWAP_IN, "weights of pack 3"):
        target.copy_(host, non_blocking=True)


def test_compute_must_wait_for_a_swap_in_and_the_message_names_both(cluster):
    gpu = cluster.devices[0]
    with cluster.activate(continues=True):
        target = torch.zeros(8, device="cpu:0")
        gpu.wait(Lane.SWAP_IN, gpu.record(Lane.COMPUTE))
        copy_in(gpu, torch.ones(8), target)
        told = (
            r"gpu0 compute: mul.* reads memory that gpu0 swap-in: copy_ \(weights of pack 3\) on \(8,\) float32 wrote"
        )
        with pytest.raises(RaceError, match=told):
            target * 2


def test_waiting_makes_it_right(cluster):
    gpu = cluster.devices[0]
    with cluster.activate():
        target = torch.zeros(8, device="cpu:0")
        gpu.wait(Lane.SWAP_IN, gpu.record(Lane.COMPUTE))
        copy_in(gpu, torch.ones(8), target)
        gpu.wait(Lane.COMPUTE, gpu.record(Lane.SWAP_IN))
        assert (target * 2).sum().item() == 16


def test_an_event_recorded_before_the_copy_is_not_enough(cluster):
    gpu = cluster.devices[0]
    with cluster.activate(continues=True):
        target = torch.zeros(8, device="cpu:0")
        gpu.wait(Lane.SWAP_IN, gpu.record(Lane.COMPUTE))
        early = gpu.record(Lane.SWAP_IN)
        copy_in(gpu, torch.ones(8), target)
        gpu.wait(Lane.COMPUTE, early)
        with pytest.raises(RaceError):
            target * 2


def test_the_host_must_wait_before_it_reads_or_writes(cluster):
    gpu = cluster.devices[0]
    for use in (lambda host: host + 1, lambda host: host.zero_()):
        with cluster.activate():
            source, host = torch.ones(8, device="cpu:0"), torch.empty(8)
            gpu.wait(Lane.SWAP_OUT, gpu.record(Lane.COMPUTE))
            with gpu.lane(Lane.SWAP_OUT):
                host.copy_(source, non_blocking=True)
            with pytest.raises(RaceError, match=r"host: .* gpu0 swap-out: copy_"):
                use(host)
            gpu.record(Lane.SWAP_OUT).synchronize()
            use(host)
            gpu.wait(Lane.COMPUTE, gpu.record(Lane.SWAP_OUT))


def test_reads_side_by_side_and_separate_parts_are_no_races(cluster):
    gpu = cluster.devices[0]
    with cluster.activate():
        arena, host = torch.zeros(16, device="cpu:0"), torch.empty(8)
        gpu.wait(Lane.SWAP_OUT, gpu.record(Lane.COMPUTE))
        with gpu.lane(Lane.SWAP_OUT):
            host.copy_(arena[:8], non_blocking=True)
        arena[:8].sum()  # reads what is being read
        arena[8:].add_(1)  # writes another part
        gpu.record(Lane.SWAP_OUT).synchronize()


def test_memory_that_another_lane_uses_must_not_be_freed(cluster):
    gpu = cluster.devices[0]
    with cluster.activate(continues=True):
        source, host = torch.ones(8, device="cpu:0"), torch.empty(8)
        gpu.wait(Lane.SWAP_OUT, gpu.record(Lane.COMPUTE))
        with gpu.lane(Lane.SWAP_OUT):
            host.copy_(source, non_blocking=True)
        del source
        gc.collect()
        with pytest.raises(RaceError, match=r"is freed while gpu0 swap-out"):
            torch.zeros(1, device="cpu:0") + 1


def test_memory_new_to_compute_is_not_yet_free_for_others(cluster):
    gpu = cluster.devices[0]
    with cluster.activate(continues=True):
        target = torch.empty(8, device="cpu:0")
        with pytest.raises(RaceError, match="allocation"):
            copy_in(gpu, torch.ones(8), target)


def test_leaving_with_copies_in_flight_is_refused(cluster):
    gpu = cluster.devices[0]
    host = torch.ones(8)

    def swap_in():
        with cluster.activate():
            target = torch.zeros(8, device="cpu:0")
            gpu.wait(Lane.SWAP_IN, gpu.record(Lane.COMPUTE))
            copy_in(gpu, host, target)
            gpu.wait(Lane.COMPUTE, gpu.record(Lane.SWAP_IN))

    with pytest.raises(RaceError, match="goes on to code"):
        swap_in()


def test_peer_copies_order_both_devices(cluster):
    with cluster.activate():
        x = torch.ones(8, device="cpu:0") * 3
        y = x.to("cpu:1") + 1
        x.zero_()
        assert y.sum().item() == 32


def test_after_a_fault_the_cluster_can_be_used_again(cluster):
    gpu = cluster.devices[0]
    with cluster.activate(continues=True):
        target = torch.empty(8, device="cpu:0")
        with pytest.raises(RaceError):
            copy_in(gpu, torch.ones(8), target)
    with cluster.activate():
        assert (target + 1).sum().item() == 16


def test_the_check_can_be_switched_off():
    cluster = EmulatedCluster(1, "1MiB", check_races=False)
    with cluster.activate():
        target = torch.empty(8, device="cpu:0")
        copy_in(cluster.devices[0], torch.ones(8), target)
        assert (target * 2).sum().item() == 16
