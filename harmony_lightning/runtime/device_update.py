"""Updates on the device: gradients stay where they were computed, and what the optimizer remembers comes to them.

    SWAP_IN    | states of p |.
    COMPUTE    | backward of p |'-> a copy of p's weights | step |.
    SWAP_OUT                                                      '-> weights, states of p |

The step works on a copy of the weights, beside the states, so that the weights' own slot is free for the next pack at once,
while new weights and states leave from here. Each goes to its place on the host in one piece, into the masters and the
tensors in `optimizer.state`; until it is there, the weights count as being updated, like those that the host works on
(`gradients`), and whoever looks at them waits (`engine.settle`).
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster, Device, Event, Lane
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.arena import Layout, lay_out, layout_nbytes
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.optimizer_states import StateArena, find_states, region_name
from harmony_lightning.runtime.residency import DeviceWeights, WeightStore
from harmony_lightning.runtime.update import JustInTimeUpdate, StandIn
from harmony_lightning.runtime.worker import HostWorker, Ticket

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Slot:
    """Device memory for one pack: new weights, and behind them states."""

    bytes: torch.Tensor
    states: StateArena | None = None
    """Those that lie here now, or are on their way."""
    pack: int | None = None
    loading: Ticket | None = None
    """Of the job that enqueues the swap-in of the states."""
    ready: Event | None = None
    """Behind that swap-in."""
    released: Event | None = None
    """Behind the last use of the former content."""
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    """The states by their names in the arena."""


class DeviceUpdates:
    """The packs that the plan wants to be updated on devices."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        cluster: Cluster,
        counters: Counters,
        store: WeightStore,
        weights: Sequence[DeviceWeights],
        loaders: Sequence[HostWorker],
        await_updates: Callable[[Iterable[str]], None],
        reads: Callable[[Iterable[str]], Iterable[Event]],
    ) -> None:
        """`loaders`, by device, enqueue swap-ins, each behind the last update of the weights: `await_updates`. `reads`
        tells the points behind the last swap-ins of weights."""
        self._parameters = parameters
        self._plan = plan
        self._cluster = cluster
        self._counters = counters
        self._store = store
        self._weights = weights
        self._loaders = loaders
        self._await_updates = await_updates
        self._reads = reads
        self._update: JustInTimeUpdate | None = None
        """Of the running backward; None if its updates are none of ours."""
        self._slots: list[list[_Slot]] = [[] for _ in cluster.devices]
        self._states: dict[int, StateArena] = {}
        self._told: set[str] = set()
        tied = {name for names in store.borrowed for name in names}
        self._layouts: dict[int, Layout] = {
            index: lay_out(parameters, (n for n in pack.parameters if parameters[n].requires_grad and n not in tied))
            for index, pack in enumerate(plan.packs)
            if pack.update == "device"
        }
        """Of the weights that may be updated on a device; a tied one has gradients in several places."""

    def begin(self, update: JustInTimeUpdate | None) -> None:
        """A backward begins, in which this update, if any, may be taken on devices."""
        self._update = update

    def end(self) -> None:
        """States that were brought in and not asked for are needed no more."""
        self._update = None
        for slots in self._slots:
            for slot in slots:
                slot.pack = None

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            log.warning("harmony: %s", text)

    def discard(self) -> None:
        """The step is given up, and no copies are in flight."""
        self.end()

    def close(self) -> None:
        """Free the slots."""
        for slots in self._slots:
            slots.clear()

    def prefetch(self, pack: int) -> None:
        """The backward of a pack begins: bring in what its update will need."""
        if self._names(pack):
            self._load(pack, self._plan.visitors(pack)[0])

    def _names(self, pack: int) -> list[str]:
        """Weights that may be updated on a device in this step."""
        update = self._update
        if update is None or pack not in self._layouts or self._store.arenas[pack].is_out_of_date():
            return []
        # The first step of a weight, in which the optimizer makes its states, is the host's: then is known what they take.
        return [name for name in self._layouts[pack] if name in update.stepped and update.options(name) is not None]

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self, pack: int, device: int, gradients: Mapping[str, torch.Tensor]
    ) -> tuple[frozenset[str], Event | None]:
        """Update a pack's weights on the device that has their gradients, all of them complete.

        Returns:
            The names of those that are updated, which may be fewer, and the point from which on the host has them.
        """
        stepped = frozenset(gradients).intersection(self._names(pack))
        slot = self._load(pack, device) if stepped else None
        if slot is None:
            return frozenset(), None
        here = self._cluster.devices[device]
        assert self._update is not None and slot.loading is not None
        slot.loading.wait()
        self._loaders[device].raise_error()
        assert slot.ready is not None
        here.wait(Lane.COMPUTE, slot.ready)
        with torch._C.DisableTorchFunction(), here.lane(Lane.COMPUTE, f"update of pack {pack}"):
            stand_ins = self._stand_ins(slot, pack, device, {n: g for n, g in gradients.items() if n in stepped})
            self._update.step_there(stand_ins)
            for name, stand_in in stand_ins.items():
                self._take_over(slot, name, stand_in)
        return stepped, self._swap_out(slot, pack, device, stepped)

    # What is stepped --------------------------------------------------------------------------------------------------

    def _stand_ins(
        self, slot: _Slot, pack: int, device: int, gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, StandIn]:
        assert self._update is not None and slot.states is not None
        layout, weights = self._layouts[pack], self._weights[device].acquire(pack, gradients)
        copies = {name: layout[name].view(slot.bytes) for name in gradients}
        torch._foreach_copy_(list(copies.values()), [weights[name] for name in copies])
        stand_ins: dict[str, StandIn] = {}
        for name, gradient in gradients.items():
            parameter, master = nn.Parameter(copies[name]), self._parameters[name]
            if master.grad is not None:  # of minibatches before
                self._counters.swap_in_bytes += master.grad.nbytes
                gradient.add_(master.grad.to(gradient.device))
                master.grad = None
            parameter.grad = gradient
            stand_ins[name] = StandIn(parameter, dict(self._update.remembered(name)))
        for key in slot.states.keys:
            if key[0] in stand_ins:
                stand_ins[key[0]].state[key[1]] = slot.views[region_name(*key)]
        return stand_ins

    def _take_over(self, slot: _Slot, name: str, stand_in: StandIn) -> None:
        """What the optimizer remembers now. Tensors that lie in the slot leave with it."""
        assert self._update is not None
        remembered = self._update.remembered(name)
        if not remembered and stand_in.state:
            self._update.remember(name, remembered)
        for key in remembered.keys() - stand_in.state.keys():
            del remembered[key]
        for key, value in stand_in.state.items():
            view = slot.views.get(region_name(name, key))
            if view is None:
                remembered[key] = value.cpu() if isinstance(value, torch.Tensor) else value
            elif value is not view:
                self._replace(remembered, key, value, view)

    @staticmethod
    def _replace(remembered: dict[str, Any], key: str, value: Any, view: torch.Tensor) -> None:
        """The optimizer has made a new tensor where others write the old one."""
        if isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (view.shape, view.dtype):
            view.copy_(value)
        else:
            remembered[key] = value.cpu() if isinstance(value, torch.Tensor) else value

    # Copies -----------------------------------------------------------------------------------------------------------

    def _load(self, pack: int, device: int) -> _Slot | None:
        """The slot into which the states of a pack come; None if they cannot."""
        found = next((slot for slot in self._slots[device] if slot.pack == pack), None)
        if found is not None:
            return found
        states = self._arena(pack)
        if states is None:
            return None
        start = layout_nbytes(self._layouts[pack])
        slot = self._free_slot(device, max(start + states.bytes.numel(), self._plan.update_slot_nbytes))
        memory = slot.bytes[start:]
        slot.pack, slot.states = pack, states
        slot.views = {name: region.view(memory) for name, region in states.layout.items()}
        released, slot.released = slot.released, None
        self._counters.swap_in_bytes += states.nbytes
        slot.loading = self._loaders[device].submit(lambda: self._swap_in(slot, states, memory, device, released))
        return slot

    def _free_slot(self, device: int, nbytes: int) -> _Slot:
        slots, here = self._slots[device], self._cluster.devices[device]
        if not slots:
            slots += [_Slot(_device_bytes(0, here)) for _ in range(1 + self._plan.prefetch)]
        slot = next((slot for slot in slots if slot.pack is None), slots[0])
        slots.remove(slot)
        slots.append(slot)  # least recently used first
        if slot.bytes.numel() < nbytes:
            if slot.released is not None:
                slot.released.synchronize()  # the memory goes back to the allocator
            slot.views = {}
            slot.bytes = _device_bytes(0, here)
            slot.bytes = _device_bytes(nbytes, here)
            # The allocator may hand out memory that compute has freed and still uses.
            slot.released = here.record(Lane.COMPUTE)
        return slot

    def _arena(self, pack: int) -> StateArena | None:
        """The states of a pack where they can move from; None if they cannot."""
        assert self._update is not None
        names = self._names(pack)
        found = find_states(self._update, names)
        if isinstance(found, str):
            self._tell_once(f"pack {pack} is updated on the host, though the plan says on the device: {found}")
            return None
        states = self._states.get(pack)
        if states is None or not states.is_of(found):
            self._await_updates(names)
            states = self._states[pack] = StateArena(found, self._cluster)
        return states

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap_in(
        self, slot: _Slot, states: StateArena, memory: torch.Tensor, device: int, released: Event | None
    ) -> None:
        """On the worker."""
        here = self._cluster.devices[device]
        assert slot.pack is not None
        self._await_updates(self._layouts[slot.pack])
        if released is not None:
            here.wait(Lane.SWAP_IN, released)
        with here.lane(Lane.SWAP_IN, f"states of pack {slot.pack}"):
            memory[: states.bytes.numel()].copy_(states.bytes, non_blocking=True)
        slot.ready = here.record(Lane.SWAP_IN)

    def _swap_out(self, slot: _Slot, pack: int, device: int, names: frozenset[str]) -> Event:
        """Bring weights and states to the host, behind all copies that still read them there."""
        assert slot.states is not None
        here, layout = self._cluster.devices[device], self._layouts[pack]
        masters, states = self._store.arenas[pack], slot.states
        for event in (here.record(Lane.COMPUTE), *self._reads(names)):
            here.wait(Lane.SWAP_OUT, event)
        start = layout_nbytes(layout)
        with torch._C.DisableTorchFunction(), here.lane(Lane.SWAP_OUT, f"weights and states of pack {pack}"):
            if layout == masters.layout and len(names) == len(layout):
                masters.bytes.copy_(slot.bytes[:start], non_blocking=True)
            else:
                for name in names:
                    masters.layout[name].view(masters.bytes).copy_(layout[name].view(slot.bytes), non_blocking=True)
            if names.issuperset(key[0] for key in states.keys):
                nbytes = states.bytes.numel()
                states.bytes.copy_(slot.bytes[start : start + nbytes], non_blocking=True)
            else:
                for key in states.keys:
                    if key[0] in names:
                        name = region_name(*key)
                        states.layout[name].view(states.bytes).copy_(slot.views[name], non_blocking=True)
        torch.autograd.graph.increment_version([self._parameters[name] for name in names])
        slot.pack, slot.released = None, here.record(Lane.SWAP_OUT)
        self._counters.swap_out_bytes += sum(self._parameters[name].nbytes for name in names)
        self._counters.swap_out_bytes += states.nbytes_of(names)
        self._counters.updates_on_devices += 1
        return slot.released


def _device_bytes(nbytes: int, device: Device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
