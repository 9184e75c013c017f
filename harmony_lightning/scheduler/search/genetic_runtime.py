"""Breeding a plan that the runtime can carry out now, scored by the simulation of what it does (`runtime.steps`).

Like `genetic`, after SwapAdvisor (Huang et al., ASPLOS 2020). What a plan leaves open are the genes:

    order       the placement: packs, or microbatches, go round the devices, or both in several pipelines; the microbatch
                size; where the last pack is dealt, the devices to which its microbatches go, one after the other
    swapping    the borders of packs, the same both ways; whether a pack comes in ahead of the running one
    placement   where stashes wait, on the device or on the host; how many of the packs that may be are updated on devices
                and stay there, the first ones

What stays on the devices from one visit to the next is no gene: the runtime decides it when it has measured a step
(`residency`), so a gene would promise what is not carried out. Each plan is judged with what would stay under it.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, TypeVar

from harmony_lightning.errors import CapacityError, ConfigurationError
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.steps import fair_seconds, runtime_seconds
from harmony_lightning.scheduler.search.breeding import (
    Bordering,
    Borders,
    Fitness,
    evolve,
    packs_between,
    stages,
)
from harmony_lightning.scheduler.search.found import Candidate, Found, best_of_kinds, num_runtime_computations
from harmony_lightning.scheduler.search.runtime_family import Mode, Placed, deal_last, placements
from harmony_lightning.scheduler.search.runtime_variants import Movable
from harmony_lightning.scheduler.search.sizes import choose_sizes
from harmony_lightning.scheduler.simulate import Rules
from harmony_lightning.units import format_nbytes

POPULATION = 16
"""Not more, as there is time for a hundred plans of a large model."""
MAX_COMPUTATIONS = 80_000
"""Microbatches times packs that are simulated at most: some three seconds."""
MAX_SHARE = 0.25
"""Of these, for one plan: larger ones are not looked at while there are others."""
MAX_SIMULATED = 800
"""Of small schedules: their plans take longer to make than to simulate."""
NUM_FINALISTS = 4
MAX_FAIR_COMPUTATIONS = 2_000
"""So many, as far as all are no larger than this, are simulated with links that are shared fairly: about a second."""
MARGIN = 0.03
"""By so much of its seconds another plan must be faster than the one in use: predictions are about as much off."""

Place = Literal["device", "host"]
Change = Callable[[Schedule], Schedule]
Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Genome:
    """A plan as it is bred."""

    placed: Placed
    size: int
    borders: Borders
    prefetch: int
    stash: Place
    dealt_order: tuple[int, ...] | None = None
    """Devices of the microbatches of the last pack, if it is dealt; None: as is usual."""
    num_moved: int = 0
    """Packs, of those that may be, that are updated on devices."""


def breed_runtime(
    costs: Costs,
    *,
    minibatch: int,
    mode: Mode,
    memory_bytes: float,
    stashes: tuple[Place, ...] = ("device", "host"),
    pipelines: int | None = None,
    deals: bool | None = None,
    microbatch_size: int | None = None,
    together: tuple[frozenset[int], ...] = (),
    abilities: Change = lambda schedule: schedule,
    movable: Movable = lambda schedule: (),
    stay: Change | None = None,
    in_use: Schedule | None = None,
    seed: int = 0,
) -> Found:
    """The fastest plan that evolves, whose peak is at most `memory_bytes` on each GPU. The same seed gives the same plan.

    Args:
        stashes: where inputs of layers may wait.
        pipelines, microbatch_size: the only number to try; None tries many.
        deals: whether the last pack is dealt; None tries both, if the mode has both.
        together: layers that must share a pack.
        abilities: adds what the runtime is asked to do: updates on devices, joint forwards.
        movable: packs for each of which it is bred who updates it, the host or a device.
        stay: what a step that was measured will let stay; None if nothing will.
        in_use: it is found, if it fits, unless another one is faster by `MARGIN`.

    Raises:
        CapacityError: nothing that evolved fits.
        ConfigurationError: the minibatch is empty.
    """
    if minibatch < 1:
        raise ConfigurationError(f"the minibatch must have at least one sample, got {minibatch}")
    started = time.perf_counter()
    gpus = costs.machine.gpus
    placed_so = placements(mode, gpus, pipelines, deals)
    shares = {placed: gpus if placed.mode == "dp" else placed.pipelines for placed in placed_so}
    """By placement, over how many pipelines the minibatch goes."""
    sizes = {
        placed: [microbatch_size]
        if microbatch_size is not None
        else choose_sizes(costs, "backward", -(-minibatch // share))
        for placed, share in shares.items()
    }
    dice = random.Random(seed)
    bred: list[_Plans] = []
    best: list[Genome] = []
    numbers = stages(minibatch)
    for samples in numbers:
        fitting = {placed: _at_most(sizes[placed], samples // share) for placed, share in shares.items()}
        bordering = Bordering(costs.num_layers, dice, together)
        plans = _Plans(costs, samples, fitting, stashes, bordering, memory_bytes, dice, 1 / len(numbers))
        plans.abilities, plans.movable, plans.stay = abilities, movable, stay
        given = plans.like(in_use) if in_use is not None and samples == minibatch else []
        founders = [*given, *best, *(plans.founder() for _ in range(POPULATION - len(best)))]
        evolve(plans, dice, plans.is_spent, [*founders, *plans.smallest()])
        best = sorted(plans.known, key=plans.fitness)[: POPULATION // 2]
        bred.append(plans)
    found = _closer(list(best_of_kinds(sorted(plans.candidates, key=lambda candidate: candidate.seconds))), costs)
    if in_use is not None and (peak := runtime_peak_bytes(in_use, costs)) <= memory_bytes:
        known = stay(in_use) if stay is not None else in_use
        present = _closer(
            [Candidate(schedule=known, seconds=runtime_seconds(known, costs, 2), peak_bytes=peak)], costs
        )[0]
        if not (found and found[0].seconds < (1 - MARGIN) * present.seconds):
            found = [present, *(candidate for candidate in found if candidate.schedule != known)]
    if not found:
        raise CapacityError(
            f"none of {len(plans.known)} bred plans fits in {format_nbytes(memory_bytes)} per GPU; raise memory, or use "
            f"the default planner, which tells what is too large"
        )
    return Found(
        rules=str(Rules.RUNTIME),
        best=found[0],
        others=tuple(found[1:]),
        num_schedules=sum(len(one.known) for one in bred),
        num_simulated=sum(len(one.candidates) for one in bred),
        is_proved=False,
        search_seconds=time.perf_counter() - started,
    )


def _at_most(sizes: list[int], samples: int) -> list[int]:
    return [size for size in sizes if size <= samples] or sizes[:1]


def _closer(found: Sequence[Candidate], costs: Costs) -> list[Candidate]:
    """The best with seconds as they are when links are shared fairly, as far as they are small enough to be looked at."""
    best, budget = list(found[:NUM_FINALISTS]), MAX_FAIR_COMPUTATIONS
    refined: list[Candidate] = []
    for candidate in best:
        budget -= num_runtime_computations(candidate.schedule)
        if budget < 0:
            break
        refined.append(replace(candidate, seconds=fair_seconds(candidate.schedule, costs)))
    return sorted(refined or best, key=lambda candidate: candidate.seconds)


class _Plans:
    """The breed."""

    abilities: Change
    movable: Movable
    stay: Change | None

    def __init__(
        self,
        costs: Costs,
        minibatch: int,
        sizes: dict[Placed, list[int]],
        stashes: tuple[Place, ...],
        bordering: Bordering,
        memory_bytes: float,
        dice: random.Random,
        share: float,
    ) -> None:
        """`share` of all that may be simulated."""
        self.costs, self.minibatch, self.sizes, self.stashes = costs, minibatch, sizes, stashes
        self.bordering, self.memory_bytes, self.dice = bordering, memory_bytes, dice
        self.known: dict[Genome, Fitness] = {}
        self.candidates: list[Candidate] = []
        self._num_computations, self._share = 0, share

    def is_spent(self) -> bool:
        """Never before something fits."""
        return (
            self._num_computations >= self._share * MAX_COMPUTATIONS
            or len(self.candidates) >= self._share * MAX_SIMULATED
        )

    def fitness(self, genome: Genome) -> Fitness:
        if genome not in self.known:
            self.known[genome] = self._judged(genome)
        return self.known[genome]

    def _judged(self, genome: Genome) -> Fitness:
        if self.is_spent():
            return Fitness(inf, inf)  # the last generation is not looked at as a whole
        schedule = self._schedule(genome)
        peak = runtime_peak_bytes(schedule, self.costs)
        if peak > self.memory_bytes:
            return Fitness(peak - self.memory_bytes, 0.0)
        if self.candidates and num_runtime_computations(schedule) > MAX_SHARE * self._share * MAX_COMPUTATIONS:
            return Fitness(0.0, inf)
        if self.stay is not None:
            schedule = self.stay(schedule)
        seconds = runtime_seconds(schedule, self.costs, 2)
        self.candidates.append(Candidate(schedule=schedule, seconds=seconds, peak_bytes=peak))
        self._num_computations += num_runtime_computations(schedule)
        return Fitness(0.0, seconds)

    def _schedule(self, genome: Genome) -> Schedule:
        packs = packs_between(genome.borders, self.costs.num_layers)
        schedule = Schedule(
            mode=genome.placed.mode,
            num_devices=self.costs.machine.gpus,
            pipelines=genome.placed.pipelines,
            minibatch=self.minibatch,
            microbatch_forward=genome.size,
            packs_forward=packs[:-1],
            microbatch_backward=genome.size,
            packs_backward=packs,
            prefetch=genome.prefetch,
            stash=genome.stash,
        )
        schedule = self.abilities(deal_last(schedule, self.costs) if genome.placed.is_dealt else schedule)
        # One microbatch for each device at most: they go to different ones in any case, and sums are those of one device.
        if schedule.dealt_order and genome.dealt_order is not None:
            schedule = replace(schedule, dealt_order=genome.dealt_order)
        if genome.num_moved:
            there = tuple(self.movable(schedule)[: genome.num_moved])
            schedule = replace(schedule, updated_there=there, updates_stay=there)
        return schedule

    # Founders ---------------------------------------------------------------------------------------------------------

    def smallest(self) -> list[Genome]:
        """One of them fits if anything does."""
        return [
            Genome(placed, sizes[0], self.bordering.finest(), prefetch=0, stash=self.stashes[-1])
            for placed, sizes in self.sizes.items()
        ]

    def like(self, schedule: Schedule) -> list[Genome]:
        """That of a schedule, if it can be bred."""
        placed = Placed(schedule.mode, schedule.pipelines, bool(schedule.dealt))
        if schedule.microbatch_backward not in self.sizes.get(placed, ()):
            return []
        borders = self.bordering.viable({first for first, _ in schedule.packs_backward})
        order = schedule.dealt_order or None
        return [Genome(placed, schedule.microbatch_backward, borders, schedule.prefetch, schedule.stash, order)]

    def founder(self) -> Genome:
        """Packs of about as many layers each; mostly with what makes a step faster where it fits."""
        placed = self._one_of(tuple(self.sizes))
        size, borders = self._one_of(self.sizes[placed]), self.bordering.even()
        genome = Genome(placed, size, borders, self._one_of((1, 1, 1, 0)), self._one_of(self.stashes))
        num_movable = len(self.movable(self._schedule(genome)))
        return replace(genome, num_moved=self._one_of((0, num_movable))) if num_movable else genome

    # Children ---------------------------------------------------------------------------------------------------------

    def crossed(self, one: Genome, other: Genome) -> Genome:
        """Borders below some layer from one parent, above from the other; all else from either. Microbatches, and where
        they go, come from the same one."""
        borders = self.bordering.crossed(one.borders, other.borders, self.bordering.cut())
        either = self._one_of((one, other))
        prefetch, stash = self._one_of((one, other)).prefetch, self._one_of((one, other)).stash
        return replace(either, borders=borders, prefetch=prefetch, stash=stash)

    def mutated(self, genome: Genome) -> Genome:
        for _ in range(self.dice.randint(0, 3)):
            what = self.dice.random()
            if what < 0.6:
                genome = replace(genome, borders=self.bordering.moved(genome.borders))
            elif what < 0.7:
                genome = replace(genome, borders=self.bordering.even())
            elif what < 0.8:
                placed = self._one_of(tuple(self.sizes))
                genome = replace(genome, placed=placed, size=self._one_of(self.sizes[placed]), dealt_order=None)
            elif what < 0.87:
                genome = replace(genome, prefetch=1 - genome.prefetch)
            elif what < 0.94:
                genome = replace(genome, stash=self._one_of(self.stashes))
            else:
                genome = replace(genome, dealt_order=self._sent_elsewhere(genome))
            if num_movable := len(self.movable(self._schedule(genome))):
                few = min(num_movable, genome.num_moved + self.dice.choice((-1, 0, 0, 1)))
                genome = replace(genome, num_moved=max(0, self._one_of((genome.num_moved, few, few, 0, num_movable))))
        return genome

    def _sent_elsewhere(self, genome: Genome) -> tuple[int, ...] | None:
        """Of the microbatches of the last pack, one goes to another device, or two change places."""
        order = genome.dealt_order or self._schedule(genome).dealt_order
        if not order:
            return None
        changed, at = list(order), self.dice.randrange(len(order))
        if self.dice.random() < 0.5:
            changed[at] = self.dice.randrange(self.costs.machine.gpus)
        else:
            other = self.dice.randrange(len(order))
            changed[at], changed[other] = changed[other], changed[at]
        return tuple(changed)

    def _one_of(self, choices: Sequence[Choice]) -> Choice:
        return self.dice.choice(choices)
