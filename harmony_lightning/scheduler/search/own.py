"""The best plan with all that our runtime can do: under our own rules, or under the runtime's where these are faster.

Our own rules leave more open, such as other packs for forward than for backward; but nothing stays on the devices between
the two, and the last pack has one device. Under the runtime's rules weights, stashes and activations stay where memory is
left, and microbatches of the last pack may be dealt over the devices. Both give each device a fixed share of shared links.

A search under the runtime's rules for what they gain here: much is left to compute at the end, where nothing need be made
again, in a large last pack; in front of it are packs that are as small as can be, which leaves memory. Nothing proves the
result the best of all there is.

More memory never gives a slower plan, by construction. Candidates do not depend on the memory: each needs so much, and what
stays is found out for amounts that are always the same. Of candidates with about the same bound the one that needs least
stands for all. The memory admits candidates, and a bound that no step goes below leaves out those that cannot be faster;
all others are simulated.

In dp each device sends all its gradients to the host under the runtime's rules, or one adds up those of all, where under
our own each sends its share of the sum. That takes longer than anything saves that stays, so only pp is searched.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.residency import HEADROOM
from harmony_lightning.scheduler.runtime.levels import Levels
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes, visit_bytes
from harmony_lightning.scheduler.runtime.steps import runtime_seconds
from harmony_lightning.scheduler.runtime.unmeasured import completed
from harmony_lightning.scheduler.search.found import Candidate, Found, num_runtime_computations
from harmony_lightning.scheduler.search.packings import MAX_UNITS, Packing, packs_of, table
from harmony_lightning.scheduler.search.runtime_bounds import runtime_bound
from harmony_lightning.scheduler.search.schedules import search
from harmony_lightning.scheduler.search.sizes import choose_sizes
from harmony_lightning.scheduler.simulate import Rules

ALIKE = 0.003
"""Of schedules whose bounds differ by a smaller share, the one that takes least memory is simulated; of those by which
weights or stashes stay, whose bounds say less, by twice as much."""
SMALL = 100
FEW_LAYERS = 12
"""Microbatches times packs of a schedule of a small model: all of these are simulated that might be faster."""
MAX_COMPUTATIONS = 8_000
"""Of a schedule, microbatches times packs, or it is left out: a quarter of a second. What is gained at the end of a step is
little then."""
MAX_LAST = 12
"""Layers of the last pack."""


def search_own(
    costs: Costs,
    *,
    minibatch: int,
    mode: Literal["pp", "dp", "auto"],
    memory_bytes: float,
) -> Found:
    """The fastest plan found whose peak is at most `memory_bytes` on each GPU; its `rules` tell under which rules that is.
    Raises as `search` does."""
    found = search(costs, minibatch=minibatch, mode=mode, memory_bytes=memory_bytes, rules=Rules.OWN)
    if mode == "dp" or costs.machine.gpus == 1:
        return found
    started = time.perf_counter()
    beside = _Beside(costs_under(Rules.RUNTIME, costs, memory_bytes), minibatch, memory_bytes, found.best.seconds)
    others = beside.run()
    seconds = found.search_seconds + time.perf_counter() - started
    if not others:
        return replace(found, search_seconds=seconds)
    return Found(
        rules=str(Rules.RUNTIME),
        best=others[0],
        others=tuple(others[1:]),
        num_schedules=found.num_schedules + beside.num_schedules,
        num_simulated=found.num_simulated + beside.num_simulated,
        is_proved=False,
        search_seconds=seconds,
    )


def costs_under(rules: str, costs: Costs, memory_bytes: float) -> Costs:
    """What a plan's seconds and bytes are counted from, where it was found by `search_own` with these rules."""
    if rules != Rules.RUNTIME:
        return costs
    return Costs(completed(costs.profile), replace(costs.machine, memory_bytes=int(memory_bytes)))


class _Beside:
    """The search under the runtime's rules for anything that takes less than is known."""

    def __init__(self, costs: Costs, minibatch: int, memory_bytes: float, known_seconds: float) -> None:
        self.costs, self.minibatch, self.memory_bytes, self.least = costs, minibatch, memory_bytes, known_seconds
        self.num_schedules = self.num_simulated = 0

    def run(self) -> list[Candidate]:
        """All that took less than what was known by then, best first."""
        least_needs: dict[object, tuple[float, float, Schedule]] = {}
        for bound, nbytes, schedule in self._family():
            self.num_schedules += 1
            stays = bool(schedule.resident or schedule.stash_stays)
            alike: object = schedule
            if not _is_small(schedule):
                apart = 2 * ALIKE if stays else ALIKE
                alike = schedule.microbatch_backward, stays, math.floor(math.log(bound) / apart)
            entry = nbytes, bound, schedule
            if alike not in least_needs or entry[:2] < least_needs[alike][:2]:
                least_needs[alike] = entry
        found: list[Candidate] = []
        for nbytes, bound, schedule in sorted(least_needs.values(), key=lambda entry: entry[1]):
            if bound >= self.least or nbytes > self.memory_bytes:
                continue
            self.num_simulated += 1
            seconds = runtime_seconds(schedule, self.costs)
            if seconds < self.least:
                self.least = seconds
                found.append(Candidate(schedule=schedule, seconds=seconds, peak_bytes=nbytes))
        return found[::-1]

    def _family(self) -> Iterator[tuple[float, float, Schedule]]:
        """Bounds, bytes of memory that must be offered, and schedules: all that might be faster than what is known."""
        costs = self.costs
        packings = tuple(self._packings())
        for size in choose_sizes(costs, "backward", self.minibatch):
            for packs in packings:
                schedule = Schedule(
                    mode="pp",
                    num_devices=costs.machine.gpus,
                    minibatch=self.minibatch,
                    microbatch_forward=size,
                    packs_forward=packs[:-1],
                    microbatch_backward=size,
                    packs_backward=packs,
                    prefetch=1,
                )
                if num_runtime_computations(schedule) > MAX_COMPUTATIONS:
                    continue
                dealt = replace(schedule, dealt=(len(packs) - 1,))
                is_small = _is_small(schedule)
                for stash in ("host", "device") if is_small else ("host",):
                    yield from self._dealt(replace(dealt, stash=stash))
                    if is_small or packs in packings[::6]:
                        for one in (schedule, dealt):
                            yield from self._staying(replace(one, stash=stash), 2 ** (0.25 if is_small else 0.5))

    def _packings(self) -> Iterator[Packing]:
        """In front of last packs of all lengths, packs of one layer, or as many as are sensible."""
        costs, sizes = self.costs, self.costs.profile.microbatch_sizes.backward
        one, size = [(layer, layer) for layer in range(costs.num_layers)], sizes[len(sizes) // 2]
        starts = table([2 * costs.forward_seconds(size, span) + costs.backward_seconds(size, span) for span in one])
        for last in range(1, min(MAX_LAST, costs.num_layers - 1) + 1):
            before = costs.num_layers - last
            yield (*packs_of(starts, min(before, MAX_UNITS), before), (before, costs.num_layers - 1))

    def _dealt(self, schedule: Schedule) -> Iterator[tuple[float, float, Schedule]]:
        """With any number of layers of the last pack that keep their activations."""
        size, (first, last) = schedule.sizes_backward[0], schedule.packs_backward[-1]
        everything = replace(schedule, keep=tuple(range(first, last + 1)))
        if self._bound(everything) >= self.least or (floor := runtime_bound(everything, self.costs)) >= self.least:
            return
        peak = most = runtime_peak_bytes(schedule, self.costs)
        for layer in range(first, last + 1):
            # The last layer of all keeps its activations in any case.
            variant = replace(schedule, keep=(*range(first, layer), last))
            if (bound := max(floor, self._bound(variant))) < self.least:
                yield bound, most, variant
            peak += self.costs.kept_bytes(size, layer) or 0.0
            most = peak / (1 - HEADROOM)

    def _staying(self, schedule: Schedule, step: float) -> Iterator[tuple[float, float, Schedule]]:
        """With what stays at amounts of memory that are always the same."""
        visits = tuple(visit_bytes(schedule, self.costs))
        peak = runtime_peak_bytes(schedule, self.costs, visits)
        levels = Levels(schedule, self.costs, visits=visits)
        most = (max(peak, *levels.full_bytes().values()) + 1) / (1 - HEADROOM)
        rungs = range(math.floor(math.log(max(peak, 1.0), step)), math.ceil(math.log(most, step)))
        for nbytes in (*(max(peak, step**rung) for rung in rungs), most):
            variant = levels.at(nbytes)
            bound = self._bound(variant)
            if bound < self.least and (bound := max(bound, runtime_bound(variant, self.costs))) < self.least:
                yield bound, nbytes, variant

    def _bound(self, schedule: Schedule) -> float:
        """What the busiest device computes, or one microbatch on its way through all packs and back, and until the weights
        of the first pack are back, updated: no forward can begin before that. Nothing is told where that pack is frozen."""
        costs, machine, packs = self.costs, self.costs.machine, schedule.packs_backward
        first, sizes, share = packs[0], schedule.sizes_backward, machine.host_share(machine.gpus)
        if not costs.gradient_bytes(first):
            return 0.0
        path, busy = 0.0, [0.0] * schedule.num_devices
        kept: list[list[int]] = [[] for _ in packs]
        for layer in schedule.keep:
            kept[bisect_right(packs, (layer, costs.num_layers)) - 1].append(layer)
        for pack, span in enumerate(packs):
            seconds = {}
            for size in dict.fromkeys(sizes):
                seconds[size] = 2 * costs.forward_seconds(size, span) + costs.backward_seconds(size, span)
                seconds[size] -= sum(costs.recompute_seconds(size, (layer, layer)) for layer in kept[pack])
            size = sizes[0]
            path += seconds[size]
            path += 2 * costs.input_bytes(size, span[0]) / machine.peer_bytes_per_second if pack else 0.0
            if pack not in schedule.dealt:
                busy[pack % len(busy)] += sum(map(seconds.__getitem__, sizes))
                continue
            for m, samples in enumerate(sizes):
                busy[(pack + m) % len(busy)] += seconds[samples]
        exposed = (costs.gradient_bytes(first) + costs.weight_bytes(first)) / share + costs.update_seconds(first)
        return (1 - 1e-6) * (max(*busy, path) + exposed)  # sums are rounded


def _is_small(schedule: Schedule) -> bool:
    return schedule.num_layers <= FEW_LAYERS and num_runtime_computations(schedule) <= SMALL
