"""Which pack's weights are on which device: slots, swap-in, release.

Each device has one slot for each pack. Those of resident packs have memory of their own; the others lie in one piece, at
offsets by which packs that are there at the same time do not overlap (`Plan.slot_offsets`). Swap-in copies a pack's arena
into its slot on the SWAP_IN lane; compute waits for that copy, and the copy waits for the compute that used what lies in
its place. Weights are never copied back: the host's are the masters, and only gradients leave (`gradients`). What a
released slot holds stays good until a pack comes whose slot overlaps with it, or the masters are written: of one that is
partly frozen what trains comes again then, and nothing else.

User code that asks for packs in another order than the plan's gets them at another place where there is room, or in the
place of packs that are in use, which have to come back then: `Counters.out_of_turn`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from harmony_lightning.hardware.device import Device, Event, Lane
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.weights.arena import Region
from harmony_lightning.runtime.weights.masters import Part, WeightStore
from harmony_lightning.runtime.weights.weight_slot import Weights, WeightSlot
from harmony_lightning.runtime.worker import HostWorker, Ticket

Newer = tuple[dict[str, torch.Tensor], Event]
"""Weights on a device that are newer than the masters, and the point behind what has made them."""


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
        self._slots: list[WeightSlot] = []
        self._shared: torch.Tensor | None = None
        """Memory for packs that are not resident."""
        self._is_allocated = False
        """Whether the plan's slots have been made; some may have gone since, and do not come again."""
        self._keys: dict[int, int] = {}
        """Bytes of each piece of memory that slots lie in, by what tells that a tensor does."""
        self._last: WeightSlot | None = None
        self.find_newer: Callable[[int], Newer | None] = lambda pack: None
        """Tells of a pack whose newest weights are on this device (`update_slots`)."""

    def acquire(self, pack: int, names: Iterable[str] = ()) -> Weights:
        """Weights of `pack`, brought in if they are not there; compute enqueued from now on may use them. Only `names` will
        be asked for, which makes no difference here."""
        if self._last is not None and self._last.pack == pack and not self._last.is_free:
            return self._last.weights
        slot = self._last = self._load(pack)
        self._finish_loading(slot)
        return slot.weights

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in slot memory, and so will be overwritten."""
        return storage_key(tensor) in self._keys

    def last_read(self, pack: int) -> Event | None:
        """The point behind the last swap-in of `pack`."""
        if pack in self._loads:
            self._loads[pack].wait()
        return self._reads.get(pack)

    def prefetch(self, pack: int) -> None:
        """Start to bring `pack` in if there is room."""
        self._allocate()
        if self._find(pack)[0] is not None or self._vacant(pack) is not None:
            self._load(pack)

    def _finish_loading(self, slot: WeightSlot) -> None:
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
            if slot.pack == pack:
                self._release(slot)

    def _release(self, slot: WeightSlot) -> None:
        if not slot.is_free:
            slot.is_free, slot.released = True, self._device.record(Lane.COMPUTE)

    def release_all(self) -> None:
        """No pack is needed here for now."""
        for slot in self._slots:
            self._release(slot)
        for slot in [s for s in self._slots if s.memory is not self._shared and s.pack not in self._plan.resident]:
            self._remove(slot)

    def _remove(self, slot: WeightSlot) -> None:
        """Free the slot, which has memory of its own."""
        self._finish_loading(slot)
        self._slots.remove(slot)
        del self._keys[storage_key(slot.memory)]

    def find_slice(self, tensor: torch.Tensor) -> tuple[int, Region] | None:
        """The pack, and where in its slot the tensor lies, if it does."""
        if not self.holds(tensor):
            return None
        key, size = storage_key(tensor), tensor.element_size()
        start = int(tensor.storage_offset()) * size
        last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        stop = start + (last + 1) * size if tensor.numel() else start
        for slot in self._slots:
            is_there = slot.generations and storage_key(slot.memory) == key
            if is_there and slot.start <= start and stop <= slot.stop:
                region = Region(start - slot.start, stop - slot.start, tensor.dtype, tensor.shape, tensor.stride())
                return slot.pack, region
        return None

    def restore(self, pack: int, region: Region) -> torch.Tensor:
        """What `find_slice` has found, where it is now."""
        self.acquire(pack)
        assert self._last is not None
        return region.view(self._last.bytes)

    @property
    def slots_nbytes(self) -> int:
        """Bytes that the slots take now."""
        return sum(self._keys.values())

    def allocate(self) -> None:
        """Make the slots now, not when they are first needed."""
        self._allocate()

    def let_go_idle(self) -> bool:
        """Free the slots of resident packs that nobody uses yet, or any more; these will share the others. Returns whether
        there were any."""
        own = [slot for slot in self._slots if slot.memory is not self._shared]
        idle = [slot for slot in own if slot.is_free or slot.loading is not None]
        for slot in idle:
            self._remove(slot)
        return bool(idle)

    def change_slots(self, plan: Plan) -> None:
        """Let all slots go; those that come next are of another plan for the same packs."""
        for slot in self._slots:
            self._finish_loading(slot)
        self._slots.clear()
        self._keys.clear()
        self._last = self._shared = None
        self._is_allocated = False
        self._plan = plan

    def _find(self, pack: int) -> tuple[WeightSlot | None, Sequence[Part]]:
        """The slot with good weights of `pack`, if there is one, and the parts of the pack that have to come."""
        parts = self._store.parts[pack]
        if not self._store.arenas[pack].is_out_of_date():
            for slot in self._slots:
                if slot.pack == pack and slot.generations:
                    stale = self._stale(slot)
                    if len(stale) < len(parts):
                        return slot, stale
        return None, parts

    def _stale(self, slot: WeightSlot) -> Sequence[Part]:
        """Parts of which the slot has no good copies."""
        store, parts = self._store, self._store.parts[slot.pack]
        written = [part for part in parts if slot.generations.get(part) != store.generation(part)]
        if len(written) == len(parts):
            return parts
        if slot.loading is not None:
            if not (slot.is_free or written):
                return ()
            slot.loading.wait()  # it was not used the last time, or something has been written since
        if slot.version != slot.bytes._version:
            return parts
        return [part for part in parts if part in written or slot.versions.get(part) != store.version(part)]

    def _vacant(self, pack: int) -> WeightSlot | None:
        """A slot that the pack may have without taking the memory of one that is needed: its own, else anywhere."""
        for slot in self._slots:
            if slot.pack == pack and self._is_vacant(pack, slot.memory, slot.start):
                return slot
        if (shared := self._shared) is not None and self._plan.packs[pack].slot_nbytes <= shared.numel():
            for start in (0, shared.numel() - self._plan.packs[pack].slot_nbytes):
                if self._is_vacant(pack, shared, start):
                    return self._add_slot(pack, shared, start)
        return None

    def _is_vacant(self, pack: int, memory: torch.Tensor, start: int) -> bool:
        """Whether no other pack is needed that lies there."""
        stop = start + self._plan.packs[pack].slot_nbytes
        return all(slot.is_free or slot.pack == pack for slot in self._slots if slot.overlaps(memory, start, stop))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load(self, pack: int) -> WeightSlot:
        slot, parts = self._find(pack)
        if slot is not None and not parts:
            slot.is_free = False
            return slot
        self._allocate()
        slot = slot or self._vacant(pack)
        if slot is None:  # user code asked for a pack out of turn
            self._counters.out_of_turn += 1
            slot = next((slot for slot in self._slots if slot.pack == pack), None) or self._add_own(pack)
        after: list[Event] = []
        for one in [one for one in self._slots if one.overlaps(slot.memory, slot.start, slot.stop)]:
            self._release(one)
            if one.released is not None:  # the lane waits for it once: what it copies later comes behind that, too
                after.append(one.released)
                one.released = None
            if one is not slot:
                one.generations.clear()
            if one is self._last:
                self._last = None
        slot.is_free = False
        slot.generations.update((part, self._store.generation(part)) for part in parts)
        layout = self._store.layouts[pack]
        if self._store.arenas[pack].is_out_of_date():
            self._await_updates(layout)
            for read in self._all_reads(layout):
                read.synchronize()
            self._store.move_in(pack)
            self._store.narrow.forget()
        self._store.is_copied = True
        if not slot.weights:
            slot.weights.update((name, region.view(slot.bytes).detach()) for name, region in layout.items())
        newer, made = (any(part.trains for part in parts) and self.find_newer(pack)) or ({}, None)
        self._counters.swap_in_bytes += sum(part.nbytes for part in parts) - sum(layout[n].nbytes for n in newer)
        flat = [name for part in parts if not (part.trains and newer) for name in part.names]
        cast = self._store.narrow.prepare(pack, flat, self._worker, self._await_updates) if flat else None
        after += [] if made is None else [made]
        slot.loading = self._loads[pack] = self._worker.submit(
            lambda: self._swap_in(slot, pack, parts, after, newer, cast)
        )
        return slot

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap_in(
        self,
        slot: WeightSlot,
        pack: int,
        parts: Iterable[Part],
        after: Iterable[Event],
        newer: Mapping[str, torch.Tensor],
        cast: Ticket | None,
    ) -> None:
        """On the worker."""
        layout = self._store.layouts[pack]
        self._await_updates([name for part in parts for name in part.names if name not in newer])
        if cast is not None:
            cast.wait()
        for event in after:
            self._device.wait(Lane.SWAP_IN, event)
        with self._device.lane(Lane.SWAP_IN, f"weights of pack {pack}"):
            for part in parts:
                is_mixed = part.trains and bool(newer)
                for memory, start in () if is_mixed else part.runs:
                    slot.bytes[start : start + memory.numel()].copy_(memory, non_blocking=True)
                for name in part.names if is_mixed else part.borrowed:
                    source = newer.get(name, self._store.parameters[name])  # a master, which is cast here if need be
                    layout[name].view(slot.bytes).copy_(source, non_blocking=True)
        slot.versions.update((part, self._store.version(part)) for part in parts)
        slot.version = slot.bytes._version
        slot.ready = self._reads[pack] = self._device.record(Lane.SWAP_IN)

    def _allocate(self) -> None:
        if self._is_allocated:
            return
        plan, device = self._plan, self._device.index
        if (nbytes := plan.shared_slots_nbytes(device)) > 0:
            self._shared = self._make_memory(nbytes)
            for pack, start in plan.slot_offsets(device).items():
                self._add_slot(pack, self._shared, start)
        self._is_allocated = True
        for pack in plan.packs_on(device):
            if pack in plan.resident:
                self._add_own(pack)

    def _add_own(self, pack: int) -> WeightSlot:
        return self._add_slot(pack, self._make_memory(max(1, self._plan.packs[pack].slot_nbytes)), 0)

    @torch.inference_mode(False)
    def _make_memory(self, nbytes: int) -> torch.Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device.torch_device)
        self._keys[storage_key(memory)] = nbytes
        return memory

    @torch.inference_mode(False)
    def _add_slot(self, pack: int, memory: torch.Tensor, start: int) -> WeightSlot:
        # `data` counts versions by itself: a swap-in beside it is no write of this one.
        slot_bytes = memory[start : start + self._plan.packs[pack].slot_nbytes].data
        # The allocator may hand out memory that compute has freed and still uses.
        slot = WeightSlot(pack, memory, start, slot_bytes, Weights(), released=self._device.record(Lane.COMPUTE))
        self._slots.append(slot)
        return slot
