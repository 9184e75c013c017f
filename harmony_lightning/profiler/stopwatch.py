"""How long a device's kernels take: by CUDA events, or by the virtual clock of an emulated device."""

from typing import Any, Protocol

import torch

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.device import Cluster, Device, Lane
from harmony_lightning.hardware.emulated import EmulatedCluster


class Stopwatch(Protocol):
    """Takes the time between marks on one device's compute lane."""

    num_runs: int
    """How often something should run, the first of several not counting, before its times can be trusted."""

    def mark(self) -> Any:
        """The point behind everything enqueued so far."""

    def seconds(self, since: Any, until: Any) -> float:
        """Between two marks."""


class VirtualStopwatch:
    """Of an emulated device: what its kernels would take, to the bit the same each time."""

    num_runs = 1

    def __init__(self, cluster: EmulatedCluster, device: Device) -> None:
        clock = cluster.machine.clock
        if clock is None:
            raise ConfigurationError("nothing is timed: EmulatedCluster(preset=...) says how fast the GPUs are")
        self._clock = clock
        self._agent = cluster.machine.agents.lanes[device.index][Lane.COMPUTE]

    def mark(self) -> float:
        return self._clock.busy_seconds(self._agent)

    def seconds(self, since: float, until: float) -> float:
        return round(until - since, 12)  # picoseconds: equal kernels shall take equal times wherever they come


class CudaStopwatch:
    """Of a GPU. Kernels are enqueued ahead, so what is measured is the device's time, not Python's."""

    num_runs = 4

    def __init__(self, device: Device) -> None:
        self._device = device.torch_device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, since: Any, until: Any) -> float:
        until.synchronize()
        return float(since.elapsed_time(until)) / 1000


def stopwatch_of(cluster: Cluster, device: Device) -> Stopwatch:
    """Raises ConfigurationError for devices whose time nobody takes."""
    if isinstance(cluster, EmulatedCluster):
        return VirtualStopwatch(cluster, device)
    if device.torch_device.type == "cuda":
        return CudaStopwatch(device)
    raise ConfigurationError(f"{device.name} cannot be profiled: profiles are of GPUs, real or emulated")
