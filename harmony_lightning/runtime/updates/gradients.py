"""Gradients: added up on devices over the microbatches, updated there or brought to the host, folded into `Parameter.grad`.

Order of arithmetic is that of plain training: within a microbatch the uses of a weight are summed first, then
microbatches are added in their order. A weight that several packs use (tied) has a part on each and is complete when
the last part has arrived; parts are added on the host.
"""

import functools
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster, Device, Event
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.structure import nbytes_of
from harmony_lightning.runtime.updates.device_sums import landings_for
from harmony_lightning.runtime.updates.device_update import DeviceUpdates
from harmony_lightning.runtime.updates.gradient_slots import GradientSlot, GradientSlots
from harmony_lightning.runtime.updates.gradient_swap_out import GradientSwapOut, OnComplete, has_hooks
from harmony_lightning.runtime.updates.update import JustInTimeUpdate
from harmony_lightning.runtime.weights.casts import Casts
from harmony_lightning.runtime.worker import HostWorker, Ticket

Result = TypeVar("Result")


class WithRoom(Protocol):
    """Calls a function that needs memory of a device."""

    def __call__(self, device: Device, function: Callable[[], Result], /) -> Result: ...


class GradientStore:
    """Where gradients are between a layer's backward and `Parameter.grad`.

    Attributes:
        updates: takes complete gradients where they are; None if there are no such devices.
        casts: of narrow weights; the same.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        cluster: Cluster,
        counters: Counters,
        worker: HostWorker,
        *,
        reads: Callable[[Iterable[str]], Sequence[Event]] = lambda names: (),
        with_room: WithRoom = lambda device, function: function(),
        limit_nbytes: int = sys.maxsize,
    ) -> None:
        """`reads` tells the points behind the last swap-ins of weights, which must come before an update though no compute
        may have waited for them; `limit_nbytes` is what gradients that code between layers makes of layers' weights may
        take on each device."""
        self._parameters = parameters
        self._plan = plan
        self._devices = cluster.devices
        self._host_is_device = cluster.host_is_device
        self._counters = counters
        self._worker = worker
        self._reads = reads
        self._with_room = with_room
        self._limit_nbytes = limit_nbytes
        self._layered = frozenset(name for pack in plan.packs for name in pack.parameters)
        self._slots = GradientSlots(parameters, plan, cluster.devices, counters, self._swap_out_part)
        self._out = GradientSwapOut(
            parameters, plan, cluster, counters, worker, self._before_update, self._behind_update
        )
        self._loose: dict[tuple[str, int], torch.Tensor] = {}
        """Gradients outside slots, by name and device: of glue weights, sparse ones, all if the host is the device."""
        self._owned: set[tuple[str, int]] = set()
        """Which of those are ours alone."""
        self._is_adding = False
        self.updates: DeviceUpdates | None = None
        self.casts: Casts | None = None

    # On devices -------------------------------------------------------------------------------------------------------

    def add(
        self, gradients: dict[str, torch.Tensor], device: int, pack: int | None, owned: Collection[str] = ()
    ) -> None:
        """Add one microbatch's gradients of weights; `pack` None for weights used by glue. Called without grad mode.

        Args:
            gradients: are taken from here one by one, so that what is left can be added when memory was short.
            owned: tensors that may be written. All may be kept, but autograd hands the same one to several takers.
        """
        in_slot = {} if pack is None or self._host_is_device else self._slots.layouts[pack]
        slot: GradientSlot | None = None
        self._is_adding = True
        try:
            for name in list(gradients):
                gradient = gradients[name]
                if pack is not None and name in in_slot and gradient.layout == torch.strided:
                    slot = slot or self._slots.acquire(pack, device)
                    slot.add(name, gradient, is_narrow=gradient.dtype is not in_slot[name].dtype)
                else:
                    self._add_loose((name, device), gradient, name in owned)
                del gradients[name]
        finally:
            self._is_adding = False

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
        total = sum(nbytes_of(self._loose[key]) for key in held)
        for key in held:
            if key == newest or total <= self._limit_nbytes:
                return
            gradient = self._loose.pop(key)
            self._owned.discard(key)
            total -= nbytes_of(gradient)
            self._send_loose({key[0]: [(key[1], gradient)]}, frozenset(), _ignore)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply everything that has been added since the last completion."""
        self._bring_back()
        self._slots.scale(factor)
        for name, gradient in self._loose.items():
            self._loose[name] = gradient * factor
        self._out.scale(factor)

    def allocate(self) -> None:
        """Make the slots of all devices now, not when they are first needed."""
        if not self._host_is_device:
            self._slots.allocate()

    def leave(self, device: Device) -> bool:
        """Memory of the device is short: sums in slots wait on the host until somebody adds to them, unless somebody does
        now. Returns whether they have left."""
        return not self._is_adding and self._slots.leave(device.index)

    def _bring_back(self) -> None:
        for device in self._slots.devices_without:
            self._with_room(self._devices[device], functools.partial(self._slots.bring_back, device))

    # Out --------------------------------------------------------------------------------------------------------------

    def send(self, pack: int | None, is_complete: Callable[[str], bool], on_complete: OnComplete) -> None:
        """Bring the gradients of a pack, if one is given, and those of glue weights from all devices to the host.

        Those for which `is_complete` holds become `Parameter.grad`, added to what is there; others wait for more.
        """
        self._bring_back()
        held: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for (name, device), gradient in sorted(self._loose.items(), key=lambda item: item[0][1]):
            is_ours = not self._host_is_device or (name, device) in self._owned
            held.setdefault(name, []).append((device, gradient if is_ours else gradient.clone()))
        self._forget_loose()
        if held:
            in_slots = self._slots.names()
            complete = frozenset(name for name in held if name not in in_slots and is_complete(name))
            self._send_loose(held, complete, on_complete)
        if pack is None or not (holders := self._slots.holders(pack)):
            return
        landings = None
        if self._plan.packs[pack].update == "device":
            self._reduce(holders)
            self._update_there(holders[0], is_complete)
        elif len(holders) > 1 and (landings := landings_for(holders, self._devices)) is None:
            while len(holders) > 1:
                self._swap_out_part(holders.pop(0))
        # A tied weight may still have a part in another pack's slot.
        elsewhere = self._slots.names(beside=holders)
        complete = frozenset(name for name in holders[0].written if name not in elsewhere and is_complete(name))
        self._out.send(holders, complete, on_complete, landings or ())

    def _swap_out_part(self, slot: GradientSlot) -> None:
        self._out.send([slot], frozenset(), _ignore)

    @torch.no_grad()
    def _reduce(self, holders: list[GradientSlot]) -> None:
        """Sum the slots of one pack into the first, in their order, which alone is left."""
        target, *others = holders
        del holders[1:]
        self._is_adding = True
        try:
            for slot in others:
                for name, gradient in slot.written.items():
                    target.add(name, self._bring_to(target.device, gradient), is_narrow=name in slot.narrow)
                slot.empty()
        finally:
            self._is_adding = False

    def _bring_to(self, home: int, gradient: torch.Tensor) -> torch.Tensor:
        device = self._devices[home]
        arrived = self._with_room(device, lambda: gradient.to(device.torch_device))
        self._counters.p2p_bytes += nbytes_of(arrived)
        return arrived

    def _update_there(self, slot: GradientSlot, is_complete: Callable[[str], bool]) -> None:
        """Let weights be updated where their gradients are complete; the gradients are used up."""
        if self.updates is None or slot.device != self._plan.update_device(slot.pack):
            return  # states that stay would be elsewhere; the host asks for them
        elsewhere = {name for name, _ in self._loose} | self._out.in_parts.keys()
        complete = {
            name: gradient
            for name, gradient in slot.written.items()
            if name not in elsewhere and is_complete(name) and _is_plain(self._parameters[name], gradient)
        }
        updated, arrival = self.updates.step(slot.pack, slot.device, complete)
        if updated:
            self._out.tickets.update(dict.fromkeys(updated, self._worker.follow(arrival)))
        for name in updated:
            del slot.written[name]
        slot.narrow -= updated

    def _before_update(self, complete: Collection[str], on_complete: OnComplete) -> Sequence[Event]:
        """The points behind which the host may update these weights."""
        reads = self._reads(complete)
        if self.updates is None or not isinstance(on_complete, JustInTimeUpdate):
            return reads
        return [*reads, *self.updates.slots.give_up(complete)]

    def _behind_update(self, complete: frozenset[str], on_complete: OnComplete, ticket: Ticket, priority: int) -> None:
        """What comes behind the job that makes these gradients complete."""
        if self.casts is None or not isinstance(on_complete, JustInTimeUpdate):
            return
        if complete.issubset(on_complete.stepped) and not any(has_hooks(self._parameters[name]) for name in complete):
            self.casts.follow(complete, ticket, priority)

    @torch.no_grad()
    def _send_loose(
        self, held: Mapping[str, list[tuple[int, torch.Tensor]]], complete: frozenset[str], on_complete: OnComplete
    ) -> None:
        totals: dict[str, torch.Tensor] = {}
        for name, ((home, total), *others) in held.items():
            for _, gradient in others:
                add = functools.partial(operator.add, total, self._bring_to(home, gradient))
                total = self._with_room(self._devices[home], add)
            if not self._host_is_device:
                self._counters.swap_out_bytes += nbytes_of(total)
                total = total.cpu()
            totals[name] = total
        self._out.send_arrived(totals, complete, on_complete)

    def hold(self) -> None:
        """Bring everything to the host; nothing becomes complete."""
        self._bring_back()
        for pack in self._slots.packs():
            self.send(pack, lambda name: False, _ignore)
        self.send(None, lambda name: False, _ignore)

    # On the host ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A backward begins."""
        self._out.begin()

    def finish(self, on_complete: OnComplete) -> None:
        """End of a backward: whatever has not become complete by now never gets more."""
        self.hold()
        self._out.finish(on_complete)
        if self.casts is not None:  # hooks may have come since, and with them a later update
            self.casts.forget([name for name, parameter in self._parameters.items() if has_hooks(parameter)])

    @property
    def completed(self) -> Collection[str]:
        """Weights whose gradients have become complete since `begin`."""
        return self._out.tickets.keys()

    def await_updates(self, names: Iterable[str]) -> None:
        """Return when the last updates of these weights are done."""
        self._out.await_updates(names)

    def discard(self) -> None:
        """Forget everything that is not yet in `Parameter.grad`."""
        self._slots.discard()
        self._forget_loose()
        self._out.discard()

    def close(self) -> None:
        """Free the slots."""
        self._slots.close()

    def _forget_loose(self) -> None:
        self._loose.clear()
        self._owned.clear()


def _is_plain(parameter: nn.Parameter, gradient: torch.Tensor) -> bool:
    """Whether nobody sees the gradient before the weight is updated, and what has come before can be added to it."""
    before = parameter.grad
    is_alike = before is None or (before.layout, before.dtype) == (torch.strided, gradient.dtype)
    return is_alike and not has_hooks(parameter)


def _ignore(names: list[str]) -> None: ...
