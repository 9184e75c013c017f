"""The runtime's rules: the tasks of steps in the order in which the engine enqueues them.

What differs from what a schedule could ask for (`own.py`): packs and microbatches are the same both ways; in pp a pack is
on the same device both ways; every layer recomputes by itself, but for the very last one, which keeps its activations; each
copy waits for what was enqueued on its device when it was asked for (`runtime.transfer`, `runtime.stash`).

The controller runs ahead of all devices, which is why "enqueued so far" is what orders things. It waits in one place: when
the gradients of too many packs are on the host.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan import Urgency
from harmony_lightning.plan.graph import NUM_LANES, Kind, Lane
from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.scheduler.clock import Clock, Event, Listener, Recorder
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.fair import fair_times

_TURNS_HELD = 2
"""Microbatches behind which compute waits for copies that read its memory (`runtime.transfer`)."""
_UPDATE_ACCESSES = 7
"""Of host memory in a step of Adam: four values are read, three written."""
_NUM_STEPS = 4
"""The first steps are not in full flow."""


@dataclass(slots=True, eq=False)
class _Slot:
    owner: int | None = None
    """The resident pack that it is for; None if packs share it."""
    pack: int | None = None
    good: int | None = None
    """The pack whose weights are here and good, though it has been left."""
    released: Event = None
    """Behind the last computation with what lay here."""


@dataclass(slots=True, eq=False)
class _Device:
    slots: list[_Slot]
    computed: Event = None
    """Behind all computations that were enqueued."""
    awaited: list[Event] = field(default_factory=list)
    """What the next computation waits for."""
    departing: "deque[tuple[list[Event], list[Event]]]" = field(default_factory=lambda: deque([([], [])]))
    """By microbatch: copies to the host, and to other devices, that still read the device's memory."""
    gradient_slots: "deque[Event]" = field(default_factory=deque)
    """When what was in each free one has left; used least recently first."""
    arrived: dict[int, Event] = field(default_factory=dict)
    """By pack in a slot: its weights are there."""


def check_for_runtime(schedule: Schedule) -> None:
    """Raises ConfigurationError if the runtime cannot carry the schedule out."""
    if schedule.packs_forward != schedule.packs_backward[:-1]:
        raise ConfigurationError("the runtime carries out plans whose packs are the same forward and backward")
    if schedule.microbatch_forward != schedule.microbatch_backward:
        raise ConfigurationError("the runtime carries out plans with one microbatch size")


def gradient_buffers(schedule: Schedule) -> dict[Urgency, int]:
    """As in `Plan`."""
    num_devices = schedule.num_active_devices
    return {"first": num_devices, "next": num_devices + 3, "last": len(schedule.packs_backward) // 3}


class RuntimeSteps:
    """Tells one step after another to a listener."""

    def __init__(self, schedule: Schedule, costs: Costs, listener: Listener) -> None:
        check_for_runtime(schedule)
        self.schedule, self.costs = schedule, costs
        self.run, self.run_on_both = listener.run, listener.run_on_both
        self.packs = schedule.packs_backward
        self.sizes = split(schedule.minibatch, schedule.microbatch_backward)
        self.is_pp = schedule.mode == "pp"
        num_devices = schedule.num_devices
        active = min(num_devices, len(self.packs) if self.is_pp else len(self.sizes))
        self.host_share = costs.machine.host_share(active)
        self.devices = [
            _Device(self._make_slots(d), gradient_slots=deque[Event]([None] * (1 + schedule.prefetch)))
            for d in range(num_devices)
        ]
        self._kept = frozenset((*schedule.keep, schedule.num_layers - 1))
        self._backward_seconds = cache(self._sum_backward_seconds)
        self.updated: list[Event] = [None] * len(self.packs)
        self.buffers = gradient_buffers(schedule)
        self.on_host: dict[Urgency, deque[tuple[float, Event]]] = {urgency: deque() for urgency in self.buffers}
        """Host buffers that gradients have taken last, by urgency: their bytes, and the updates that free them."""
        self.dealt_with: list[tuple[float, Event]] = []
        """Those before."""
        self.controller: Event = None
        self.updates: list[tuple[Event, int]] = []
        """With their priorities: of those whose gradients have come, the host does the lowest first."""
        self.starts: list[Event] = []
        """First computation of each step."""
        self._turn = 0
        self.travelling_nbytes = costs.machine.memory_bytes // 16 if schedule.prefetch else 0

    def _make_slots(self, d: int) -> list[_Slot]:
        here = range(d, len(self.packs), self.schedule.num_devices) if self.is_pp else range(len(self.packs))
        own = [_Slot(owner=pack) for pack in here if pack in self.schedule.resident]
        return own + [_Slot() for _ in range(min(1 + self.schedule.prefetch, len(here) - len(own)))]

    def device(self, pack: int, microbatch: int) -> int:
        return (pack if self.is_pp else microbatch) % self.schedule.num_devices

    def step(self) -> None:
        """Tell the next step."""
        last, count = len(self.packs) - 1, len(self.sizes)
        for d in range(min(self.schedule.num_devices, last + 1 if self.is_pp else count)):
            self._load(d, d if self.is_pp else 0)
        self.outputs: list[Event] = [None] * count
        """By microbatch: its output is computed."""
        self.gradients: list[Event] = [None] * count
        """By microbatch: the gradient of the next pack's input has arrived."""
        self.stashed: dict[tuple[int, int], Event] = {}
        for pack in range(last + 1):
            self._forward(pack)
        self._ahead: dict[tuple[int, int], Event] = {}
        order = [(pack, m) for pack in range(last - 1, -1, -1) for m in range(count)]
        self._following: dict[tuple[int, int], tuple[int, int]] = {}
        latest: dict[int, tuple[int, int]] = {}
        self._send(last)
        self._leave(last, self._visitors(last))
        for visit in order if self.schedule.prefetch else ():
            d = self.device(*visit)
            if d in latest:
                self._following[latest[d]] = visit
            else:
                self._bring_stash(visit)
            latest[d] = visit
        for pack in range(last - 1, -1, -1):
            self._backward(pack)
        for device in self.devices:
            for slot in device.slots:
                if slot.pack is not None:
                    slot.pack, slot.released = None, device.computed
                slot.good = None
            self._let_go(device, 0)

    # Visits -----------------------------------------------------------------------------------------------------------

    def _visitors(self, pack: int) -> list[int]:
        if self.is_pp:
            return [pack % self.schedule.num_devices]
        return list(range(min(self.schedule.num_devices, len(self.sizes))))

    def _forward(self, pack: int) -> None:
        last = len(self.packs) - 1
        is_fused, turn = pack == last, self._next_turn()
        upcoming = {d: self._next(pack, 1) for d in self._visitors(pack)}
        crosses = self.is_pp and pack > 0 and self.schedule.num_devices > 1
        sent: list[Event] = []
        entering = [self.costs.input_bytes(size, self.packs[pack][0]) for size in self.sizes]
        for m, size in enumerate(self.sizes):
            d = self.device(pack, m)
            device = self.devices[d]
            while crosses and len(sent) < len(self.sizes):  # as `runtime.microbatch.sending_ahead`
                n = len(sent)
                if n > m + self.schedule.prefetch and sum(entering[m : n + 1]) > self.travelling_nbytes:
                    break
                sent.append(self._peer(turn, Kind.OUTPUT_PEER, pack - 1, pack, n, self.outputs[n]))
            self._let_go(device, _TURNS_HELD)
            weights = self._acquire(d, pack, upcoming)
            seconds = self.costs.forward_seconds(size, self.packs[pack])
            done = self._compute(d, seconds, Kind.FORWARD, turn, m, sent[m] if crosses else None, weights)
            if len(self.starts) == self._steps and pack == 0 and m == 0:
                self.starts.append(done)
            self.outputs[m] = done
            if is_fused:
                self._let_go(device, _TURNS_HELD)
                self._fused_backward(pack, turn, m, size)
            elif self.schedule.stash == "host" and pack not in self.schedule.stash_stays:
                nbytes = self.costs.stash_bytes(size, self.packs[pack])
                left = self._host_copy(d, Lane.SWAP_OUT, Kind.STASH_OUT, turn, m, nbytes, done)
                self.stashed[pack, m] = left
                device.departing[-1][0].append(left)
        self._leave(pack, [d for d, following in upcoming.items() if following is not None])

    def _fused_backward(self, pack: int, turn: int, m: int, size: int) -> None:
        d = self.device(pack, m)
        slot = self.devices[d].gradient_slots.popleft() if m < len(self._visitors(pack)) else None
        self._compute(d, self._backward_seconds(size, pack), Kind.BACKWARD, turn, m, slot)
        self._hand_back(pack, turn, m)

    def _sum_backward_seconds(self, size: int, pack: int) -> float:
        """Recompute included, but for layers that keep their activations."""
        span = self.packs[pack]
        seconds = self.costs.backward_seconds(size, span) + self.costs.forward_seconds(size, span)
        kept = (layer for layer in range(span[0], span[1] + 1) if layer in self._kept)
        return max(0.0, seconds - sum(self.costs.recompute_seconds(size, (layer, layer)) for layer in kept))

    def _hand_back(self, pack: int, turn: int, m: int) -> None:
        """The gradient of a pack's input goes to where that was computed."""
        if pack == 0:
            return
        done = self.devices[self.device(pack, m)].computed
        if self.is_pp and self.schedule.num_devices > 1:
            done = self._peer(turn, Kind.GRADIENT_PEER, pack, pack - 1, m, done)
        self.gradients[m] = done

    def _backward(self, pack: int) -> None:
        turn = self._next_turn()
        upcoming = {d: self._next(pack, -1) for d in self._visitors(pack)}
        fresh = set(self._visitors(pack))
        for m, size in enumerate(self.sizes):
            d = self.device(pack, m)
            following = self._following.get((pack, m))
            if following is not None:
                self._bring_stash(following)
            elif not self.schedule.prefetch:
                self._bring_stash((pack, m))
            self._let_go(self.devices[d], _TURNS_HELD)
            weights = self._acquire(d, pack, upcoming)
            slot = self.devices[d].gradient_slots.popleft() if d in fresh else None
            fresh.discard(d)
            seconds = self._backward_seconds(size, pack)
            stash = self._ahead.pop((pack, m), None)
            self._compute(d, seconds, Kind.BACKWARD, turn, m, self.gradients[m], stash, weights, slot)
            self._hand_back(pack, turn, m)
        self._leave(pack, [d for d, following in upcoming.items() if following is not None])
        self._send(pack)

    def _leave(self, pack: int, devices: Iterable[int]) -> None:
        for d in devices:
            for slot in self.devices[d].slots:
                if slot.pack == pack:
                    slot.pack, slot.good, slot.released = None, pack, self.devices[d].computed

    def _next(self, pack: int, way: int) -> int | None:
        """The pack that follows on the same device; None behind the last one."""
        following = pack + way * (self.schedule.num_devices if self.is_pp else 1)
        return following if 0 <= following < len(self.packs) else None

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn - 1

    @property
    def _steps(self) -> int:
        return (self._turn - 1) // (2 * len(self.packs) - 1)

    # Weights and gradients --------------------------------------------------------------------------------------------

    def _acquire(self, d: int, pack: int, upcoming: dict[int, int | None]) -> Event:
        device = self.devices[d]
        self._load(d, pack)
        following = upcoming[d]
        if following is not None and any(slot.pack is None for slot in self._slots_for(d, following)):
            self._load(d, following)
        return device.arrived.get(pack)

    def _slots_for(self, d: int, pack: int) -> list[_Slot]:
        owner = pack if pack in self.schedule.resident else None
        return [slot for slot in self.devices[d].slots if slot.owner == owner]

    def _load(self, d: int, pack: int) -> None:
        device = self.devices[d]
        slots = self._slots_for(d, pack)
        if any(slot.pack == pack for slot in slots):
            return
        free = [slot for slot in slots if slot.pack is None]
        for kept in free:
            if kept.good == pack:
                kept.pack, kept.good = pack, None
                return
        slot = min(free, key=lambda slot: slot.good is not None, default=None)
        if slot is None:
            slot = slots[0]
            slot.released = device.computed
        waits = (slot.released, self.updated[pack], self.controller)
        slot.pack, slot.good, slot.released = pack, None, None
        nbytes = self.costs.weight_bytes(self.packs[pack])
        arrived = self._host_copy(d, Lane.SWAP_IN, Kind.WEIGHTS_IN, self._turn, 0, nbytes, *waits)
        device.arrived[pack] = arrived

    def _send(self, pack: int) -> None:
        """Gradients go to the host, and the weights are stepped there."""
        turn, span = self._turn - 1, self.packs[pack]
        home, *others = self._visitors(pack)
        nbytes = self.costs.gradient_bytes(span)
        for d in others:
            self.devices[d].gradient_slots.append(None)
        for d in others:  # added up on the first device, and the controller waits for each
            seconds = nbytes / self.costs.machine.peer_bytes_per_second
            lanes = (NUM_LANES * d + Lane.COMPUTE, NUM_LANES * home + Lane.COMPUTE)
            waits = (self.devices[d].computed, self.devices[home].computed, self.controller)
            done = self.run_on_both(*lanes, seconds, Kind.ALL_REDUCE, turn, 0, nbytes, *waits)
            self.devices[d].computed = self.devices[home].computed = self.controller = done
        if not nbytes:
            self.devices[home].gradient_slots.append(None)
            return
        urgency, priority = self._urgency(pack)
        buffer_nbytes = self._take_buffer(nbytes, urgency)
        ready = self.devices[home].computed
        left = self._host_copy(home, Lane.SWAP_OUT, Kind.WEIGHT_GRADIENTS_OUT, turn, 0, nbytes, ready, self.controller)
        self.devices[home].gradient_slots.append(left)
        seconds = self.costs.update_seconds(span)
        touched = _UPDATE_ACCESSES * nbytes
        updated = self.run(int(Lane.HOST), seconds, Kind.UPDATE, turn, 0, touched, left)
        self.updates.append((updated, priority))
        self.updated[pack] = updated
        self.on_host[urgency].append((buffer_nbytes, self.updated[pack]))

    def _urgency(self, pack: int) -> tuple[Urgency, int]:
        """As in `Plan`, with the priority."""
        if pack < self.buffers["first"]:
            return "first", pack - len(self.packs)
        return ("last", 1 + pack) if pack % 3 == 2 else ("next", 0)

    def _take_buffer(self, nbytes: float, urgency: Urgency) -> float:
        """As `runtime.updates.host_buffers`: the controller waits for one that is used again. Returns its bytes."""
        on_host = self.on_host[urgency]
        if on_host and len(on_host) >= self.buffers[urgency]:
            self.dealt_with.append(on_host.popleft())
        for index, (size, free) in enumerate(self.dealt_with):
            if nbytes <= size <= 2 * nbytes:
                del self.dealt_with[index]
                self.controller = free
                return size
        return nbytes

    # Computations and copies ------------------------------------------------------------------------------------------

    def _compute(self, d: int, seconds: float, kind: Kind, turn: int, m: int, *after: Event) -> Event:
        device = self.devices[d]
        awaited, device.awaited = device.awaited, []
        lane = NUM_LANES * d + Lane.COMPUTE
        device.computed = self.run(lane, seconds, kind, turn, m, 0, *after, *awaited, self.controller)
        return device.computed

    def _bring_stash(self, visit: tuple[int, int]) -> None:
        pack, m = visit
        stashed = self.stashed.get(visit)
        if stashed is None:
            return
        d = self.device(pack, m)
        nbytes = self.costs.stash_bytes(self.sizes[m], self.packs[pack])
        waits = (stashed, self.devices[d].computed, self.controller)
        self._ahead[visit] = self._host_copy(d, Lane.STASH_IN, Kind.STASH_IN, self._turn, m, nbytes, *waits)

    def _peer(self, turn: int, kind: Kind, source_pack: int, target_pack: int, m: int, ready: Event) -> Event:
        """Between the devices of two neighbouring packs."""
        source, target = self.device(source_pack, m), self.device(target_pack, m)
        nbytes = self.costs.input_bytes(self.sizes[m], self.packs[max(source_pack, target_pack)][0])
        seconds = nbytes / self.costs.machine.peer_bytes_per_second
        lanes = (NUM_LANES * source + Lane.PEER_OUT, NUM_LANES * target + Lane.PEER_IN)
        waits = (ready, self.devices[target].computed, self.controller)
        left = self.run_on_both(*lanes, seconds, kind, turn, m, nbytes, *waits)
        self.devices[source].departing[-1][1].append(left)
        return left

    def _let_go(self, device: _Device, num_held: int) -> None:
        """Another microbatch comes: compute waits for copies that were there before the last ones. Those to other devices
        are held for as many as go through a pack; that there is memory for it is taken for granted."""
        departing = device.departing
        if any(departing[-1]):
            departing.append(([], []))
        for to_host, _ in list(departing)[: max(0, len(departing) - num_held)]:
            device.awaited += to_host
            to_host.clear()
        while len(departing) > (max(num_held, len(self.sizes)) if num_held else 0):
            device.awaited += departing.popleft()[1]
        if not departing:
            departing.append(([], []))

    def _host_copy(self, d: int, lane: Lane, kind: Kind, turn: int, m: int, nbytes: float, *after: Event) -> Event:
        return self.run(NUM_LANES * d + lane, nbytes / self.host_share, kind, turn, m, nbytes, *after)


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
    recorder = Recorder(schedule.num_devices)
    steps = RuntimeSteps(schedule, costs, recorder)
    for _ in range(_NUM_STEPS):
        steps.step()
    ends = fair_times(recorder.graph, costs.machine, dict(steps.updates)).ends
    return ends[steps.starts[-1]] - ends[steps.starts[-2]]
