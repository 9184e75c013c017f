"""The search: the best schedule of a large family, proved best by bounds rather than hoped for.

The family joins every packing of `packings` for backward with every one for forward, at every microbatch size. It does
not depend on memory or on links: memory only rules members out, and each member's seconds only grow when a link gets
slower. Where the best of the family is proved (`Found.is_proved`), more memory or a faster link never makes a plan worse.

Branch and bound, in three steps of rising cost: a bound for a backward packing with the least that any of a group of
forward packings leaves behind; bounds for its pairs with each of them; the simulation. Whatever is not looked at closer
had a bound above what was found by then.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from harmony_lightning.errors import CapacityError, ConfigurationError
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.record import Record
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.rules.memory import turn_bytes
from harmony_lightning.scheduler.rules.turns import turns
from harmony_lightning.scheduler.search.bounds import (
    Choice,
    Floats,
    Ints,
    Setting,
    State,
    after_backward,
    after_forward,
    fitting,
    measure,
)
from harmony_lightning.scheduler.search.packings import Packing, Packings, families
from harmony_lightning.scheduler.search.sizes import choose_sizes
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds
from harmony_lightning.units import format_nbytes

BLOCK = 64
"""Groups of pairs whose bounds are refined at once."""
MAX_COMPUTATIONS = 60_000
"""Microbatches times packs that a search simulates at most: about a second. Mostly it needs a hundredth of them."""
MAX_BOUNDED = 8_000_000
"""Turns that bounds of pairs look at, at most: a quarter of a second. Mostly they need a tenth of them."""
MAX_SIZED = 50_000
"""Packs whose memory a search counts at most: about a second, where little fits and bounds say little."""
MIN_CANDIDATES = 4
"""So many kinds of schedules are simulated in any case, for comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Record):
    """A schedule and what it takes."""

    schedule: Schedule
    seconds: float
    peak_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Record):
    """What a search found, and how far it had to look."""

    rules: str
    best: Candidate
    others: tuple[Candidate, ...]
    """The next best of those that were simulated: one for each combination of sizes and numbers of packs, best first."""
    num_schedules: int
    """Members of the family that may fit."""
    num_simulated: int
    is_proved: bool
    """Whether nothing in the family is better; False if the search ran into its limit on simulations."""
    search_seconds: float


def search(
    costs: Costs,
    *,
    minibatch: int,
    mode: Literal["pp", "dp", "auto"],
    memory_bytes: float,
    rules: Rules,
    packings: Sequence[Packings] | None = None,
    known: Sequence[Schedule] = (),
) -> Found:
    """The fastest schedule whose peak is at most `memory_bytes` on each GPU.

    Args:
        packings: `families(costs)`, to share them between searches.
        known: schedules of the same question that are simulated first, such as the best under other rules.

    Raises:
        CapacityError: no schedule fits, with the layer that needs most.
        ConfigurationError: the minibatch is empty, or the mode unknown.
    """
    if minibatch < 1:
        raise ConfigurationError(f"the minibatch must have at least one sample, got {minibatch}")
    if mode not in ("pp", "dp", "auto"):
        raise ConfigurationError(f"mode must be 'pp', 'dp' or 'auto', got {mode!r}")
    started = time.perf_counter()
    modes: tuple[Literal["pp", "dp"], ...] = ("pp", "dp") if mode == "auto" else (mode,)
    searches = [
        _Search(costs, minibatch, one, memory_bytes, rules, family, share=1 / len(modes))
        for family in packings or families(costs)
        for one in modes
    ]
    for schedule in known:
        searches[modes.index(schedule.mode)].simulate(schedule)
    found = sorted((c for one in searches for c in one.run()), key=lambda c: c.seconds)
    if not found:
        raise CapacityError(_too_large(costs, modes[0], minibatch, memory_bytes, rules))
    return Found(
        rules=str(rules),
        best=found[0],
        others=tuple(found[1:]),
        num_schedules=sum(one.num_schedules for one in searches),
        num_simulated=sum(one.num_simulated for one in searches),
        is_proved=all(one.is_complete for one in searches),
        search_seconds=time.perf_counter() - started,
    )


class _Search:
    """One search in one mode."""

    def __init__(
        self,
        costs: Costs,
        minibatch: int,
        mode: Literal["pp", "dp"],
        memory_bytes: float,
        rules: Rules,
        packings: Packings,
        share: float,
    ) -> None:
        """`share` of all that may be bounded, sized and simulated."""
        self.costs, self.minibatch, self.mode, self.rules = costs, minibatch, mode, rules
        self.memory_bytes, self.packings = memory_bytes, packings
        self.max_computations, self.max_sized, self.max_bounded = (
            int(most * share) for most in (MAX_COMPUTATIONS, MAX_SIZED, MAX_BOUNDED)
        )
        gpus = costs.machine.gpus
        self.setting = Setting(
            costs=costs,
            rules=rules,
            is_pp=mode == "pp" and gpus > 1,
            num_devices=min(gpus, minibatch) if mode == "dp" else gpus,
            samples=-(-minibatch // gpus) if mode == "dp" else minibatch,
        )
        self.num_schedules = self.num_simulated = self.num_computations = self.num_reduced = self.num_sized = 0
        self.num_bounded = 0
        self.share = 1.0
        """Of that, what may be used by now."""
        self.is_complete = True
        self.best: dict[tuple[int, int, int, int], Candidate] = {}
        """By four-tuple with packs counted: the best of those."""
        self.least = np.inf

    def run(self) -> list[Candidate]:
        """Candidates, best first."""
        sizes_backward = choose_sizes(self.costs, "backward", self.setting.samples)
        choices = [(size, packs) for size in sizes_backward for packs in self.packings.backward(size)]
        backward = fitting(self.setting, "backward", choices, self.memory_bytes)
        if self.rules is Rules.OWN:
            # Bounds know nothing of the memory that our abilities take: what has room for them comes first, or the search
            # would look at larger packs and microbatches, which promise more, until it must end.
            able = fitting(self.setting, "backward", choices, self.memory_bytes, is_able=True)
            if len(able) < len(backward):
                self.share = 0.5
                self._walk(able, is_able=True)
                self.share = 1.0
        self._walk(backward, is_able=False)
        return sorted(self.best.values(), key=lambda c: c.seconds)

    def _walk(self, backward: list[Choice], *, is_able: bool) -> None:
        """Look at pairs of these choices with those of forward, in the order of bounds."""
        if not backward:
            return
        turns = measure(self.setting, "backward", backward)
        forward, leaves, groups, pairs = self._groups(backward, is_able=is_able)
        if not len(pairs):
            return
        # A pair is a backward choice and a group of forward choices, (row, group).
        state = leaves.least_of(groups[:-1]).rows(pairs[:, 1])
        bounds = after_backward(self.setting, state, turns, pairs[:, 0])
        sizes = np.diff(groups)[pairs[:, 1]]
        self.num_schedules = int(sizes.sum())
        self.is_complete = True
        order = np.argsort(bounds, kind="stable")
        for at in range(0, len(order), BLOCK):
            block = order[at : at + BLOCK]
            block = block[bounds[block] < self.least]
            if not len(block):
                break
            if self.num_bounded > self.share * self.max_bounded or self.is_exhausted:
                self.is_complete = False
                break
            rows = np.repeat(pairs[block, 0], sizes[block])
            offsets = np.arange(len(rows)) - np.repeat(np.cumsum(sizes[block]) - sizes[block], sizes[block])
            members = np.repeat(groups[pairs[block, 1]], sizes[block]) + offsets
            self.num_bounded += int(turns.counts[rows].sum())
            self._look_at(
                forward, backward, members, rows, after_backward(self.setting, leaves.rows(members), turns, rows)
            )

    @property
    def is_exhausted(self) -> bool:
        """Whether as much has been simulated or sized as may be by now."""
        most = self.share * self.max_computations, self.share * self.max_sized
        return self.num_computations > most[0] or self.num_sized > most[1]

    def _look_at(
        self, forward: list[Choice], backward: list[Choice], members: Ints, rows: Ints, bounds: Floats
    ) -> None:
        for pair in np.argsort(bounds, kind="stable"):
            if bounds[pair] >= self.least and len(self.best) >= MIN_CANDIDATES:
                break
            (forward_size, forward_packs), (backward_size, backward_packs) = (
                forward[members[pair]],
                backward[rows[pair]],
            )
            key = (forward_size, len(forward_packs), backward_size, len(backward_packs))
            is_other = len(self.best) < MIN_CANDIDATES and key not in self.best
            if not (bounds[pair] < self.least or is_other):
                continue
            self.num_sized += len(forward_packs) + len(backward_packs)
            if self.is_exhausted:
                self.is_complete = False
                break
            self.simulate(
                Schedule(
                    mode=self.mode,
                    num_devices=self.costs.machine.gpus,
                    minibatch=self.minibatch,
                    microbatch_forward=forward_size,
                    packs_forward=forward_packs,
                    microbatch_backward=backward_size,
                    packs_backward=backward_packs,
                )
            )

    def simulate(self, schedule: Schedule) -> None:
        """Look at one schedule, in all variants that may be best."""
        key = (
            schedule.microbatch_forward,
            len(schedule.packs_forward),
            schedule.microbatch_backward,
            len(schedule.packs_backward),
        )
        for variant, peak in fitting_variants(schedule, self.costs, self.rules, self.memory_bytes):
            is_reduced = self.rules is Rules.OWN and (not variant.prefetch or variant.boundary == "host")
            if is_reduced and self.num_reduced > self.max_computations // 3:
                # Bounds say little about what goes without our abilities; leave time for what has them.
                self.is_complete = False
                continue
            taken = seconds(variant, self.costs, self.rules)
            self.num_simulated += 1
            self.num_computations += num_computations(variant)
            self.num_reduced += num_computations(variant) if is_reduced else 0
            if key not in self.best or taken < self.best[key].seconds:
                self.best[key] = Candidate(schedule=variant, seconds=taken, peak_bytes=peak)
            self.least = min(self.least, taken)

    # The family -------------------------------------------------------------------------------------------------------

    def _groups(self, backward: list[Choice], *, is_able: bool) -> tuple[list[Choice], State, Ints, Ints]:
        """Forward choices for all backward choices, sorted into groups that are alike.

        Returns:
            The choices that fit; the state that each leaves; where each group begins (and where the last one ends); and
            pairs of a backward choice and a group that go together, [pair, (row, group)].
        """
        by_layers: dict[int, set[Packing]] = {}
        for _, packs in backward:
            # The packs of backward may do for forward too.
            by_layers.setdefault(packs[-1][0], set()).add(packs[:-1])
        family = [
            (size, packing)
            for size in choose_sizes(self.costs, "forward", self.setting.samples)
            for num_layers, packings in by_layers.items()
            for packing in packings.union(self.packings.forward(size, num_layers))
        ]
        choices = fitting(self.setting, "forward", family, self.memory_bytes, is_able=is_able)
        choices.sort(key=lambda choice: (self._group(choice), choice[1]))
        starts: dict[tuple[int, int, int], int] = {}
        for row, choice in enumerate(choices):
            starts.setdefault(self._group(choice), row)
        alike: dict[int, list[tuple[int, int]]] = {}
        for index, (num_layers, size, _) in enumerate(starts):
            alike.setdefault(num_layers, []).append((size, index))
        pairs = [
            (row, index)
            for row, (backward_size, packs) in enumerate(backward)
            for size, index in alike.get(packs[-1][0], ())
            if size >= backward_size
        ]
        leaves = after_forward(self.setting, measure(self.setting, "forward", choices))
        groups = np.array([*starts.values(), len(choices)], dtype=np.int64)
        return choices, leaves, groups, np.array(pairs, dtype=np.int64).reshape(-1, 2)

    def _group(self, choice: Choice) -> tuple[int, int, int]:
        """Layers, microbatch size, and how often the turns go round the devices, up to twice: such leave alike states."""
        size, packing = choice
        return packing[-1][1] + 1 if packing else 0, size, min(len(packing) // self.setting.stride, 2)


def fitting_variants(
    schedule: Schedule, costs: Costs, rules: Rules, memory_bytes: float
) -> Iterator[tuple[Schedule, float]]:
    """What our rules leave open, as far as it fits and may be fastest, each with its peak.

    A slot more for weights and gradients, and boundaries on the device, never make a step slower: with both, nothing else
    need be tried.
    """

    def fitting(**choices: Any) -> Iterator[tuple[Schedule, float]]:
        variant = replace(schedule, **choices)
        peak = peak_bytes(variant, costs, rules)
        if peak <= memory_bytes:
            yield variant, peak

    if rules is not Rules.OWN:
        yield from fitting()
        return
    found = [*fitting(prefetch=1, boundary="device")]
    if not found:
        found = [*fitting(prefetch=1, boundary="host"), *fitting(prefetch=0, boundary="device")]
    yield from found or fitting(prefetch=0, boundary="host")


def best_of_kinds(found: Sequence[Candidate]) -> Iterator[Candidate]:
    """One for each combination of mode, size and number of packs, best first."""
    kinds: dict[tuple[str, int, int], Candidate] = {}
    for candidate in found:
        schedule = candidate.schedule
        kinds.setdefault((schedule.mode, schedule.microbatch_backward, len(schedule.packs_backward)), candidate)
    yield from kinds.values()


def num_computations(schedule: Schedule) -> int:
    """Microbatches times packs: what a simulation takes time for."""
    forward = len(schedule.packs_forward) * len(schedule.sizes_forward)
    return forward + len(schedule.packs_backward) * len(schedule.sizes_backward)


def _too_large(costs: Costs, mode: Literal["pp", "dp"], minibatch: int, memory_bytes: float, rules: Rules) -> str:
    """What even the smallest packs and microbatches need."""
    sizes, num_layers = costs.profile.microbatch_sizes, costs.num_layers
    packs = tuple((layer, layer) for layer in range(num_layers))
    smallest = Schedule(
        mode=mode,
        num_devices=costs.machine.gpus,
        minibatch=minibatch,
        microbatch_forward=sizes.forward[0],
        packs_forward=packs[:-1],
        microbatch_backward=sizes.backward[0],
        packs_backward=packs,
    )
    largest = max(turns(smallest), key=lambda turn: (turn_bytes(smallest, costs, turn), -turn.span[0]))
    alone, peak = turn_bytes(smallest, costs, largest), peak_bytes(smallest, costs, rules)
    beside = f" and {format_nbytes(peak - alone)} beside it" if peak > alone else ""
    return (
        f"no schedule fits: with packs of one layer and microbatches of {sizes.backward[0]}, layer {largest.span[0]} needs "
        f"{format_nbytes(alone)}{beside}, but each GPU offers {format_nbytes(memory_bytes)}; raise memory, or split that "
        f"layer"
    )
