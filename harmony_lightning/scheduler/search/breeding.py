"""Breeding, whatever the genome: selection, and what becomes of the borders of packs.

Same dice, same numbers. Genomes that do not fit live on as long as nothing better does, those that need least first: from
them it is not far to ones that fit.
"""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from harmony_lightning.plan.schedule import Span

ELITE = 8
"""One in so many, of the best, lives on unchanged."""
STAGE = 4
"""Each stage has so many times the samples of the one before."""
FEW_SAMPLES = 16
"""The first one has at least so many, if there are."""
PATIENCE = 25
"""Generations without a better one after which it ends."""

Genome = TypeVar("Genome", bound=Hashable)
Borders = tuple[int, ...]
"""First layers of packs, but for layer 0, ascending."""


@dataclass(frozen=True, slots=True, order=True)
class Fitness:
    """Smaller is better: what fits before what does not, then the faster, or the one that nearly fits."""

    excess_bytes: float
    seconds: float


class Breed(Protocol[Genome]):
    """What is bred."""

    def founder(self) -> Genome:
        """One that descends from nobody."""
        ...

    def crossed(self, one: Genome, other: Genome) -> Genome:
        """Their child."""
        ...

    def mutated(self, genome: Genome) -> Genome:
        """A little different, or the same."""
        ...

    def fitness(self, genome: Genome) -> Fitness:
        """Remembered: it is asked for in each generation."""
        ...


def evolve(breed: Breed[Genome], dice: random.Random, is_spent: Callable[[], bool], founders: Sequence[Genome]) -> None:
    """Generations, until the best stays the best or a budget is spent; the breed remembers all whose fitness was asked
    for. `founders` are the first generation, judged in this order; later ones are as large."""

    def parent(population: Sequence[Genome]) -> Genome:
        """The better of three. The population is sorted, so the smaller index is the better."""
        return population[min(dice.randrange(len(population)) for _ in range(3))]

    population, size = list(founders), len(founders)
    elite = size // ELITE
    best, idle = None, 0
    while idle < PATIENCE and not is_spent():
        population = sorted(dict.fromkeys(population), key=breed.fitness)[:size]
        champion = breed.fitness(population[0])
        idle = idle + 1 if champion == best else 0
        best = champion
        children = [breed.mutated(breed.crossed(parent(population), parent(population))) for _ in range(size - elite)]
        population = [*population[:elite], *children, breed.founder()]


def stages(minibatch: int) -> list[int]:
    """Samples of the steps for which to breed, one after the other: on few samples many genomes are simulated in the time
    of one on all of them, and what is good there is good to begin with."""
    found = [minibatch]
    while found[0] >= STAGE * FEW_SAMPLES:
        found.insert(0, found[0] // STAGE)
    return found


class Bordering:
    """How borders are drawn, crossed and moved.

    Args:
        together: layers that must share a pack: no border is between them.
    """

    def __init__(self, num_layers: int, dice: random.Random, together: Sequence[frozenset[int]] = ()) -> None:
        self._num_layers, self._dice = num_layers, dice
        self._forbidden = {border for one in together for border in range(min(one) + 1, max(one) + 1)}

    def viable(self, borders: set[int]) -> Borders:
        """Those of them that may be."""
        return tuple(sorted(border for border in borders - self._forbidden if 0 < border < self._num_layers))

    def finest(self) -> Borders:
        """As many as may be: the smallest packs."""
        return self.viable(set(range(self._num_layers)))

    def even(self) -> Borders:
        """Packs of about as many layers each."""
        count = self._dice.randint(1, self._num_layers)
        return self.viable({round(index * self._num_layers / count) for index in range(1, count)})

    def cut(self) -> int:
        """A layer at which two genomes are crossed."""
        return self._dice.randint(0, self._num_layers)

    def crossed(self, low: Borders, high: Borders, cut: int) -> Borders:
        """Borders below the cut from one, above from the other."""
        return tuple(border for border in low if border < cut) + tuple(border for border in high if border >= cut)

    def moved(self, borders: Borders) -> Borders:
        """A border more, one less, or one or all of them somewhat aside."""
        last = self._num_layers - 1
        changed = set(borders)
        what = self._dice.random()
        if (not changed or what < 0.2) and last:
            changed.add(self._dice.randint(1, last))
        elif changed and what < 0.4:
            changed.remove(self._dice.choice(borders))
        elif changed and what < 0.8:
            border = self._dice.choice(borders)
            changed.remove(border)
            changed.add(border + self._dice.choice((-3, -2, -1, 1, 2, 3)))
        elif changed:
            aside = self._dice.choice((-1, 1))
            changed = {border + aside for border in changed}
        return self.viable(changed)


def packs_between(borders: Borders, num_layers: int) -> tuple[Span, ...]:
    """Packs as first and last layer."""
    starts = (0, *borders)
    ends = (*borders, num_layers)
    return tuple((start, end - 1) for start, end in zip(starts, ends, strict=True))
