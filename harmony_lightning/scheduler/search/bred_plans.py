"""The genetic searcher for plans that the runtime can carry out: the same question as `search_runtime`, bred.

Memory placement and swap decisions are genes' company: of each packing that is bred, stashes wait on the devices and packs
come ahead if that fits, and what is left of the memory goes to what stays, by the runtime's own rule.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.steps import fair_seconds, runtime_seconds
from harmony_lightning.scheduler.search.genetic import Breed, Rearing, Scored, best_of
from harmony_lightning.scheduler.search.runtime import MAX_FAIR_COMPUTATIONS, Change, Mode
from harmony_lightning.scheduler.search.schedules import Candidate, Found, choose_sizes, num_computations
from harmony_lightning.scheduler.simulate import Rules

MAX_COMPUTATIONS = 16_000
"""Microbatches times packs that are simulated in each mode: some two seconds."""


def breed_runtime(
    costs: Costs,
    *,
    minibatch: int,
    mode: Literal["pp", "dp", "auto"],
    memory_bytes: float,
    stashes: tuple[Literal["device", "host"], ...] = ("device", "host"),
    microbatch_size: int | None = None,
    together: tuple[frozenset[int], ...] = (),
    abilities: Change = lambda schedule: schedule,
    stay: Change | None = None,
    seed: int = 0,
) -> Found:
    """The best plan that evolves; arguments are those of `search_runtime`. The same seed gives the same plan.

    Raises:
        CapacityError: nothing that evolved fits.
        ConfigurationError: the minibatch is empty.
    """
    started = time.perf_counter()
    modes: tuple[Mode, ...] = ("pp", "dp") if costs.machine.gpus > 1 else ("pp",)
    if mode != "auto":
        modes = (mode,)

    def variants(schedule: Schedule) -> Iterator[Schedule]:
        schedule = abilities(schedule)
        return (replace(schedule, prefetch=ahead, stash=stash) for ahead in (1, 0) for stash in stashes)

    def score(schedule: Schedule) -> Iterator[Scored]:
        for variant in variants(schedule):
            if (peak := runtime_peak_bytes(variant, costs)) <= memory_bytes:
                variant = stay(variant) if stay is not None else variant
                yield runtime_seconds(variant, costs, 2), peak, variant
                return

    breeds = []
    for one in modes:
        samples = -(-minibatch // costs.machine.gpus) if one == "dp" else minibatch
        sizes = choose_sizes(costs, "backward", samples) if microbatch_size is None else [microbatch_size]
        rearing = Rearing(
            score=score,
            excess_bytes=lambda schedule: (
                min(runtime_peak_bytes(variant, costs) for variant in variants(schedule)) - memory_bytes
            ),
            forward_sizes=sizes,
            backward_sizes=sizes,
            is_joint=True,
            uncut=together,
            max_computations=MAX_COMPUTATIONS,
        )
        breeds.append(Breed(costs, minibatch, one, rearing, random.Random(seed)))
    found = best_of(breeds, Rules.RUNTIME, memory_bytes, started)
    # Until here each GPU had a fixed share of a shared link; as it is for the best.
    shared = sorted((_shared(each, costs) for each in (found.best, *found.others)), key=lambda each: each.seconds)
    taken = time.perf_counter() - started
    return replace(found, best=shared[0], others=tuple(shared[1:]), search_seconds=taken)


def _shared(candidate: Candidate, costs: Costs) -> Candidate:
    if num_computations(candidate.schedule) > MAX_FAIR_COMPUTATIONS:
        return candidate
    return replace(candidate, seconds=fair_seconds(candidate.schedule, costs))
