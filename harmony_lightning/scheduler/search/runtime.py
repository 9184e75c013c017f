"""The search for a plan that the runtime can carry out now: the same packs both ways, one microbatch size.

Few choices are left, so it is plain: of every packing (`packings`), microbatch size and mode, a lower bound from the
busiest of compute, links and updates; then simulations in the order of the bounds, until those of the rest are above
what was found. These give each GPU a fixed share of a shared link, which is all that it gets in the worst case; simulated
with links of their own, GPUs take about as long as in the best case. The truth is between, and costs ten times as much to
find out: so it is found out for the best few in the worst case, of several kinds, and for those that may still be better in
the best case, and the fastest of these wins.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from harmony_lightning.errors import CapacityError, ConfigurationError
from harmony_lightning.plan.schedule import Schedule, Span, split
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.steps import fair_seconds, runtime_seconds
from harmony_lightning.scheduler.search.packings import pack_counts, packs_of, table
from harmony_lightning.scheduler.search.schedules import Candidate, Found, choose_sizes, num_computations
from harmony_lightning.scheduler.simulate import Rules
from harmony_lightning.units import format_nbytes

MAX_COMPUTATIONS = 8_000
"""Microbatches times packs that a search simulates at most: about a second."""
MAX_FAIR_COMPUTATIONS = 400
"""Of all schedules that are looked at closer: about a second. Larger ones are not."""
NUM_FINALISTS = 3
FINE = 12
"""Up to so many packs every number is tried; beyond twice that, numbers in growing steps."""

MARGIN = 0.03
"""By so much of its seconds another schedule must be faster than the one in use: predictions are about as much off."""

Mode = Literal["pp", "dp"]
Change = Callable[[Schedule], Schedule]
"""Adds something to a schedule, such as what stays on the devices."""


def search_runtime(
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
    in_use: Schedule | None = None,
) -> Found:
    """The fastest plan found whose peak is at most `memory_bytes` on each GPU.

    Args:
        stashes: where inputs of layers may wait.
        microbatch_size: the only one to try; None tries many.
        together: layers that must share a pack.
        abilities: adds what the runtime is asked to do: dealt packs, updates on devices, joint forwards.
        stay: what a step that was measured will let stay; None if nothing will.
        in_use: a schedule that fits; it is found unless another one is faster by `MARGIN`.

    Raises:
        CapacityError: nothing fits, with what the smallest packs need.
        ConfigurationError: the minibatch is empty.
    """
    if minibatch < 1:
        raise ConfigurationError(f"the minibatch must have at least one sample, got {minibatch}")
    started = time.perf_counter()
    modes: tuple[Mode, ...] = ("pp", "dp") if mode == "auto" and costs.machine.gpus > 1 else ("pp",)
    if mode != "auto":
        modes = (mode,)
    bounded = sorted(
        ((_bound(schedule, costs, stays=stay is not None), order, schedule)
        for order, schedule in enumerate(map(abilities, _family(costs, minibatch, modes, microbatch_size, together)))),
        key=lambda entry: entry[:2],
    )  # fmt: skip
    found: list[Candidate] = []
    num_simulated = num_computed = 0
    is_complete = True
    for bound, _, schedule in bounded:
        if len(found) >= NUM_FINALISTS and bound >= found[NUM_FINALISTS - 1].seconds:
            break
        if num_computed > MAX_COMPUTATIONS and found:
            is_complete = False
            break
        for fitting, peak in _fitting(schedule, costs, memory_bytes, stashes):
            variant = stay(fitting) if stay is not None else fitting
            found.append(Candidate(schedule=variant, seconds=runtime_seconds(variant, costs, 2), peak_bytes=peak))
            num_simulated += 1
            num_computed += num_computations(variant)
        found.sort(key=lambda candidate: candidate.seconds)
    if in_use is not None:
        variant = stay(in_use) if stay is not None else in_use
        peak = runtime_peak_bytes(in_use, costs)
        present = _refined(
            Candidate(schedule=variant, seconds=runtime_seconds(variant, costs, 2), peak_bytes=peak), costs
        )
    if not found and in_use is None:
        raise CapacityError(_too_large([schedule for _, _, schedule in bounded], costs, memory_bytes, stashes))
    found = _closer(found, costs)
    if in_use is not None and not (found and found[0].seconds < (1 - MARGIN) * present.seconds):
        found.insert(0, present)
    return Found(
        rules=str(Rules.RUNTIME),
        best=found[0],
        others=tuple(_best_of_kinds(found))[1:],
        num_schedules=len(bounded),
        num_simulated=num_simulated,
        is_proved=is_complete
        and in_use is None
        and costs.machine.host_link_shared_by == 1
        and found[0].schedule.microbatches_per_forward == 1,
        search_seconds=time.perf_counter() - started,
    )


def _closer(found: list[Candidate], costs: Costs) -> list[Candidate]:
    """What may be fastest, with seconds as they are when links are shared fairly; best first."""
    finalists, budget = _within(_finalists(found), MAX_FAIR_COMPUTATIONS)
    if not finalists:
        return _finalists(found)  # too large, all of them
    refined = [_refined(each, costs) for each in finalists]
    if costs.machine.host_link_shared_by > 1:
        alone = costs.on(replace(costs.machine, host_link_shared_by=1))
        least = min(candidate.seconds for candidate in refined)
        others = [each for each in found if each not in finalists and num_computations(each.schedule) <= budget]
        in_best_case = [(runtime_seconds(each.schedule, alone, 2), index) for index, each in enumerate(others)]
        hopeful = [others[index] for seconds, index in sorted(in_best_case) if seconds < least]
        refined += [_refined(each, costs) for each in _within(hopeful, budget)[0]]
    return sorted(refined, key=lambda candidate: candidate.seconds)


def _within(candidates: list[Candidate], budget: int) -> tuple[list[Candidate], int]:
    """The first ones, as many as the budget of computations allows, and what is left of it."""
    chosen: list[Candidate] = []
    for candidate in candidates:
        if num_computations(candidate.schedule) > budget:
            break
        chosen.append(candidate)
        budget -= num_computations(candidate.schedule)
    return chosen, budget


def _refined(candidate: Candidate, costs: Costs) -> Candidate:
    if num_computations(candidate.schedule) > MAX_FAIR_COMPUTATIONS:
        return candidate
    return replace(candidate, seconds=fair_seconds(candidate.schedule, costs))


def _finalists(found: list[Candidate]) -> list[Candidate]:
    """The best, and the best of other kinds: those that are told beside it must be as well known."""
    best = found[:NUM_FINALISTS]
    of_other_kinds = [candidate for candidate in _best_of_kinds(found) if candidate not in best]
    return best + of_other_kinds[:NUM_FINALISTS]


def _best_of_kinds(found: list[Candidate]) -> Iterator[Candidate]:
    """One for each combination of mode, size and number of packs, best first."""
    kinds: dict[tuple[str, int, int], Candidate] = {}
    for candidate in found:
        schedule = candidate.schedule
        kinds.setdefault((schedule.mode, schedule.microbatch_backward, len(schedule.packs_backward)), candidate)
    yield from kinds.values()


def _family(
    costs: Costs, minibatch: int, modes: tuple[Mode, ...], size: int | None, together: tuple[frozenset[int], ...]
) -> Iterator[Schedule]:
    gpus = costs.machine.gpus
    packings = _packings(costs, together)
    for mode in modes:
        samples = -(-minibatch // gpus) if mode == "dp" else minibatch
        sizes = choose_sizes(costs, "backward", samples) if size is None else [size]
        for one in sizes:
            for packs in packings:
                yield Schedule(
                    mode=mode,
                    num_devices=gpus,
                    minibatch=minibatch,
                    microbatch_forward=one,
                    packs_forward=packs[:-1],
                    microbatch_backward=one,
                    packs_backward=packs,
                    prefetch=1,
                )


def _packings(costs: Costs, together: tuple[frozenset[int], ...]) -> tuple[tuple[Span, ...], ...]:
    """Packs of about equal seconds and of about equal weights."""
    sizes = costs.profile.microbatch_sizes.backward
    layers, size = range(costs.num_layers), sizes[len(sizes) // 2]  # a layer's share hardly depends on the size
    one = [(layer, layer) for layer in layers]
    seconds = [costs.forward_seconds(size, span) * 2 + costs.backward_seconds(size, span) for span in one]
    weights = [costs.weight_bytes(span) + costs.gradient_bytes(span) for span in one]
    found: dict[tuple[Span, ...], None] = {}
    tables = [table(seconds), table(weights)]
    for count in pack_counts(costs.num_layers, FINE):
        for starts in tables:
            packs = packs_of(starts, count, costs.num_layers)
            if all(any(min(s) >= first and max(s) <= last for first, last in packs) for s in together):
                found[packs] = None
    if not found:
        found[((0, costs.num_layers - 1),)] = None
    return tuple(found)


def _bound(schedule: Schedule, costs: Costs, *, stays: bool) -> float:
    """No less than this: what the busiest device computes, what links carry, what the host updates. If something `stays`,
    that may be everything: each layer computes forward once, and its weights come in once."""
    packs, gpus = schedule.packs_backward, schedule.num_devices
    sizes = split(schedule.minibatch, schedule.microbatch_backward)
    machine, last = costs.machine, len(packs) - 1
    of_device = sizes[::gpus] if schedule.mode == "dp" else sizes
    counts = [(size, of_device.count(size)) for size in set(of_device)]

    def seconds(span: Span) -> float:
        """Forward is run again for backward, but for the last pack."""
        repeated = 2 if span != packs[last] and not stays else 1
        return sum(n * (repeated * costs.forward_seconds(s, span) + backward(s, span)) for s, n in counts)

    def backward(size: int, span: Span) -> float:
        backward = costs.backward_seconds(size, span)
        if stays:
            backward += costs.forward_seconds(size, span) - costs.recompute_seconds(size, span)
        return max(0.0, backward)

    if schedule.mode == "dp":
        compute, visitors = sum(map(seconds, packs)), min(gpus, len(sizes))
    else:
        own = [[packs[p] for p in range(d, len(packs), gpus) if p not in schedule.dealt] for d in range(gpus)]
        # Who has more of its own may get less of what is dealt.
        busiest, even = max(sum(map(seconds, mine)) for mine in own), sum(map(seconds, packs)) / gpus
        compute, visitors = max(busiest, even), 1
    travelling = [span for p, span in enumerate(packs) if p not in schedule.updates_stay]
    nbytes = sum(map(costs.weight_bytes, travelling)) * visitors
    active = gpus if schedule.dealt else min(gpus, len(packs)) if schedule.mode == "pp" else visitors
    kept = sum(costs.weight_bytes(span) for span in packs[-active:]) if schedule.mode == "pp" else nbytes / len(packs)
    if stays:
        kept = nbytes
    # Forward may find new weights where they were updated.
    entering = (
        sum(costs.weight_bytes(span) for p, span in enumerate(packs) if p not in schedule.updated_there) * visitors
    )
    links = max(0.0, entering + nbytes - kept) / (active * machine.host_share(active))
    updates = sum(costs.update_seconds(span) for p, span in enumerate(packs) if p not in schedule.updated_there)
    return 0.98 * max(compute, links, updates)


def _fitting(
    schedule: Schedule, costs: Costs, memory_bytes: float, stashes: tuple[Literal["device", "host"], ...]
) -> Iterator[tuple[Schedule, float]]:
    """A slot more and stashes on the device never make a step slower."""
    for prefetch in (1, 0):
        for stash in stashes:
            variant = replace(schedule, prefetch=prefetch, stash=stash)
            peak = runtime_peak_bytes(variant, costs)
            if peak <= memory_bytes:
                yield variant, peak
                return


def _too_large(
    family: list[Schedule], costs: Costs, memory_bytes: float, stashes: tuple[Literal["device", "host"], ...]
) -> str:
    smallest = [replace(schedule, prefetch=0, stash=stashes[-1]) for schedule in family]
    peak, schedule = min(((runtime_peak_bytes(s, costs), s) for s in smallest), key=lambda pair: pair[0])
    heaviest = max(range(costs.num_layers), key=lambda layer: costs.weight_bytes((layer, layer)))
    name = costs.profile.names[heaviest] if costs.profile.names else str(heaviest)
    return (
        f"no plan fits: even {len(schedule.packs_backward)} packs with microbatches of {schedule.microbatch_backward} need "
        f"{format_nbytes(peak)}, but each GPU offers {format_nbytes(memory_bytes)}; the heaviest layer is {name} with "
        f"{format_nbytes(costs.weight_bytes((heaviest, heaviest)))} of weights and as much of gradients; raise memory, "
        f"lower the microbatch size, or split that layer"
    )
