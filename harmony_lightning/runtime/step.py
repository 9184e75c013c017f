"""A training step: all microbatches forward through the packs, and back.

    forward     all microbatches go through pack 0, then through pack 1, ...; in the last pack each one finishes and
                runs its backward at once (fused), so that logits of only one microbatch are ever alive
    backward    all microbatches go back through the last but one pack, ..., pack 0; a pack whose last segment is done
                sends its gradients to the host, where `on_complete` may update its weights while others still compute,
                or is updated where it is

Which pack comes next is read off the microbatches themselves: the foremost pack that one of them waits for. So loops,
skipped layers and other orders than the plan's need no special case, only more swapping.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from harmony_lightning.runtime.layer.joint import Joint, Waiting
from harmony_lightning.runtime.lookahead import Lookahead
from harmony_lightning.runtime.microbatch import Microbatch, sending_ahead
from harmony_lightning.runtime.randomness import Stream
from harmony_lightning.runtime.running import unwatched
from harmony_lightning.runtime.transfer import Arrival
from harmony_lightning.runtime.updates.gradient_swap_out import OnComplete
from harmony_lightning.runtime.updates.update import JustInTimeUpdate
from harmony_lightning.runtime.user_code import UserCode
from harmony_lightning.runtime.visits import next_in_backward, next_in_forward, visit

Settle = Callable[[Any], tuple[torch.Tensor | None, Any]]
"""Takes a microbatch's result apart: its loss, and the result with that loss detached."""

Group = Sequence[Microbatch]


class TrainingStep:
    """One step, from the first microbatch's first layer to the last gradient.

    Attributes:
        microbatches: in their order.
        has_loss: whether some microbatch returned a loss that can be differentiated.
        is_cut: whether the microbatches are cut at pack borders.
    """

    def __init__(
        self,
        code: UserCode,
        functions: Sequence[Callable[[], Any]],
        streams: Sequence[Stream | None],
        shares: Sequence[float],
        settle: Settle,
        factor: float,
        *,
        is_cut: bool,
    ) -> None:
        """Arguments are those of `Engine.forward`, and each microbatch's random stream."""
        self.microbatches = [
            Microbatch(code.state, m, function, stream, is_cut=is_cut, may_join=is_cut)
            for m, (function, stream) in enumerate(zip(functions, streams, strict=True))
        ]
        self.has_loss = False
        self.is_cut = is_cut
        self._code = code
        self._state = code.state
        self._shares = shares
        self._settle = settle
        self._factor = factor
        self._segments_left: Counter[int] = Counter()
        """By pack: segments whose backward has not run."""
        self._uses: set[tuple[int, tuple[str, ...]]] = set()
        """Packs, each with weights that some segment uses there."""
        self._users: dict[str, set[int]] = {}
        """The same by weight, in backward."""
        self._differentiated: set[int] = set()
        """Packs that have segments with a graph."""

    def forward(self) -> list[Any]:
        """To the end of all microbatches, with the backward of the last segment of each; returns what came of them."""
        state, microbatches = self._state, self.microbatches
        state.weights.prefetch_first()
        if not self.is_cut:
            for microbatch in microbatches:
                self._run(microbatch)
                state.leave_pack()
                state.release_all()
        else:
            with visit(state, 0, microbatches, next_in_forward(state.plan, 0, microbatches)):
                for group in self._groups(0, microbatches):
                    self._run_group(group)
        while waiting := [m for m in microbatches if not m.is_done]:
            pack = min(m.waits_for for m in waiting if m.waits_for is not None)
            visitors = [m for m in waiting if m.waits_for == pack]
            with visit(state, pack, visitors, next_in_forward(state.plan, pack, waiting)):
                groups = self._groups(pack, visitors)
                if len(state.cluster.devices) > 1:
                    groups = sending_ahead(groups, state.plan.prefetch, state.travelling_nbytes)
                for group in groups:
                    self._run_group(group)
        results = [microbatch.result for microbatch in microbatches]
        for microbatch in microbatches:
            microbatch.result = None
            microbatch.replaced.clear()  # no user code will ask any more
        return results

    def backward(self, factor: float, on_complete: OnComplete, on_device: JustInTimeUpdate | None) -> None:
        """What is left of it; arguments are those of `Engine.backward`."""
        state, microbatches = self._state, self.microbatches
        if factor != self._factor:
            self._rescale(factor / self._factor)
        state.measuring.holding = None  # from here on, what waits goes
        for pack, names in self._uses:
            for name in names:
                self._users.setdefault(name, set()).add(pack)
        state.gradients.begin()
        state.weights.begin_updates(on_device)
        for pack in reversed(range(len(state.plan.packs))):
            if not self._segments_left[pack]:
                self._send(pack, on_complete)
                for device in state.plan.devices_of(pack):
                    state.weights.release(pack, device)  # the next but one comes in its place
        ahead = Lookahead(microbatches if state.plan.prefetch else (), self._code.stash.bring_back)
        while left := [m for m in microbatches if m.segments]:
            pack = max(m.segment.pack for m in left)
            visitors = [m for m in left if m.segment.pack == pack]
            with visit(state, pack, visitors, next_in_backward(state.plan, pack, left, self._differentiated)):
                state.weights.prefetch_states(pack)
                for microbatch in visitors:
                    while microbatch.segments and microbatch.segment.pack == pack:
                        ahead.begin(microbatch.segment)
                        self._backward_segment(microbatch)
                if not self._segments_left[pack]:
                    self._send(pack, on_complete)  # while the weights are there, for an update on the device
        state.weights.end_updates()
        with unwatched(state):
            state.gradients.finish(on_complete)

    def _groups(self, pack: int, visitors: Sequence[Microbatch]) -> Iterable[Group]:
        """Those that go through a pack together, as many as may be on each device. They stay in their order over all
        devices, as layers write buffers in it."""
        plan = self._state.plan
        size = self._state.memory.num_together if pack + 1 < len(plan.packs) else 1
        if size == 1:
            return [[microbatch] for microbatch in visitors]
        groups: list[list[Microbatch]] = [[]]
        on_device: Counter[int] = Counter()
        for microbatch in visitors:
            if on_device[microbatch.device.index] == size:
                groups.append([])
                on_device.clear()
            on_device[microbatch.device.index] += 1
            groups[-1].append(microbatch)
        return groups

    def _run_group(self, group: Group) -> None:
        """Let microbatches go on to the next pack; those that come to a layer with inputs of one kind call it together."""
        for microbatch in group:
            self._run(microbatch)
        while waiting := [(m, m.waiting) for m in group if m.waiting is not None]:
            here = [(m, call) for m, call in waiting if call.site is waiting[0][1].site]
            _join(here)
            for microbatch, _ in here:
                self._run(microbatch)

    def _run(self, microbatch: Microbatch) -> None:
        """Let a microbatch go on; if it comes to its end, differentiate its last segment."""
        device = microbatch.device
        self._state.turn(device)
        with self._code.running(microbatch):
            microbatch.go_on(device)
        if not microbatch.is_done:
            return
        share = self._shares[microbatch.index]
        loss, microbatch.result = self._settle(microbatch.result)
        if share == 0:
            loss = None  # it counts nothing, and may be 0 / 0
        if loss is not None:
            seed = torch.full_like(loss.detach(), share * self._factor)
            microbatch.deposit(get_gradient_edge(loss), Arrival(seed, microbatch.segment.device))
        self.has_loss |= loss is not None
        del loss  # only nodes hold the graph from here on, so that backward frees it
        if not microbatch.is_cut:
            del microbatch.segments[:-1]
            self._state.is_holding = True
            self._backward_segment(microbatch)
            self._state.is_holding = False
            return
        for segment in microbatch.segments:
            self._segments_left[segment.pack] += 1
            self._uses.add((segment.pack, tuple(segment.uses)))
            if segment.has_graph:
                self._differentiated.add(segment.pack)
        self._backward_segment(microbatch)

    def _backward_segment(self, microbatch: Microbatch) -> None:
        segment = microbatch.segment
        self._state.turn(segment.device)
        with self._code.running(microbatch, "in backward of", segment):
            microbatch.backward_segment()
        self._segments_left[segment.pack] -= 1

    def _send(self, pack: int, on_complete: OnComplete) -> None:
        with unwatched(self._state):
            self._state.gradients.send(pack, self._is_complete, on_complete)

    def _is_complete(self, name: str) -> bool:
        """Whether no segment's backward will use the weight any more."""
        return not any(self._segments_left[pack] for pack in self._users.get(name, ()))

    def _rescale(self, ratio: float) -> None:
        self._state.gradients.scale(ratio)
        for microbatch in self.microbatches:
            for _, parts in microbatch.pending.values():
                parts[:] = [Arrival(part.take() * ratio, part.device) for part in parts]


def _join(calls: Sequence[tuple[Microbatch, Waiting]]) -> None:
    """Let calls of a layer that can be joined share a joint one."""
    left = list(calls)
    while left:
        first = left[0][1]
        together = [(m, call) for m, call in left if call is first or first.is_joinable_with(call)]
        left = [one for one in left if one not in together]
        joint = Joint([call for _, call in together]) if len(together) > 1 else None
        for microbatch, _ in together:
            microbatch.joint = joint
