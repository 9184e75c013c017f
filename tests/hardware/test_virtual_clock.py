"""The virtual clock: costs by formula, lanes that overlap or wait, links that are shared."""

import pytest
import torch

from harmony_lightning import ConfigurationError, EmulatedCluster
from harmony_lightning.hardware.device import Lane
from harmony_lightning.hardware.presets import GPUS, HOSTS, GpuModel, HostModel, gpu_model

MIB = 2**20
GPU = GpuModel(
    name="round",
    memory_bytes=64 * MIB,
    flops_per_second={"float32": 1e9, "bfloat16": 4e9},
    memory_bytes_per_second=1e9,
    link_bytes_per_second=float(MIB),
    launch_seconds=0.0,
)
HOST = HostModel(name="round", memory_bytes_per_second=1e12, update_parameters_per_second=1e6, flops_per_second=1e12)


def cluster_of(num_gpus=1, gpu=GPU, host=HOST):
    return EmulatedCluster(num_gpus, preset=gpu, host=host)


def copy_in(cluster, index, host):
    gpu = cluster.devices[index]
    target = torch.empty_like(host, device=gpu.torch_device)
    gpu.wait(Lane.SWAP_IN, gpu.record(Lane.COMPUTE))
    with gpu.lane(Lane.SWAP_IN, "weights"):
        target.copy_(host, non_blocking=True)
    gpu.wait(Lane.COMPUTE, gpu.record(Lane.SWAP_IN))
    return target


def spans(cluster, lane, device=0):
    return [(a.start, a.end) for a in cluster.activities() if (a.device, a.lane) == (device, lane)]


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1e9), (torch.bfloat16, 4e9)])
def test_a_product_costs_its_operations(dtype, rate):
    cluster = cluster_of()
    with cluster.activate():
        a = torch.empty(256, 128, device="cpu:0", dtype=dtype)
        b = torch.empty(128, 512, device="cpu:0", dtype=dtype)
        a @ b
    (activity,) = cluster.activities()
    assert activity.flops == 2 * 256 * 128 * 512
    assert (activity.start, activity.end) == (0.0, activity.flops / rate)


def test_other_kernels_cost_their_bytes_and_views_nothing():
    cluster = cluster_of()
    with cluster.activate():
        x = torch.empty(1000, device="cpu:0")
        x.view(10, 100).t()
        x + 1
    (activity,) = cluster.activities()
    assert (activity.nbytes, activity.end) == (8000, 8000 / 1e9)


def test_what_waits_for_a_copy_starts_behind_it_and_what_does_not_beside_it():
    cluster = cluster_of()
    host = torch.empty(MIB, dtype=torch.uint8)
    with cluster.activate(continues=True):
        x = torch.ones(1000, device="cpu:0")
        copied = copy_in(cluster, 0, host)
        copied.add_(1)
    ((start, end),) = spans(cluster, "swap-in")
    assert end - start == pytest.approx(1.0)
    kernels = spans(cluster, "compute")
    assert kernels[0][1] == start and kernels[1][0] == end
    assert x.shape == (1000,)


@pytest.mark.parametrize(("uplink", "seconds"), [(None, 1.0), (float(MIB), 2.0), (1.5 * MIB, 4 / 3)])
def test_gpus_share_an_uplink_fairly(uplink, seconds):
    host = HostModel(
        name="narrow",
        memory_bytes_per_second=1e12,
        update_parameters_per_second=1e6,
        flops_per_second=1e12,
        uplink_bytes_per_second=uplink,
    )
    cluster = cluster_of(2, host=host)
    with cluster.activate(continues=True):
        for index in range(2):
            copy_in(cluster, index, torch.empty(MIB, dtype=torch.uint8))
    for index in range(2):
        assert spans(cluster, "swap-in", index)[-1][1] == pytest.approx(seconds)


def test_a_fused_update_costs_its_parameters_on_the_host():
    cluster = cluster_of()
    weight = torch.nn.Parameter(torch.zeros(500_000))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    with cluster.activate():
        optimizer.step()
    update = next(a for a in cluster.activities() if a.name == "update")
    assert update.lane == "host" and update.end - update.start == pytest.approx(0.5, rel=0.01)


def test_presets_have_what_a_model_needs():
    assert set(GPUS) == {"1080ti", "3090", "4090", "5090", "a100-40", "h100", "h200"}
    for name, model in GPUS.items():
        assert model.flops("bfloat16") >= model.flops("float32") > model.flops("float64")
        assert gpu_model(name.upper()) is model
    assert all(host.memory_bytes_per_second > 1e10 for host in HOSTS.values())
    assert EmulatedCluster(2, preset="3090").devices[1].memory_bytes == 24 * 2**30
    with pytest.raises(ConfigurationError, match="no GPU is called"):
        EmulatedCluster(preset="9090")
    with pytest.raises(ConfigurationError, match="nothing is timed"):
        EmulatedCluster().activities()


def test_a_host_thread_takes_the_job_of_the_lowest_number_that_is_ready():
    """Whatever the order in which this process came to them."""
    cluster = cluster_of()
    jobs = {"waits": (0, 100_000), "second": (2, 300_000), "first": (1, 200_000)}
    with cluster.activate(continues=True):
        copy_in(cluster, 0, torch.empty(MIB, dtype=torch.uint8))  # which takes a second
        arrived = cluster.devices[0].record(Lane.SWAP_IN)
        for name, (priority, size) in jobs.items():
            weight = torch.nn.Parameter(torch.zeros(size))
            weight.grad = torch.ones_like(weight)
            optimizer = torch.optim.AdamW([weight], fused=True)
            cluster.begin_job(priority)
            if name == "waits":
                arrived.synchronize()
            optimizer.step()
    updates = [a for a in cluster.activities() if a.name == "update"]
    assert [a.end - a.start for a in updates] == pytest.approx([0.2, 0.3, 0.1], rel=0.05)
    assert updates[1].end < 1 < updates[2].start
