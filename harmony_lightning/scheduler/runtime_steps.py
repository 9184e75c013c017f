"""The runtime's rules: the tasks of steps in the order in which the engine enqueues them.

What differs from what a schedule could ask for (`own.py`): packs and microbatches are the same both ways; in pp a pack is
on the same device both ways; every layer recomputes by itself, but for the very last one, which keeps its activations; each
copy waits for what was enqueued on its device when it was asked for (`runtime.transfer`, `runtime.stash`).

The controller runs ahead of all devices, which is why "enqueued so far" is what orders things. It waits when the gradients
of too many packs are on the host, for the update of a pack that it is about to use, and at the end of a step for all copies
between devices and host.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from harmony_lightning.plan import Urgency
from harmony_lightning.plan.graph import NUM_LANES, Kind, Lane, TaskGraph
from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.scheduler.clock import Clock, Event, Listener, Recorder
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.fair import fair_times
from harmony_lightning.scheduler.runtime_slots import GradientSlots, Point, WeightSlots
from harmony_lightning.scheduler.sized_plan import sized_plan

_TURNS_HELD = 2
"""Microbatches behind which compute waits for copies that read its memory (`runtime.transfer`)."""
_UPDATE_ACCESSES = 8
"""Of memory in a step of Adam: four values are read, and written as far as torch tells, though the gradient is not."""
_ADDITION_ACCESSES = 3
"""Of memory, when one gradient is added to another."""
_IN_TURN: Urgency = "next"
"""Of gradients that come in parts."""
_INPUT_ACCESSES = 3
"""Of host memory, when a part of the minibatch is put where devices copy from."""
_NUM_STEPS = 4
"""The first steps are not in full flow."""


@dataclass(slots=True, eq=False)
class _Departing:
    """Copies that read a device's memory, enqueued since another microbatch came to the device."""

    number: int
    nbytes: float = 0.0
    ends: list[Event] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Device:
    weights: WeightSlots
    gradients: GradientSlots
    states: "deque[Point]"
    """When what was in each slot for updates that packs share has left; used least recently first."""
    computed: Event = None
    """Behind all computations that were enqueued."""
    awaited: list[Event] = field(default_factory=list)
    """What the next computation waits for."""
    turn: int = 0
    to_host: "deque[_Departing]" = field(default_factory=deque)
    to_peers: "deque[_Departing]" = field(default_factory=deque)
    landing: tuple[float, Point] | None = None
    """Memory that is set aside for what comes next from another device: bytes, and when it is free."""
    landed_nbytes: float | None = None
    """What came last from another device."""

    def now(self) -> Point:
        """Behind all that compute was given so far."""
        return (self.computed, *self.awaited)


class RuntimeSteps:
    """Tells one step after another to a listener."""

    def __init__(self, schedule: Schedule, costs: Costs, listener: Listener) -> None:
        self.schedule, self.costs = schedule, costs
        self.run, self.run_on_both = listener.run, listener.run_on_both
        plan = self.plan = sized_plan(schedule, costs)
        self.packs = schedule.packs_backward
        self.sizes = split(schedule.minibatch, schedule.microbatch_backward)
        count, num_devices = len(self.sizes), schedule.num_devices
        self.places = [
            tuple(plan.device(p, m) for m in range(count)) if plan.is_dealt(p) else (plan.device(p, 0),) * count
            for p in range(len(self.packs))
        ]
        """By pack and microbatch, the device."""
        self.visitors = [list(dict.fromkeys(places)) for places in self.places]
        self.goes_back = [costs.profile.glue_bytes > 0] * len(self.packs)
        """Whether gradients go through a pack."""
        for p, pack in enumerate(plan.packs):
            self.goes_back[p] |= pack.trainable_nbytes > 0 or (p > 0 and self.goes_back[p - 1])
        self._following = _following(self.visitors)
        self._followed = _following(self.visitors[::-1])
        active = len({d for visitors in self.visitors for d in visitors})
        self.host_share = costs.machine.host_share(active)
        self._num_buffers = plan.gradient_buffers
        self.devices: list[_Device] = []
        for d in range(num_devices):
            now = functools.partial(self._now, d)
            weights = WeightSlots(plan, d, functools.partial(self._swap_in, d), self._finish, now)
            states = deque[Point]([()] * (1 + schedule.prefetch))
            self.devices.append(_Device(weights, GradientSlots(plan, d), states))
        self.states: dict[int, Event] = {}
        """By pack: what the optimizer remembers of it has come to the device that updates it."""
        self.weights_there: dict[int, Event] = {}
        """By pack that stays where it is updated: its newest weights are there."""
        self._kept = frozenset((*schedule.keep, schedule.num_layers - 1))
        self._backward_seconds = cache(self._sum_backward_seconds)
        self.updated: list[Event] = [None] * len(self.packs)
        self.on_host: dict[Urgency, deque[tuple[float, Event]]] = {urgency: deque() for urgency in self._num_buffers}
        """Host buffers that gradients have taken last, by urgency: their bytes, and the updates that free them."""
        self.dealt_with: list[tuple[float, Event]] = []
        """Those before."""
        self.controller: Event = None
        self._copied: dict[int, Event] = {}
        """By lane: behind the last copy between a device and the host."""
        self.updates: list[tuple[Event, int]] = []
        """With their priorities: of those whose gradients have come, the host does the lowest first."""
        self.starts: list[Event] = []
        """First computation of each step."""
        self._turn = 0
        self.travelling_nbytes = costs.machine.memory_bytes // 16 if schedule.prefetch else 0

    def step(self) -> None:
        """Tell the next step."""
        last, count = len(self.packs) - 1, len(self.sizes)
        for d, device in enumerate(self.devices):
            first = next((p for p, visitors in enumerate(self.visitors) if d in visitors), None)
            if first is not None:
                device.weights.prefetch(first)
        self.outputs: list[Point] = [()] * count
        """By microbatch: its output is computed."""
        self.gradients: list[Event] = [None] * count
        """By microbatch: the gradient of the next pack's input has arrived."""
        self.stashed: dict[tuple[int, int], Event] = {}
        self._brought: dict[tuple[int, int, bool], Event] = {}
        """By pack and microbatch: the stash of the last layer is back, and those of the others."""
        for pack in range(last + 1):
            self._forward(pack)
        self._send(last)
        for d in self.visitors[last]:
            self.devices[d].weights.release(last)
        self._look_ahead([(p, m) for p in range(last - 1, -1, -1) if self.goes_back[p] for m in range(count)])
        for pack in range(last - 1, -1, -1):
            if self.goes_back[pack]:
                self._backward(pack)
        for device in self.devices:
            device.weights.end_step(lambda pack: self.plan.packs[pack].trainable_nbytes > 0)
            for departing in (*device.to_host, *device.to_peers):
                device.awaited += departing.ends
            device.to_host.clear()
            device.to_peers.clear()
            device.landing = device.landed_nbytes = None
        self._wait(*self._copied.values())

    # Visits -----------------------------------------------------------------------------------------------------------

    def _forward(self, pack: int) -> None:
        is_fused, turn = pack == len(self.packs) - 1, self._next_turn()
        upcoming = dict(self._following[pack])
        leaves = self.goes_back[pack] and self.schedule.stash == "host" and pack not in self.schedule.stash_stays
        for group, arrived in self._sending_ahead(pack, turn):
            d = self.places[pack][group[0]]
            for m in group:
                self._begin_turn(d)
                if pack == 0:
                    self._bring_input(d, turn, m)
            weights = self._acquire(d, pack, upcoming)
            seconds = self._forward_seconds(group, self.packs[pack])
            done = self._compute(d, seconds, Kind.FORWARD, turn, group[0], *arrived, weights)
            if pack == group[0] == 0:
                self.starts.append(done)
            for m in group:
                self.outputs[m] = self.devices[d].now()
                if is_fused:
                    self._begin_turn(d)
                    self._compute_backward(pack, turn, m)
                elif leaves:
                    nbytes = self.costs.stash_bytes(self.sizes[m], self.packs[pack])
                    left = self._host_copy(d, Lane.SWAP_OUT, Kind.STASH_OUT, turn, m, nbytes, done)
                    self.stashed[pack, m] = left
                    self._hold(self.devices[d].to_host, d, nbytes, left)
        self._leave(pack, self._following[pack])

    def _bring_input(self, d: int, turn: int, m: int) -> None:
        """Of the minibatch: the controller puts it where a device can copy it from, and user code waits for that copy."""
        nbytes = self.costs.input_bytes(self.sizes[m], 0)
        self._wait(nbytes=_INPUT_ACCESSES * nbytes)
        self._compute(d, nbytes / self.host_share, Kind.INPUT_IN, turn, m, nbytes=nbytes)

    def _forward_seconds(self, group: Sequence[int], span: tuple[int, int]) -> float:
        """A joint call may be larger than any that was profiled: as of several of those then. What it takes is put
        together, and what it returns is taken apart."""
        samples = sum(self.sizes[m] for m in group)
        if len(group) == 1:
            return self.costs.forward_seconds(samples, span)
        full, rest = divmod(samples, self.costs.profile.microbatch_sizes.forward[-1])
        sizes = [self.costs.profile.microbatch_sizes.forward[-1]] * full + [rest] * (rest > 0)
        copied = sum(2 * self.costs.input_bytes(samples, q) for q in range(span[0], span[1] + 1))
        copied += sum(2 * self.costs.input_bytes(samples, q + 1) for q in range(span[0], span[1] + 1))
        return sum(self.costs.forward_seconds(size, span) for size in sizes) + self.costs.device_seconds(copied)

    def _groups(self, pack: int) -> list[Sequence[int]]:
        """Microbatches that go through a pack together, as `runtime.step` forms them."""
        size = self.schedule.microbatches_per_forward if pack + 1 < len(self.packs) else 1
        if size == 1:
            return [(m,) for m in range(len(self.sizes))]
        places = self.places[pack]
        here = [[m for m, place in enumerate(places) if place == d] for d in self.visitors[pack]]
        columns = [[of[i : i + size] for i in range(0, len(of), size)] for of in here]
        return [group for row in itertools.zip_longest(*columns, fillvalue=()) for group in row if group]

    def _sending_ahead(self, pack: int, turn: int) -> Iterator[tuple[Sequence[int], list[Event]]]:
        """Groups, and when what they need is there: as `runtime.microbatch.sending_ahead`."""
        groups, layer = self._groups(pack), self.packs[pack][0]
        entering = [sum(self.costs.input_bytes(self.sizes[m], layer) for m in group) for group in groups]
        arrived: list[list[Event]] = []
        travelling = 0.0
        for index, group in enumerate(groups):
            while pack and len(arrived) < len(groups):
                n = len(arrived)
                if n > index + self.schedule.prefetch and travelling + entering[n] > self.travelling_nbytes:
                    break
                arrived.append([self._send_output(pack, turn, m) for m in groups[n]])
                travelling += entering[n]
            travelling -= entering[index]
            yield group, arrived[index] if pack else []

    def _send_output(self, pack: int, turn: int, m: int) -> Event:
        """Of the pack before, for this one; None if it is where it is needed."""
        source, target = self.places[pack - 1][m], self.places[pack][m]
        if source == target:
            return None
        nbytes = self.costs.input_bytes(self.sizes[m], self.packs[pack][0])
        return self._peer(turn, Kind.OUTPUT_PEER, source, target, m, nbytes, self.outputs[m])

    def _backward(self, pack: int) -> None:
        turn = self._next_turn()
        back = len(self.packs) - 1 - pack
        following = {d: len(self.packs) - 1 - p for d, p in self._followed[back].items()}
        following = {d: p for d, p in following.items() if self.goes_back[p]}
        upcoming = dict(following)
        self._bring_states(pack)
        for m in range(len(self.sizes)):
            d = self.places[pack][m]
            ahead = self._ahead.pop((pack, m), None)
            if ahead is not None:
                self._bring_back(ahead)
            elif not self.schedule.prefetch:
                self._bring_stash(pack, m, is_first=True)
            self._begin_turn(d)
            weights = self._acquire(d, pack, upcoming)
            self._compute_backward(pack, turn, m, self.gradients[m], weights)
        self._send(pack)
        self._leave(pack, following)

    def _compute_backward(self, pack: int, turn: int, m: int, *after: Event) -> None:
        """And the gradient of its input goes to where that was computed."""
        d, (first, last), size = self.places[pack][m], self.packs[pack], self.sizes[m]
        device = self.devices[d]
        seconds = self._backward_seconds(size, (first, last))
        left: Point = ()
        if self.places[pack].index(d) == m:  # the first one here: its gradients are put where those of others are added
            left = device.gradients.enter(pack)
            seconds = max(0.0, seconds - self.costs.device_seconds(self.costs.gradient_bytes((first, last))))
        if left or (first < last and (pack, m) in self.stashed):
            # The last layer waits for its own stash alone, and has made its gradients before they need others' place.
            begin = min(seconds, self._backward_seconds(size, (last, last)))
            self._compute(d, begin, Kind.BACKWARD, turn, m, *after, self._brought.pop((pack, m, True), None))
            self._bring_stash(pack, m, is_first=False)
            seconds, after = seconds - begin, left
        else:
            after = (*after, self._brought.pop((pack, m, True), None))
        self._compute(d, seconds, Kind.BACKWARD, turn, m, *after, self._brought.pop((pack, m, False), None))
        if pack == 0 or not self.goes_back[pack - 1]:
            return
        source, target = d, self.places[pack - 1][m]
        self.gradients[m] = device.computed
        if source != target:
            nbytes = self.costs.input_bytes(size, first)
            self.gradients[m] = self._peer(turn, Kind.GRADIENT_PEER, source, target, m, nbytes, device.now())

    def _sum_backward_seconds(self, size: int, span: tuple[int, int]) -> float:
        """Recompute included, but for layers that keep their activations."""
        seconds = self.costs.backward_seconds(size, span) + self.costs.forward_seconds(size, span)
        if self.schedule.microbatches_per_forward > 1 and span[1] < self.packs[-1][0]:
            # A joint call leaves no graph, so that layers are run again as a whole.
            seconds += self.costs.forward_seconds(size, span) - self.costs.recompute_seconds(size, span)
        kept = (layer for layer in range(span[0], span[1] + 1) if layer in self._kept)
        return max(0.0, seconds - sum(self.costs.recompute_seconds(size, (layer, layer)) for layer in kept))

    def _look_ahead(self, order: Sequence[tuple[int, int]]) -> None:
        """Of visits in backward: which others' stashes set out when they begin; those of the first ones do at once."""
        self._ahead: dict[tuple[int, int], tuple[int, int]] = {}
        latest: dict[int, tuple[int, int]] = {}
        for visit in order if self.schedule.prefetch else ():
            d = self.places[visit[0]][visit[1]]
            if d in latest:
                self._ahead[latest[d]] = visit
            else:
                self._bring_back(visit)
            latest[d] = visit

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn - 1

    # Weights and gradients --------------------------------------------------------------------------------------------

    def _acquire(self, d: int, pack: int, upcoming: dict[int, int]) -> Event:
        weights = self.devices[d].weights
        arrived = weights.acquire(pack)
        following = upcoming.pop(d, None)
        if following is not None:
            weights.prefetch(following)
        return arrived

    def _leave(self, pack: int, following: dict[int, int]) -> None:
        for d in following:
            self.devices[d].weights.release(pack)

    def _swap_in(self, d: int, pack: int, released: Point) -> Event:
        waits = (*released, self.updated[pack], self.controller)
        if (newer := self.weights_there.get(pack)) is not None:
            seconds, lane = self._device_seconds(pack, 2), NUM_LANES * d + Lane.SWAP_IN
            return self.run(lane, seconds, Kind.WEIGHTS_IN, self._turn, 0, 0, *waits, newer)
        nbytes = self.plan.packs[pack].nbytes
        return self._host_copy(d, Lane.SWAP_IN, Kind.WEIGHTS_IN, self._turn, 0, nbytes, *waits)

    def _finish(self, pack: int) -> None:
        """A swap-in must have been enqueued, which is done behind the last update of the weights."""
        if self.updated[pack] is not None:
            self._wait(self.updated[pack])

    def _wait(self, *events: Event, nbytes: float = 0.0) -> None:
        """The controller does, and reads and writes so many bytes of host memory."""
        seconds = nbytes / (2 * self.costs.machine.host_message_bytes_per_second)
        self.controller = self.run(int(Lane.CONTROLLER), seconds, Kind.WAIT, self._turn, 0, nbytes, *events)

    def _send(self, pack: int) -> None:
        """Gradients go to the host, and the weights are stepped there."""
        turn, span = self._turn - 1, self.packs[pack]
        home, *others = self.visitors[pack]
        nbytes = self.costs.gradient_bytes(span)
        if not nbytes:
            return
        is_in_parts = bool(others) and pack in self.schedule.dealt and self.plan.packs[pack].update == "host"
        if is_in_parts:  # the host adds, so that no device waits for another
            *others, home = self.visitors[pack]
            for d in others:
                left = self._swap_out(d, turn, pack, nbytes, _IN_TURN)
                added = self._add_part(turn, 0 if d == others[0] else nbytes, left)
                self.on_host[_IN_TURN].append((self._buffer_nbytes, added))
            others = []
        for d in others:  # added up on the first device
            seconds = nbytes / self.costs.machine.peer_bytes_per_second
            lanes = (NUM_LANES * d + Lane.COMPUTE, NUM_LANES * home + Lane.COMPUTE)
            waits = (*self.devices[d].now(), *self.devices[home].now(), self.controller)
            done = self.run_on_both(*lanes, seconds, Kind.ALL_REDUCE, turn, 0, nbytes, *waits)
            for end in (d, home):
                self.devices[end].computed, self.devices[end].awaited = done, []
            self._compute(home, self.costs.device_seconds(_ADDITION_ACCESSES * nbytes), Kind.ALL_REDUCE, turn, 0)
        if self.plan.packs[pack].update == "device":
            self._update_there(pack, home, turn)
            return
        urgency = _IN_TURN if is_in_parts else self.plan.urgency(pack)
        left = self._swap_out(home, turn, pack, nbytes, urgency)
        if is_in_parts:
            left = self._add_part(turn, nbytes, left)
        touched = _UPDATE_ACCESSES * nbytes
        seconds = self.costs.update_seconds(span)
        updated = self.run(int(Lane.HOST), seconds, Kind.UPDATE, turn, 0, touched, left)
        self.updates.append((updated, 0 if is_in_parts else self.plan.update_priority(pack)))
        self.updated[pack] = updated
        self.on_host[urgency].append((self._buffer_nbytes, updated))

    def _add_part(self, turn: int, nbytes: float, arrived: Event) -> Event:
        """The host adds what has come from one device to what came from others."""
        added = self.run(int(Lane.HOST), 0.0, Kind.UPDATE, turn, 0, _ADDITION_ACCESSES * nbytes, arrived)
        self.updates.append((added, 0))
        return added

    def _bring_states(self, pack: int) -> None:
        """An update on a device will come: what the optimizer remembers does, unless it is there."""
        if self.plan.packs[pack].update == "host" or pack in self.states:
            return
        d = self.visitors[pack][0]
        stays = pack in self.plan.updates_stay
        waits = (*(() if stays else self.devices[d].states.popleft()), self.updated[pack], self.controller)
        nbytes = self.plan.packs[pack].state_nbytes
        self.states[pack] = self._host_copy(d, Lane.SWAP_IN, Kind.WEIGHTS_IN, self._turn, 0, nbytes, *waits)

    def _update_there(self, pack: int, d: int, turn: int) -> None:
        """On a copy of the weights, so that their slot is free; new weights and states leave, or stay."""
        self._bring_states(pack)
        device, sizes = self.devices[d], self.plan.packs[pack]
        self._compute(d, self._device_seconds(pack, 2), Kind.UPDATE, turn, 0, self.states[pack])
        device.weights.release(pack)
        done = self._compute(d, self._device_seconds(pack, _UPDATE_ACCESSES), Kind.UPDATE, turn, 0)
        if self.plan.weights_stay(pack):
            self.weights_there[pack], self.updated[pack] = done, None
            return
        stays = pack in self.plan.updates_stay
        nbytes = sizes.trainable_nbytes + (0 if stays else sizes.state_nbytes)
        left = self._host_copy(d, Lane.SWAP_OUT, Kind.WEIGHT_GRADIENTS_OUT, turn, 0, nbytes, done, self.controller)
        self.updated[pack] = left
        if not stays:
            del self.states[pack]
            device.states.append((left,))

    def _device_seconds(self, pack: int, accesses: int) -> float:
        return self.costs.device_seconds(accesses * self.plan.packs[pack].trainable_nbytes)

    def _swap_out(self, d: int, turn: int, pack: int, nbytes: float, urgency: Urgency) -> Event:
        """Gradients leave for a buffer of the host."""
        self._buffer_nbytes = self._take_buffer(nbytes, urgency)
        waits = (*self.devices[d].now(), self.controller)
        left = self._host_copy(d, Lane.SWAP_OUT, Kind.WEIGHT_GRADIENTS_OUT, turn, 0, nbytes, *waits)
        self.devices[d].gradients.leave(pack, left)
        return left

    def _take_buffer(self, nbytes: float, urgency: Urgency) -> float:
        """As `runtime.updates.host_buffers`: the controller waits for one that is used again. Returns its bytes."""
        on_host = self.on_host[urgency]
        if on_host and len(on_host) >= self._num_buffers[urgency]:
            self.dealt_with.append(on_host.popleft())
        for index, (size, free) in enumerate(self.dealt_with):
            if nbytes <= size <= 2 * nbytes:
                del self.dealt_with[index]
                self._wait(free)
                return size
        return nbytes

    # Computations and copies ------------------------------------------------------------------------------------------

    def _now(self, d: int) -> Point:
        return self.devices[d].now()

    def _compute(
        self, d: int, seconds: float, kind: Kind, turn: int, m: int, *after: Event, nbytes: float = 0.0
    ) -> Event:
        device = self.devices[d]
        awaited, device.awaited = device.awaited, []
        lane = NUM_LANES * d + Lane.COMPUTE
        device.computed = self.run(lane, seconds, kind, turn, m, nbytes, *after, *awaited, self.controller)
        return device.computed

    def _bring_back(self, visit: tuple[int, int]) -> None:
        """All that a microbatch has stashed in a pack."""
        self._bring_stash(*visit, is_first=True)
        self._bring_stash(*visit, is_first=False)

    def _bring_stash(self, pack: int, m: int, *, is_first: bool) -> None:
        """That of the last layer, which comes first, or those of the others."""
        stashed = self.stashed.get((pack, m))
        first, last = self.packs[pack]
        span = (last, last) if is_first else (first, last - 1)
        if stashed is None or span[0] > span[1] or (pack, m, is_first) in self._brought:
            return
        d = self.places[pack][m]
        nbytes = self.costs.stash_bytes(self.sizes[m], span)
        waits = (stashed, *self.devices[d].now(), self.controller)
        brought = self._host_copy(d, Lane.STASH_IN, Kind.STASH_IN, self._turn, m, nbytes, *waits)
        self._brought[pack, m, is_first] = brought

    def _peer(self, turn: int, kind: Kind, source: int, target: int, m: int, nbytes: float, ready: Point) -> Event:
        """From device to device."""
        seconds = nbytes / self.costs.machine.peer_bytes_per_second
        lanes = (NUM_LANES * source + Lane.PEER_OUT, NUM_LANES * target + Lane.PEER_IN)
        waits = (*ready, *self._land(self.devices[target], nbytes), self.controller)
        left = self.run_on_both(*lanes, seconds, kind, turn, m, nbytes, *waits)
        self._hold(self.devices[source].to_peers, source, nbytes, left)
        return left

    def _land(self, device: _Device, nbytes: float) -> Point:
        """When memory for what comes is free, as `runtime.transfer.Landings`."""
        (size, free), device.landing = device.landing or (None, ()), None
        if nbytes <= self.travelling_nbytes:
            device.landed_nbytes = nbytes
        return free if size == nbytes else device.now()

    def _hold(self, departures: "deque[_Departing]", d: int, nbytes: float, end: Event) -> None:
        turn = self.devices[d].turn
        if not departures or departures[-1].number != turn:
            departures.append(_Departing(turn))
        departures[-1].nbytes += nbytes
        departures[-1].ends = [end]  # a lane's copies end in order

    def _begin_turn(self, d: int) -> None:
        """Another microbatch comes: compute waits for copies that were there before the last ones. Those to other devices
        are held for as many as go through a pack while they take little."""
        device = self.devices[d]
        if any(departures and departures[-1].number == device.turn for departures in (device.to_host, device.to_peers)):
            device.turn += 1
        for departures, most in ((device.to_host, _TURNS_HELD), (device.to_peers, max(_TURNS_HELD, len(self.sizes)))):
            total = sum(departing.nbytes for departing in departures)
            while departures:
                age = device.turn - departures[0].number
                if age < _TURNS_HELD or (age < most and total <= self.travelling_nbytes):
                    break
                total -= departures[0].nbytes
                device.awaited += departures.popleft().ends
        if device.landing is None and device.landed_nbytes is not None:
            device.landing = device.landed_nbytes, device.now()

    def _host_copy(self, d: int, lane: Lane, kind: Kind, turn: int, m: int, nbytes: float, *after: Event) -> Event:
        index = NUM_LANES * d + lane
        copied = self._copied[index] = self.run(index, nbytes / self.host_share, kind, turn, m, nbytes, *after)
        return copied


def _following(visitors: Sequence[Sequence[int]]) -> list[dict[int, int]]:
    """By position and device that is visited there, the position at which it is visited next."""
    following: list[dict[int, int]] = []
    upcoming: dict[int, int] = {}
    for position in range(len(visitors) - 1, -1, -1):
        following.append({d: upcoming[d] for d in visitors[position] if d in upcoming})
        upcoming.update(dict.fromkeys(visitors[position], position))
    return following[::-1]


def runtime_seconds(schedule: Schedule, costs: Costs, num_steps: int = _NUM_STEPS) -> float:
    """From the start of one step to that of the next, in full flow; each GPU has a fixed share of what they share."""
    clock = Clock(schedule.num_devices)
    steps = RuntimeSteps(schedule, costs, clock)
    for _ in range(num_steps):
        steps.step()
    seconds: float = steps.starts[-1] - steps.starts[-2]
    return seconds


def fair_seconds(schedule: Schedule, costs: Costs) -> float:
    """The same, links and host memory being shared by those that use them: slower to find out, and closer to the truth."""
    graph, steps = settled_steps(schedule, costs)
    ends = fair_times(graph, costs.machine, dict(steps.updates)).ends
    return ends[steps.starts[-1]] - ends[steps.starts[-2]]


def settled_steps(schedule: Schedule, costs: Costs) -> tuple[TaskGraph, RuntimeSteps]:
    """Some steps, the last of which are in full flow, and who told them."""
    recorder = Recorder(schedule.num_devices)
    steps = RuntimeSteps(schedule, costs, recorder)
    for _ in range(_NUM_STEPS):
        steps.step()
    return recorder.graph, steps
