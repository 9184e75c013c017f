"""A second searcher: a genetic algorithm that breeds schedules, scored by the same simulation as the default search.

After SwapAdvisor (Huang et al., ASPLOS 2020), which breeds execution order, memory placement and swap decisions together.
In a layer-major step these follow from where packs begin and how large microbatches are: a pack's borders say what is
swapped together and what lies on a device at the same time, and the round of the devices gives the order. So a genome is
the borders of the forward and of the backward packs, anywhere, and the two microbatch sizes. It knows no bounds and no
balance; where it beats the default search, that search's family of packings is too small.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harmony_lightning.errors import CapacityError
from harmony_lightning.plan.schedule import Schedule, Span
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.search.schedules import (
    Candidate,
    Found,
    choose_sizes,
    fitting_variants,
    num_computations,
)
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds

POPULATION = 48
ELITE = 6
"""The best, which live on unchanged."""
MAX_COMPUTATIONS = 800_000
"""Microbatches times packs that are simulated at most: some five seconds."""
PATIENCE = 25
"""Generations without a better one after which it ends."""


@dataclass(frozen=True, slots=True)
class Genome:
    """A schedule as it is bred. Borders are the first layers of packs, but for layer 0, ascending."""

    forward_size: int
    forward_borders: tuple[int, ...]
    backward_size: int
    backward_borders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fitness:
    """Smaller is better: what fits before what does not, then the faster, or the one that nearly fits."""

    excess_bytes: float
    seconds: float


def breed(
    costs: Costs, *, minibatch: int, mode: Literal["pp", "dp", "auto"], memory_bytes: float, rules: Rules, seed: int = 0
) -> Found:
    """The best schedule that evolves. The same seed gives the same schedule.

    Raises:
        CapacityError: nothing that evolved fits.
        ConfigurationError: the minibatch is empty, or the mode unknown.
    """
    started = time.perf_counter()
    modes: tuple[Literal["pp", "dp"], ...] = ("pp", "dp") if mode == "auto" else (mode,)
    breeds = [_Breed(costs, minibatch, one, memory_bytes, rules, random.Random(seed)) for one in modes]
    found = sorted((candidate for one in breeds for candidate in one.run()), key=lambda candidate: candidate.seconds)
    if not found:
        raise CapacityError(
            f"none of {sum(len(one.known) for one in breeds)} bred schedules fits in {memory_bytes:.0f} bytes per GPU; "
            f"raise memory, or use the default planner, which tells what is too large"
        )
    return Found(
        rules=str(rules),
        best=found[0],
        others=tuple(found[1:4]),
        num_schedules=sum(len(one.known) for one in breeds),
        num_simulated=sum(one.num_simulated for one in breeds),
        is_proved=False,
        search_seconds=time.perf_counter() - started,
    )


class _Breed:
    """Evolution in one mode."""

    def __init__(
        self,
        costs: Costs,
        minibatch: int,
        mode: Literal["pp", "dp"],
        memory_bytes: float,
        rules: Rules,
        dice: random.Random,
    ) -> None:
        self.costs, self.minibatch, self.mode = costs, minibatch, mode
        self.memory_bytes, self.rules, self.dice = memory_bytes, rules, dice
        samples = -(-minibatch // costs.machine.gpus) if mode == "dp" else minibatch
        self.forward_sizes = choose_sizes(costs, "forward", samples)
        self.backward_sizes = choose_sizes(costs, "backward", samples)
        self.known: dict[Genome, tuple[Fitness, Schedule]] = {}
        self.num_simulated = self.num_computations = 0

    def run(self) -> list[Candidate]:
        """Candidates that fit, best first."""
        population = [self._founder() for _ in range(POPULATION)]
        best, idle = None, 0
        while idle < PATIENCE and self.num_computations < MAX_COMPUTATIONS:
            population = sorted(dict.fromkeys(population), key=self._key)
            champion = self._key(population[0])
            idle = idle + 1 if champion == best else 0
            best = champion
            population = population[:POPULATION]
            children = [self._mutated(self._crossed(*self._parents(population))) for _ in range(POPULATION - ELITE)]
            population = [*population[:ELITE], *children, self._founder()]
        fitting = sorted(
            ((fitness, schedule) for fitness, schedule in self.known.values() if not fitness.excess_bytes),
            key=lambda entry: entry[0].seconds,
        )
        return [
            Candidate(
                schedule=schedule, seconds=fitness.seconds, peak_bytes=peak_bytes(schedule, self.costs, self.rules)
            )
            for fitness, schedule in fitting[:4]
        ]

    # Fitness ----------------------------------------------------------------------------------------------------------

    def _key(self, genome: Genome) -> tuple[float, float]:
        fitness = self._fitness(genome)
        return fitness.excess_bytes, fitness.seconds

    def _fitness(self, genome: Genome) -> Fitness:
        if genome not in self.known:
            schedule = self._schedule(genome)
            scored = []
            for variant, _ in fitting_variants(schedule, self.costs, self.rules, self.memory_bytes):
                scored.append((seconds(variant, self.costs, self.rules), variant))
                self.num_simulated += 1
                self.num_computations += num_computations(variant)
            if scored:
                taken, schedule = min(scored, key=lambda one: one[0])
                self.known[genome] = Fitness(0.0, taken), schedule
            else:
                excess = peak_bytes(schedule, self.costs, self.rules) - self.memory_bytes
                self.known[genome] = Fitness(excess, 0.0), schedule
        return self.known[genome][0]

    def _schedule(self, genome: Genome) -> Schedule:
        fused = genome.backward_borders[-1] if genome.backward_borders else 0
        return Schedule(
            mode=self.mode,
            num_devices=self.costs.machine.gpus,
            minibatch=self.minibatch,
            microbatch_forward=genome.forward_size,
            packs_forward=_packs(genome.forward_borders, fused) if fused else (),
            microbatch_backward=genome.backward_size,
            packs_backward=_packs(genome.backward_borders, self.costs.num_layers),
        )

    # Breeding ---------------------------------------------------------------------------------------------------------

    def _founder(self) -> Genome:
        """Packs of about as many layers each."""
        return self._viable(
            self.dice.choice(self.forward_sizes), self._even(), self.dice.choice(self.backward_sizes), self._even()
        )

    def _even(self) -> tuple[int, ...]:
        num_layers = self.costs.num_layers
        count = self.dice.randint(1, num_layers)
        return tuple(sorted({round(index * num_layers / count) for index in range(1, count)} - {0, num_layers}))

    def _parents(self, population: Sequence[Genome]) -> tuple[Genome, Genome]:
        """The better of three, twice. The population is sorted, so the smaller index is the better."""
        return (
            population[min(self.dice.randrange(len(population)) for _ in range(3))],
            population[min(self.dice.randrange(len(population)) for _ in range(3))],
        )

    def _crossed(self, one: Genome, other: Genome) -> Genome:
        """Borders below some layer from one parent, above from the other; each size from either."""
        cut = self.dice.randint(0, self.costs.num_layers)

        def joined(low: tuple[int, ...], high: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(border for border in low if border < cut) + tuple(border for border in high if border >= cut)

        return self._viable(
            self.dice.choice((one, other)).forward_size,
            joined(one.forward_borders, other.forward_borders),
            self.dice.choice((one, other)).backward_size,
            joined(one.backward_borders, other.backward_borders),
        )

    def _mutated(self, genome: Genome) -> Genome:
        forward, backward = genome.forward_borders, genome.backward_borders
        forward_size, backward_size = genome.forward_size, genome.backward_size
        for _ in range(self.dice.randint(0, 3)):
            what = self.dice.random()
            if what < 0.35:
                backward = self._moved(backward)
            elif what < 0.6:
                forward = self._moved(forward)
            elif what < 0.7:
                forward = backward
            elif what < 0.8:
                forward_size = self.dice.choice(self.forward_sizes)
            elif what < 0.9:
                backward_size = self.dice.choice(self.backward_sizes)
            else:
                backward = self._even()
        return self._viable(forward_size, forward, backward_size, backward)

    def _moved(self, borders: tuple[int, ...]) -> tuple[int, ...]:
        """A border more, one less, or one or all of them somewhat aside."""
        last = self.costs.num_layers - 1
        changed = set(borders)
        what = self.dice.random()
        if (not changed or what < 0.2) and last:
            changed.add(self.dice.randint(1, last))
        elif changed and what < 0.4:
            changed.remove(self.dice.choice(borders))
        elif changed and what < 0.8:
            border = self.dice.choice(borders)
            changed.remove(border)
            changed.add(border + self.dice.choice((-3, -2, -1, 1, 2, 3)))
        elif changed:
            aside = self.dice.choice((-1, 1))
            changed = {border + aside for border in changed}
        return tuple(sorted(border for border in changed if 1 <= border <= last))

    def _viable(
        self, forward_size: int, forward: tuple[int, ...], backward_size: int, backward: tuple[int, ...]
    ) -> Genome:
        """Forward packs end where the fused pack begins, and forward microbatches are at least those of backward."""
        fused = backward[-1] if backward else 0
        if forward_size < backward_size:
            larger = [size for size in self.forward_sizes if size >= backward_size]
            forward_size = larger[0] if larger else self.forward_sizes[-1]
        return Genome(forward_size, tuple(border for border in forward if border < fused), backward_size, backward)


def _packs(borders: tuple[int, ...], num_layers: int) -> tuple[Span, ...]:
    starts = (0, *borders)
    ends = (*borders, num_layers)
    return tuple((start, end - 1) for start, end in zip(starts, ends, strict=True))
