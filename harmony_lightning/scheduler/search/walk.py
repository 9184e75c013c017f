"""Through all schedules of one mode in the order of bounds, with one choice of what our rules leave open.

In three steps of rising cost: a bound for a backward packing with the least that any of a group of forward packings leaves
behind; bounds for its pairs with each of them; the simulation. Whatever is not looked at closer had a bound above what was
found by then.

A walk may end before it has proved anything, as it takes a limited effort. What it has seen by then still depends on its
`rung` alone, whatever memory the search was asked for, but for what cannot be faster than what was seen before:

    who walks, and in which order      follows from the rung
    who is passed over                 has a bound above the best so far: the lower that is, the more are
    effort                             is counted for who fits below the next rung, whether or not the memory admits it

So the lower the best was before a walk, the lower it is afterwards.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.search.bounds import (
    Choice,
    Floats,
    Ints,
    Setting,
    after_backward,
    after_forward,
    measure,
    needs,
)
from harmony_lightning.scheduler.search.found import Candidate, num_computations
from harmony_lightning.scheduler.search.packings import Packing, Packings
from harmony_lightning.scheduler.search.sizes import choose_sizes
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds

RUNG = 2 ** (1 / 8)
"""Each rung is so many times the one below."""
BLOCK = 64
"""Groups of pairs whose bounds are refined at once."""
MAX_COMPUTATIONS = 60_000
"""Microbatches times packs that a walk simulates at one rung at most, and one schedule more: about a second. Mostly it
needs a hundredth of them. Half of that with each setting, where there are several."""
MAX_BOUNDED = 4_000_000
"""Turns that bounds of pairs look at, at most: an eighth of a second. Mostly they need a tenth of them."""
MAX_SIZED = 20_000
"""Packs whose memory a walk counts at most: about half a second, where little fits and bounds say little."""
MIN_CANDIDATES = 4
"""So many kinds of schedules are simulated in any case, for comparison."""


class Seen:
    """What was simulated for one question: of what the memory admits."""

    def __init__(self, costs: Costs, rules: Rules, memory_bytes: float) -> None:
        self._costs, self._rules, self._memory_bytes = costs, rules, memory_bytes
        self.best: dict[tuple[str, int, int, int, int], Candidate] = {}
        """By mode and four-tuple with packs counted: the best of those."""
        self.below = math.inf
        """Who takes less is faster than all of these; seconds are told to the nanosecond."""
        self.num_simulated = 0
        self.peak_bytes = cache(lambda schedule: peak_bytes(schedule, costs, rules))
        self._simulated: set[Schedule] = set()

    def simulate(self, schedule: Schedule) -> None:
        """Look at it, unless it does not fit."""
        peak = self.peak_bytes(schedule)
        if peak > self._memory_bytes or schedule in self._simulated:
            return
        self._simulated.add(schedule)
        taken = seconds(schedule, self._costs, self._rules)
        self.num_simulated += 1
        key = kind_of(schedule)
        if key not in self.best or taken < self.best[key].seconds:
            self.best[key] = Candidate(schedule=schedule, seconds=taken, peak_bytes=peak)
        self.below = min(self.below, taken - 0.5e-9)


class Walk:
    """Walks at one rung after another, from the highest down.

    Args:
        settings: best first: no bound is lower with a later one.
        rung: the highest.
    """

    def __init__(
        self, settings: Sequence[Setting], mode: Literal["pp", "dp"], minibatch: int, packings: Packings, rung: int
    ) -> None:
        self._settings, self._mode, self._minibatch, self._packings = settings, mode, minibatch, packings
        self._ideal, self._open = settings[0], list(range(len(settings)))
        self._most = MAX_COMPUTATIONS // (1 if len(settings) == 1 else 2)
        limit = RUNG ** (rung + 1)
        choices = [
            (size, packs)
            for size in choose_sizes(self._ideal.costs, "backward", self._ideal.samples)
            for packs in packings.backward(size)
        ]
        self._backward, self._needs_backward = _up_to(limit, choices, needs(settings, "backward", choices))
        self._forward, self._needs_forward = _up_to(limit, *self._family())
        groups = dict.fromkeys(map(self._group, self._forward))
        self._groups = list(groups)
        places = {group: place for place, group in enumerate(groups)}
        self._group_of = np.array([places[self._group(choice)] for choice in self._forward], dtype=np.int64)
        self._behind = np.array([packs[-1][0] for _, packs in self._backward], dtype=np.int64)
        """Layers in front of the last backward pack."""
        self._before = np.array([num_layers for num_layers, *_ in self._groups], dtype=np.int64)[self._group_of]
        self._turns = measure(self._ideal, "backward", self._backward)
        self._leaves = after_forward(self._ideal, measure(self._ideal, "forward", self._forward))

    @property
    def num_schedules(self) -> int:
        """Pairs that may fit."""
        of_forward = Counter((self._before[row], size) for row, (size, _) in enumerate(self._forward))
        of_backward = Counter((self._behind[row], size) for row, (size, _) in enumerate(self._backward))
        return sum(
            one * other
            for (behind, small), one in of_backward.items()
            for (layers, large), other in of_forward.items()
            if layers == behind and large >= small
        )

    def run(self, rung: int, seen: Seen) -> bool:
        """Look at schedules below the next rung, unless it is known from higher ones that none of them is faster than what
        was seen. Tells whether that is known now."""
        self._open = [place for place in self._open if not self._run(place, RUNG ** (rung + 1), seen)]
        return not self._open

    def _run(self, place: int, limit: float, seen: Seen) -> bool:
        setting = self._settings[place]
        forward = np.flatnonzero(self._needs_forward[place] <= limit)
        backward = self._hopeful(np.flatnonzero(self._needs_backward[place] <= limit), forward, seen.below)
        if not len(backward):
            return True
        forward = forward[np.isin(self._before[forward], self._behind[backward])]
        if setting == self._ideal:
            turns, leaves = self._turns.rows(backward), self._leaves.rows(forward)
        else:
            turns = measure(setting, "backward", [self._backward[row] for row in backward])
            leaves = after_forward(setting, measure(setting, "forward", [self._forward[row] for row in forward]))
        starts = _starts(self._group_of[forward])
        alike: dict[int, list[tuple[int, int]]] = {}
        for index, row in enumerate(forward[starts]):
            num_layers, size, _ = self._groups[self._group_of[row]]
            alike.setdefault(num_layers, []).append((size, index))
        # A pair is a backward choice and a group of forward choices, (row, group).
        pairs = np.array(
            [
                (row, index)
                for row, choice in enumerate(backward)
                for size, index in alike[self._behind[choice]]
                if size >= self._backward[choice][0]
            ],
            dtype=np.int64,
        ).reshape(-1, 2)
        bounds = after_backward(setting, leaves.least_of(starts).rows(pairs[:, 1]), turns, pairs[:, 0])
        sizes = np.diff(np.append(starts, len(forward)))[pairs[:, 1]]
        effort = _Effort()
        order = np.argsort(bounds, kind="stable")
        for at in range(0, len(order), BLOCK):
            block = order[at : at + BLOCK]
            block = block[bounds[block] < seen.below]
            if not len(block):
                break
            if effort.bounded > MAX_BOUNDED:
                return False
            rows = np.repeat(pairs[block, 0], sizes[block])
            offsets = np.arange(len(rows)) - np.repeat(np.cumsum(sizes[block]) - sizes[block], sizes[block])
            members = np.repeat(starts[pairs[block, 1]], sizes[block]) + offsets
            effort.bounded += int(turns.counts[rows].sum())
            refined = after_backward(setting, leaves.rows(members), turns, rows)
            if not self._look_at(setting, forward[members], backward[rows], refined, seen, limit, effort):
                return False
        return True

    def _look_at(
        self,
        setting: Setting,
        forward: Ints,
        backward: Ints,
        bounds: Floats,
        seen: Seen,
        limit: float,
        effort: "_Effort",
    ) -> bool:
        """Whether all of these pairs were looked at, or cannot be faster."""
        for pair in np.argsort(bounds, kind="stable"):
            is_hopeful = bounds[pair] < seen.below
            if not is_hopeful and len(seen.best) >= MIN_CANDIDATES:
                break
            schedule = self._schedule(setting, self._forward[forward[pair]], self._backward[backward[pair]])
            if is_hopeful:
                if effort.computed > self._most or effort.sized > MAX_SIZED:
                    return False
                effort.sized += len(schedule.packs_forward) + len(schedule.packs_backward)
                if seen.peak_bytes(schedule) <= limit:
                    effort.computed += num_computations(schedule)
            elif kind_of(schedule) in seen.best:
                continue
            seen.simulate(schedule)
        return True

    def _schedule(self, setting: Setting, forward: Choice, backward: Choice) -> Schedule:
        return Schedule(
            mode=self._mode,
            num_devices=setting.costs.machine.gpus,
            minibatch=self._minibatch,
            microbatch_forward=forward[0],
            packs_forward=forward[1],
            microbatch_backward=backward[0],
            packs_backward=backward[1],
            prefetch=setting.prefetch,
            boundary=setting.boundary,
        )

    def _hopeful(self, backward: Ints, forward: Ints, below: float) -> Ints:
        """Of backward choices, those that might be faster behind the best of all forward choices for their layers."""
        backward = backward[np.isin(self._behind[backward], self._before[forward])]
        if math.isinf(below) or not len(backward):
            return backward
        starts = _starts(self._before[forward])
        best = self._leaves.rows(forward).least_of(starts)
        place_of = {int(num_layers): place for place, num_layers in enumerate(self._before[forward[starts]])}
        places = np.array([place_of[int(num_layers)] for num_layers in self._behind[backward]], dtype=np.int64)
        return backward[after_backward(self._ideal, best.rows(places), self._turns, backward) < below]

    # The family -------------------------------------------------------------------------------------------------------

    def _family(self) -> tuple[list[Choice], Floats]:
        """Forward choices for all backward choices, sorted into groups that are alike, and the bytes that they need. The
        packs of backward may do for forward, too: from where these fit somehow."""
        by_layers: dict[int, dict[Packing, float]] = {}
        for row, (_, packs) in enumerate(self._backward):
            nbytes, of_layers = self._needs_backward[:, row].min(), by_layers.setdefault(packs[-1][0], {})
            of_layers[packs[:-1]] = min(nbytes, of_layers.get(packs[:-1], nbytes))
        family = [
            ((size, packing), nbytes)
            for size in choose_sizes(self._ideal.costs, "forward", self._ideal.samples)
            for num_layers, of_backward in by_layers.items()
            for packing, nbytes in (of_backward | dict.fromkeys(self._packings.forward(size, num_layers), 0.0)).items()
        ]
        family.sort(key=lambda entry: (self._group(entry[0]), entry[0][1]))
        choices = [choice for choice, _ in family]
        return choices, np.maximum(needs(self._settings, "forward", choices), [nbytes for _, nbytes in family])

    def _group(self, choice: Choice) -> tuple[int, int, int]:
        """Layers, microbatch size, and how often the turns go round the devices, up to twice: such leave alike states."""
        size, packing = choice
        return packing[-1][1] + 1 if packing else 0, size, min(len(packing) // self._ideal.stride, 2)


@dataclass(slots=True)
class _Effort:
    """Of a walk at one rung."""

    computed: int = 0
    sized: int = 0
    bounded: int = 0


def _up_to(limit: float, choices: list[Choice], nbytes: Floats) -> tuple[list[Choice], Floats]:
    """Those that may fit with some setting."""
    rows = np.flatnonzero(nbytes.min(axis=0) <= limit)
    return [choices[row] for row in rows], nbytes[:, rows]


def _starts(numbers: Ints) -> Ints:
    """Where rows of equal numbers begin."""
    return np.flatnonzero(np.diff(numbers, prepend=-1))


def kind_of(schedule: Schedule) -> tuple[str, int, int, int, int]:
    """Schedules of one kind are told as one."""
    return (
        schedule.mode,
        schedule.microbatch_forward,
        len(schedule.packs_forward),
        schedule.microbatch_backward,
        len(schedule.packs_backward),
    )
