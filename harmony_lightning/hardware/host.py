"""Training without any GPU: the host is the one device and nothing is ever swapped."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from harmony_lightning.hardware.device import Device, Event, Lane, Mark, Reached


class HostDevice:
    """The host's memory and cores. Lanes are synchronous; memory is not counted: the host's allocator is not ours."""

    def __init__(self) -> None:
        self.index = 0
        self.torch_device = torch.device("cpu")
        self.memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def name(self) -> str:
        return "host"

    def lane(self, lane: Lane, what: str = "") -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, lane: Lane) -> Event:
        return Reached()

    def wait(self, lane: Lane, event: Event) -> None:
        pass

    def allocated_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 0

    def reset_peak(self) -> None:
        pass

    def take_peak(self) -> int:
        return 0

    def random_state(self) -> torch.Tensor | None:
        return None

    def set_random_state(self, state: torch.Tensor) -> None:
        pass

    def seed_random(self, seed: int) -> None:
        pass

    def __repr__(self) -> str:
        return "HostDevice()"


class HostCluster:
    """A cluster of the host alone."""

    def __init__(self) -> None:
        self._devices = (HostDevice(),)

    @property
    def devices(self) -> Sequence[Device]:
        return self._devices

    @property
    def host_is_device(self) -> bool:
        return True

    def activate(self, *, continues: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self) -> Mark:
        return Reached()

    def begin_job(self, priority: int) -> None: ...

    def result(self, tensor: torch.Tensor, root: torch.device) -> torch.Tensor:
        return tensor.to(root)

    def close(self) -> None: ...

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def trim_device_memory(self) -> None: ...

    def trim_host_memory(self) -> None: ...

    def __repr__(self) -> str:
        return "HostCluster()"
