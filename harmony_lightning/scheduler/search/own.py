"""The best plan with all that our runtime can do: under our own rules, or under the runtime's where these are faster.

Our own rules leave more open, such as other packs for forward than for backward; but nothing stays on the devices between
the two, and the last pack has one device. Under the runtime's rules weights, stashes and activations stay where memory is
left, and microbatches of the last pack may be dealt over the devices. Both give each device a fixed share of shared links.

A search under the runtime's rules for what they gain here: much is left to compute at the end, where nothing need be made
again, in a large last pack; in front of it are packs that are as small as can be, which leaves memory. Candidates are
refined in the order of a bound until none can be faster, or enough was simulated; so nothing proves the result the best.

In dp the devices' gradients are added up on one of them under the runtime's rules, one after the other, while both compute
nothing else. That takes longer than anything saves that stays, so only pp is searched.
"""

import heapq
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Literal

from harmony_lightning.plan import Plan
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.residency import HEADROOM, peaks
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.sized_plan import sized_plan
from harmony_lightning.scheduler.runtime.staying import predicted_usage, with_what_stays
from harmony_lightning.scheduler.runtime.steps import runtime_seconds
from harmony_lightning.scheduler.runtime.unmeasured import completed
from harmony_lightning.scheduler.search.found import Candidate, Found, num_computations
from harmony_lightning.scheduler.search.packings import MAX_UNITS, Packing, packs_of, table
from harmony_lightning.scheduler.search.schedules import search
from harmony_lightning.scheduler.search.sizes import choose_sizes
from harmony_lightning.scheduler.simulate import Rules

MAX_EFFORT = 24_000
"""Of simulations under the runtime's rules, in computations; what stays takes as long as the square of the packs."""
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
        self._effort = self._order = 0

    def run(self) -> list[Candidate]:
        """All that took less than what was known by then, best first."""
        entries: list[tuple[float, int, Schedule, bool]] = []

        def enter(schedule: Schedule, is_fitting: bool) -> None:
            bound = self._bound(schedule)
            if bound < self.least:
                heapq.heappush(entries, (bound, self._order, schedule, is_fitting))
            self._order += 1

        for schedule in self._family():
            enter(schedule, is_fitting=False)
        self.num_schedules = self._order
        found: list[Candidate] = []
        while entries and entries[0][0] < self.least and self._effort < MAX_EFFORT:
            _, _, schedule, is_fitting = heapq.heappop(entries)
            if is_fitting:
                found += self._simulate(schedule)
                continue
            for variant in self._fitting(schedule):
                enter(variant, is_fitting=True)
        return found[::-1]

    def _family(self) -> Iterator[Schedule]:
        """With the whole last pack kept."""
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
                    keep=tuple(range(packs[-1][0], costs.num_layers)),
                )
                yield schedule
                yield replace(schedule, dealt=(len(packs) - 1,))

    def _packings(self) -> Iterator[Packing]:
        """In front of last packs of all lengths, packs of one layer, or as many as are sensible."""
        costs, sizes = self.costs, self.costs.profile.microbatch_sizes.backward
        one, size = [(layer, layer) for layer in range(costs.num_layers)], sizes[len(sizes) // 2]
        starts = table([2 * costs.forward_seconds(size, span) + costs.backward_seconds(size, span) for span in one])
        for last in range(1, min(MAX_LAST, costs.num_layers - 1) + 1):
            before = costs.num_layers - last
            yield (*packs_of(starts, min(before, MAX_UNITS), before), (before, costs.num_layers - 1))

    def _fitting(self, schedule: Schedule) -> Iterator[Schedule]:
        """With what can be kept of the last pack: the most where stashes leave, of which what stays is found out later."""
        size, num_packs = schedule.sizes_backward[0], len(schedule.packs_backward)
        for stash in ("device", "host"):
            variant = replace(schedule, stash=stash)
            peak = runtime_peak_bytes(variant, self.costs)
            self._effort += 8 * num_packs
            if peak > self.memory_bytes:
                continue
            *others, last = schedule.keep  # the last layer of all keeps its activations in any case
            with_them = accumulate((self.costs.kept_bytes(size, layer) or 0.0 for layer in others), initial=peak)
            count = sum(most <= (1 - HEADROOM) * self.memory_bytes for most in with_them)
            yield replace(variant, keep=(*others[: max(0, count - 1)], last))
            if count > len(others):
                return

    def _simulate(self, schedule: Schedule) -> Iterator[Candidate]:
        plan = self._plan(schedule)
        staying = with_what_stays(schedule, plan, self.costs)
        self.num_simulated += 1
        self._effort += num_computations(staying) + len(plan.packs) ** 2
        if runtime_seconds(staying, self.costs, 2) >= self.least:
            return
        seconds = runtime_seconds(staying, self.costs)
        if seconds < self.least:
            self.least = seconds
            yield Candidate(schedule=staying, seconds=seconds, peak_bytes=self._peak(staying, plan))

    def _plan(self, schedule: Schedule) -> Plan:
        """With layers known by their numbers: plans tell by names what stays."""
        plan = sized_plan(schedule, self.costs)
        spans = schedule.packs_backward
        layers = [tuple(map(str, range(first, last + 1))) for first, last in spans]
        packs = [replace(pack, layers=names) for pack, names in zip(plan.packs, layers, strict=True)]
        return replace(plan, packs=tuple(packs), keep=layers[-1][-1:])

    def _peak(self, schedule: Schedule, plan: Plan) -> float:
        """Of what the schedule has, and what stays, when that was decided for `plan`."""
        keep = tuple(map(str, schedule.keep))
        staying = replace(plan, resident=schedule.resident, stash_stays=schedule.stash_stays, keep=keep)
        return max(peaks(staying, predicted_usage(schedule, plan, self.costs), plan))

    def _bound(self, schedule: Schedule) -> float:
        """What the busiest device computes, or one microbatch on its way through all packs and back, and until the weights
        of the first pack are back, updated: no forward can begin before that. Frozen layers count as if they trained."""
        costs, machine, packs = self.costs, self.costs.machine, schedule.packs_backward
        sizes = schedule.sizes_backward
        size, share = sizes[0], machine.host_share(machine.gpus)
        path, busy = 0.0, [0.0] * schedule.num_devices
        kept = [0.0] * len(packs)
        for layer in schedule.keep:
            kept[bisect_right(packs, (layer, costs.num_layers)) - 1] += costs.recompute_seconds(size, (layer, layer))
        for pack, span in enumerate(packs):
            seconds = 2 * costs.forward_seconds(size, span) + costs.backward_seconds(size, span) - kept[pack]
            path += seconds + (2 * costs.input_bytes(size, span[0]) / machine.peer_bytes_per_second if pack else 0.0)
            for m, samples in enumerate(sizes):  # a last one that is smaller takes no less than its share
                busy[(pack + m * (pack in schedule.dealt)) % len(busy)] += seconds * samples / size
        first = packs[0]
        exposed = (costs.gradient_bytes(first) + costs.weight_bytes(first)) / share + costs.update_seconds(first)
        return max(max(busy), path) + exposed
