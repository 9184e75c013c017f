"""Harmony's rules: the tasks of one step as Harmony's simulator counts them.

Per device six lanes serve what they are given in order: swap-in, peer-in, compute, peer-out, swap-out, host. A forward turn
swaps its weights in, then per microbatch its input, and computes; where a backward pack begins inside it, that layer's
input is stashed to the host on the way. A backward turn brings its stash back, recomputes, and goes on when the gradient of
its output has come. Its gradients leave after the last microbatch, its weights are released (which costs time), and the
host updates them.

Without overlap the copies and computations of a turn follow each other. With overlap the next turn's first input is brought
while the last but one microbatch still computes, later inputs two microbatches ahead, and outputs leave during compute; but
the weights of the next turn wait for the current one's last computation, and its compute for the release.

Tasks are told in an order in which everything that one waits for was told before, and in which each lane serves them. Peer
copies occupy the sender's and the receiver's lane at once. Source: the words and the behaviour of the published simulator;
the scores that it gives the published schedules are met exactly (`benchmarks/published_schedules`).
"""

from itertools import pairwise

from harmony_lightning.plan.graph import Kind, Lane
from harmony_lightning.plan.schedule import Schedule, sources
from harmony_lightning.scheduler.clock import Event, Listener
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.rules.turns import Turn, turns


def tell_harmony(schedule: Schedule, costs: Costs, listener: Listener, *, overlap: bool) -> None:
    """Tell all tasks of one step to a listener."""
    step = _Step(schedule, costs, listener, overlap)
    for turn in turns(schedule):
        if turn.is_forward:
            step.forward(turn)
        else:
            step.backward(turn)


class _Step:
    """What the turns of a step have in common."""

    def __init__(self, schedule: Schedule, costs: Costs, listener: Listener, overlap: bool) -> None:
        self.schedule, self.costs, self.overlap = schedule, costs, overlap
        self.run, self.run_on_both = listener.run, listener.run_on_both
        self.num_devices = schedule.num_active_devices
        # A single device exchanges everything with the host, whatever the mode.
        self.is_pp = schedule.mode == "pp" and schedule.num_devices > 1
        self.host_share = costs.machine.host_share(self.num_devices)
        # A message crosses the host's memory twice.
        self.message_share = costs.machine.host_message_bytes_per_second / self.num_devices / 2
        self.sizes, self.sizes_backward = schedule.sizes_forward, schedule.sizes_backward
        self.is_same_cut = self.sizes == self.sizes_backward
        self.source = sources(self.sizes, self.sizes_backward)
        """By backward microbatch: the forward microbatch that completes it."""
        self.completes: list[list[int]] = [[] for _ in self.sizes]
        for microbatch, source in enumerate(self.source):
            self.completes[source].append(microbatch)
        self.stash_device = {first: schedule.device_backward(q) for q, (first, _) in enumerate(schedule.packs_backward)}
        self.stashed: dict[int, list[Event]] = {first: [None] * len(self.sizes_backward) for first in self.stash_device}
        """By first layer of a backward pack and backward microbatch: its stash is where backward will be."""
        self.messages: list[Event] = []
        """By backward microbatch: the input of the fused pack is on the host of its device."""

    # Turns ------------------------------------------------------------------------------------------------------------

    def forward(self, turn: Turn) -> None:
        parts = self._parts(turn)
        is_last = turn.pack == len(self.schedule.packs_forward) - 1
        leaves_by_host = not self.is_pp or (is_last and not self.is_same_cut)
        weights = None if self._input_goes_first(turn) else self._weights(turn)
        previous = weights
        for i, size in enumerate(self.sizes):
            arrived = self._input(turn, i, size, previous)
            if weights is None:
                weights = self._weights(turn)
            previous = self._compute_forward(turn, i, size, parts, arrived, weights if i == 0 else None)
            turn.computed.append(previous)
            if leaves_by_host:
                nbytes = self.costs.input_bytes(size, turn.span[1] + 1)
                left = self._host_copy(turn, Lane.SWAP_OUT, Kind.OUTPUT_OUT, i, nbytes, previous)
                turn.sent.append(left)
                if self.is_pp:
                    device = self.schedule.device_backward(len(self.schedule.packs_backward) - 1)
                    self.messages += [self._message(turn, j, turn.span[1] + 1, device, left) for j in self.completes[i]]
                else:
                    previous = left
        self._release(turn, None if self.overlap or self.is_pp else previous)

    def backward(self, turn: Turn) -> None:
        costs, compute = self.costs, turn.lane(Lane.COMPUTE)
        weights = None if self._input_goes_first(turn) else self._weights(turn)
        previous = weights
        for i, size in enumerate(self.sizes_backward):
            gradient: Event = None
            if turn.is_fused:
                arrived = self._input(turn, i, size, previous)
            else:
                nbytes = costs.input_bytes(size, turn.span[0])
                place = self._place(turn, i) if self.overlap else previous
                stash = self.stashed[turn.span[0]][i]
                arrived = self._host_copy(turn, Lane.SWAP_IN, Kind.STASH_IN, i, nbytes, stash, place)
                if self.overlap:
                    gradient = self._gradient(turn, i, size)
            if weights is None:
                weights = self._weights(turn)
            before = (arrived, weights if i == 0 else None)
            turn.recomputed.append(
                self.run(compute, costs.forward_seconds(size, turn.span), Kind.RECOMPUTE, turn.index, i, 0, *before)
            )
            if not turn.is_fused and not self.overlap:
                gradient = self._gradient(turn, i, size)
            previous = self.run(
                compute, costs.backward_seconds(size, turn.span), Kind.BACKWARD, turn.index, i, 0, gradient
            )
            turn.computed.append(previous)
            if not self.is_pp and turn.span[0] > 0:
                nbytes = costs.input_bytes(size, turn.span[0])
                previous = self._host_copy(turn, Lane.SWAP_OUT, Kind.GRADIENT_OUT, i, nbytes, previous)
                turn.sent.append(previous)
        self._finish_backward(turn, None if self.overlap or self.is_pp else previous)

    def _finish_backward(self, turn: Turn, after: Event) -> None:
        nbytes = self.costs.state_bytes(turn.span)
        if not self.is_pp and self.num_devices > 1:
            around = 2 * (self.num_devices - 1) / self.num_devices * nbytes
            seconds = around / self.costs.machine.peer_bytes_per_second
            after = self.run(turn.lane(Lane.COMPUTE), seconds, Kind.ALL_REDUCE, turn.index, 0, around, after)
        left = self._host_copy(turn, Lane.SWAP_OUT, Kind.WEIGHT_GRADIENTS_OUT, 0, nbytes, turn.computed[-1], after)
        self._release(turn, left)
        self.run(turn.lane(Lane.HOST), self.costs.update_seconds(turn.span), Kind.UPDATE, turn.index, 0, 0, left)

    # Computations and what surrounds them -----------------------------------------------------------------------------

    def _parts(self, turn: Turn) -> list[tuple[int, int]]:
        """A forward pack, cut before each layer whose input is stashed."""
        first, last = turn.span
        cuts = [first, *(layer for layer in self.stash_device if first < layer <= last), last + 1]
        return [(start, end - 1) for start, end in pairwise(cuts)]

    def _compute_forward(
        self, turn: Turn, i: int, size: int, parts: list[tuple[int, int]], arrived: Event, weights: Event
    ) -> Event:
        costs, compute, done = self.costs, turn.lane(Lane.COMPUTE), None
        for part in parts:
            stash: Event = None
            if part[0] in self.stash_device:
                if part is not parts[0]:
                    ready: tuple[Event, ...] = (done,)
                elif not self.overlap:
                    ready = (arrived,)
                elif i:
                    ready = (arrived, turn.computed[i - 1])
                else:
                    ready = (arrived, turn.left.released if turn.left else None)
                nbytes = costs.input_bytes(size, part[0])
                stash = self._host_copy(turn, Lane.SWAP_OUT, Kind.STASH_OUT, i, nbytes, *ready)
                for j in self.completes[i]:
                    self.stashed[part[0]][j] = self._message(turn, j, part[0], self.stash_device[part[0]], stash)
            seconds = costs.forward_seconds(size, part)
            waits = (arrived, weights, None if self.overlap else stash)
            done = self.run(compute, seconds, Kind.FORWARD, turn.index, i, 0, *waits)
        return done

    def _release(self, turn: Turn, after: Event) -> None:
        seconds = self.costs.machine.release_seconds
        turn.released = self.run(turn.lane(Lane.COMPUTE), seconds, Kind.RELEASE, turn.index, 0, 0, after)

    # Copies -----------------------------------------------------------------------------------------------------------

    def _input_goes_first(self, turn: Turn) -> bool:
        """Whether the first input was ordered before the weights: they share a lane."""
        by_host = not self.is_pp or not (turn.is_forward or turn.is_fused)
        return self.overlap and turn.left is not None and by_host

    def _weights(self, turn: Turn) -> Event:
        after = None
        if turn.left is not None:
            after = turn.left.computed[-1] if self.overlap else turn.left.released
        return self._host_copy(turn, Lane.SWAP_IN, Kind.WEIGHTS_IN, 0, self.costs.state_bytes(turn.span), after)

    def _input(self, turn: Turn, i: int, size: int, previous: Event) -> Event:
        place = self._place(turn, i) if self.overlap else previous
        nbytes, former = self.costs.input_bytes(size, turn.span[0]), turn.former
        ready: Event = None
        if former is not None:
            if not self.is_pp:
                ready = former.sent[self.source[i] if turn.is_fused else i]
            elif turn.is_fused and not self.is_same_cut:
                ready = self.messages[i]
            else:
                return self._peer_copy(turn, Kind.OUTPUT_PEER, i, nbytes, former.computed[i], place)
        return self._host_copy(turn, Lane.SWAP_IN, Kind.INPUT_IN, i, nbytes, ready, place)

    def _gradient(self, turn: Turn, i: int, size: int) -> Event:
        assert turn.former is not None
        left, nbytes = turn.left, self.costs.input_bytes(size, turn.span[1] + 1)
        if not self.overlap:
            place = turn.recomputed[i]
        elif i:
            place = turn.recomputed[i - 1]
        elif left is None:
            place = None
        elif not self.is_pp or not (left.is_forward or left.is_fused):
            place = left.recomputed[-1]
        else:
            place = self._place(turn, 0)
        if self.is_pp:
            return self._peer_copy(turn, Kind.GRADIENT_PEER, i, nbytes, turn.former.computed[i], place)
        return self._host_copy(turn, Lane.SWAP_IN, Kind.GRADIENT_IN, i, nbytes, turn.former.sent[i], place)

    def _place(self, turn: Turn, i: int) -> Event:
        """When input `i` has a place on the device: two inputs do."""
        if i >= 2:
            return turn.computed[i - 2]
        if turn.left is None:
            return None
        if i == 1:
            return turn.left.released
        if len(turn.left.computed) >= 2:
            return turn.left.computed[-2]
        return turn.left2.released if turn.left2 else None

    def _host_copy(self, turn: Turn, lane: Lane, kind: Kind, i: int, nbytes: float, *after: Event) -> Event:
        return self.run(turn.lane(lane), nbytes / self.host_share, kind, turn.index, i, nbytes, *after)

    def _peer_copy(self, turn: Turn, kind: Kind, i: int, nbytes: float, *after: Event) -> Event:
        assert turn.former is not None
        seconds = nbytes / self.costs.machine.peer_bytes_per_second
        out, into = turn.former.lane(Lane.PEER_OUT), turn.lane(Lane.PEER_IN)
        return self.run_on_both(out, into, seconds, kind, turn.index, i, nbytes, *after)

    def _message(self, turn: Turn, j: int, layer: int, device: int, after: Event) -> Event:
        nbytes = 0.0 if device == turn.device else self.costs.input_bytes(self.sizes_backward[j], layer)
        return self.run(turn.lane(Lane.HOST), nbytes / self.message_share, Kind.MESSAGE, turn.index, j, nbytes, after)
