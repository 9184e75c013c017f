"""Our rules: the tasks of steps as our runtime can carry them out, one step after the other.

What differs from Harmony's rules (`rules.harmony`):

    weights       those of the next pack come in portions between the inputs of the running one, into a second slot
    gradients     leave from a second slot while the next pack computes; in dp the devices first add them up, each a share
                  of the weights, and send, and have updated, that share only
    memory        slots are reused in place: nothing is released
    stashes       one process and one host: no messages, and what is on the host already is not sent again
    boundaries    in dp a pack's outputs may stay on the device until the next pack, there, has taken them
    updates       the next step's forward waits for the update of its own pack only; nothing else is between two steps

Without prefetch there is one slot for weights and one for gradients. Inputs are brought two microbatches ahead, and a
computation waits until what the one before last left has gone.
"""

from itertools import pairwise

from harmony_lightning.plan.graph import Kind, Lane
from harmony_lightning.plan.schedule import Schedule, sources
from harmony_lightning.scheduler.clock import Event, Listener
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.rules.turns import Turn, turns


class OwnSteps:
    """Tells one step after another to a listener."""

    def __init__(self, schedule: Schedule, costs: Costs, listener: Listener) -> None:
        self.schedule, self.costs = schedule, costs
        self.run, self.run_on_both = listener.run, listener.run_on_both
        self.num_devices = schedule.num_active_devices
        self.is_pp = schedule.mode == "pp" and schedule.num_devices > 1
        self.host_share = costs.machine.host_share(self.num_devices)
        self.sizes, self.sizes_backward = schedule.sizes_forward, schedule.sizes_backward
        self.source = sources(self.sizes, self.sizes_backward)
        self.stash_layers = [first for first, _ in schedule.packs_backward]
        self.is_by_host = not self.is_pp and schedule.boundary == "host"
        self.stashed: dict[int, list[Event]] = {}
        """By first layer of a backward pack, per forward microbatch: its stash is on the host."""
        self.updated: list[Event] = [None] * len(schedule.packs_backward)
        self.arriving: dict[int, Event] = {}
        """By index of a turn: when the last portion of its weights is there."""
        self._turns: list[Turn] = []

    def step(self) -> None:
        """Tell the next step."""
        upcoming = list(turns(self.schedule, self._turns))
        following: dict[int, Turn] = {}
        for turn in reversed(upcoming):
            turn.right = following.get(turn.device)
            following[turn.device] = turn
        for turn in upcoming:
            if turn.is_forward:
                self._forward(turn)
            else:
                self._backward(turn)
        self._turns = upcoming

    # Turns ------------------------------------------------------------------------------------------------------------

    def _forward(self, turn: Turn) -> None:
        parts = self._parts(turn)
        weights = self._weights(turn)
        gone: list[Event] = []
        for first, _ in parts:
            if first in self.stash_layers:
                self.stashed[first] = []
        for i, size in enumerate(self.sizes):
            arrived = self._input(turn, i, i, size)
            self._portion(turn, i, len(self.sizes))
            before = (arrived, weights if i == 0 else None, gone[i - 2] if i >= 2 else None)
            done, left = self._compute_forward(turn, i, size, parts, before)
            turn.computed.append(done)
            if not self.is_pp and (self.is_by_host or turn.span[1] + 1 in self.stash_layers[:-1]):
                # The next pack's input, which is its first stash too, if backward needs one there.
                nbytes = self.costs.input_bytes(size, turn.span[1] + 1)
                kind = Kind.OUTPUT_OUT if self.is_by_host else Kind.STASH_OUT
                left = self._host_copy(turn, Lane.SWAP_OUT, kind, i, nbytes, done)
                turn.sent.append(left)
            gone.append(left)

    def _compute_forward(
        self, turn: Turn, i: int, size: int, parts: list[tuple[int, int]], before: tuple[Event, ...]
    ) -> tuple[Event, Event]:
        """The end of the last part, and of the last copy to the host."""
        done: Event = None
        left: Event = None
        for part in parts:
            if part[0] in self.stash_layers:
                if part is not parts[0]:
                    nbytes = self.costs.input_bytes(size, part[0])
                    left = self._host_copy(turn, Lane.SWAP_OUT, Kind.STASH_OUT, i, nbytes, done)
                elif turn.former is None:
                    left = None  # the minibatch itself is on the host
                elif self.is_pp:
                    nbytes = self.costs.input_bytes(size, part[0])
                    left = self._host_copy(turn, Lane.SWAP_OUT, Kind.STASH_OUT, i, nbytes, before[0])
                else:
                    left = turn.former.sent[i]
                self.stashed[part[0]].append(left)
            seconds = self.costs.forward_seconds(size, part)
            done = self.run(turn.lane(Lane.COMPUTE), seconds, Kind.FORWARD, turn.index, i, 0, *before)
            before = ()
        return done, left

    def _backward(self, turn: Turn) -> None:
        costs, compute = self.costs, turn.lane(Lane.COMPUTE)
        weights = self._weights(turn)
        former_slot = turn.left2 if self.schedule.prefetch else turn.left
        slot = former_slot.released if former_slot is not None else None
        for i, size in enumerate(self.sizes_backward):
            gradient: Event = None
            if turn.is_fused:
                arrived = self._input(turn, i, self.source[i], size)
            else:
                nbytes, stash = costs.input_bytes(size, turn.span[0]), self.stashed[turn.span[0]][self.source[i]]
                place = self._place(turn, i)
                arrived = self._host_copy(turn, Lane.SWAP_IN, Kind.STASH_IN, i, nbytes, stash, place)
                gradient = self._gradient(turn, i, size)
            self._portion(turn, i, len(self.sizes_backward))
            waits = (arrived, weights if i == 0 else None, turn.sent[i - 2] if turn.sent and i >= 2 else None)
            seconds = costs.forward_seconds(size, turn.span)
            turn.recomputed.append(self.run(compute, seconds, Kind.RECOMPUTE, turn.index, i, 0, *waits))
            seconds = costs.backward_seconds(size, turn.span)
            done = self.run(compute, seconds, Kind.BACKWARD, turn.index, i, 0, gradient, slot if i == 0 else None)
            turn.computed.append(done)
            if self.is_by_host and turn.span[0] > 0:
                nbytes = costs.input_bytes(size, turn.span[0])
                turn.sent.append(self._host_copy(turn, Lane.SWAP_OUT, Kind.GRADIENT_OUT, i, nbytes, done))
        self._update(turn)

    def _update(self, turn: Turn) -> None:
        nbytes, ready = self.costs.weight_bytes(turn.span), turn.computed[-1]
        seconds = self.costs.update_seconds(turn.span)
        if not self.is_pp and self.num_devices > 1:
            others = (self.num_devices - 1) / self.num_devices * nbytes
            copying = others / self.costs.machine.peer_bytes_per_second
            out, into = turn.lane(Lane.PEER_OUT), turn.lane(Lane.PEER_IN)
            ready = self.run_on_both(out, into, copying, Kind.ALL_REDUCE, turn.index, 0, others, ready)
            nbytes -= others
            seconds /= self.num_devices
        turn.released = self._host_copy(turn, Lane.SWAP_OUT, Kind.WEIGHT_GRADIENTS_OUT, 0, nbytes, ready)
        host = turn.lane(Lane.HOST)
        self.updated[turn.pack] = self.run(host, seconds, Kind.UPDATE, turn.index, 0, 0, turn.released)

    # Copies -----------------------------------------------------------------------------------------------------------

    def _parts(self, turn: Turn) -> list[tuple[int, int]]:
        first, last = turn.span
        cuts = [first, *(layer for layer in self.stash_layers if first < layer <= last), last + 1]
        return [(start, end - 1) for start, end in pairwise(cuts)]

    def _weights(self, turn: Turn) -> Event:
        """All of a turn's weights: they have been coming since the turn before, or they come now."""
        if turn.index in self.arriving:
            return self.arriving.pop(turn.index)
        before = turn.left2 if self.schedule.prefetch else turn.left
        slot = before.computed[-1] if before else None
        nbytes = self.costs.state_bytes(turn.span)
        return self._host_copy(turn, Lane.SWAP_IN, Kind.WEIGHTS_IN, 0, nbytes, slot, *self._updates(turn))

    def _portion(self, turn: Turn, i: int, count: int) -> None:
        """Between two inputs of this turn, a portion of the next turn's weights."""
        following = turn.right
        if following is None or not self.schedule.prefetch:
            return
        slot = turn.left.computed[-1] if turn.left is not None else None
        nbytes = self.costs.state_bytes(following.span) / count
        waits = (slot, *self._updates(following)) if i == 0 else ()
        self.arriving[following.index] = self._host_copy(following, Lane.SWAP_IN, Kind.WEIGHTS_IN, i, nbytes, *waits)

    def _updates(self, turn: Turn) -> list[Event]:
        """What the step before made of these layers; backward finds what forward waited for."""
        if not (turn.is_forward or turn.is_fused):
            return []
        packs = enumerate(self.schedule.packs_backward)
        return [self.updated[q] for q, (first, last) in packs if first <= turn.span[1] and turn.span[0] <= last]

    def _input(self, turn: Turn, i: int, source: int, size: int) -> Event:
        nbytes, former = self.costs.input_bytes(size, turn.span[0]), turn.former
        if former is None:
            return self._host_copy(turn, Lane.SWAP_IN, Kind.INPUT_IN, i, nbytes, self._place(turn, i))
        if self.is_by_host:
            place = self._place(turn, i)
            return self._host_copy(turn, Lane.SWAP_IN, Kind.INPUT_IN, i, nbytes, former.sent[source], place)
        if not self.is_pp:
            return former.computed[source]
        return self._peer_copy(turn, Kind.OUTPUT_PEER, i, nbytes, former.computed[source], self._place(turn, i))

    def _gradient(self, turn: Turn, i: int, size: int) -> Event:
        assert turn.former is not None
        nbytes = self.costs.input_bytes(size, turn.span[1] + 1)
        if self.is_by_host:
            place = self._place(turn, i)
            return self._host_copy(turn, Lane.SWAP_IN, Kind.GRADIENT_IN, i, nbytes, turn.former.sent[i], place)
        if not self.is_pp:
            return turn.former.computed[i]
        return self._peer_copy(turn, Kind.GRADIENT_PEER, i, nbytes, turn.former.computed[i], self._place(turn, i))

    def _place(self, turn: Turn, i: int) -> Event:
        """When input `i` has a place on the device: two inputs do."""
        if i >= 2:
            return turn.computed[i - 2]
        if turn.left is None:
            return None
        if i == 1:
            return turn.left.computed[-1]
        if len(turn.left.computed) >= 2:
            return turn.left.computed[-2]
        return turn.left2.computed[-1] if turn.left2 else None

    def _host_copy(self, turn: Turn, lane: Lane, kind: Kind, i: int, nbytes: float, *after: Event) -> Event:
        return self.run(turn.lane(lane), nbytes / self.host_share, kind, turn.index, i, nbytes, *after)

    def _peer_copy(self, turn: Turn, kind: Kind, i: int, nbytes: float, *after: Event) -> Event:
        assert turn.former is not None
        seconds = nbytes / self.costs.machine.peer_bytes_per_second
        out, into = turn.former.lane(Lane.PEER_OUT), turn.lane(Lane.PEER_IN)
        return self.run_on_both(out, into, seconds, kind, turn.index, i, nbytes, *after)
