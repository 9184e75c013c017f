"""What the runtime puts on a device's lanes in a simulation, and what each piece of work waits for.

The controller runs ahead of all devices, so "enqueued so far" is what orders things: each copy waits for what was enqueued
on its device when it was asked for (`runtime.transfer`, `runtime.stash`).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from harmony_lightning.plan.graph import NUM_LANES, Kind, Lane
from harmony_lightning.plan.schedule import Schedule, Span, split
from harmony_lightning.plan.usage import summed_nbytes, travelling_nbytes
from harmony_lightning.scheduler.clock import Event, Listener
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.slots import Point

_TURNS_HELD = 2
"""Microbatches behind which compute waits for copies that read its memory (`runtime.transfer`)."""
_ADDITION_ACCESSES = 3
"""Of memory, when one gradient is added to another."""


@dataclass(slots=True, eq=False)
class _Departing:
    """Copies that read a device's memory, enqueued since another microbatch came to the device."""

    number: int
    nbytes: float = 0.0
    ends: list[Event] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Device:
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


class RuntimeLanes:
    """The lanes of all devices, and the controller.

    Attributes:
        controller: behind all that it has waited for.
        turn: index of the running visit, counted on over steps.
        travelling_nbytes: what may be on its way from device to device beside the microbatches that are due.
    """

    def __init__(self, schedule: Schedule, costs: Costs, listener: Listener, num_active: int) -> None:
        """`num_active` devices are at work, and share links."""
        self.costs = costs
        self.run, self.run_on_both = listener.run, listener.run_on_both
        self.controller: Event = None
        self.turn = -1
        self.host_share = costs.machine.host_share(num_active)
        self.travelling_nbytes = travelling_nbytes(costs.machine.memory_bytes, schedule.prefetch)
        self._num_microbatches = len(split(schedule.minibatch, schedule.microbatch_backward))
        self._devices = [_Device() for _ in range(schedule.num_devices)]
        self._copied: dict[int, Event] = {}
        """By lane: behind the last copy between a device and the host."""

    def now(self, d: int) -> Point:
        """Behind all that compute was given so far."""
        device = self._devices[d]
        return (device.computed, *device.awaited)

    def compute(self, d: int, seconds: float, kind: Kind, m: int, *after: Event, nbytes: float = 0.0) -> Event:
        device = self._devices[d]
        awaited, device.awaited = device.awaited, []
        lane = NUM_LANES * d + Lane.COMPUTE
        device.computed = self.run(lane, seconds, kind, self.turn, m, nbytes, *after, *awaited, self.controller)
        return device.computed

    def add_up_there(self, source: int, home: int, span: Span) -> None:
        """One device's gradients are sent to another one, which adds them to its own, and updates."""
        nbytes = self.costs.gradient_bytes(span)
        seconds = nbytes / self.costs.machine.peer_bytes_per_second
        lanes = (NUM_LANES * source + Lane.COMPUTE, NUM_LANES * home + Lane.COMPUTE)
        waits = (*self.now(source), *self.now(home), self.controller)
        done = self.run_on_both(*lanes, seconds, Kind.ALL_REDUCE, self.turn, 0, nbytes, *waits)
        for end in (source, home):
            self._devices[end].computed, self._devices[end].awaited = done, []
        seconds = self.costs.device_seconds(_ADDITION_ACCESSES * nbytes) + self.costs.sum_launch_seconds(span)
        self.compute(home, seconds, Kind.ALL_REDUCE, 0)

    def pass_on(self, devices: Sequence[int], nbytes: float) -> list[Event]:
        """Gradients that several devices have are added up on their way to the host (`runtime.updates.device_sums`): all
        send at once, but each its first piece behind that of the one before, and none to one that has not all of its own.
        By device: when they have left."""
        piece = summed_nbytes(int(nbytes))
        adding = self.costs.device_seconds(_ADDITION_ACCESSES * piece) + self.costs.machine.launch_seconds
        first: Event = None
        left: list[Event] = []
        for d, target in zip_longest(devices, devices[1:]):
            ready = (*self.now(d), *(() if target is None else self.now(target)), self.controller)
            if left:
                lane = NUM_LANES * d + Lane.SWAP_OUT
                first = self.run(lane, adding, Kind.ALL_REDUCE, self.turn, 0, 0, *ready, first)
            parts = (piece, nbytes - piece) if nbytes > piece else (nbytes,)
            first, *rest = [self._send_on(d, target, part, *ready, first) for part in parts]
            left += rest or [first]
        self._copied[NUM_LANES * devices[-1] + Lane.SUM_OUT] = left[-1]
        return left

    def _send_on(self, source: int, target: int | None, nbytes: float, *after: Event) -> Event:
        """To the next device, or None for the host."""
        lane, machine, turn = NUM_LANES * source + Lane.SUM_OUT, self.costs.machine, self.turn
        if target is None:
            return self.run(lane, nbytes / self.host_share, Kind.WEIGHT_GRADIENTS_OUT, turn, 0, nbytes, *after)
        rate = machine.peer_bytes_per_second
        seconds = nbytes / (min(rate, self.host_share) if machine.peers_by_host else rate)
        return self.run_on_both(
            lane, NUM_LANES * target + Lane.SUM_IN, seconds, Kind.ALL_REDUCE, turn, 0, nbytes, *after
        )

    def wait(self, *events: Event, nbytes: float = 0.0) -> None:
        """The controller does, and reads and writes so many bytes of host memory."""
        seconds = nbytes / (2 * self.costs.machine.host_message_bytes_per_second)
        self.controller = self.run(int(Lane.CONTROLLER), seconds, Kind.WAIT, self.turn, 0, nbytes, *events)

    def copy(self, d: int, lane: Lane, kind: Kind, m: int, nbytes: float, *after: Event) -> Event:
        """Between a device and the host; returns the end."""
        index = NUM_LANES * d + lane
        copied = self._copied[index] = self.run(index, nbytes / self.host_share, kind, self.turn, m, nbytes, *after)
        return copied

    def send(self, source: int, target: int, kind: Kind, m: int, nbytes: float, ready: Point) -> Event:
        """From device to device."""
        seconds = nbytes / self.costs.machine.peer_bytes_per_second
        lanes = (NUM_LANES * source + Lane.PEER_OUT, NUM_LANES * target + Lane.PEER_IN)
        waits = (*ready, *self._land(target, nbytes), self.controller)
        left = self.run_on_both(*lanes, seconds, kind, self.turn, m, nbytes, *waits)
        self._hold(self._devices[source].to_peers, source, nbytes, left)
        return left

    def send_stash(self, d: int, m: int, nbytes: float, ready: Event) -> Event:
        """To the host."""
        left = self.copy(d, Lane.SWAP_OUT, Kind.STASH_OUT, m, nbytes, ready)
        self._hold(self._devices[d].to_host, d, nbytes, left)
        return left

    def begin_turn(self, d: int) -> None:
        """Another microbatch comes: compute waits for copies that were there before the last ones. Those to other devices
        are held for as many as go through a pack while they take little."""
        device = self._devices[d]
        if any(departures and departures[-1].number == device.turn for departures in (device.to_host, device.to_peers)):
            device.turn += 1
        longest = max(_TURNS_HELD, self._num_microbatches)
        for departures, most in ((device.to_host, _TURNS_HELD), (device.to_peers, longest)):
            total = sum(departing.nbytes for departing in departures)
            while departures:
                age = device.turn - departures[0].number
                if age < _TURNS_HELD or (age < most and total <= self.travelling_nbytes):
                    break
                total -= departures[0].nbytes
                device.awaited += departures.popleft().ends
        if device.landing is None and device.landed_nbytes is not None:
            device.landing = device.landed_nbytes, self.now(d)

    def end_step(self) -> None:
        """Nothing is held or set aside any more, and the controller waits for all copies between devices and host but those
        of updates."""
        for device in self._devices:
            for departing in (*device.to_host, *device.to_peers):
                device.awaited += departing.ends
            device.to_host.clear()
            device.to_peers.clear()
            device.landing = device.landed_nbytes = None
        self.wait(*(copied for lane, copied in self._copied.items() if lane % NUM_LANES != Lane.UPDATE_OUT))

    def _land(self, d: int, nbytes: float) -> Point:
        """When memory for what comes is free, as `runtime.transfer.Landings`."""
        device = self._devices[d]
        (size, free), device.landing = device.landing or (None, ()), None
        if nbytes <= self.travelling_nbytes:
            device.landed_nbytes = nbytes
        return free if size == nbytes else self.now(d)

    def _hold(self, departures: "deque[_Departing]", d: int, nbytes: float, end: Event) -> None:
        turn = self._devices[d].turn
        if not departures or departures[-1].number != turn:
            departures.append(_Departing(turn))
        departures[-1].nbytes += nbytes
        departures[-1].ends = [end]  # a lane's copies end in order
