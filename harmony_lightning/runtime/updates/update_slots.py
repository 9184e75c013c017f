"""Device memory in which packs are updated: new weights, and behind them what the optimizer remembers.

A slot is shared by packs that come one after the other, each of which leaves for the host when it has been updated. The
next forward need not wait for that: it takes the new weights from here if the slot has none but them. Or a slot belongs to
one pack that stays: what is newest is then there only, and the host is behind until somebody asks for it (`bring_home`). He
may write it, too, so that what was here is good no longer. Where other devices need the weights, as in dp, they leave all
the same, and only the states stay. Of narrow weights the masters come in, with the states.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster, Device, Event, Lane
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.updates.optimizer_states import StateArena, region_name
from harmony_lightning.runtime.weights.arena import Layout, layout_nbytes
from harmony_lightning.runtime.weights.masters import WeightStore
from harmony_lightning.runtime.weights.residency import Newer
from harmony_lightning.runtime.worker import HostWorker, Ticket


@dataclass(slots=True, eq=False)
class UpdateSlot:
    bytes: torch.Tensor
    owner: int | None = None
    """The pack that stays here; None if packs share the slot."""
    pack: int | None = None
    """The last one here."""
    states: StateArena | None = None
    """Those that lie here now, or are on their way here; None when they have left."""
    loading: Ticket | None = None
    """Of the job that enqueues the swap-in of the states."""
    ready: Event | None = None
    """Behind that swap-in."""
    released: Event | None = None
    """Behind the last use of the former content."""
    updated: Event | None = None
    """Behind the last update here."""
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    """The states by their names in the arena."""
    newer: frozenset[str] = frozenset()
    """Names of weights of which the host has old values, or had when they left; they lie here as in the pack's layout."""
    newer_states: frozenset[str] = frozenset()
    """Names of weights of whose states the host has old values."""


class UpdateSlots:
    """The slots of all devices."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[int, Layout],
        plan: Plan,
        cluster: Cluster,
        counters: Counters,
        store: WeightStore,
        loaders: Sequence[HostWorker],
        await_updates: Callable[[Iterable[str]], None],
        reads: Callable[[Iterable[str]], Iterable[Event]],
    ) -> None:
        """`layouts`, by pack, of the weights that are updated on devices. `loaders`, by device, enqueue swap-ins, each
        behind the last update of the weights: `await_updates`. `reads` tells the points behind their last swap-ins."""
        self._parameters = parameters
        self._layouts = layouts
        self._plan = plan
        self._devices = cluster.devices
        self._counters = counters
        self._store = store
        self._loaders = loaders
        self._await_updates = await_updates
        self._reads = reads
        self._slots: list[list[UpdateSlot]] = [[] for _ in cluster.devices]
        self._unstepped: dict[str, Event] = {}
        """By weight whose states have come to a slot that others have by now, and which was not stepped there: the point
        behind that copy."""

    def end(self) -> None:
        """What was brought in and not updated is needed no more: from now on anybody may write it on the host."""
        for slot in self._all():
            if slot.newer or slot.newer_states:
                continue
            if slot.pack is not None and slot.loading is not None:
                slot.loading.wait()
                if slot.ready is not None:
                    slot.ready.synchronize()
            if slot.owner is None:
                slot.pack = None
            slot.states = None
        for read in self._unstepped.values():
            read.synchronize()
        self._unstepped.clear()

    def close(self) -> None:
        """Free the slots."""
        for slots in self._slots:
            slots.clear()

    def load(self, pack: int, device: int, states: StateArena) -> UpdateSlot:
        """The slot where these states of a pack are, or into which they come."""
        found = next((slot for slot in self._slots[device] if slot.pack == pack), None)
        if found is not None and found.states is states:
            return found
        start = layout_nbytes(self._layouts[pack])
        nbytes = max(start + states.bytes.numel(), self._plan.packs[pack].update_slot_nbytes)
        slot = found or self._free_slot(pack, device, nbytes)
        if slot.bytes.numel() < nbytes:
            self._grow(slot, device, nbytes)
        memory = slot.bytes[start:]
        slot.pack, slot.states, slot.newer, slot.newer_states = pack, states, frozenset(), frozenset()
        slot.views = {name: region.view(memory) for name, region in states.layout.items()}
        released, slot.released = slot.released, None
        masters = {name: self._layouts[pack][name].view(slot.bytes) for name in self._narrow(pack)}
        self._counters.swap_in_bytes += states.nbytes + sum(view.nbytes for view in masters.values())
        slot.loading = self._loaders[device].submit(
            lambda: self._swap_in(slot, pack, states, masters, device, released)
        )
        return slot

    def _narrow(self, pack: int) -> list[str]:
        return [name for name in self._plan.packs[pack].narrow if name in self._layouts[pack]]

    def arrived(self, slot: UpdateSlot, device: int) -> Event:
        """The point from which on the states are there."""
        if slot.loading is not None:
            slot.loading.wait()
            self._loaders[device].raise_error()
            slot.loading = None
        assert slot.ready is not None
        return slot.ready

    def keep_or_leave(self, slot: UpdateSlot, pack: int, device: int, names: frozenset[str]) -> Event | None:
        """These weights have been updated in the slot. Returns the point from which on the host has them; None if the slot
        keeps them."""
        slot.updated = self._devices[device].record(Lane.COMPUTE)
        if slot.owner is None:
            slot.released = self._swap_out(slot, pack, device, names, names)
            self._let_go_of_states(slot, device, names)
            slot.newer = names if len(self._plan.devices_of(pack)) == 1 else frozenset()
            return slot.released
        slot.newer_states |= names
        if not self._plan.weights_stay(pack):
            return self._swap_out(slot, pack, device, names, frozenset())
        slot.newer |= names
        return None

    # What stays -------------------------------------------------------------------------------------------------------

    def newer(self, pack: int, device: int) -> Newer | None:
        """Weights of a pack that are newer here than on the host, for a swap-in; None if there are none."""
        slot = next((slot for slot in self._slots[device] if slot.pack == pack and slot.newer), None)
        if slot is None or slot.updated is None:
            return None
        names = slot.newer
        if slot.owner is None:
            slot.newer = frozenset()  # others may come: whoever needs them again finds them on the host
        return {name: self._layouts[pack][name].view(slot.bytes) for name in names}, slot.updated

    def is_behind(self, names: Iterable[str] | None = None) -> bool:
        """Whether the host has old values of something, or of one of these weights."""
        slots = [slot for slot in self._all() if slot.newer or slot.newer_states]
        if names is None or not slots:
            return bool(slots)
        wanted = frozenset(names)
        return any(not wanted.isdisjoint(slot.newer | slot.newer_states) for slot in slots)

    def bring_home(self, names: Iterable[str] | None = None) -> None:
        """Return when the host has the newest values, of these weights and their packs at least: anybody may write them."""
        wanted = None if names is None else frozenset(names)
        ends = [
            self._leave(slot, device)
            for device, slots in enumerate(self._slots)
            for slot in slots
            if (newer := slot.newer | slot.newer_states) and (wanted is None or not wanted.isdisjoint(newer))
        ]
        for end in ends:
            end.synchronize()

    def give_up(self, names: Collection[str]) -> list[Event]:
        """The host is going to update these weights: what is here of their states will be good no longer. Returns the
        points behind which it may."""
        events: list[Event] = []
        for device, slots in enumerate(self._slots):
            for slot in slots:
                states = slot.states
                if states is None or all(weight not in names for weight, _ in states.keys):
                    continue
                events.append(self.arrived(slot, device))
                if slot.newer or slot.newer_states:
                    events.append(self._leave(slot, device))
                slot.states = None
        events += [self._unstepped.pop(name) for name in names if name in self._unstepped]
        self.bring_home(names)
        return events

    def _let_go_of_states(self, slot: UpdateSlot, device: int, stepped: Collection[str] = ()) -> None:
        """Others will come in their place; the host may still step weights to which they belong."""
        if (states := slot.states) is not None:
            read, slot.states = self.arrived(slot, device), None
            self._unstepped.update((weight, read) for weight, _ in states.keys if weight not in stepped)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _leave(self, slot: UpdateSlot, device: int) -> Event:
        """Bring what is newer to the host; returns the point from which on it is there."""
        assert slot.pack is not None
        if slot.owner is None and slot.released is not None:  # it has left
            slot.newer = frozenset()
            return slot.released
        self.arrived(slot, device)
        slot.released = self._swap_out(slot, slot.pack, device, slot.newer, slot.newer_states)
        slot.newer = slot.newer_states = frozenset()
        slot.states = None
        return slot.released

    # Copies -----------------------------------------------------------------------------------------------------------

    def _all(self) -> Iterable[UpdateSlot]:
        return (slot for slots in self._slots for slot in slots)

    def _free_slot(self, pack: int, device: int, nbytes: int) -> UpdateSlot:
        slots, here = self._slots[device], self._devices[device]
        if pack in self._plan.updates_stay:
            slots.append(UpdateSlot(_device_bytes(nbytes, here), pack, released=here.record(Lane.COMPUTE)))
            return slots[-1]
        shared = [slot for slot in slots if slot.owner is None]
        if not shared:
            nbytes = max(nbytes, self._plan.shared_update_slot_nbytes(device))
            for _ in range(max(1, self._plan.num_shared_update_slots(device))):
                # The allocator may hand out memory that compute has freed and still uses.
                shared.append(UpdateSlot(_device_bytes(nbytes, here), released=here.record(Lane.COMPUTE)))
            slots += shared
        slot = next((slot for slot in shared if slot.states is None), shared[0])
        self._let_go_of_states(slot, device)
        slots.remove(slot)
        slots.append(slot)  # least recently used first
        return slot

    def _grow(self, slot: UpdateSlot, device: int, nbytes: int) -> None:
        """The optimizer remembers more than was foreseen."""
        here = self._devices[device]
        self.bring_home()
        if slot.released is not None:
            slot.released.synchronize()  # the memory goes back to the allocator
        for read in self._reads(self._layouts[slot.pack] if slot.pack is not None else ()):
            read.synchronize()
        slot.views = {}
        slot.bytes = _device_bytes(0, here)
        slot.bytes = _device_bytes(nbytes, here)
        slot.released = here.record(Lane.COMPUTE)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap_in(
        self,
        slot: UpdateSlot,
        pack: int,
        states: StateArena,
        masters: Mapping[str, torch.Tensor],
        device: int,
        released: Event | None,
    ) -> None:
        """On the worker. `masters`: where those of narrow weights come."""
        here = self._devices[device]
        self._await_updates(self._layouts[pack])
        if released is not None:
            here.wait(Lane.SWAP_IN, released)
        with here.lane(Lane.SWAP_IN, f"states of pack {pack}"):
            start = layout_nbytes(self._layouts[pack])
            slot.bytes[start : start + states.bytes.numel()].copy_(states.bytes, non_blocking=True)
            for name, master in masters.items():
                master.copy_(self._parameters[name], non_blocking=True)
        slot.ready = here.record(Lane.SWAP_IN)

    def _swap_out(
        self, slot: UpdateSlot, pack: int, device: int, weights: Collection[str], states_of: Collection[str]
    ) -> Event:
        """Bring weights, and states of weights, to the host, behind all copies that still read them there."""
        here, layout = self._devices[device], self._layouts[pack]
        masters, states = self._store.arenas[pack], slot.states
        for event in (here.record(Lane.COMPUTE), *self._reads(weights)):
            here.wait(Lane.UPDATE_OUT, event)
        start = layout_nbytes(layout)
        with torch._C.DisableTorchFunction(), here.lane(Lane.UPDATE_OUT, f"weights and states of pack {pack}"):
            if layout == masters.layout and len(weights) == len(layout):
                masters.bytes.copy_(slot.bytes[:start], non_blocking=True)
            else:
                for name in weights:
                    masters.layout[name].view(masters.bytes).copy_(layout[name].view(slot.bytes), non_blocking=True)
            if states is not None and states_of:
                self._swap_out_states(slot, states, start, states_of)
                self._counters.swap_out_bytes += states.nbytes_of(states_of)
        self._counters.swap_out_bytes += sum(self._parameters[name].nbytes for name in weights)
        return here.record(Lane.UPDATE_OUT)

    @staticmethod
    def _swap_out_states(slot: UpdateSlot, states: StateArena, start: int, weights: Collection[str]) -> None:
        if all(weight in weights for weight, _ in states.keys):
            nbytes = states.bytes.numel()
            states.bytes.copy_(slot.bytes[start : start + nbytes], non_blocking=True)
            return
        for weight, key in states.keys:
            if weight in weights:
                name = region_name(weight, key)
                states.layout[name].view(states.bytes).copy_(slot.views[name], non_blocking=True)


def _device_bytes(nbytes: int, device: Device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
