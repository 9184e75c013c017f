"""Which pack's weights are on which device: slots, swap-in, release.

Each device has a fixed number of equal slots, allocated once. Swap-in copies a pack's arena into a free slot on the
SWAP_IN lane; compute waits for that copy, and the next copy into the slot waits for the compute that used it. Weights
are never copied back: the host's are the masters, and only gradients leave (`gradients`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from harmony_lightning.hardware.device import Cluster, Device, Event, Lane
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.arena import HostArena, Layout, lay_out, return_freed_memory
from harmony_lightning.runtime.counters import Counters
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


class WeightStore:
    """The masters on the host, one arena per pack. A tied weight lies in the arena of the first pack that has it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan, cluster: Cluster) -> None:
        self.parameters = parameters
        self.arenas: list[HostArena] = []
        self.layouts: list[Layout] = []
        self.borrowed: list[tuple[str, ...]] = []
        owned: set[str] = set()
        for pack in plan.packs:
            names = [name for name in pack.parameters if name not in owned]
            owned.update(names)
            self.arenas.append(HostArena(parameters, names, cluster))
            self.borrowed.append(tuple(name for name in pack.parameters if name not in names))
            # Own weights first, in the arena's order, so that they arrive in one copy.
            self.layouts.append(lay_out(parameters, (*names, *self.borrowed[-1])))
            return_freed_memory()  # pack by pack: else the host would hold the weights twice for a moment


@dataclass(slots=True, eq=False)
class _Slot:
    bytes: torch.Tensor
    pack: int | None = None
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
        self._last: _Slot | None = None
        self.find_newer: Callable[[int], Newer | None] = lambda pack: None
        """Tells of a pack whose newest weights are on this device (`update_slots`)."""

    def acquire(self, pack: int, names: Iterable[str]) -> Weights:
        """Weights of `pack`, brought in if they are not there; compute enqueued from now on may use them. Only `names` will
        be asked for, which makes no difference here."""
        if self._last is not None and self._last.pack == pack:
            return self._last.views[pack]
        slot = self._last = self._load(pack)
        self._finish_loading(slot)
        self._slots.remove(slot)
        self._slots.append(slot)  # most recently used last
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
        if self._find(pack) is None and any(slot.pack is None for slot in self._slots):
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
        """The pack is not needed here any more."""
        slot = self._find(pack)
        if slot is not None:
            slot.pack = None
            slot.released = self._device.record(Lane.COMPUTE)

    def release_all(self) -> None:
        for slot in self._slots:
            if slot.pack is not None:
                self.release(slot.pack)

    def _find(self, pack: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.pack == pack), None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load(self, pack: int) -> _Slot:
        if (found := self._find(pack)) is not None:
            return found
        self._allocate()
        slot = next((slot for slot in self._slots if slot.pack is None), None)
        if slot is None:
            slot = self._slots[0]  # least recently used: user code asked for a pack out of turn
            slot.released = self._device.record(Lane.COMPUTE)
        released, slot.released = slot.released, None
        if slot is self._last:
            self._last = None
        slot.pack = pack
        layout = self._store.layouts[pack]
        if (arena := self._store.arenas[pack]).is_out_of_date():
            self._await_updates(layout)
            for read in self._all_reads(layout):
                read.synchronize()
            arena.move_in()
        if pack not in slot.views:
            slot.views[pack] = Weights((name, region.view(slot.bytes).detach()) for name, region in layout.items())
        newer, made = self.find_newer(pack) or ({}, None)
        self._counters.swap_in_bytes += self._plan.packs[pack].nbytes - sum(weight.nbytes for weight in newer.values())
        slot.loading = self._loads[pack] = self._worker.submit(
            lambda: self._swap_in(slot, pack, [event for event in (released, made) if event is not None], newer)
        )
        return slot

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap_in(self, slot: _Slot, pack: int, after: Iterable[Event], newer: Mapping[str, torch.Tensor]) -> None:
        """On the worker."""
        arena, layout = self._store.arenas[pack], self._store.layouts[pack]
        self._await_updates(layout)
        for event in after:
            self._device.wait(Lane.SWAP_IN, event)
        with self._device.lane(Lane.SWAP_IN, f"weights of pack {pack}"):
            if not newer:
                slot.bytes[: arena.bytes.numel()].copy_(arena.bytes, non_blocking=True)
            for name in arena.layout if newer else ():
                source = newer.get(name, self._store.parameters[name])
                layout[name].view(slot.bytes).copy_(source, non_blocking=True)
            for name in self._store.borrowed[pack]:
                layout[name].view(slot.bytes).copy_(self._store.parameters[name], non_blocking=True)
        slot.ready = self._reads[pack] = self._device.record(Lane.SWAP_IN)

    def _allocate(self) -> None:
        if not self._slots:
            nbytes = max(1, max(pack.slot_nbytes for pack in self._plan.packs))
            for _ in range(1 + self._plan.prefetch):
                slot_bytes = torch.empty(nbytes, dtype=torch.uint8, device=self._device.torch_device)
                # The allocator may hand out memory that compute has freed and still uses.
                self._slots.append(_Slot(slot_bytes, released=self._device.record(Lane.COMPUTE)))


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
