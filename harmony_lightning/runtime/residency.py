"""Which pack's weights are on which device: slots, swap-in, release.

Each device has a fixed number of slots, allocated once: one for each resident pack, and equal ones that the others share.
Swap-in copies a pack's arena into a slot on the SWAP_IN lane; compute waits for that copy, and the next copy into the slot
waits for the compute that used it. Weights are never copied back: the host's are the masters, and only gradients leave
(`gradients`). What a released slot holds stays good until the masters are written or another pack takes the slot.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from harmony_lightning.hardware.device import Device, Event, Lane
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.arena import (
    Region,
)
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.masters import WeightStore
from harmony_lightning.runtime.worker import HostWorker, Ticket


class Weights(dict[str, torch.Tensor]):
    """Device-resident weights by name: leaves over slot memory, valid until the slot is released."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._edges: dict[str, tuple[torch.Tensor, GradientEdge]] = {}

    def edge(self, name: str) -> GradientEdge:
        """Where gradients of a weight that requires one end. Torch makes a view of the leaf to find out."""
        weight, (of, edge) = self[name], self._edges.get(name, (None, None))
        if of is not weight or edge is None:
            edge = get_gradient_edge(weight)
            self._edges[name] = (weight, edge)
        return edge


Newer = tuple[dict[str, torch.Tensor], Event]
"""Weights on a device that are newer than the masters, and the point behind what has made them."""


@dataclass(slots=True, eq=False)
class _Slot:
    bytes: torch.Tensor
    owner: int | None = None
    """The resident pack that it is for; None if packs share it."""
    pack: int | None = None
    """Whose weights are in it, or on their way."""
    is_free: bool = True
    """Whether nobody needs them now."""
    generation: int = -1
    """Of the masters that they are copies of."""
    versions: tuple[int, int] = (-1, -1)
    """Of those masters, and of the copy, behind the swap-in."""
    loading: Ticket | None = None
    """Of the job that enqueues the swap-in of the present content; None once compute waits for that."""
    ready: Event | None = None
    """Behind that swap-in."""
    released: Event | None = None
    """Behind the last compute on the former content, or on what the memory was before."""
    views: dict[int, Weights] = field(default_factory=dict)
    """Leaves of each pack that was ever here; the memory behind them is that of the present one."""


class DeviceWeights:
    """The weight slots of one device."""

    def __init__(
        self,
        device: Device,
        store: WeightStore,
        plan: Plan,
        counters: Counters,
        worker: HostWorker,
        await_updates: Callable[[Iterable[str]], None],
        all_reads: Callable[[Iterable[str]], Iterable[Event]],
    ) -> None:
        """`worker` enqueues swap-ins, in their order, each behind the updates of the weights: `await_updates`. `all_reads`
        tells the points behind the last swap-ins of weights to any device."""
        self._all_reads = all_reads
        self._worker = worker
        self._await_updates = await_updates
        self._device = device
        self._store = store
        self._plan = plan
        self._counters = counters
        self._loads: dict[int, Ticket] = {}
        """By pack: the last job that has enqueued its swap-in."""
        self._reads: dict[int, Event] = {}
        """By pack: behind the last swap-in."""
        self._slots: list[_Slot] = []
        """Least recently used first."""
        self._last: _Slot | None = None
        self.find_newer: Callable[[int], Newer | None] = lambda pack: None
        """Tells of a pack whose newest weights are on this device (`update_slots`)."""

    def acquire(self, pack: int, names: Iterable[str] = ()) -> Weights:
        """Weights of `pack`, brought in if they are not there; compute enqueued from now on may use them. Only `names` will
        be asked for, which makes no difference here."""
        if self._last is not None and self._last.pack == pack and not self._last.is_free:
            return self._last.views[pack]
        slot = self._last = self._load(pack)
        self._finish_loading(slot)
        self._slots.remove(slot)
        self._slots.append(slot)
        return slot.views[pack]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in slot memory, and so will be overwritten."""
        key = storage_key(tensor)
        return any(storage_key(slot.bytes) == key for slot in self._slots)

    def last_read(self, pack: int) -> Event | None:
        """The point behind the last swap-in of `pack`."""
        if pack in self._loads:
            self._loads[pack].wait()
        return self._reads.get(pack)

    def prefetch(self, pack: int) -> None:
        """Start to bring `pack` in if a slot is free."""
        self._allocate()
        if self._find(pack) is not None or self._vacant(pack) is not None:
            self._load(pack)

    def _finish_loading(self, slot: _Slot) -> None:
        """Let compute wait for the present content."""
        if slot.loading is not None:
            slot.loading.wait()
            self._worker.raise_error()
            slot.loading = None
            assert slot.ready is not None
            self._device.wait(Lane.COMPUTE, slot.ready)

    def release(self, pack: int) -> None:
        """The pack is not needed here for now."""
        for slot in self._slots:
            if slot.pack == pack and not slot.is_free:
                slot.is_free = True
                slot.released = self._device.record(Lane.COMPUTE)

    def release_all(self) -> None:
        """No pack is needed here for now."""
        for slot in self._slots:
            if slot.pack is not None:
                self.release(slot.pack)
        for slot in [slot for slot in self._slots if slot.owner not in (None, *self._plan.resident)]:
            self._finish_loading(slot)
            self._slots.remove(slot)

    def find_slice(self, tensor: torch.Tensor) -> tuple[int, Region] | None:
        """The pack, and where in its slot the tensor lies, if it does."""
        key = storage_key(tensor)
        slot = next((slot for slot in self._slots if storage_key(slot.bytes) == key), None)
        if slot is None or slot.pack is None:
            return None
        size = tensor.element_size()
        last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = int(tensor.storage_offset()) * size
        stop = start + (last + 1) * size if tensor.numel() else start
        return slot.pack, Region(start, stop, tensor.dtype, tensor.shape, tensor.stride())

    def restore(self, pack: int, region: Region) -> torch.Tensor:
        """What `find_slice` has found, where it is now."""
        self.acquire(pack)
        assert self._last is not None
        return region.view(self._last.bytes)

    @property
    def slots_nbytes(self) -> int:
        """Bytes that the slots take now."""
        return sum(slot.bytes.numel() for slot in self._slots)

    def allocate(self) -> None:
        """Make the slots now, not when they are first needed."""
        self._allocate()

    def let_go_idle(self) -> bool:
        """Free the slots of resident packs that nobody uses yet, or any more; these will share the others. Returns whether
        there were any."""
        idle = [slot for slot in self._slots if slot.owner is not None and (slot.is_free or slot.loading is not None)]
        for slot in idle:
            self._finish_loading(slot)
            self._slots.remove(slot)
        return bool(idle)

    def change_slots(self, plan: Plan) -> None:
        """Let all slots go; those that come next are of another plan for the same packs."""
        for slot in self._slots:
            self._finish_loading(slot)
        self._slots.clear()
        self._last = None
        self._plan = plan

    def _find(self, pack: int) -> _Slot | None:
        """The slot with good weights of `pack`."""
        for slot in self._slots:
            if slot.pack == pack and slot.generation == self._store.generations[pack]:
                if slot.loading is not None:
                    if not slot.is_free:
                        return slot
                    slot.loading.wait()  # it was not used the last time
                is_good = slot.versions == (self._store.versions(pack), slot.bytes._version)
                return slot if is_good and not self._store.arenas[pack].is_out_of_date() else None
        return None

    def _vacant(self, pack: int) -> _Slot | None:
        """A slot that the pack may have without taking it from one that is needed."""
        owned = [slot for slot in self._slots if slot.owner == pack]
        shared = [slot for slot in self._slots if self._is_shared(slot, pack)]
        free = [slot for slot in owned or shared if slot.is_free]
        # What is no good any more goes first.
        return min(free, key=lambda slot: slot.pack is not None and self._find(slot.pack) is slot, default=None)

    def _is_shared(self, slot: _Slot, pack: int) -> bool:
        """Whether packs share the slot, and this one has room in it."""
        return slot.owner is None and slot.bytes.numel() >= self._plan.packs[pack].slot_nbytes

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load(self, pack: int) -> _Slot:
        if (found := self._find(pack)) is not None:
            found.is_free = False
            return found
        self._allocate()
        slot = self._vacant(pack)
        if slot is None:  # user code asked for a pack out of turn
            taken = [s for s in self._slots if s.owner == pack] or [s for s in self._slots if self._is_shared(s, pack)]
            slot = taken[0] if taken else self._add_slot(self._plan.packs[pack].slot_nbytes, pack)
            slot.released = self._device.record(Lane.COMPUTE)
        released, slot.released = slot.released, None
        if slot is self._last:
            self._last = None
        slot.pack, slot.is_free, slot.generation = pack, False, self._store.generations[pack]
        layout = self._store.layouts[pack]
        if self._store.arenas[pack].is_out_of_date():
            self._await_updates(layout)
            for read in self._all_reads(layout):
                read.synchronize()
            self._store.move_in(pack)
            self._store.narrow.forget()
        self._store.is_copied = True
        if pack not in slot.views:
            slot.views[pack] = Weights((name, region.view(slot.bytes).detach()) for name, region in layout.items())
        newer, made = self.find_newer(pack) or ({}, None)
        self._counters.swap_in_bytes += self._plan.packs[pack].nbytes - sum(weight.nbytes for weight in newer.values())
        cast = self._store.narrow.prepare(pack, self._worker, self._await_updates)
        after = [event for event in (released, made) if event is not None]
        slot.loading = self._loads[pack] = self._worker.submit(lambda: self._swap_in(slot, pack, after, newer, cast))
        return slot

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap_in(
        self, slot: _Slot, pack: int, after: Iterable[Event], newer: Mapping[str, torch.Tensor], cast: Ticket | None
    ) -> None:
        """On the worker."""
        arena, layout = self._store.arenas[pack], self._store.layouts[pack]
        narrow, wide_nbytes = self._store.narrow.arenas[pack], self._store.wide_nbytes[pack]
        self._await_updates(layout)
        if cast is not None:
            cast.wait()
        for event in after:
            self._device.wait(Lane.SWAP_IN, event)
        with self._device.lane(Lane.SWAP_IN, f"weights of pack {pack}"):
            if wide_nbytes and not newer:
                slot.bytes[:wide_nbytes].copy_(arena.bytes[:wide_nbytes], non_blocking=True)
            if narrow.numel():
                slot.bytes[wide_nbytes : wide_nbytes + narrow.numel()].copy_(narrow, non_blocking=True)
            for name in arena.layout if newer else ():  # none of them narrow
                source = newer.get(name, self._store.parameters[name])
                layout[name].view(slot.bytes).copy_(source, non_blocking=True)
            for name in self._store.borrowed[pack]:
                layout[name].view(slot.bytes).copy_(self._store.parameters[name], non_blocking=True)
        slot.versions = self._store.versions(pack), slot.bytes._version
        slot.ready = self._reads[pack] = self._device.record(Lane.SWAP_IN)

    def _allocate(self) -> None:
        if self._slots:
            return
        plan, device = self._plan, self._device.index
        for _ in range(plan.num_shared_slots(device)):
            self._add_slot(plan.shared_slot_nbytes(device))
        for pack in plan.packs_on(device):
            if pack in plan.resident:
                self._add_slot(plan.packs[pack].slot_nbytes, pack)

    @torch.inference_mode(False)
    def _add_slot(self, nbytes: int, owner: int | None = None) -> _Slot:
        slot_bytes = torch.empty(max(1, nbytes), dtype=torch.uint8, device=self._device.torch_device)
        # The allocator may hand out memory that compute has freed and still uses.
        slot = _Slot(slot_bytes, owner, released=self._device.record(Lane.COMPUTE))
        self._slots.append(slot)
        return slot


class HostWeights:
    """The same face where the host is the only device: the masters serve directly."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan) -> None:
        self._parameters = parameters
        self._views = [Weights() for _ in plan.packs]

    def acquire(self, pack: int, names: Iterable[str]) -> Weights:
        weights = self._views[pack]
        for name in names:
            parameter = self._parameters[name]
            if name not in weights or weights[name].data_ptr() != parameter.data_ptr():
                with torch.inference_mode(False), torch.no_grad():
                    weights[name] = parameter.detach()
        return weights

    def holds(self, tensor: torch.Tensor) -> bool:
        return False  # the user's own memory, which stays

    def last_read(self, pack: int) -> None: ...

    def prefetch(self, pack: int) -> None: ...

    def release(self, pack: int) -> None: ...

    def release_all(self) -> None: ...

    def find_slice(self, tensor: torch.Tensor) -> None: ...

    slots_nbytes = 0

    def allocate(self) -> None: ...

    def let_go_idle(self) -> bool:
        return False

    def change_slots(self, plan: Plan) -> None: ...
