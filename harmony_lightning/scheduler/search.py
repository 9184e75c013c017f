"""The search: the best schedule of a large family, proved best by bounds rather than hoped for.

The family joins every packing of `packings.py` for backward with every one for forward, at every microbatch size. It does
not depend on memory or on links: memory only rules members out, and each member's seconds only grow when a link gets
slower. As the best of the family is always found, more memory or a faster link never gives a worse plan.

Branch and bound, in three steps of rising cost: a bound for a backward packing with the least that any of a group of
forward packings leaves behind; bounds for its pairs with each of them; the simulation. Whatever is not looked at closer
had a bound above what was found by then.
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from harmony_lightning.errors import CapacityError, ConfigurationError
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.record import Record
from harmony_lightning.scheduler.bounds import (
    Floats,
    Ints,
    Setting,
    State,
    Turns,
    after_backward,
    after_forward,
    measure,
)
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.memory import backward_bytes, forward_bytes
from harmony_lightning.scheduler.packings import Packing, Packings
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds
from harmony_lightning.units import format_nbytes

Choice = tuple[int, Packing]
"""Microbatch size and packing, of one direction."""
MAX_SIZES = 8
"""Microbatch sizes that are tried per direction."""
BLOCK = 64
"""Groups of pairs whose bounds are refined at once."""
MAX_COMPUTATIONS = 60_000
"""Microbatches times packs that a search simulates at most: about a second. Mostly it needs a hundredth of them."""


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
    packings: Packings | None = None,
) -> Found:
    """The fastest schedule whose peak is at most `memory_bytes` on each GPU.

    Raises:
        CapacityError: no schedule fits, with the layer that needs most.
        ConfigurationError: the minibatch is empty, or the mode unknown.
    """
    if minibatch < 1:
        raise ConfigurationError(f"the minibatch must have at least one sample, got {minibatch}")
    if mode not in ("pp", "dp", "auto"):
        raise ConfigurationError(f"mode must be 'pp', 'dp' or 'auto', got {mode!r}")
    started = time.perf_counter()
    packings = packings or Packings(costs)
    modes: tuple[Literal["pp", "dp"], ...] = ("pp", "dp") if mode == "auto" else (mode,)
    searches = [_Search(costs, minibatch, one, memory_bytes, rules, packings) for one in modes]
    found = sorted((c for one in searches for c in one.run()), key=lambda c: c.seconds)
    if not found:
        raise CapacityError(_too_large(costs, memory_bytes))
    return Found(
        rules=str(rules),
        best=found[0],
        others=tuple(found[1:]),
        num_schedules=sum(one.num_schedules for one in searches),
        num_simulated=sum(one.num_simulated for one in searches),
        is_proved=all(one.num_computations <= MAX_COMPUTATIONS for one in searches),
        search_seconds=time.perf_counter() - started,
    )


class _Search:
    """One search in one mode."""

    def __init__(
        self, costs: Costs, minibatch: int, mode: Literal["pp", "dp"], memory_bytes: float, rules: Rules, packings: Packings
    ) -> None:  # fmt: skip
        self.costs, self.minibatch, self.mode, self.rules = costs, minibatch, mode, rules
        self.memory_bytes, self.packings = memory_bytes, packings
        gpus = costs.machine.gpus
        self.setting = Setting(
            costs=costs,
            rules=rules,
            is_pp=mode == "pp" and gpus > 1,
            num_devices=min(gpus, minibatch) if mode == "dp" else gpus,
            samples=-(-minibatch // gpus) if mode == "dp" else minibatch,
        )
        self.num_schedules = self.num_simulated = self.num_computations = 0
        self.best: dict[tuple[int, int, int, int], Candidate] = {}
        """By four-tuple with packs counted: the best of those."""
        self.least = np.inf

    def run(self) -> list[Candidate]:
        """Candidates, best first."""
        backward, turns = self._fitting(
            "backward", [(u, p) for u in self._sizes("backward") for p in self.packings.backward(u)]
        )
        if not backward:
            return []
        forward, leaves, groups, pairs = self._groups(backward)
        if not len(pairs):
            return []
        # A pair is a backward choice and a group of forward choices, (row, group).
        state = leaves.least_of(groups[:-1]).rows(pairs[:, 1])
        bounds = after_backward(self.setting, state, turns, pairs[:, 0])
        sizes = np.diff(groups)[pairs[:, 1]]
        self.num_schedules = int(sizes.sum())
        order = np.argsort(bounds, kind="stable")
        for at in range(0, len(order), BLOCK):
            block = order[at : at + BLOCK]
            block = block[bounds[block] < self.least]
            if not len(block):
                break
            rows = np.repeat(pairs[block, 0], sizes[block])
            offsets = np.arange(len(rows)) - np.repeat(np.cumsum(sizes[block]) - sizes[block], sizes[block])
            members = np.repeat(groups[pairs[block, 1]], sizes[block]) + offsets
            self._simulate(
                forward, backward, members, rows, after_backward(self.setting, leaves.rows(members), turns, rows)
            )
        return sorted(self.best.values(), key=lambda c: c.seconds)

    def _simulate(
        self, forward: list[Choice], backward: list[Choice], members: Ints, rows: Ints, bounds: Floats
    ) -> None:
        for pair in np.argsort(bounds, kind="stable"):
            (forward_size, forward_packs), (backward_size, backward_packs) = (
                forward[members[pair]],
                backward[rows[pair]],
            )
            # With fewer turns than devices each has more of the host link than bounds assume.
            is_small = len(forward_packs) + len(backward_packs) < self.setting.stride
            if (bounds[pair] >= self.least and not is_small) or self.num_computations > MAX_COMPUTATIONS:
                continue
            schedule = Schedule(
                mode=self.mode,
                num_devices=self.costs.machine.gpus,
                minibatch=self.minibatch,
                microbatch_forward=forward_size,
                packs_forward=forward_packs,
                microbatch_backward=backward_size,
                packs_backward=backward_packs,
                prefetch=int(self.rules is Rules.OWN),
            )
            peak = peak_bytes(schedule, self.costs, self.rules)
            if peak > self.memory_bytes and schedule.prefetch:
                schedule = replace(schedule, prefetch=0)
                peak = peak_bytes(schedule, self.costs, self.rules)
            if peak > self.memory_bytes:
                continue
            taken = seconds(schedule, self.costs, self.rules)
            self.num_simulated += 1
            self.num_computations += len(forward_packs) * len(schedule.sizes_forward)
            self.num_computations += len(backward_packs) * len(schedule.sizes_backward)
            key = (forward_size, len(forward_packs), backward_size, len(backward_packs))
            if key not in self.best or taken < self.best[key].seconds:
                self.best[key] = Candidate(schedule=schedule, seconds=taken, peak_bytes=peak)
            self.least = min(self.least, taken)

    # The family -------------------------------------------------------------------------------------------------------

    def _sizes(self, direction: str) -> list[int]:
        """Microbatch sizes to try: those that cut the samples evenly, or all if none does."""
        measured = getattr(self.costs.profile.microbatch_sizes, direction)
        samples = self.setting.samples
        least, most = min(measured[0], samples), min(measured[-1], samples)
        sizes = [size for size in range(least, most + 1) if samples % size == 0] or list(range(least, most + 1))
        if len(sizes) <= MAX_SIZES:
            return sizes
        wanted = np.geomspace(sizes[0], sizes[-1], MAX_SIZES)
        return sorted({min(sizes, key=lambda size: (abs(np.log(size / one)), size)) for one in wanted})

    def _fitting(self, direction: str, choices: list[Choice]) -> tuple[list[Choice], Turns]:
        """Choices of which every pack fits by itself."""
        turns = measure(self.setting, direction, choices)
        rows = np.nonzero(turns.needs.max(axis=1, initial=0.0) <= self.memory_bytes)[0]
        return [choices[row] for row in rows], turns.rows(rows)

    def _groups(self, backward: list[Choice]) -> tuple[list[Choice], State, Ints, Ints]:
        """Forward choices for all backward choices, sorted into groups that are alike.

        Returns:
            The choices that fit; the state that each leaves; where each group begins (and where the last one ends); and
            pairs of a backward choice and a group that go together, [pair, (row, group)].
        """
        sizes = self._sizes("forward")
        wanted: dict[tuple[int, int, int], list[Choice]] = {}
        for size in sizes:
            for num_layers in sorted({packs[-1][0] for _, packs in backward}):
                packings = {*self.packings.forward(size, num_layers)}
                # The packs of backward may do for forward too.
                packings |= {packs[:-1] for _, packs in backward if packs[-1][0] == num_layers}
                for packing in sorted(packings):
                    key = (num_layers, size, self._bucket(packing))
                    wanted.setdefault(key, []).append((size, packing))
        keys = sorted(wanted)
        choices = [choice for key in keys for choice in wanted[key]]
        group_of = np.repeat(np.arange(len(keys)), [len(wanted[key]) for key in keys])
        turns = measure(self.setting, "forward", choices)
        fits = np.nonzero(turns.needs.max(axis=1, initial=0.0) <= self.memory_bytes)[0]
        group_of = group_of[fits]
        present, groups = np.unique(group_of, return_index=True)
        number = {keys[one]: index for index, one in enumerate(present)}
        by_layers: dict[int, list[tuple[int, int]]] = {}
        for (num_layers, size, _), index in number.items():
            by_layers.setdefault(num_layers, []).append((size, index))
        pairs = [
            (row, index)
            for row, (backward_size, packs) in enumerate(backward)
            for size, index in by_layers.get(packs[-1][0], ())
            if size >= backward_size
        ]
        leaves = after_forward(self.setting, turns.rows(fits))
        return (
            [choices[row] for row in fits],
            leaves,
            np.append(groups, len(fits)),
            np.array(pairs, dtype=np.int64).reshape(-1, 2),
        )

    def _bucket(self, packing: Packing) -> int:
        """Packings whose turns go round the devices equally often, up to twice, leave similar states behind."""
        return min(len(packing) // self.setting.stride, 2)


def _too_large(costs: Costs, memory_bytes: float) -> str:
    sizes = costs.profile.microbatch_sizes
    needs = [
        (
            max(
                forward_bytes(costs, sizes.forward[0], (layer, layer)),
                backward_bytes(costs, sizes.backward[0], (layer, layer)),
            ),
            -layer,
        )
        for layer in range(costs.num_layers)
    ]
    need, layer = max(needs)
    return (
        f"no schedule fits: layer {-layer} alone needs {format_nbytes(need)} at microbatches of {sizes.backward[0]}, but "
        f"each GPU offers {format_nbytes(memory_bytes)}; raise memory, or split that layer"
    )
