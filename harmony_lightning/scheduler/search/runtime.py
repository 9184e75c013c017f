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
0.5 % with faster host memory and 0.1 % with faster updates, in 276 random questions; with faster links in 8 of 379 random
questions about three layers that have no weights, whose steps overlap and have no period, by up to 27 %.

Each placement (pp, with a last pack that is dealt or not, dp, so many pipelines) is a family that is searched by itself,
the one with the lowest bound first: what takes less in one need not be looked for in the next.

Where the search chooses who updates packs, what else stays gives way to what devices update, so a member that is hopeless
at one rung need not be so at the next. It is given up by its floor (`runtime_variants`). And where everything fits, so
that nothing crosses the host links, that may take longer than the fastest plan, by `QUIET_SHARE` at most.

What moves the plan made from sizes with the memory is not held by this: `in_use` counts as it is given.
"""

import math
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import accumulate, repeat

from harmony_lightning.errors import CapacityError, ConfigurationError
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.steps import fair_seconds, runtime_seconds
from harmony_lightning.scheduler.search.found import Candidate, Found, best_of_kinds, num_runtime_computations
from harmony_lightning.scheduler.search.runtime_family import Mode, Stash, runtime_families, too_large
from harmony_lightning.scheduler.search.runtime_variants import RUNG, Movable, Variant, Variants
from harmony_lightning.scheduler.simulate import Rules

MEMBERS = 12
"""Packings of a rung that may be simulated."""
MAX_COMPUTATIONS = 2_500
"""Of all of these, microbatches times packs."""
MAX_AT_RUNG = 15_000
"""Of all variants of these that are simulated, if they are more than those that are looked at in full."""
MAX_FAIR_COMPUTATIONS = 200
"""Of one that is simulated with links shared fairly."""
USUAL_VARIANTS = 2
"""Of a member at a rung; one that has more counts as more members."""
FINALISTS = 6
"""Of these, those of which it is found out what they take."""
MAX_TOTAL = 15_000
"""Computations of all that is simulated in a family, a quarter of a second: rungs below those that were looked at by then
are left out, and so may be what is found with less memory. Models of 50 layers seldom come to that, of 200 they do."""
THOROUGH = 8
"""Each so many-th rung is looked at like that; the others with a third of the simulations, if the model is not small."""
SMALL = 1_000
"""Computations of the largest member of a small model's family."""
QUIET_SHARE = 0.03
"""Of the fastest plan's seconds: so much more may one take by which nothing crosses the host links."""
NUM_OTHERS = 3
"""So many candidates are told, if there are."""

Change = Callable[[Schedule], Schedule]
"""Adds something to a schedule."""


def search_runtime(
    costs: Costs,
    *,
    minibatch: int,
    mode: Mode,
    memory_bytes: float,
    stashes: tuple[Stash, ...] = ("device", "host"),
    pipelines: int | None = None,
    deals: bool | None = None,
    microbatch_size: int | None = None,
    together: tuple[frozenset[int], ...] = (),
    abilities: Change = lambda schedule: schedule,
    movable: Movable = lambda schedule: (),
    stay_bytes: float | None = None,
    moves_stash: bool = False,
    in_use: Schedule | None = None,
) -> Found:
    """The fastest plan found whose peak is at most `memory_bytes` on each GPU.

    Args:
        stashes: where inputs of layers may wait.
        pipelines, microbatch_size: the only number to try; None tries many.
        deals: whether the last pack is dealt; None tries both, if the mode has both.
        together: layers that must share a pack.
        abilities: adds what the runtime is asked to do: updates on devices, joint forwards.
        movable: packs for each of which the search chooses who updates it, the host or a device.
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
    stay = None if stay_bytes is None else stay_bytes / memory_bytes
    variants = Variants(costs, stashes, stay, moves_stash, movable)
    families = runtime_families(costs, minibatch, mode, pipelines, deals, microbatch_size, together)
    searches = [_Search(costs, tuple(map(abilities, family)), memory_bytes, variants) for family in families]
    searches.sort(key=lambda search: search.floor)  # what one finds is what others need not go below
    found: list[Candidate] = []
    for search in searches:
        found = search.run(found, None if found else in_use)
    if not found:
        raise CapacityError(too_large([s for search in searches for s in search.family], costs, memory_bytes, stashes))
    found = _preferred(found, costs)
    return Found(
        rules=str(Rules.RUNTIME),
        best=found[0],
        others=tuple(best_of_kinds(found))[1:],
        num_schedules=sum(len(search.family) for search in searches),
        num_simulated=sum(search.num_simulated for search in searches),
        is_proved=all(search.proves(found[0].seconds) for search in searches)
        and in_use is None
        and costs.machine.host_link_shared_by == 1
        and found[0].schedule.microbatches_per_forward == 1,
        search_seconds=time.perf_counter() - started,
    )


def _preferred(found: list[Candidate], costs: Costs) -> list[Candidate]:
    """With one in front by which nothing crosses the host links, if it takes hardly longer than the fastest: it leaves the
    host to others, and is what one device would do."""
    limit = (1 + QUIET_SHARE) * found[0].seconds if found else 0.0
    quiet = (c for c in found if c.seconds <= limit and _is_quiet(c.schedule, costs))
    first = next(quiet, None)
    return found if first is None else [first, *(candidate for candidate in found if candidate is not first)]


def _is_quiet(schedule: Schedule, costs: Costs) -> bool:
    """Neither weights, gradients and states nor stashes cross host links."""
    if schedule.dealt or schedule.num_copies > 1:
        return False
    last = len(schedule.packs_backward) - 1
    return all(
        (p in schedule.updates_stay if costs.gradient_bytes(span) else p in schedule.resident)
        and (schedule.stash == "device" or p in schedule.stash_stays or p == last)
        for p, span in enumerate(schedule.packs_backward)
    )


def _with_least(chosen: list[Variant], variants: list[Variant]) -> list[Variant]:
    """And of each packing among these the variant that takes least: it may fit where the chosen ones do not."""
    least: dict[object, Variant] = {}
    for variant in variants:
        if (packing := _packing(variant)) not in least or variant.peak_bytes < least[packing].peak_bytes:
            least[packing] = variant
    smallest = (least[packing] for packing in dict.fromkeys(map(_packing, chosen)))
    others = (one for one in smallest if num_runtime_computations(one.schedule) <= MAX_COMPUTATIONS)
    return list(dict.fromkeys((*chosen, *others)))


def _packing(variant: Variant) -> object:
    one = variant.schedule
    return one.num_copies, one.dealt, one.microbatch_backward, one.packs_backward


def is_simulated_fairly(schedule: Schedule) -> bool:
    """Whether its seconds are those with links and memory shared fairly."""
    return num_runtime_computations(schedule) <= MAX_FAIR_COMPUTATIONS


class _Search:
    """A search in one family."""

    def __init__(
        self,
        costs: Costs,
        family: tuple[Schedule, ...],
        memory_bytes: float,
        variants: Variants,
    ) -> None:
        self._costs, self.family, self._memory_bytes, self._variants = costs, family, memory_bytes, variants
        self._floors = {index: variants.floor(schedule) for index, schedule in enumerate(family)}
        self.floor = min(self._floors.values())
        self._alone = costs.on(replace(costs.machine, host_link_shared_by=1))
        self._limits = cache(self._simulate)
        self._found: dict[Schedule, Candidate] = {}
        self._left_out: dict[Schedule, float] = {}
        """Bounds of what was not simulated."""
        self._least_floor = math.inf
        """Of members of the family that were left out at some rung."""
        self._unseen: dict[int, float] = {}
        """And of members of the family that lower rungs were still to be looked at for when the search ended."""
        self._best = math.inf
        self._is_small = all(num_runtime_computations(schedule) <= SMALL for schedule in family)
        self._num_computed = 0
        self.num_simulated = 0

    def proves(self, seconds: float) -> bool:
        """Whether nothing in the family can take less."""
        left_out = (bound for schedule, bound in self._left_out.items() if schedule not in self._found)
        return all(bound >= seconds for bound in (self._least_floor, *left_out, *self._unseen.values()))

    def run(self, known: list[Candidate], in_use: Schedule | None) -> list[Candidate]:
        """Candidates, best first, with those `known` of other families; of those that take as long, the one in use."""
        self._found = {candidate.schedule: candidate for candidate in known}
        self._best = known[0].seconds if known else math.inf
        hopeful = {index: floor for index, floor in self._floors.items() if floor < self._best}
        """Floors at higher rungs."""
        if not hopeful and in_use is None:
            return self._candidates
        rung = math.floor(math.log(self._memory_bytes, RUNG))
        rung -= rung % self._variants.step
        while True:
            if in_use is not None:
                self._look_at([self._variants.settled(in_use, rung)])
            is_lowest = not any(map(self._variants.fits_somehow, reversed(self.family), repeat(RUNG**rung)))
            variants, floors = self._first_of(hopeful, rung, len(hopeful) if is_lowest else MEMBERS)
            members, finalists = self._members(variants, floors, rung, is_lowest)
            self._look_at([v for m in members for v in variants[m]], finalists)
            admitted = (v for those in variants.values() for v in those if v.peak_bytes <= self._memory_bytes)
            self._left_out |= {v.schedule: v.bound for v in admitted if v.schedule not in self._found}
            unmoved = (m for m, those in variants.items() if m not in members and those)
            open_floors = (floors[m] for m in unmoved if floors[m] < min(v.bound for v in variants[m]))
            self._least_floor = min([self._least_floor, *open_floors])
            hopeful = {index: floor for index, floor in (hopeful | floors).items() if floor < self._best}
            self._unseen = hopeful
            is_done = not hopeful and (in_use is None or self._stays_nothing(in_use, rung))
            if is_done or RUNG**rung < 1 or self._has_done_enough:
                return self._candidates
            rung -= self._variants.step

    @property
    def _candidates(self) -> list[Candidate]:
        return sorted(self._found.values(), key=lambda candidate: candidate.seconds)

    def _stays_nothing(self, schedule: Schedule, rung: int) -> bool:
        """Or what stays does not help, here or at lower rungs."""
        found = self._variants.settled(schedule, rung)
        return found.bound >= self._best or not (
            found.schedule.resident or found.schedule.stash_stays or found.schedule.keep[1:]
        )

    def _first_of(
        self, hopeful: dict[int, float], rung: int, count: int
    ) -> tuple[dict[int, list[Variant]], dict[int, float]]:
        """Of the family, variants at a rung with updates on the host: of so many with the lowest floors, and others on the
        way to them; and these floors."""
        found: dict[int, list[Variant]] = {}
        floors: dict[int, float] = {}
        lowest: list[float] = []
        for index in sorted(hopeful, key=lambda index: (hopeful[index], index)):
            if bisect_left(lowest, hopeful[index]) >= count:
                break
            found[index], floors[index] = self._variants.on_host(self.family[index], rung)
            if found[index]:
                insort(lowest, floors[index])
        return found, floors

    def _members(
        self, variants: dict[int, list[Variant]], floors: dict[int, float], rung: int, is_lowest: bool
    ) -> tuple[list[int], int]:
        """Of the family, those that may be simulated at a rung, whose variants get those with updates on devices, and how
        many of these variants in full; those that do not fit the memory count, too. At the lowest rung at which anything
        fits it is all of them."""
        order = sorted((m for m, those in variants.items() if those), key=lambda m: (floors[m], m))
        share = 1 if rung % THOROUGH == 0 or self._is_small else 1 / 3
        finalists = 2 * len(order) if is_lowest else round(share * FINALISTS)
        members: list[int] = []
        computations = 0.0
        for m in order if is_lowest else order[:MEMBERS]:
            variants[m] += self._variants.on_devices(self.family[m], rung)
            computations += num_runtime_computations(self.family[m]) * max(1, len(variants[m]) / USUAL_VARIANTS)
            if computations > share * MAX_COMPUTATIONS and len(members) >= finalists:
                break
            members.append(m)
        return members, finalists

    # Simulations ------------------------------------------------------------------------------------------------------

    def _look_at(self, variants: list[Variant], finalists: int = FINALISTS) -> None:
        """At those of a rung that are likely to be fastest: what shared links take is between the best and the worst case.
        Who is left out for its bound makes room for others, so the lower the best so far the more of those."""
        hopeful = [variant for variant in variants if not self._is_hopeless(variant.bound)]
        if len(hopeful) > finalists:
            hopeful.sort(key=lambda variant: variant.bound)
            computations = accumulate(num_runtime_computations(variant.schedule) for variant in hopeful)
            few = sum(number <= MAX_AT_RUNG for number in computations)
            hopeful = hopeful[: max(few, finalists)]
        if len(hopeful) > finalists:
            hopeful.sort(key=lambda variant: sum(self._limits(variant.schedule)))
        for variant in _with_least(hopeful[:finalists], variants):
            schedule = variant.schedule
            if self._has_done_enough:
                return
            if variant.peak_bytes > self._memory_bytes or schedule in self._found or self._is_hopeless(variant.bound):
                continue
            is_fair = is_simulated_fairly(schedule)
            seconds = fair_seconds(schedule, self._costs) if is_fair else self._limits(schedule)[1]
            seconds = max(seconds, variant.bound)
            self._found[schedule] = Candidate(schedule=schedule, seconds=seconds, peak_bytes=variant.peak_bytes)
            self._best = min(self._best, seconds)
            self.num_simulated += 1

    def _simulate(self, schedule: Schedule) -> tuple[float, float]:
        """Seconds with links of its own for each GPU, and with a fixed share of those that they share."""
        self._num_computed += num_runtime_computations(schedule)
        fixed = runtime_seconds(schedule, self._costs, 2)
        if self._costs.machine.host_link_shared_by == 1 or num_runtime_computations(schedule) > MAX_FAIR_COMPUTATIONS:
            return fixed, fixed
        return runtime_seconds(schedule, self._alone, 2), fixed

    @property
    def _has_done_enough(self) -> bool:
        return self._num_computed > MAX_TOTAL and bool(self._found)

    def _is_hopeless(self, seconds: float) -> bool:
        return seconds >= self._best and len(self._found) >= NUM_OTHERS
