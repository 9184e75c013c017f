"""A second searcher: a genetic algorithm that breeds schedules, scored by the same simulation as the default search.

After SwapAdvisor (Huang et al., ASPLOS 2020), which breeds execution order, memory placement and swap decisions together.
The genes of a layer-major step:

    order       the mode: packs, or microbatches, go round the devices; the microbatch sizes of forward and backward
    swapping    the borders of the forward and of the backward packs, anywhere: what is swapped together, and lies on a
                device at the same time; under our own rules whether a pack's weights come in while the one before computes
    placement   under our own rules, in dp: where a pack's outputs wait for the next pack, on the device or on the host

Harmony's rules have no choice but the first three: prefetch and boundary are not genes there. It knows no bounds and no
balance; where it beats the default search, that search's family of packings is too small. `genetic_runtime` breeds plans
for the runtime.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from harmony_lightning.errors import CapacityError
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.search.breeding import (
    Bordering,
    Borders,
    Fitness,
    evolve,
    packs_between,
    stages,
)
from harmony_lightning.scheduler.search.found import Candidate, Found, num_computations
from harmony_lightning.scheduler.search.sizes import choose_sizes
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds

POPULATION = 48
MAX_COMPUTATIONS = 800_000
"""Microbatches times packs that are simulated at most: some five seconds."""


Mode = Literal["pp", "dp"]
Choice = TypeVar("Choice")
Sizes = dict[Mode, dict[str, list[int]]]
"""Microbatch sizes to try, by mode and direction."""


@dataclass(frozen=True, slots=True)
class Genome:
    """A schedule as it is bred."""

    mode: Mode
    forward_size: int
    forward_borders: Borders
    backward_size: int
    backward_borders: Borders
    prefetch: int
    boundary: Literal["device", "host"]


def breed(
    costs: Costs, *, minibatch: int, mode: Literal["pp", "dp", "auto"], memory_bytes: float, rules: Rules, seed: int = 0
) -> Found:
    """The best schedule that evolves. The same seed gives the same schedule.

    Raises:
        CapacityError: nothing that evolved fits.
        ConfigurationError: the minibatch is empty, or the mode unknown.
    """
    started = time.perf_counter()
    modes: tuple[Mode, ...] = ("pp", "dp") if mode == "auto" else (mode,)
    dice = random.Random(seed)
    sizes = {
        one: {
            direction: choose_sizes(costs, direction, -(-minibatch // costs.machine.gpus) if one == "dp" else minibatch)
            for direction in ("forward", "backward")
        }
        for one in modes
    }
    bred: list[_Schedules] = []
    best: list[Genome] = []
    numbers = stages(minibatch)
    for samples in numbers:
        budget = MAX_COMPUTATIONS // len(numbers)
        schedules = _Schedules(costs, samples, sizes, memory_bytes, rules, dice, budget)
        founders = [*best, *(schedules.founder() for _ in range(POPULATION - len(best)))]
        evolve(schedules, dice, schedules.is_spent, founders)
        best = schedules.best(POPULATION // 2)
        bred.append(schedules)
    found = [schedules.candidate(genome) for genome in best[:4] if not schedules.fitness(genome).excess_bytes]
    num_known = sum(len(one.known) for one in bred)
    if not found:
        raise CapacityError(
            f"none of {num_known} bred schedules fits in {memory_bytes:.0f} bytes per GPU; "
            f"raise memory, or use the default planner, which tells what is too large"
        )
    return Found(
        rules=str(rules),
        best=found[0],
        others=tuple(found[1:]),
        num_schedules=num_known,
        num_simulated=sum(one.num_simulated for one in bred),
        is_proved=False,
        search_seconds=time.perf_counter() - started,
    )


class _Schedules:
    """The breed."""

    def __init__(
        self,
        costs: Costs,
        minibatch: int,
        sizes: Sizes,
        memory_bytes: float,
        rules: Rules,
        dice: random.Random,
        budget: int,
    ) -> None:
        self.costs, self.minibatch, self.sizes, self.modes = costs, minibatch, sizes, tuple(sizes)
        self.memory_bytes, self.rules, self.dice, self.budget = memory_bytes, rules, dice, budget
        self.is_own = rules is Rules.OWN
        self.bordering = Bordering(costs.num_layers, dice)
        self.known: dict[Genome, Fitness] = {}
        self.num_simulated = self.num_computations = 0

    def is_spent(self) -> bool:
        return self.num_computations >= self.budget

    def best(self, count: int) -> list[Genome]:
        """Of all whose fitness is known."""
        return sorted(self.known, key=lambda genome: self.known[genome])[:count]

    def candidate(self, genome: Genome) -> Candidate:
        schedule = self._schedule(genome)
        return Candidate(
            schedule=schedule,
            seconds=self.known[genome].seconds,
            peak_bytes=peak_bytes(schedule, self.costs, self.rules),
        )

    def fitness(self, genome: Genome) -> Fitness:
        if genome not in self.known:
            schedule = self._schedule(genome)
            excess = max(0.0, peak_bytes(schedule, self.costs, self.rules) - self.memory_bytes)
            taken = 0.0
            if not excess:
                taken = seconds(schedule, self.costs, self.rules)
                self.num_simulated += 1
                self.num_computations += num_computations(schedule)
            self.known[genome] = Fitness(excess, taken)
        return self.known[genome]

    def _schedule(self, genome: Genome) -> Schedule:
        fused = genome.backward_borders[-1] if genome.backward_borders else 0
        return Schedule(
            mode=genome.mode,
            num_devices=self.costs.machine.gpus,
            minibatch=self.minibatch,
            microbatch_forward=genome.forward_size,
            packs_forward=packs_between(genome.forward_borders, fused) if fused else (),
            microbatch_backward=genome.backward_size,
            packs_backward=packs_between(genome.backward_borders, self.costs.num_layers),
            prefetch=genome.prefetch,
            boundary=genome.boundary,
        )

    def founder(self) -> Genome:
        """Packs of about as many layers each; mostly with what makes a step faster where it fits."""
        mode = self._one_of(self.modes)
        return self._viable(
            Genome(
                mode=mode,
                forward_size=self._size(mode, "forward"),
                forward_borders=self.bordering.even(),
                backward_size=self._size(mode, "backward"),
                backward_borders=self.bordering.even(),
                prefetch=self._one_of((1, 1, 1, 0) if self.is_own else (0,)),
                boundary=self._one_of(("device", "device", "device", "host") if self.is_own else ("device",)),
            )
        )

    def crossed(self, one: Genome, other: Genome) -> Genome:
        """Borders below some layer from one parent, above from the other; all else from either."""
        cut, crossed = self.bordering.cut(), self.bordering.crossed
        leader, second = self.dice.choice((one, other)), self.dice.choice((one, other))
        carrier = self.dice.choice((one, other)) if self.is_own else leader
        return self._viable(
            Genome(
                mode=leader.mode,
                forward_size=leader.forward_size,
                forward_borders=crossed(one.forward_borders, other.forward_borders, cut),
                backward_size=second.backward_size if second.mode == leader.mode else leader.backward_size,
                backward_borders=crossed(one.backward_borders, other.backward_borders, cut),
                prefetch=carrier.prefetch,
                boundary=carrier.boundary,
            )
        )

    def mutated(self, genome: Genome) -> Genome:
        dice, moved = self.dice, self.bordering.moved
        for _ in range(dice.randint(0, 3)):
            what = dice.random()
            if what < 0.35:
                genome = replace(genome, backward_borders=moved(genome.backward_borders))
            elif what < 0.6:
                genome = replace(genome, forward_borders=moved(genome.forward_borders))
            elif what < 0.7:
                genome = replace(genome, forward_borders=genome.backward_borders)
            elif what < 0.8:
                genome = replace(genome, forward_size=self._size(genome.mode, "forward"))
            elif what < 0.9:
                genome = replace(genome, backward_size=self._size(genome.mode, "backward"))
            else:
                genome = replace(genome, backward_borders=self.bordering.even())
        if self.is_own and dice.random() < 0.06:
            genome = replace(genome, prefetch=1 - genome.prefetch)
        if self.is_own and dice.random() < 0.06:
            genome = replace(genome, boundary="host" if genome.boundary == "device" else "device")
        if len(self.modes) > 1 and dice.random() < 0.06:
            genome = self._in_mode(genome, dice.choice(self.modes))
        return self._viable(genome)

    def _in_mode(self, genome: Genome, mode: Mode) -> Genome:
        """With microbatches of the sizes that may be there."""
        sizes = self.sizes[mode]
        return replace(
            genome,
            mode=mode,
            forward_size=min(sizes["forward"], key=lambda size: abs(size - genome.forward_size)),
            backward_size=min(sizes["backward"], key=lambda size: abs(size - genome.backward_size)),
        )

    def _one_of(self, choices: Sequence[Choice]) -> Choice:
        """Dice are thrown where there is a choice."""
        return self.dice.choice(choices) if len(choices) > 1 else choices[0]

    def _size(self, mode: Mode, direction: Literal["forward", "backward"]) -> int:
        """One that the samples of this stage suffice for."""
        sizes, devices = self.sizes[mode][direction], self.costs.machine.gpus if mode == "dp" else 1
        return self.dice.choice([size for size in sizes if size * devices <= self.minibatch] or sizes[:1])

    def _viable(self, genome: Genome) -> Genome:
        """Forward packs end where the fused pack begins, and forward microbatches are at least those of backward. What
        nobody looks at is the same in all."""
        fused = genome.backward_borders[-1] if genome.backward_borders else 0
        forward_size = genome.forward_size
        if forward_size < genome.backward_size:
            sizes = self.sizes[genome.mode]["forward"]
            forward_size = next((size for size in sizes if size >= genome.backward_size), sizes[-1])
        hands_over = self.is_own and (genome.mode == "dp" or self.costs.machine.gpus == 1)
        return replace(
            genome,
            forward_size=forward_size,
            forward_borders=tuple(border for border in genome.forward_borders if border < fused),
            boundary=genome.boundary if hands_over else "device",
        )
