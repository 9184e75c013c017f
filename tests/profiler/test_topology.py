"""Machines: by the data sheets of presets, and as far as the host at hand can be measured."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from harmony_lightning import ConfigurationError
from harmony_lightning.hardware.presets import host_model
from harmony_lightning.profiler import Machine, topology
from harmony_lightning.profiler.machine import parse_gpus, preset_machine


def test_gpus_are_a_number_and_a_model():
    assert [(count, gpu.name) for count, gpu in map(parse_gpus, ("4x3090", "H100", "1x1080ti", "8xA100-40"))] == [
        (4, "3090"), (1, "h100"), (1, "1080ti"), (8, "a100-40"),
    ]  # fmt: skip
    for text in ("0x3090", "x3090", "fourx3090"):
        with pytest.raises(ConfigurationError, match="names no GPUs"):
            parse_gpus(text)
    with pytest.raises(ConfigurationError, match="no GPU is called '9090'"):
        parse_gpus("2x9090")


def test_a_desktop_shares_its_uplink_and_a_server_does_not():
    count, gpu = parse_gpus("4x1080ti")
    desktop, server = (preset_machine(count, gpu, host_model(name)) for name in ("desktop", "server"))
    assert desktop.host_share(4) == 25e9 / 4 and desktop.host_share(1) == 12.3e9  # its own link is the narrower one
    assert server.host_share(4) == server.host_share(1) == 12.3e9
    assert Machine.from_json(server.to_json()) == server


def test_the_host_can_be_measured(monkeypatch):
    monkeypatch.setattr(topology, "_COPIED_BYTES", 2**20)
    monkeypatch.setattr(topology, "_NUM_UPDATED", 2**14)
    assert topology.host_copy_bytes_per_second() > 1e7
    assert topology.host_update_parameters_per_second() > 1e5
    assert topology.host_memory_bytes() > 2**30


def test_a_copy_within_a_gpu_reads_and_writes(monkeypatch):
    """On a clock on which everything takes two seconds, with the host in the place of a GPU."""
    monkeypatch.setattr(topology, "_COPIED_BYTES", 2**10)
    now = itertools.count(0, 2)
    monkeypatch.setattr(topology.time, "perf_counter", lambda: next(now))
    waits = []
    rate = topology.gpu_memory_bytes_per_second(torch.device("cpu"), lambda: waits.append(0))
    assert rate == 2 * 8 * 2**10 / 2
    assert len(waits) == 2 * 4  # around each of the runs


def test_a_machine_file_without_the_memory_rate_has_that_of_the_data_sheet():
    machine = replace(preset_machine(*parse_gpus("2x3090"), host_model("server")), gpu="NVIDIA GeForce RTX 3090")
    older = replace(machine, gpu_memory_bytes_per_second=None)
    assert Machine.from_json(older.to_json()) == machine
    unknown = replace(older, gpu="NVIDIA GeForce RTX 3090 Ti")
    assert Machine.from_json(unknown.to_json()) == unknown


def test_without_a_gpu_the_machine_must_be_named(monkeypatch):
    monkeypatch.setattr(topology.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="--gpus 4x3090"):
        topology.machine_at_hand()


def test_gpus_of_others_are_not_touched(monkeypatch):
    touched = []

    def properties(device):
        touched.append(device)
        return SimpleNamespace(name="GPU", uuid=str(device.index))

    def measure(devices, progress):
        touched.extend(devices)
        return preset_machine(*parse_gpus(f"{len(devices)}x3090"), host_model("server"))

    monkeypatch.setattr(topology.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(topology.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(topology.torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(topology, "_measure", measure)
    monkeypatch.setenv("HARMONY_CACHE", "off")
    ours = [torch.device("cuda", index) for index in (3, 1)]
    machine, _ = topology.machine_at_hand(ours)
    assert machine.gpus == 2 and set(touched) == set(ours)
    assert topology.machine_at_hand()[0].gpus == 4


@pytest.mark.gpu
def test_the_machine_at_hand():
    if not topology.torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    machine, _ = topology.machine_at_hand(is_fresh=True)
    assert machine.gpus == topology.torch.cuda.device_count()
    assert 1e9 < machine.host_share(1) < 1e12
    assert machine.host_share(1) < machine.gpu_memory_bytes_per_second < 1e14
