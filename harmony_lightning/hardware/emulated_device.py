"""An emulated GPU: a memory limit, exact byte counters, and lanes whose order the machine watches.

A storage is charged when the first tensor that looks into it is made and given back when the last one dies. Left out:
the temporaries inside one operation, the allocator's rounding and fragmentation.
"""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from harmony_lightning.errors import DeviceOutOfMemoryError
from harmony_lightning.hardware.device import Event, Lane
from harmony_lightning.hardware.emulated_machine import Machine
from harmony_lightning.hardware.race_check import Memory
from harmony_lightning.units import format_nbytes


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Bytes that crossed a device's links since it was made, implicit copies of scalars and indices included."""

    host_to_device_bytes: int = 0
    device_to_host_bytes: int = 0
    peer_bytes: int = 0
    """Received from other devices; the sender does not count them again."""


class Allocation:
    """One storage on one device. Alive while any tensor looks into the storage; gives the bytes back when it dies."""

    __slots__ = ("__weakref__", "device", "memory", "nbytes", "storage")

    def __init__(self, device: "EmulatedDevice", storage: torch.UntypedStorage, nbytes: int) -> None:
        self.device = device
        self.storage = storage  # Held so that its address, the key in the device's table, is not reused too early.
        self.nbytes = nbytes
        self.memory = device.watch(storage)

    def __del__(self) -> None:
        self.device._release(self)


class EmulatedDevice:
    """A GPU in name, memory and traffic. What is enqueued is computed at once; its order is the machine's matter."""

    def __init__(self, index: int, memory_bytes: int, machine: Machine) -> None:
        self.index = index
        self.torch_device = torch.device("cpu", index)
        self.memory_bytes = memory_bytes
        self.machine = machine
        self.traffic = Traffic()
        self.cluster_devices: Sequence[EmulatedDevice] = (self,)
        """What `cpu:i` means to tensors that live here."""
        self._allocated = 0
        self._peak = 0
        self._recent_peak = 0
        self._allocations: dict[int, weakref.ref[Allocation]] = {}

    @property
    def name(self) -> str:
        return f"gpu{self.index}"

    def lane(self, lane: Lane, what: str = "") -> AbstractContextManager[None]:
        return self.machine.lane(self.index, lane, what)

    def record(self, lane: Lane) -> Event:
        return self.machine.record(self.index, lane)

    def wait(self, lane: Lane, event: Event) -> None:
        self.machine.wait(self.index, lane, event)

    def allocated_bytes(self) -> int:
        return self._allocated

    def peak_bytes(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        self._peak = self._allocated

    def take_peak(self) -> int:
        taken, self._recent_peak = self._recent_peak, self._allocated
        return taken

    def random_state(self) -> torch.Tensor | None:
        return None

    def set_random_state(self, state: torch.Tensor) -> None:
        pass

    def seed_random(self, seed: int) -> None:
        pass

    def __repr__(self) -> str:
        return f"EmulatedDevice({self.name}, {format_nbytes(self._allocated)} of {format_nbytes(self.memory_bytes)})"

    def hold(self, storage: torch.UntypedStorage) -> Allocation:
        """The storage's allocation, made and charged if the storage is new here.

        Raises:
            DeviceOutOfMemoryError: the storage does not fit; nothing is charged.
        """
        found = self._allocations.get(storage._cdata)
        if found is not None and (allocation := found()) is not None:
            return allocation
        nbytes = storage.nbytes()
        self._charge(nbytes)
        allocation = Allocation(self, storage, nbytes)
        self._allocations[storage._cdata] = weakref.ref(allocation)
        return allocation

    def recharge(self, allocation: Allocation) -> None:
        """Follow a storage that an operation has resized."""
        nbytes = allocation.storage.nbytes()
        self._charge(nbytes - allocation.nbytes)
        allocation.nbytes = nbytes
        allocation.memory = self.watch(allocation.storage)

    def watch(self, storage: torch.UntypedStorage) -> Memory:
        """Memory that the calling thread's lane has just allocated."""
        agent, what = self.machine.agents.present(self.index)
        start = storage.data_ptr()
        return Memory(start, start + storage.nbytes(), agent, ("allocation", what))

    def _charge(self, nbytes: int) -> None:
        allocated = self._allocated + nbytes
        if allocated > self.memory_bytes and nbytes > 0:
            raise DeviceOutOfMemoryError(
                f"{self.name} (emulated CUDA) out of memory: tried to allocate {_exact(nbytes)} with "
                f"{_exact(self._allocated)} in use; the limit is {_exact(self.memory_bytes)}. Make the tensors smaller "
                f"or raise the cluster's memory"
            )
        self._allocated = allocated
        if allocated > self._peak:
            self._peak = allocated
        if allocated > self._recent_peak:
            self._recent_peak = allocated

    def _release(self, allocation: Allocation) -> None:
        del self._allocations[allocation.storage._cdata]
        self._allocated -= allocation.nbytes
        if self.machine.check is not None:
            self.machine.check.free(allocation.memory)


def _exact(nbytes: int) -> str:
    return f"{format_nbytes(nbytes)} ({nbytes} bytes)"
