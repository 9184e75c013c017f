"""How many bytes a schedule needs on each device when the runtime carries it out.

Slots for weights, gradients and updates are there throughout. Beside them, while microbatch m of M is in a layer of a pack:

    working   what the layer needs beside its input, and the stashes of the layers of the pack up to it; of several
              microbatches where they go through it together
    waiting   what the microbatches behind m have left for this pack, and those in front of it for the next one:
              inputs and outputs in forward, gradients in backward
    stash     those that stay; else one that is on its way out, or comes in ahead
    held      copies to other devices, for M microbatches within `plan.travelling_nbytes` (`transfer.Departures`),
              and the place where the next one from there arrives (`transfer.Landings`)

All of these change evenly from microbatch to microbatch, so the most is at the first one or at the last ones; or when a
device updates the pack, behind the last one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from harmony_lightning.plan.offsets import Lifetime, lay_at_offsets
from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.plan.usage import summed_nbytes, travelling_nbytes
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.packing import STEP_TEMPORARIES
from harmony_lightning.scheduler.runtime.sized_plan import sized_plan
from harmony_lightning.scheduler.runtime.visitors import visitors_of

_TURNS_HELD = 2
"""Microbatches for which what is copied to other devices is held in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisitBytes:
    """The most in use on one device while microbatches are in a pack, slots for weights left out."""

    device: int
    pack: int
    is_backward: bool
    """The last pack's backward is part of its forward."""
    nbytes: float


def runtime_peak_bytes(schedule: Schedule, costs: Costs, visits: Iterable[VisitBytes] | None = None) -> float:
    """The most that any device holds if nothing stays that need not. `visits` are those of `visit_bytes`, if at hand."""
    return max(device_peak_bytes(schedule, costs, visits).values())


def device_peak_bytes(schedule: Schedule, costs: Costs, visits: Iterable[VisitBytes] | None = None) -> dict[int, float]:
    """The same by device, those left out that have no packs or do what another one does."""
    packs = schedule.packs_backward
    beside: dict[int, float] = {}
    for visit in visit_bytes(schedule, costs) if visits is None else visits:
        beside[visit.device] = max(visit.nbytes, beside.get(visit.device, 0.0))

    def slots(device: int) -> float:
        here = [packs[p] for p in _packs_on(schedule, device)]
        return _in_turn(schedule, [costs.weight_bytes(span) for span in here])

    return {device: slots(device) + nbytes for device, nbytes in beside.items()}


def visit_bytes(schedule: Schedule, costs: Costs) -> Iterator[VisitBytes]:
    """In the order of the step, by device. Those that do what one of another pipeline does are left out."""
    sizes = split(schedule.minibatch, schedule.microbatch_backward)
    updates = _update_slots(schedule, costs)
    seen: set[tuple[int, tuple[int, ...], float]] = set()
    for index in range(schedule.num_devices):
        pipeline, stage = divmod(index, schedule.depth)
        kind = stage, sizes[pipeline :: schedule.num_copies], updates[index]
        if pipeline < len(sizes) and kind not in seen:
            seen.add(kind)
            yield from _Device(schedule, costs, index, sizes, updates[index]).visits()


class _Device:
    """One device under one schedule, and the microbatches that come there."""

    def __init__(
        self, schedule: Schedule, costs: Costs, index: int, sizes: tuple[int, ...], updates_nbytes: float
    ) -> None:
        self._costs, self._index = costs, index
        self._packs, self._last = schedule.packs_backward, len(schedule.packs_backward) - 1
        self._has_peers = schedule.depth > 1
        self._size, self._count = sizes[0], len(sizes)
        self._dealt = schedule.dealt
        self._leaves, self._is_ahead = schedule.stash == "host", schedule.prefetch > 0
        visitors = {p: visitors_of(schedule, index, p, sizes) for p in _packs_on(schedule, index)}
        self._here = {p: here for p, here in visitors.items() if here.count}
        self._order = tuple(self._here)
        self._turn = {p: turn for turn, p in enumerate(self._order)}
        self._forward_turns = tuple(p for p in self._order if p != self._last)
        self._last_to_leave = max((p for p in self._here if p != self._last), default=None)
        self._before: dict[int, int | None] = dict(zip(self._here, (None, *self._here), strict=False))
        """The pack that is visited here in front of another."""
        self._limit = travelling_nbytes(costs.machine.memory_bytes, schedule.prefetch)
        gradients = _in_turn(schedule, [costs.gradient_bytes(self._packs[p]) for p in _packs_on(schedule, index)])
        self._fixed: float = gradients + 2 * costs.profile.glue_bytes + updates_nbytes
        self._stashes = [costs.stash_bytes(self._size, span) for span in self._packs]
        self._updated = {p for p in schedule.updated_there if schedule.device(p, 0) == index}
        self._summed = {p: self._coming_sums(schedule, p) for p in self._here if schedule.is_dealt(p)}
        """By pack: the most that comes at once of gradients that other devices have of it."""
        # These are asked for many times.
        self._in_layers = cache(self._most_in_layers)
        entering = costs.inputs(self._size)
        self._boundaries = [0.0, *(entering[first] for first, _ in self._packs[1:]), 0.0]
        self._kept, self._sent_behind = dict[int, float](), dict[int, float]()
        kept = sent = 0.0
        for p in self._here:
            self._kept[p] = 0.0 if self._leaves else kept
            kept += self._here[p].all * self._stashes[p]
        for p in reversed(self._here):
            self._sent_behind[p] = sent
            sent += self._here[p].arriving

    def visits(self) -> Iterator[VisitBytes]:
        for pack in self._here:
            most = self._fused(pack) if pack == self._last else self._forward(pack)
            yield VisitBytes(device=self._index, pack=pack, is_backward=False, nbytes=self._fixed + most)
        for pack in reversed([pack for pack in self._here if pack != self._last]):
            yield VisitBytes(device=self._index, pack=pack, is_backward=True, nbytes=self._fixed + self._backward(pack))

    def _forward(self, pack: int) -> float:
        here, leaving, last = self._here[pack], self._boundary(pack + 1), self._packs[pack][1]

        def at(m: int) -> float:
            if here.group == 1:
                working, left = self._in_layers(pack, here.sizes[m], False), self._stashes[pack]
            else:
                working, left = self._in_joint_layers(pack, m), self._costs.stash_bytes(self._size, (last, last))
            former = m * self._stashes[pack]
            if self._leaves:
                former = left if m else self._last_stash(self._before[pack])
            return working + self._inputs_waiting(pack, m) + m * leaving + former + self._travelling(pack, m)

        moments = {m - m % here.group for m in here.moments}
        return self._kept[pack] + self._landing(self._boundary(pack)) + max(map(at, moments))

    def _fused(self, pack: int) -> float:
        """A microbatch that ends goes back at once: its gradient takes the place of its input."""

        def at(m: int, working: float) -> float:
            return (
                working + self._inputs_waiting(pack, m) + self._gradients_waiting(pack, m) + self._travelling(pack, m)
            )

        here = self._here[pack]
        most = max(at(m, max(self._in_layers(pack, here.sizes[m], w) for w in (False, True))) for m in here.moments)
        most = max(most, at(here.count - 1, self._in_update(pack)))
        if pack in self._summed:
            most = max(most, here.all * self._boundary(pack) + self._summed[pack])
        former = self._last_stash(self._before[pack]) if self._leaves else 0.0
        return former + self._kept[pack] + self._landing(self._boundary(pack)) + most

    def _backward(self, pack: int) -> float:
        here, leaving = self._here[pack], self._boundary(pack + 1)

        def at(m: int, working: float) -> float:
            left = here.left(m)
            waiting = working + left * leaving + self._gradients_waiting(pack, m)
            waiting += self._travelling(pack, m, backward=True)
            if not self._leaves:
                return waiting + left * self._stashes[pack]
            following = min(1.0, left) * self._stashes[pack] if left else self._stash_before(pack)
            return waiting + self._is_ahead * following + self._left_last(pack, m)

        most = max(at(m, self._in_layers(pack, here.sizes[m], True)) for m in here.moments)
        most = max(most, at(here.count - 1, self._in_update(pack)))
        if pack in self._summed:
            most = max(most, here.all * self._boundary(pack) + self._summed[pack])
        return most + self._kept[pack] + self._landing(leaving)

    # Of one microbatch, or of those that go together ------------------------------------------------------------------

    def _most_in_layers(self, pack: int, size: int, backward: bool) -> float:
        """In the layer that needs most."""
        first, last = self._packs[pack]
        costs, most = self._costs, 0.0
        way = "backward" if backward else "forward"
        comes_alone = backward and pack != self._last and self._leaves and not self._is_ahead
        for layer in range(first, last + 1):
            working = costs.working_bytes(way, size, (layer, layer))
            if backward and layer + 1 < costs.num_layers:
                working += costs.stash_bytes(size, (layer, layer))
            else:  # what the code behind a layer saves is part of what that works with
                working += costs.input_bytes(size, layer)
            if backward and layer < last:
                working += self._boundary(pack + 1)  # the gradient that the segment's backward was given
            if backward and self._here[pack].group > 1:
                working += costs.input_bytes(size, layer + 1)  # the second run goes to its end
            if layer > first and not comes_alone:
                working += costs.stash_bytes(size, (first, layer - 1))
            most = max(most, working)
        return most

    def _in_joint_layers(self, pack: int, m: int) -> float:
        """The same in a joint forward, the first of which is tried beside one that counts."""
        first, last = self._packs[pack]
        costs, size, most = self._costs, self._here[pack].sizes[m], 0.0
        times = sum(self._here[pack].sizes[m : m + self._here[pack].group]) / size
        for layer in range(first, last + 1):
            entering, leaving = costs.input_bytes(size, layer), costs.input_bytes(size, layer + 1)
            working = entering + leaving + max(costs.working_bytes("forward", size, (layer, layer)), 2 * leaving)
            stashes = costs.stash_bytes(size, (first, layer - 1)) if layer > first else 0.0
            most = max(most, times * (stashes + entering + working))
        return most

    def _in_update(self, pack: int) -> float:
        """Of a pack that this device updates."""
        if pack not in self._updated:
            return 0.0
        first, last = self._packs[pack]
        return STEP_TEMPORARIES * max(self._costs.largest_weight_bytes(layer) for layer in range(first, last + 1))

    def _coming_sums(self, schedule: Schedule, pack: int) -> float:
        """Weight by weight to the device that updates it, or else in pieces."""
        first, last = self._packs[pack]
        if pack in schedule.updated_there:
            layers = range(first, last + 1) if pack in self._updated else ()
            return max((self._costs.gradient_bytes((i, i)) for i in layers), default=0.0)
        is_alone = self._count == 1 or len(set(schedule.dealt_order)) == 1
        return 0.0 if is_alone else summed_nbytes(int(self._costs.gradient_bytes((first, last))))

    def _boundary(self, pack: int) -> float:
        """Of one microbatch, as it enters the pack; the first pack's input comes from the host."""
        return self._boundaries[pack]

    # Waiting ----------------------------------------------------------------------------------------------------------

    def _stash_before(self, pack: int) -> float:
        before = self._before[pack]
        return 0.0 if before is None else self._stashes[before]

    def _left_last(self, pack: int, m: int) -> float:
        """The last stash that has left in forward is held until something is sent from here in another turn."""
        if self._sent_behind[pack] or m > self._here[pack].stayed(m):
            return 0.0
        return self._last_stash(pack if self._last_to_leave is None else self._last_to_leave)

    def _last_stash(self, pack: int | None) -> float:
        """What the last microbatch leaves in a pack: of the last layer alone if it is in a joint call, which microbatches
        that are dealt need not be."""
        if pack is None:
            return 0.0
        here, (first, last) = self._here[pack], self._packs[pack]
        is_joint = here.group > 1 and here.count % here.group != 1 and pack not in self._dealt
        return self._costs.stash_bytes(here.sizes[-1], (last if is_joint else first, last))

    def _inputs_waiting(self, pack: int, m: int) -> float:
        """Of microbatches behind this one, and those that go with it: all if they are made here, else as many as are sent
        ahead."""
        here, entering = self._here[pack], self._boundary(pack)
        left = here.left(m + here.group - 1) if m + here.group < here.count else 0.0
        if not entering or not left:
            return 0.0
        ahead = here.group * (1 + self._is_ahead)
        ahead = min(here.count, max(ahead, int(self._limit // entering))) - here.group
        made_here = max(0.0, here.all - here.arriving - here.stayed(min(m + here.group, here.count - 1)))
        return (made_here + min(left - made_here, ahead)) * entering

    def _gradients_waiting(self, pack: int, m: int) -> float:
        """Of inputs of the microbatches in front of this one, where the pack before is here, too."""
        here, former = self._here[pack], self._here.get(pack - 1)
        elsewhere = 0 if former is None else former.gone(here.index(m))
        return (here.stayed(m) + elsewhere) * self._boundary(pack)

    # Copies between devices -------------------------------------------------------------------------------------------

    def _landing(self, nbytes: float) -> float:
        return nbytes if self._has_peers and nbytes <= self._limit else 0.0

    def _travelling(self, pack: int, m: int, *, backward: bool = False) -> float:
        """What has been sent and is held as microbatch m comes (`transfer.Departures`): of the last turns, in each of which
        something was sent, while it takes little; that of the very last one in any case."""
        if not self._has_peers:
            return 0.0
        longest = max(_TURNS_HELD, self._count)
        total, age = 0.0, 1.0
        for turns, nbytes in self._turns(pack, m, backward):
            if nbytes:
                room = max(int((self._limit - total) // nbytes), _TURNS_HELD - age)
                total += nbytes * max(0.0, min(turns, longest - age, room))
                if room < turns:
                    break
            age += turns
            if age >= longest:
                break
        return total

    def _turns(self, pack: int, m: int, backward: bool) -> Iterator[tuple[float, float]]:
        """Turns and bytes sent in each, newest first. Outputs are sent all at once, when the next pack comes to them."""
        here, turn = self._here, self._turn[pack]
        if backward or pack == self._last:
            yield m - here[pack].stayed(m), self._boundary(pack)
        elif self._leaves:
            yield m, 0.0
        if backward:
            for p in self._order[turn + 1 :]:
                yield here[p].arriving, self._boundary(p)
        for p in reversed(self._forward_turns if backward else self._order[:turn]):
            leaving = here[p].leaving * self._boundary(p + 1)
            if self._leaves:
                yield 1, leaving
                yield here[p].count - 1, 0.0
            elif leaving:
                yield 1, leaving


def _packs_on(schedule: Schedule, device: int) -> list[int]:
    """Packs that have slots on a device."""
    takes_turns = device in schedule.dealt_order or not schedule.dealt_order
    packs, stage = range(len(schedule.packs_backward)), device % schedule.depth
    return [p for p in packs if (takes_turns if p in schedule.dealt else p % schedule.depth == stage)]


def _update_slots(schedule: Schedule, costs: Costs) -> list[int]:
    """Bytes of slots for updates by device."""
    if not schedule.updated_there:
        return [0] * schedule.num_devices
    plan = sized_plan(schedule, costs)
    return [plan.update_slots_nbytes(device) for device in range(schedule.num_devices)]


def _in_turn(schedule: Schedule, sizes: list[float]) -> int:
    """Bytes of slots for packs that come one after the other, as the plan lays them: `Plan.slot_offsets`, and
    `Plan.gradient_offsets`, which leaves out frozen packs."""
    present = (round(size) for size in sizes if size)
    lifetimes = tuple(Lifetime(turn, turn + 1 + schedule.prefetch, nbytes) for turn, nbytes in enumerate(present))
    ends = (offset + life.nbytes for offset, life in zip(lay_at_offsets(lifetimes), lifetimes, strict=True))
    return max(ends, default=0)
