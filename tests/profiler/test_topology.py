"""Machines: by the data sheets of presets, and as far as the host at hand can be measured."""

import pytest

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


def test_without_a_gpu_the_machine_must_be_named(monkeypatch):
    monkeypatch.setattr(topology.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="--gpus 4x3090"):
        topology.machine_at_hand()


@pytest.mark.gpu
def test_the_machine_at_hand():
    if not topology.torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    machine, _ = topology.machine_at_hand(is_fresh=True)
    assert machine.gpus == topology.torch.cuda.device_count()
    assert 1e9 < machine.host_share(1) < 1e12
