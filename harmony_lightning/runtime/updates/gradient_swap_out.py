"""Swap-out of gradients: out of device memory, through buffers on the host, into `Parameter.grad`.

The controller enqueues the copies and goes on; the worker waits for them and adds up what arrives. What is not complete
yet, as other packs have a part of it too, waits on the host for the rest.

Hooks on parameters are given what one backward over the whole minibatch would give them: its complete gradient, once, on
the host, where the parameter is. They run on the controller, at the end of backward, through autograd itself.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster, Event, Lane
from harmony_lightning.plan import Plan, Urgency
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.updates.device_sums import pass_on
from harmony_lightning.runtime.updates.gradient_slots import GradientSlot
from harmony_lightning.runtime.updates.host_buffers import HostBuffers
from harmony_lightning.runtime.weights.arena import Layout, lay_out, layout_nbytes, narrow_types
from harmony_lightning.runtime.worker import HostWorker, Ticket

LAST = sys.maxsize
"""Priority of a job that comes behind all others that wait."""

OnComplete = Callable[[list[str]], None]
"""Called on the worker thread with names whose `Parameter.grad` has become complete."""

Arrived = dict[str, torch.Tensor]
"""Gradients on the host, by weight."""


class GradientSwapOut:
    """The way out of all gradients, from the moment when a device has no more use for them."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        cluster: Cluster,
        counters: Counters,
        worker: HostWorker,
        before: Callable[[Collection[str], OnComplete], Sequence[Event]],
        behind: Callable[[frozenset[str], OnComplete, Ticket, int], None],
    ) -> None:
        """`before` tells the points that must be reached before these weights' gradients are complete, as they may be
        updated then; `behind` is told of the job that does both, and of its priority."""
        self._parameters = parameters
        self._order = {name: index for index, name in enumerate(parameters)}
        self._plan = plan
        self._devices = cluster.devices
        self._counters = counters
        self._worker = worker
        self._before = before
        self._behind = behind
        self._buffers = HostBuffers(cluster, worker, plan.gradient_buffers)
        self._narrow_buffers = HostBuffers(cluster, worker, plan.gradient_buffers)
        self._narrow_layouts: list[Layout] = [
            lay_out(parameters, names, narrow_types(plan, names))
            for names in ([n for n in pack.narrow if parameters[n].requires_grad] for pack in plan.packs)
        ]
        self._parts: Arrived = {}
        """What has arrived of gradients that are not complete. Only the worker touches it."""
        self._for_hooks: Arrived = {}
        """Complete, but hooks of the user's come before `Parameter.grad`. The worker adds, `_deliver` takes."""
        self.tickets: dict[str, Ticket] = {}
        """By weight: the job that has made its gradient complete, and updates it if updates are just in time."""
        self.in_parts: dict[str, Ticket] = {}
        """By weight of which some part has been sent in this backward: the job that deals with the last one."""

    def begin(self) -> None:
        """A backward begins."""
        self.tickets.clear()
        self._buffers.begin()
        self._narrow_buffers.begin()

    @torch.inference_mode(False)
    @torch.no_grad()
    def send(
        self,
        slots: Sequence[GradientSlot],
        complete: frozenset[str],
        on_complete: OnComplete,
        landings: Sequence[torch.Tensor] = (),
    ) -> None:
        """Empty a slot; weights in `complete` get no more parts. Or several of one pack, which are added up by means of
        `landings`."""
        slot = slots[-1]
        if not slot.written:
            slot.empty()
            return
        nbytes = layout_nbytes(slot.layout)
        in_turn = len(complete) < len(slot.written) or not complete.isdisjoint(self.in_parts)
        urgency: Urgency = "next" if in_turn else self._plan.urgency(slot.pack)
        buffer = self._buffers.take(nbytes, urgency)
        if len(slots) > 1:
            slot.narrow.clear()  # sums have more digits
        narrow = self._leave_narrow(slot)
        narrow_layout = {name: self._narrow_layouts[slot.pack][name] for name in narrow}
        narrow_nbytes = layout_nbytes(self._narrow_layouts[slot.pack])
        narrow_buffer = self._narrow_buffers.take(narrow_nbytes, urgency) if narrow else None
        arrived = self._buffers.lend(buffer, slot.layout, slot.written)
        as_left = self._narrow_buffers.lend(narrow_buffer, narrow_layout, narrow) if narrow_buffer is not None else {}
        self._counters.swap_out_bytes += sum((as_left.get(name, arrived[name])).nbytes for name in arrived)
        self._counters.p2p_bytes += (len(slots) - 1) * nbytes
        if len(slots) > 1:
            left = pass_on(slots, self._devices, landings, None if narrow else buffer)
        if len(slots) == 1 or narrow:
            left = self._leave(slot, buffer, narrow_buffer, narrow_layout)

        @torch.no_grad()
        def take() -> Arrived:
            while as_left:
                name, gradient = as_left.popitem()
                arrived[name].copy_(gradient)
            return arrived

        priority = 0 if in_turn else self._plan.update_priority(slot.pack)
        ticket = self._submit(take, arrived.keys(), complete, on_complete, left, priority)
        self._buffers.follow(buffer, ticket, urgency)
        if narrow_buffer is not None:
            self._narrow_buffers.follow(narrow_buffer, ticket, urgency)

    def _leave(
        self, slot: GradientSlot, buffer: torch.Tensor, narrow_buffer: torch.Tensor | None, narrow: Layout
    ) -> Event:
        """Copy what is in a slot to the host."""
        owner, nbytes = self._devices[slot.device], layout_nbytes(slot.layout)
        owner.wait(Lane.SWAP_OUT, owner.record(Lane.COMPUTE))
        with owner.lane(Lane.SWAP_OUT, f"gradients of pack {slot.pack}"):
            if len(slot.written) == len(slot.layout) and narrow_buffer is None:
                buffer[:nbytes].copy_(slot.bytes[:nbytes], non_blocking=True)
            else:
                for name, view in slot.written.items():
                    if narrow_buffer is None or name not in narrow:
                        slot.layout[name].view(buffer).copy_(view, non_blocking=True)
                    else:  # cast here: a copy to the host that casts would carry all bytes, and wait
                        region = narrow[name]
                        region.view(narrow_buffer).copy_(view.to(region.dtype), non_blocking=True)
        slot.left = owner.record(Lane.SWAP_OUT)
        slot.empty()
        return slot.left

    def _leave_narrow(self, slot: GradientSlot) -> list[str]:
        """Gradients that travel in the type of narrow weights."""
        is_half = self._plan.gradient_wire == "half"
        return [name for name in self._narrow_layouts[slot.pack] if name in (slot.written if is_half else slot.narrow)]

    def send_arrived(self, arrived: Arrived, complete: frozenset[str], on_complete: OnComplete) -> None:
        """Gradients that are on the host already; those in `complete` get no more parts."""
        self._submit(lambda: arrived, arrived.keys(), complete, on_complete)

    def finish(self, on_complete: OnComplete) -> None:
        """End of a backward: whatever has not become complete by now never gets more."""
        complete = frozenset(self.in_parts)
        self._submit(self._take_parts, complete, complete, on_complete, priority=LAST)
        if any(has_hooks(parameter) for parameter in self._parameters.values()):
            self._worker.drain()
            self._deliver(on_complete)

    def _take_parts(self) -> Arrived:
        parts, self._parts = self._parts, {}
        return parts

    def _submit(
        self,
        take: Callable[[], Arrived],
        names: Collection[str],
        complete: frozenset[str],
        on_complete: OnComplete,
        arrival: Event | None = None,
        priority: int = 0,
    ) -> Ticket:
        """Have the worker deal with gradients of these names, which reach the host at `arrival`; those in `complete` get no
        more parts."""
        events = [*self._before(complete, on_complete), *([arrival] if arrival is not None else [])]
        incomplete = [name for name in names if name not in complete]
        earlier = dict.fromkeys(self.in_parts.pop(name) for name in names if name in self.in_parts)

        def receive() -> None:
            for ticket in earlier:  # parts that came from other devices, perhaps later than this one
                ticket.wait()
            for event in events:
                event.synchronize()
            self._receive(take(), complete, on_complete)

        ticket = self._worker.submit(receive, priority)
        self.in_parts.update(dict.fromkeys(incomplete, ticket))
        self.tickets.update(dict.fromkeys(complete, ticket))
        self._behind(complete, on_complete, ticket, priority)
        return ticket

    @torch.no_grad()
    def _receive(self, arrived: Arrived, complete: frozenset[str], on_complete: OnComplete) -> None:
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
        on_complete(sorted(complete - self._for_hooks.keys(), key=self._order.__getitem__))

    def _deliver(self, on_complete: OnComplete) -> None:
        """Let autograd put gradients of parameters with hooks into `Parameter.grad`: it runs all kinds of hooks in its
        order, and all in one backward, which is what hooks for several parameters wait for."""
        arrived, self._for_hooks = self._for_hooks, {}
        if arrived:
            torch.autograd.backward([self._parameters[name] for name in arrived], list(arrived.values()))
            on_complete(list(arrived))

    def await_updates(self, names: Iterable[str]) -> None:
        """Return when the last updates of these weights are done."""
        for ticket in {ticket for name in names if (ticket := self.tickets.get(name)) is not None}:
            ticket.wait()
        self._worker.raise_error()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply what waits on the host for the rest."""
        self._worker.drain()
        for part in self._parts.values():
            part.mul_(factor)

    def discard(self) -> None:
        """Forget everything that is not yet in `Parameter.grad`."""
        self._worker.drain()
        self._parts.clear()
        self._for_hooks.clear()


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether the user watches the gradient of this parameter, and it trains at present."""
    return parameter.requires_grad and bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)  # type: ignore[attr-defined]
