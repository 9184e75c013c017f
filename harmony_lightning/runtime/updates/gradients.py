"""Gradients: added up on the device over the microbatches, brought to the host once, folded into `Parameter.grad`.

Order of arithmetic is that of plain training: within a microbatch the uses of a weight are summed first, then
microbatches are added in their order. A weight that several packs use (tied) has a part on each and is complete when
the last part has arrived; parts are added on the host.

Hooks on parameters are given what one backward over the whole minibatch would give them: its complete gradient, once, on
the host, where the parameter is. They run on the controller, at the end of backward, through autograd itself.
"""

import functools
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster, Device, Event, Lane
from harmony_lightning.plan import Plan, Urgency
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.updates.device_update import DeviceUpdates
from harmony_lightning.runtime.updates.host_buffers import HostBuffers
from harmony_lightning.runtime.updates.update import JustInTimeUpdate
from harmony_lightning.runtime.weights.arena import Layout, lay_out, layout_nbytes, narrow_types
from harmony_lightning.runtime.weights.casts import Casts
from harmony_lightning.runtime.worker import HostWorker, Ticket

LAST = sys.maxsize
"""Priority of a job that comes behind all others that wait."""

OnComplete = Callable[[list[str]], None]
"""Called on the worker thread with names whose `Parameter.grad` has become complete."""


@dataclass(slots=True, eq=False)
class _Slot:
    home: int
    """The pack that it is for."""
    memory: torch.Tensor
    """The piece that it lies in, with others."""
    start: int
    bytes: torch.Tensor
    """From there on."""
    pack: int | None = None
    """The same, while gradients of it are here."""
    written: dict[str, torch.Tensor] = field(default_factory=dict)
    """Views of the gradients that hold data."""
    narrow: set[str] = field(default_factory=set)
    """Those that are one gradient of a narrow weight, and so have no more digits than its type."""
    left: Event | None = None
    """Behind the swap-out of the former content, unless compute has waited for that."""

    def overlaps(self, other: "_Slot") -> bool:
        start, stop = max(self.start, other.start), min(self.start + len(self.bytes), other.start + len(other.bytes))
        return self.memory is other.memory and start < stop

    def empty(self) -> None:
        """What it held has left."""
        self.pack = None
        self.written.clear()
        self.narrow.clear()


class GradientStore:
    """Where gradients are between a layer's backward and `Parameter.grad`."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        cluster: Cluster,
        counters: Counters,
        worker: HostWorker,
        reads: Callable[[Iterable[str]], Sequence[Event]] = lambda names: (),
        limit_nbytes: int = sys.maxsize,
    ) -> None:
        """`reads` tells the points behind the last swap-ins of weights, which must come before an update though no compute
        may have waited for them; `limit_nbytes` is what gradients that code between layers makes of layers' weights may
        take on each device."""
        self._reads = reads
        self._parameters = parameters
        self._order = {name: index for index, name in enumerate(parameters)}
        self._limit_nbytes = limit_nbytes
        self._plan = plan
        self._devices = cluster.devices
        self._host_is_device = cluster.host_is_device
        self._counters = counters
        self._worker = worker
        self._buffers = HostBuffers(cluster, worker, plan.gradient_buffers)
        self._narrow_buffers = HostBuffers(cluster, worker, plan.gradient_buffers)
        self._layouts: list[Layout] = [
            lay_out(parameters, (name for name in pack.parameters if parameters[name].requires_grad))
            for pack in plan.packs
        ]
        self._narrow_layouts: list[Layout] = [
            lay_out(parameters, names, narrow_types(plan, names))
            for layout, pack in zip(self._layouts, plan.packs, strict=True)
            for names in [[name for name in pack.narrow if name in layout]]
        ]
        self._layered = frozenset(name for pack in plan.packs for name in pack.parameters)
        self._slots: list[list[_Slot]] = [[] for _ in self._devices]
        self._loose: dict[tuple[str, int], torch.Tensor] = {}
        """Gradients outside slots, by name and device: of glue weights, sparse ones, all if the host is the device."""
        self._owned: set[tuple[str, int]] = set()
        """Which of those are ours alone."""
        self._parts: dict[str, torch.Tensor] = {}
        """On the host: what has arrived of gradients that are not complete. Only the worker touches it."""
        self._for_hooks: dict[str, torch.Tensor] = {}
        """Complete, but hooks of the user's come before `Parameter.grad`. The worker adds, `deliver` takes."""
        self._updates: dict[str, Ticket] = {}
        """By weight: the job that has made its gradient complete, and updates it if updates are just in time."""
        self._in_parts: set[str] = set()
        """Weights of which some part has been sent in this backward."""
        self.updates: DeviceUpdates | None = None
        """Takes complete gradients where they are; None if there are no such devices."""
        self.casts: Casts | None = None
        """Of narrow weights; the same."""
        self.with_room: Callable[[Device, Callable[[], torch.Tensor]], torch.Tensor] = lambda device, make: make()
        """Calls a function that needs memory of a device."""

    def add(
        self, gradients: dict[str, torch.Tensor], device: int, pack: int | None, owned: Collection[str] = ()
    ) -> None:
        """Add one microbatch's gradients of weights; `pack` None for weights used by glue. Called without grad mode.

        Args:
            gradients: are taken from here one by one, so that what is left can be added when memory was short.
            owned: tensors that may be written. All may be kept, but autograd hands the same one to several takers.
        """
        in_slot = {} if pack is None or self._host_is_device else self._layouts[pack]
        slot: _Slot | None = None
        for name in list(gradients):
            gradient = gradients[name]
            if pack is not None and name in in_slot and gradient.layout == torch.strided:
                slot = slot or self._slot(pack, device)
                self._add_to_slot(name, gradient, slot, in_slot)
            else:
                self._add_loose((name, device), gradient, name in owned)
            del gradients[name]

    @staticmethod
    def _add_to_slot(name: str, gradient: torch.Tensor, slot: _Slot, layout: Layout) -> None:
        view = slot.written.get(name)
        if view is None:
            view = layout[name].view(slot.bytes)
            slot.written[name] = view.copy_(gradient)
            if gradient.dtype is not view.dtype:
                slot.narrow.add(name)
        else:
            view.add_(gradient)
            slot.narrow.discard(name)

    def _add_loose(self, key: tuple[str, int], gradient: torch.Tensor, is_ours: bool) -> None:
        held, dtype = self._loose.get(key), self._parameters[key[0]].dtype
        if gradient.dtype is not dtype:
            gradient = gradient.to(dtype)
        if held is None:
            self._loose[key] = gradient.detach()
            if not self._host_is_device:
                self._make_room(key)
            if is_ours:
                self._owned.add(key)
        elif key in self._owned:
            held.add_(gradient)
        else:
            self._loose[key] = held + gradient
            self._owned.add(key)

    def has_loose(self, name: str, device: int) -> bool:
        """Whether a gradient of the weight is here outside of slots: the next one is only added to it."""
        return (name, device) in self._loose

    def _make_room(self, newest: tuple[str, int]) -> None:
        """Code that goes through many weights makes as many gradients: the oldest go to the host, where later ones are
        added to them. Weights of no layer are different, as the plan has set room aside for theirs."""
        held = [key for key in self._loose if key[1] == newest[1] and key[0] in self._layered]
        total = sum(_payload_nbytes(self._loose[key]) for key in held)
        for key in held:
            if key == newest or total <= self._limit_nbytes:
                return
            gradient = self._loose.pop(key)
            self._owned.discard(key)
            total -= _payload_nbytes(gradient)
            self._send_loose({key[0]: [(key[1], gradient)]}, frozenset(), _ignore)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply everything that has been added since the last completion."""
        for slots in self._slots:
            for slot in slots:
                slot.narrow.clear()
                for view in slot.written.values():
                    view.mul_(factor)
        for name, gradient in self._loose.items():
            self._loose[name] = gradient * factor
        self._worker.drain()
        for part in self._parts.values():
            part.mul_(factor)

    def send(self, pack: int | None, is_complete: Callable[[str], bool], on_complete: OnComplete) -> None:
        """Bring the gradients of a pack, if one is given, and those of glue weights from all devices to the host.

        Those for which `is_complete` holds become `Parameter.grad`, added to what is there; others wait for more.
        """
        held: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for (name, device), gradient in sorted(self._loose.items(), key=lambda item: item[0][1]):
            is_ours = not self._host_is_device or (name, device) in self._owned
            held.setdefault(name, []).append((device, gradient if is_ours else gradient.clone()))
        self._forget_loose()
        in_slots = {name for slots in self._slots for slot in slots for name in slot.written}
        if held:
            complete = frozenset(name for name in held if name not in in_slots and is_complete(name))
            self._send_loose(held, complete, on_complete)
        holders = [(d, slot) for d, slots in enumerate(self._slots) for slot in slots if slot.pack == pack is not None]
        if holders:
            assert pack is not None
            visitors = self._plan.visitors(pack)
            holders.sort(key=lambda held: visitors.index(held[0]) if held[0] in visitors else len(visitors))
            if pack in self._plan.dealt and self._plan.packs[pack].update == "host":
                # Devices have other packs to go on with: the host adds, in the same order, and none of them waits.
                while len(holders) > 1:
                    self._swap_out(*holders.pop(0), lambda name: False, _ignore)
            else:
                self._reduce(holders)
            self._update_there(*holders[0], is_complete)
            self._swap_out(*holders[0], is_complete, on_complete)

    def _update_there(self, device: int, slot: _Slot, is_complete: Callable[[str], bool]) -> None:
        """Let weights be updated where their gradients are complete; the gradients are used up."""
        if self.updates is None or slot.pack is None or device != self._plan.update_device(slot.pack):
            return  # states that stay would be elsewhere; the host asks for them
        elsewhere = {name for name, _ in self._loose} | self._in_parts
        complete = {
            name: gradient
            for name, gradient in slot.written.items()
            if name not in elsewhere and is_complete(name) and _is_plain(self._parameters[name], gradient)
        }
        updated, arrival = self.updates.step(slot.pack, device, complete)
        if updated:
            self._updates.update(dict.fromkeys(updated, self._worker.follow(arrival)))
        for name in updated:
            del slot.written[name]
        slot.narrow -= updated

    def hold(self) -> None:
        """Bring everything to the host; nothing becomes complete."""
        for pack in sorted({slot.pack for slots in self._slots for slot in slots if slot.pack is not None}):
            self.send(pack, lambda name: False, _ignore)
        self.send(None, lambda name: False, _ignore)

    def finish(self, on_complete: OnComplete) -> None:
        """End of a backward: whatever has not become complete by now never gets more."""
        self.hold()

        complete, self._in_parts = frozenset(self._in_parts), set()
        self._submit(self._take_parts, complete, on_complete, priority=LAST)
        if any(has_hooks(parameter) for parameter in self._parameters.values()):
            self._worker.drain()
            self._deliver(on_complete)

    def _take_parts(self) -> dict[str, torch.Tensor]:
        parts, self._parts = self._parts, {}
        return parts

    def await_updates(self, names: Iterable[str]) -> None:
        """Return when the last updates of these weights are done."""
        for ticket in {ticket for name in names if (ticket := self._updates.get(name)) is not None}:
            ticket.wait()
        self._worker.raise_error()

    @property
    def completed(self) -> Collection[str]:
        """Weights whose gradients have become complete since `begin`."""
        return self._updates.keys()

    def begin(self) -> None:
        """A backward begins."""
        self._updates.clear()

    def _deliver(self, on_complete: OnComplete) -> None:
        """Let autograd put gradients of parameters with hooks into `Parameter.grad`: it runs all kinds of hooks in its
        order, and all in one backward, which is what hooks for several parameters wait for."""
        arrived, self._for_hooks = self._for_hooks, {}
        if arrived:
            if self.casts is not None:
                self.casts.forget(arrived)
            torch.autograd.backward([self._parameters[name] for name in arrived], list(arrived.values()))
            on_complete(list(arrived))

    def _forget_loose(self) -> None:
        self._loose.clear()
        self._owned.clear()

    def discard(self) -> None:
        """Forget everything that is not yet in `Parameter.grad`."""
        for slots in self._slots:
            for slot in slots:
                slot.empty()
        self._forget_loose()
        self._worker.drain()
        self._parts.clear()
        self._for_hooks.clear()

    def close(self) -> None:
        """Free the slots."""
        for slots in self._slots:
            slots.clear()

    def allocate(self) -> None:
        """Make the slots of all devices now, not when they are first needed."""
        for device in range(len(self._devices)):
            if not self._host_is_device and self._plan.packs_on(device):
                self._allocate(device)

    def _allocate(self, device: int) -> None:
        if self._slots[device]:
            return
        if offsets := self._plan.gradient_offsets(device):
            memory = self._make_memory(device, self._plan.gradient_slots_nbytes(device))
            for pack, start in offsets.items():
                self._add_slot(pack, device, memory, start)

    @torch.inference_mode(False)
    def _make_memory(self, device: int, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._devices[device].torch_device)

    @torch.inference_mode(False)
    def _add_slot(self, pack: int, device: int, memory: torch.Tensor, start: int) -> _Slot:
        slot = _Slot(pack, memory, start, memory[start : start + layout_nbytes(self._layouts[pack])])
        self._slots[device].append(slot)
        return slot

    def _slot(self, pack: int, device: int) -> _Slot:
        self._allocate(device)
        slot = next((slot for slot in self._slots[device] if slot.home == pack), None)
        if slot is None:  # a pack that should be on other devices
            self._counters.out_of_turn += 1
            slot = self._add_slot(pack, device, self._make_memory(device, layout_nbytes(self._layouts[pack])), 0)
        if slot.pack is None:
            for other in self._slots[device]:
                if other.overlaps(slot):
                    if other.pack is not None:  # packs are visited out of turn: what it has so far waits on the host
                        self._counters.out_of_turn += 1
                        self._swap_out(device, other, lambda name: False, _ignore)
                    if other.left is not None:
                        self._devices[device].wait(Lane.COMPUTE, other.left)
                        other.left = None
            slot.pack = pack
        return slot

    @torch.no_grad()
    def _reduce(self, holders: list[tuple[int, _Slot]]) -> None:
        """Sum the slots of one pack into the first, in their order."""
        home, target = holders[0]
        for _, slot in holders[1:]:
            for name, gradient in slot.written.items():
                arrived = self._bring_to(home, gradient)
                if name in target.written:
                    target.written[name].add_(arrived)
                    target.narrow.discard(name)
                else:
                    target.narrow.update({name} & slot.narrow)
                    assert target.pack is not None
                    target.written[name] = self._layouts[target.pack][name].view(target.bytes)
                    target.written[name].copy_(arrived)
            slot.empty()

    def _bring_to(self, home: int, gradient: torch.Tensor) -> torch.Tensor:
        device = self._devices[home]
        arrived = self.with_room(device, lambda: gradient.to(device.torch_device))
        self._counters.p2p_bytes += _payload_nbytes(arrived)
        return arrived

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap_out(self, device: int, slot: _Slot, is_complete: Callable[[str], bool], on_complete: OnComplete) -> None:
        assert slot.pack is not None
        if not slot.written:
            slot.pack = None
            return
        layout = self._layouts[slot.pack]
        nbytes = layout_nbytes(layout)
        # A tied weight may still have a part in another pack's slot.
        elsewhere = {name for slots in self._slots for other in slots if other is not slot for name in other.written}
        complete = frozenset(name for name in slot.written if name not in elsewhere and is_complete(name))
        in_turn = len(complete) < len(slot.written) or not complete.isdisjoint(self._in_parts)
        urgency: Urgency = "next" if in_turn else self._plan.urgency(slot.pack)
        buffer = self._buffers.take(nbytes, urgency)
        narrow = self._leave_narrow(slot)
        narrow_layout = {name: self._narrow_layouts[slot.pack][name] for name in narrow}
        narrow_nbytes = layout_nbytes(self._narrow_layouts[slot.pack])
        narrow_buffer = self._narrow_buffers.take(narrow_nbytes, urgency) if narrow else None
        lane_owner = self._devices[device]
        lane_owner.wait(Lane.SWAP_OUT, lane_owner.record(Lane.COMPUTE))
        with lane_owner.lane(Lane.SWAP_OUT, f"gradients of pack {slot.pack}"):
            if len(slot.written) == len(layout) and narrow_buffer is None:
                buffer[:nbytes].copy_(slot.bytes[:nbytes], non_blocking=True)
            else:
                for name, view in slot.written.items():
                    if narrow_buffer is None or name not in narrow:
                        layout[name].view(buffer).copy_(view, non_blocking=True)
                    else:  # cast here: a copy to the host that casts would carry all bytes, and wait
                        region = narrow_layout[name]
                        region.view(narrow_buffer).copy_(view.to(region.dtype), non_blocking=True)
        arrival = slot.left = lane_owner.record(Lane.SWAP_OUT)
        arrived = self._buffers.lend(buffer, layout, slot.written)
        as_left = self._narrow_buffers.lend(narrow_buffer, narrow_layout, narrow) if narrow_buffer is not None else {}
        self._counters.swap_out_bytes += sum((as_left.get(name, arrived[name])).nbytes for name in arrived)
        slot_pack = slot.pack
        slot.empty()

        @torch.no_grad()
        def take() -> dict[str, torch.Tensor]:
            while as_left:
                name, gradient = as_left.popitem()
                arrived[name].copy_(gradient)
            return arrived

        self._in_parts.update(arrived.keys() - complete)
        self._in_parts -= complete
        priority = 0 if in_turn else self._plan.update_priority(slot_pack)
        ticket = self._submit(take, complete, on_complete, arrival, priority)
        self._buffers.follow(buffer, ticket, urgency)
        if narrow_buffer is not None:
            self._narrow_buffers.follow(narrow_buffer, ticket, urgency)

    def _leave_narrow(self, slot: _Slot) -> list[str]:
        """Gradients that travel in the type of narrow weights."""
        assert slot.pack is not None
        is_half = self._plan.gradient_wire == "half"
        return [name for name in self._narrow_layouts[slot.pack] if name in (slot.written if is_half else slot.narrow)]

    @torch.no_grad()
    def _send_loose(
        self, held: Mapping[str, list[tuple[int, torch.Tensor]]], complete: frozenset[str], on_complete: OnComplete
    ) -> None:
        totals: dict[str, torch.Tensor] = {}
        for name, ((home, total), *others) in held.items():
            for _, gradient in others:
                add = functools.partial(operator.add, total, self._bring_to(home, gradient))
                total = self.with_room(self._devices[home], add)
            if not self._host_is_device:
                self._counters.swap_out_bytes += _payload_nbytes(total)
                total = total.cpu()
            totals[name] = total
        self._in_parts.update(totals.keys() - complete)
        self._submit(lambda: totals, complete, on_complete)

    def _submit(
        self,
        take: Callable[[], dict[str, torch.Tensor]],
        complete: frozenset[str],
        on_complete: OnComplete,
        arrival: Event | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Have the worker deal with gradients that reach the host at `arrival`; those in `complete` get no more parts."""
        events = list(self._reads(complete))
        if self.updates is not None and isinstance(on_complete, JustInTimeUpdate):
            events += self.updates.slots.give_up(complete)
        events += [arrival] if arrival is not None else []

        def receive() -> None:
            for event in events:
                event.synchronize()
            self._receive(take(), complete, on_complete)

        ticket = self._worker.submit(receive, priority)
        self._updates.update(dict.fromkeys(complete, ticket))
        if (
            self.casts is not None
            and isinstance(on_complete, JustInTimeUpdate)
            and complete.issubset(on_complete.stepped)
        ):
            self.casts.follow(complete, ticket, priority)
        return ticket

    @torch.no_grad()
    def _receive(self, arrived: dict[str, torch.Tensor], complete: frozenset[str], on_complete: OnComplete) -> None:
        """On the worker: fold what has arrived into parts or into `Parameter.grad`."""
        for name in list(arrived):
            gradient = arrived.pop(name)
            part = self._parts.pop(name, None)
            if part is not None:
                gradient = part.add_(gradient)
            if name not in complete:
                self._parts[name] = gradient
                continue
            parameter = self._parameters[name]
            if has_hooks(parameter):
                self._for_hooks[name] = gradient
            elif parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        on_complete(self._in_order(complete - self._for_hooks.keys()))

    def _in_order(self, names: frozenset[str]) -> list[str]:
        return sorted(names, key=self._order.__getitem__)


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether the user watches the gradient of this parameter, and it trains at present."""
    return parameter.requires_grad and bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)  # type: ignore[attr-defined]


def _is_plain(parameter: nn.Parameter, gradient: torch.Tensor) -> bool:
    """Whether nobody sees the gradient before the weight is updated, and what has come before can be added to it."""
    before = parameter.grad
    is_alike = before is None or (before.layout, before.dtype) == (torch.strided, gradient.dtype)
    return is_alike and not has_hooks(parameter)


def _payload_nbytes(gradient: torch.Tensor) -> int:
    if gradient.layout == torch.sparse_coo:
        return gradient._values().nbytes + gradient._indices().nbytes
    return gradient.nbytes


def _ignore(names: list[str]) -> None: ...
