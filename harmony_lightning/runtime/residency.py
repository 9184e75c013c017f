"""Which pack's weights are on which device: slots, swap-in, release.

Each device has a fixed number of equal slots, allocated once. Swap-in copies a pack's arena into a free slot on the
SWAP_IN lane; compute waits for that copy, and the next copy into the slot waits for the compute that used it. Weights
are never copied back: the host's are the masters, and only gradients leave (`gradients`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster, Device, Event, Lane
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.arena import HostArena, Layout, lay_out, return_freed_memory
from harmony_lightning.runtime.counters import Counters

Weights = dict[str, torch.Tensor]
"""Device-resident weights by name: leaves over slot memory, valid until the slot is released."""


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
    ready: Event | None = None
    """Behind the swap-in of the present content."""
    released: Event | None = None
    """Behind the last compute on the former content, or on what the memory was before."""
    views: dict[int, Weights] = field(default_factory=dict)
    """Leaves of each pack that was ever here; the memory behind them is that of the present one."""


class DeviceWeights:
    """The weight slots of one device."""

    def __init__(self, device: Device, store: WeightStore, plan: Plan, counters: Counters) -> None:
        self._device = device
        self._store = store
        self._plan = plan
        self._counters = counters
        self._slots: list[_Slot] = []
        self._last: _Slot | None = None

    def acquire(self, pack: int) -> Weights:
        """Weights of `pack`, brought in if they are not there; compute enqueued from now on may use them."""
        if self._last is not None and self._last.pack == pack:
            return self._last.views[pack]
        slot = self._last = self._load(pack)
        if slot.ready is not None:
            self._device.wait(Lane.COMPUTE, slot.ready)
            slot.ready = None
        self._slots.remove(slot)
        self._slots.append(slot)  # most recently used last
        return slot.views[pack]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in slot memory, and so will be overwritten."""
        key = storage_key(tensor)
        return any(storage_key(slot.bytes) == key for slot in self._slots)

    def prefetch(self, pack: int) -> None:
        """Start to bring `pack` in if a slot is free."""
        if self._find(pack) is None and any(slot.pack is None for slot in self._slots):
            self._load(pack)

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
        if slot.released is not None:
            self._device.wait(Lane.SWAP_IN, slot.released)
            slot.released = None
        arena, layout = self._store.arenas[pack], self._store.layouts[pack]
        arena.refresh()
        with self._device.lane(Lane.SWAP_IN, f"weights of pack {pack}"):
            slot.bytes[: arena.bytes.numel()].copy_(arena.bytes, non_blocking=True)
            for name in self._store.borrowed[pack]:
                layout[name].view(slot.bytes).copy_(self._store.parameters[name], non_blocking=True)
        if slot is self._last:
            self._last = None
        slot.ready = self._device.record(Lane.SWAP_IN)
        slot.pack = pack
        self._counters.swap_in_bytes += self._plan.packs[pack].nbytes
        if pack not in slot.views:
            slot.views[pack] = {name: region.view(slot.bytes).detach() for name, region in layout.items()}
        return slot

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
        self._views: list[Weights] = [{} for _ in plan.packs]
        self._plan = plan

    def acquire(self, pack: int) -> Weights:
        weights = self._views[pack]
        for name in self._plan.packs[pack].parameters:
            parameter = self._parameters[name]
            if name not in weights or weights[name].data_ptr() != parameter.data_ptr():
                with torch.inference_mode(False), torch.no_grad():
                    weights[name] = parameter.detach()
        return weights

    def holds(self, tensor: torch.Tensor) -> bool:
        return False  # the user's own memory, which stays

    def prefetch(self, pack: int) -> None: ...

    def release(self, pack: int) -> None: ...

    def release_all(self) -> None: ...
