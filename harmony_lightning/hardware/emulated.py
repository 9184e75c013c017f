"""A server of emulated GPUs: devices `cpu:0 .. cpu:N-1` with real numbers, a memory limit and exact byte counters.

Most machines have no GPU and few have several, yet what matters here (who holds what where, and what crosses the links)
is arithmetic over tensors, not silicon.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware import emulated_copies  # noqa: F401  (registers the operations)
from harmony_lightning.hardware.device import Lane, Mark
from harmony_lightning.hardware.emulated_device import EmulatedDevice, Traffic
from harmony_lightning.hardware.emulated_machine import Machine
from harmony_lightning.hardware.emulated_mode import EmulatedMode, literals_on_devices
from harmony_lightning.hardware.emulated_tensor import EmulatedTensor, storage_key
from harmony_lightning.hardware.presets import DEFAULT_HOST, GpuModel, HostModel, gpu_model, host_model
from harmony_lightning.hardware.shapes import addresses
from harmony_lightning.hardware.virtual_clock import Activity, VirtualClock
from harmony_lightning.units import parse_nbytes

__all__ = ["EmulatedCluster", "EmulatedDevice", "EmulatedMode", "EmulatedTensor", "Traffic", "storage_key"]


@dataclass(frozen=True, eq=False, repr=False)
class EmulatedCluster:
    """Emulated GPUs `cpu:0 .. cpu:num_gpus-1`, each with `memory` ("64MiB", or bytes; the default without a preset).

    With `check_races`, memory that is used without being waited for raises `RaceError`. With a `preset` ("3090", see
    `hardware.presets`, or a model of your own) the run is timed as on these GPUs in that `host`: `activities`. With `fake`,
    large tensors have shapes and no numbers, and take no memory: models of any size can be timed anywhere. Build them on
    the meta device and call `to_empty(device="cpu")`. With `strict` False, host tensors may be used on a device, where
    CUDA would refuse, and are copied: for modules that only ever ran on the host.

    Raises:
        ConfigurationError: no GPU, or a memory that is not a size.
    """

    num_gpus: int = 1
    memory: str | int | None = None
    preset: str | GpuModel | None = None
    host: str | HostModel | None = None
    check_races: bool = True
    fake: bool = False
    strict: bool = True
    devices: tuple[EmulatedDevice, ...] = field(init=False)
    machine: Machine = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.num_gpus, int) or isinstance(self.num_gpus, bool) or self.num_gpus < 1:
            raise ConfigurationError(f"num_gpus must be a whole number of at least 1, got {self.num_gpus!r}")
        gpu = gpu_model(self.preset) if self.preset is not None else None
        if gpu is None and self.host is not None:
            raise ConfigurationError(f"host={self.host!r} says how fast the host is, but not the GPUs; give a preset")
        if self.memory is None:
            object.__setattr__(self, "memory", gpu.memory_bytes if gpu is not None else "64MiB")
        assert self.memory is not None
        memory_bytes = parse_nbytes(self.memory)
        machine = Machine(self.num_gpus, is_checked=self.check_races, is_fake=self.fake, is_strict=self.strict)
        if gpu is not None:
            machine.clock = VirtualClock(machine.agents, gpu, host_model(self.host or DEFAULT_HOST))
        devices = tuple(EmulatedDevice(index, memory_bytes, machine) for index in range(self.num_gpus))
        for device in devices:
            device.cluster_devices = devices
        object.__setattr__(self, "devices", devices)
        object.__setattr__(self, "machine", machine)

    @property
    def host_is_device(self) -> bool:
        return False

    @contextlib.contextmanager
    def activate(self, *, continues: bool = False) -> Iterator[None]:
        modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, EmulatedMode)]
        check = self.machine.check
        if modes and modes[-1].devices is self.devices:
            yield
        else:
            if check is not None:
                check.reset()
            with literals_on_devices(), EmulatedMode(self.devices):
                yield
        if check is not None and not continues:
            check.leave(self.machine.agents.thread())

    def mark(self) -> Mark:
        return self.machine.mark()

    def begin_job(self, priority: int) -> None:
        if self.machine.clock is not None:
            self.machine.clock.begin_job(self.machine.agents.thread(), priority)

    def result(self, tensor: torch.Tensor, root: torch.device) -> torch.Tensor:
        """The host stands for the root here, which on CUDA is the first GPU: a copy that nobody waits for."""
        if type(tensor) is not EmulatedTensor:
            return tensor.to(root)
        home = tensor.home
        home.wait(Lane.PEER_OUT, home.record(Lane.COMPUTE))
        with home.lane(Lane.PEER_OUT, "result"):
            arrived = tensor.to(root, non_blocking=True)
        home.machine.record(home.index, Lane.PEER_OUT).observe()
        return arrived

    def activities(self) -> tuple[Activity, ...]:
        """What every lane and host thread has done, and when: since the start, or since `machine.clock.clear()`.

        Raises:
            ConfigurationError: the cluster has no preset, so nothing is timed.
        """
        if self.machine.clock is None:
            raise ConfigurationError("nothing is timed: EmulatedCluster(preset=...) says how fast the GPUs are")
        return self.machine.clock.replay()

    def close(self) -> None: ...

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return addresses(nbytes) if self.fake else torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def trim_device_memory(self) -> None:
        """Memory goes back at once, and has no gaps."""

    def trim_host_memory(self) -> None:
        """Nothing here is pinned, and memory goes back at once."""

    def __repr__(self) -> str:
        preset = (
            f", preset={self.preset if isinstance(self.preset, str) else self.preset.name!r}" if self.preset else ""
        )
        return f"EmulatedCluster(num_gpus={self.num_gpus}, memory={self.memory!r}{preset})"

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        options = (self.num_gpus, self.memory, self.preset, self.host, self.check_races, self.fake, self.strict)
        return type(self), options
