"""The search for a plan that the runtime can carry out now: the same packs both ways, one microbatch size.

More memory never gives a slower plan, by construction. Candidates belong to *rungs*, amounts of memory that are always the
same: at each the packings that are most promising there, with as much staying on the devices as fits at that rung
(`levels`). Memory admits rungs, and changes nothing in them; what a candidate takes does not depend on it either; and what
is found is the fastest of all that are admitted. (Of very large models the lowest rungs are left out, and with them this
promise: `MAX_TOTAL`.)

Rungs are looked at from the highest down. A rung's candidates are thinned by bounds (`runtime_bound`), then by simulations
with links of its own for each GPU, which is about the best case, and with a fixed share, which is the worst. Finally the
few that are left are simulated with links shared fairly, which is the truth and takes several times as long. Whatever has
a bound above the best so far is left out of all that, and cannot be better.

A faster machine thins rungs otherwise, and a step of one plan may take a little longer when something is faster: by up to
0.5 % with faster host memory and 0.1 % with faster updates, in 276 random questions; never with faster links or GPUs.

What moves the plan made from sizes with the memory is not held by this: `in_use` counts as it is given.
"""

import math
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise, repeat
from typing import Literal

from harmony_lightning.errors import CapacityError, ConfigurationError
from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.levels import Levels
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes, visit_bytes
from harmony_lightning.scheduler.runtime.steps import fair_seconds, runtime_seconds
from harmony_lightning.scheduler.search.runtime_bounds import runtime_bound
from harmony_lightning.scheduler.search.runtime_family import Mode, Stash, runtime_family, too_large
from harmony_lightning.scheduler.search.schedules import Candidate, Found, best_of_kinds, num_computations
from harmony_lightning.scheduler.simulate import Rules

RUNG = 2 ** (1 / 8)
"""Each rung is so many times the one below."""
MEMBERS = 12
"""Packings of a rung that may be simulated."""
MAX_COMPUTATIONS = 2_500
"""Of all of these, microbatches times packs."""
MAX_FAIR_COMPUTATIONS = 200
"""Of one that is simulated with links shared fairly."""
FINALISTS = 6
"""Of these, those of which it is found out what they take."""
MAX_TOTAL = 60_000
"""Computations of all that is simulated, about a second and a half: rungs below those that were looked at by then are left
out, and so may be what is found with less memory. Models of 50 layers seldom come to that, of 200 they do."""
THOROUGH = 8
"""Each so many-th rung is looked at like that; the others with a third of the simulations, if the model is not small."""
SMALL = 1_000
"""Computations of the largest member of a small model's family."""
NUM_OTHERS = 3
"""So many candidates are told, if there are."""

Change = Callable[[Schedule], Schedule]
"""Adds something to a schedule."""


def search_runtime(
    costs: Costs,
    *,
    minibatch: int,
    mode: Literal["pp", "dp", "auto"],
    memory_bytes: float,
    stashes: tuple[Stash, ...] = ("device", "host"),
    microbatch_size: int | None = None,
    together: tuple[frozenset[int], ...] = (),
    abilities: Change = lambda schedule: schedule,
    stay_bytes: float | None = None,
    moves_stash: bool = False,
    in_use: Schedule | None = None,
) -> Found:
    """The fastest plan found whose peak is at most `memory_bytes` on each GPU.

    Args:
        stashes: where inputs of layers may wait.
        microbatch_size: the only one to try; None tries many.
        together: layers that must share a pack.
        abilities: adds what the runtime is asked to do: dealt packs, updates on devices, joint forwards.
        stay_bytes: up to which things stay on each GPU, as in steps behind a measured one; None if nothing will.
        moves_stash: stashes go to the host whatever is left.
        in_use: it is found, if it fits, unless another one is faster.

    Raises:
        CapacityError: nothing fits, with what the smallest packs need.
        ConfigurationError: the minibatch is empty.
    """
    if minibatch < 1:
        raise ConfigurationError(f"the minibatch must have at least one sample, got {minibatch}")
    started = time.perf_counter()
    modes: tuple[Mode, ...] = ("pp", "dp") if mode == "auto" and costs.machine.gpus > 1 else ("pp",)
    if mode != "auto":
        modes = (mode,)
    family = tuple(map(abilities, runtime_family(costs, minibatch, modes, microbatch_size, together)))
    stay = None if stay_bytes is None else stay_bytes / memory_bytes
    search = _Search(costs, family, memory_bytes, stashes, stay, moves_stash, in_use)
    found = search.run()
    if not found:
        raise CapacityError(too_large(family, costs, memory_bytes, stashes))
    return Found(
        rules=str(Rules.RUNTIME),
        best=found[0],
        others=tuple(best_of_kinds(found))[1:],
        num_schedules=len(family),
        num_simulated=search.num_simulated,
        is_proved=search.is_complete
        and in_use is None
        and costs.machine.host_link_shared_by == 1
        and found[0].schedule.microbatches_per_forward == 1,
        search_seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """A member of the family with what stays at a rung."""

    schedule: Schedule
    bound: float
    peak_bytes: float


class _Search:
    """One search.

    Attributes:
        is_complete: nothing in the family can be faster than what was found.
    """

    def __init__(
        self,
        costs: Costs,
        family: tuple[Schedule, ...],
        memory_bytes: float,
        stashes: tuple[Stash, ...],
        stay: float | None,
        moves_stash: bool,
        in_use: Schedule | None,
    ) -> None:
        """`stay`: bytes up to which things stay for each byte of `memory_bytes`."""
        self._costs, self._family, self._memory_bytes, self._stay = costs, family, memory_bytes, stay
        self._stashes, self._in_use = stashes, in_use
        self._alone = costs.on(replace(costs.machine, host_link_shared_by=1))
        visits = cache(lambda schedule: tuple(visit_bytes(schedule, costs)))
        self._peak = cache(lambda schedule: runtime_peak_bytes(schedule, costs, visits(schedule)))
        self._levels = cache(lambda one: Levels(one, costs, moves_stash=moves_stash, visits=visits(one)))
        self._bound = cache(lambda schedule: runtime_bound(schedule, costs))
        self._limits = cache(self._simulate)
        self._least = cache(self._count_least)
        self._found: dict[Schedule, Candidate] = {}
        self._left_out: dict[Schedule, float] = {}
        """Bounds of what was not simulated."""
        self._unseen: dict[int, float] = {}
        """And of members of the family that lower rungs were still to be looked at for when the search ended."""
        self._best = math.inf
        self._is_small = all(num_computations(schedule) <= SMALL for schedule in family)
        self._num_computed = 0
        self.num_simulated = 0

    @property
    def is_complete(self) -> bool:
        left_out = (bound for schedule, bound in self._left_out.items() if schedule not in self._found)
        return all(bound >= self._best for bound in (*left_out, *self._unseen.values()))

    def run(self) -> list[Candidate]:
        """Candidates, best first; of those that take as long, the one in use."""
        hopeful = dict.fromkeys(range(len(self._family)), 0.0)
        """Bounds at higher rungs: where less stays they only rise."""
        rung = math.floor(math.log(self._memory_bytes, RUNG))
        rung -= 0 if self._stay is None else rung % 2
        while True:
            if self._in_use is not None:
                self._look_at([self._variant(self._in_use, rung)])
            is_lowest = not any(map(self._fits_somehow, reversed(self._family), repeat(RUNG**rung)))
            variants = self._first_of(hopeful, rung, len(hopeful) if is_lowest else MEMBERS)
            bounds = {index: min(v.bound for v in those) for index, those in variants.items() if those}
            members, finalists = self._members(bounds, rung, is_lowest)
            self._look_at([v for m in members for v in variants[m]], finalists)
            admitted = (v for those in variants.values() for v in those if v.peak_bytes <= self._memory_bytes)
            self._left_out |= {v.schedule: v.bound for v in admitted if v.schedule not in self._found}
            unseen = {index: bound for index, bound in hopeful.items() if index not in variants}
            hopeful = {index: bound for index, bound in (unseen | bounds).items() if bound < self._best}
            self._unseen = hopeful
            is_done = not hopeful and (self._in_use is None or self._stay is None or self._stays_nothing(rung))
            if is_done or RUNG**rung < 1 or self._has_done_enough:
                return sorted(self._found.values(), key=lambda candidate: candidate.seconds)
            rung -= 1 if self._stay is None else 2

    def _first_of(self, hopeful: dict[int, float], rung: int, count: int) -> dict[int, list[_Variant]]:
        """Variants of the family at a rung: of so many with the lowest bounds there, and others on the way to them."""
        found: dict[int, list[_Variant]] = {}
        bounds: list[float] = []
        for index in sorted(hopeful, key=lambda index: (hopeful[index], index)):
            if bisect_left(bounds, hopeful[index]) >= count:
                break
            found[index] = self._variants(self._family[index], rung)
            if found[index]:
                insort(bounds, min(variant.bound for variant in found[index]))
        return found

    def _members(self, bounds: dict[int, float], rung: int, is_lowest: bool) -> tuple[list[int], int]:
        """Of the family, those that may be simulated at a rung, and how many of them in full; those that do not fit the
        memory count, too. At the lowest rung at which anything fits it is all of them."""
        order = sorted(bounds, key=lambda index: (bounds[index], index))
        if is_lowest:
            return order, 2 * len(order)
        computations = accumulate(num_computations(self._family[index]) for index in order)
        share = 1 if rung % THOROUGH == 0 or self._is_small else 1 / 3
        few = sum(number <= share * MAX_COMPUTATIONS for number in computations)
        finalists = round(share * FINALISTS)
        return order[: min(MEMBERS, max(few, finalists))], finalists

    # Variants ---------------------------------------------------------------------------------------------------------

    def _variants(self, schedule: Schedule, rung: int) -> list[_Variant]:
        """Those that fit below the next rung, with what stays at this one, and may be fastest."""
        limit = RUNG ** (rung + (1 if self._stay is None else 2))
        if self._stay is not None:
            # Stashes that stay are on the device; with one slot less more may stay.
            choices = [replace(schedule, prefetch=prefetch, stash=self._stashes[-1]) for prefetch in (1, 0)]
            return [self._variant(choice, rung) for choice in choices if self._fits(choice, limit)]
        found: list[Schedule] = []
        for prefetch in (1, 0):
            for stash in self._stashes:
                # A slot more and stashes on the device never make a step slower.
                if not any(
                    one.prefetch >= prefetch and self._stashes.index(one.stash) <= self._stashes.index(stash)
                    for one in found
                ):
                    choice = replace(schedule, prefetch=prefetch, stash=stash)
                    if self._fits(choice, limit):
                        found.append(choice)
        return [self._variant(choice, rung) for choice in found]

    def _variant(self, schedule: Schedule, rung: int) -> _Variant:
        peak = self._peak(schedule)
        if self._stay is not None:
            schedule = self._levels(schedule).at(self._stay * RUNG**rung)
        return _Variant(schedule=schedule, bound=self._bound(schedule), peak_bytes=peak)

    def _stays_nothing(self, rung: int) -> bool:
        assert self._in_use is not None
        found = self._variant(self._in_use, rung)
        return found.bound >= self._best or not (
            found.schedule.resident or found.schedule.stash_stays or found.schedule.keep[1:]
        )

    def _fits_somehow(self, schedule: Schedule, memory_bytes: float) -> bool:
        choices = (replace(schedule, prefetch=p, stash=stash) for p in (0, 1) for stash in reversed(self._stashes))
        return any(self._fits(choice, memory_bytes) for choice in choices)

    def _fits(self, schedule: Schedule, memory_bytes: float) -> bool:
        return self._least(schedule) <= memory_bytes and self._peak(schedule) <= memory_bytes

    def _count_least(self, schedule: Schedule) -> float:
        """Slots, and stashes of packs in front of a device's last one: quickly told, and no more than the peak."""
        costs, packs = self._costs, schedule.packs_backward
        if schedule.dealt:
            return max(costs.weight_bytes(span) + costs.gradient_bytes(span) for span in packs)
        sizes, step = split(schedule.minibatch, schedule.microbatch_backward), schedule.num_devices
        if schedule.mode == "dp":
            sizes, step = sizes[::step], 1
        most = 0.0
        for d in range(min(step, len(packs))):
            here = packs[d::step]
            pairs = list(pairwise(here)) if schedule.prefetch and len(here) > 1 else [(span,) for span in here]
            slots = max(sum(map(costs.weight_bytes, pair)) for pair in pairs)
            slots += max(sum(map(costs.gradient_bytes, pair)) for pair in pairs)
            if schedule.stash == "device":
                slots += sum(costs.stash_bytes(size, span) for span in here[:-1] for size in sizes)
            most = max(most, slots)
        return most

    # Simulations ------------------------------------------------------------------------------------------------------

    def _look_at(self, variants: list[_Variant], finalists: int = FINALISTS) -> None:
        """At those of a rung that are likely to be fastest: what shared links take is between the best and the worst case.
        Who is left out for its bound makes room for others, so the lower the best so far the more of those."""
        hopeful = [variant for variant in variants if not self._is_hopeless(variant.bound)]
        if len(hopeful) > finalists:
            hopeful.sort(key=lambda variant: sum(self._limits(variant.schedule)))
        for variant in hopeful[:finalists]:
            schedule = variant.schedule
            if self._has_done_enough:
                return
            if variant.peak_bytes > self._memory_bytes or schedule in self._found or self._is_hopeless(variant.bound):
                continue
            is_small = num_computations(schedule) <= MAX_FAIR_COMPUTATIONS
            seconds = fair_seconds(schedule, self._costs) if is_small else self._limits(schedule)[1]
            seconds = max(seconds, variant.bound)
            self._found[schedule] = Candidate(schedule=schedule, seconds=seconds, peak_bytes=variant.peak_bytes)
            self._best = min(self._best, seconds)
            self.num_simulated += 1

    def _simulate(self, schedule: Schedule) -> tuple[float, float]:
        """Seconds with links of its own for each GPU, and with a fixed share of those that they share."""
        self._num_computed += num_computations(schedule)
        fixed = runtime_seconds(schedule, self._costs, 2)
        if self._costs.machine.host_link_shared_by == 1 or num_computations(schedule) > MAX_FAIR_COMPUTATIONS:
            return fixed, fixed
        return runtime_seconds(schedule, self._alone, 2), fixed

    @property
    def _has_done_enough(self) -> bool:
        return self._num_computed > MAX_TOTAL and bool(self._found)

    def _is_hopeless(self, seconds: float) -> bool:
        return seconds >= self._best and len(self._found) >= NUM_OTHERS
