"""A server of emulated GPUs: devices `cpu:0 .. cpu:N-1` with real numbers, a memory limit and exact byte counters.

Most machines have no GPU and few have several, yet what matters here (who holds what where, and what crosses the links)
is arithmetic over tensors, not silicon.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware import emulated_copies  # noqa: F401  (registers the operations)
from harmony_lightning.hardware.device import Mark
from harmony_lightning.hardware.emulated_device import EmulatedDevice, Traffic
from harmony_lightning.hardware.emulated_machine import Machine
from harmony_lightning.hardware.emulated_mode import EmulatedMode, literals_on_devices
from harmony_lightning.hardware.emulated_tensor import EmulatedTensor, storage_key
from harmony_lightning.units import parse_nbytes

__all__ = ["EmulatedCluster", "EmulatedDevice", "EmulatedMode", "EmulatedTensor", "Traffic", "storage_key"]


@dataclass(frozen=True, eq=False)
class EmulatedCluster:
    """Emulated GPUs `cpu:0 .. cpu:num_gpus-1`, each with `memory` ("64MiB", or bytes).

    With `check_races`, memory that is used without being waited for raises `RaceError`.

    Raises:
        ConfigurationError: no GPU, or a memory that is not a size.
    """

    num_gpus: int = 1
    memory: str | int = "64MiB"
    check_races: bool = field(default=True, repr=False)
    devices: tuple[EmulatedDevice, ...] = field(init=False, repr=False)
    machine: Machine = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.num_gpus, int) or isinstance(self.num_gpus, bool) or self.num_gpus < 1:
            raise ConfigurationError(f"num_gpus must be a whole number of at least 1, got {self.num_gpus!r}")
        memory_bytes = parse_nbytes(self.memory)
        machine = Machine(self.num_gpus, is_checked=self.check_races)
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
        if modes and modes[-1].devices is self.devices:
            yield
            return
        check = self.machine.check
        if check is not None:
            check.reset()
        with literals_on_devices(), EmulatedMode(self.devices):
            yield
        if check is not None and not continues:
            check.leave(self.machine.agents.thread())

    def mark(self) -> Mark:
        return self.machine.mark()

    def close(self) -> None: ...

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def __reduce__(self) -> tuple[type[Self], tuple[int, str | int, bool]]:
        return type(self), (self.num_gpus, self.memory, self.check_races)
