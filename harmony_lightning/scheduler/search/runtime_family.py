"""Schedules that the runtime can carry out, in families: each packing (`packings`) and microbatch size with one placement.
They do not depend on how much memory there is, nor tell what it is used for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan.schedule import Schedule, Span
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.search.breeding import packs_between
from harmony_lightning.scheduler.search.packings import pack_counts, packs_of, table
from harmony_lightning.scheduler.search.sizes import choose_sizes
from harmony_lightning.units import format_nbytes

FINE = 12
"""Up to so many packs every number is tried; beyond twice that, numbers in growing steps."""

FEW_LAYERS = 5
"""Of so many every packing is tried."""

Mode = Literal["auto", "pp", "dp", "mixed"]
"""What is asked for. Auto: pp and dp. Mixed: every number of pipelines, and one whose last pack is to be dealt.

In auto GPUs add up the gradients of dp, at least until dp has been chosen and is searched again. Where the host does, or in
several pipelines, all GPUs are at its memory at once. How long that takes is not known well enough
(`benchmarks/placements`)."""
Stash = Literal["device", "host"]


def runtime_families(
    costs: Costs,
    minibatch: int,
    mode: Mode,
    pipelines: int | None,
    size: int | None,
    together: tuple[frozenset[int], ...],
) -> Iterator[tuple[Schedule, ...]]:
    """`pipelines` and `size` of microbatches are the only ones; None for many."""
    gpus = costs.machine.gpus
    packings = _packings(costs, together)
    for kind, several in placements(mode, gpus, pipelines):
        samples = -(-minibatch // (gpus if kind == "dp" else several))
        sizes = choose_sizes(costs, "backward", samples) if size is None else [size]
        yield tuple(
            Schedule(
                mode=kind,
                num_devices=gpus,
                pipelines=several,
                minibatch=minibatch,
                microbatch_forward=one,
                packs_forward=packs[:-1],
                microbatch_backward=one,
                packs_backward=packs,
                prefetch=1,
            )
            for one in sizes
            for packs in packings
        )


def placements(mode: Mode, gpus: int, pipelines: int | None = None) -> Iterator[tuple[Literal["pp", "dp"], int]]:
    """Modes of schedules, and how many pipelines these have: so many, if a number is given."""
    if pipelines is not None and (pipelines < 1 or (mode == "dp" and pipelines > 1)):
        raise ConfigurationError(
            f"pipelines must be a positive number, and are of pp and mixed, got {pipelines} in mode {mode!r}"
        )
    if mode == "mixed" and pipelines is None:
        yield from (("pp", count) for count in range(1, max(2, gpus)) if gpus % count == 0)
    elif mode != "dp":
        yield "pp", pipelines or 1
    if mode == "dp" or (mode == "auto" and gpus > 1 and pipelines is None):
        yield "dp", 1


def _packings(costs: Costs, together: tuple[frozenset[int], ...]) -> tuple[tuple[Span, ...], ...]:
    """Packs of about equal seconds and of about equal weights; any packs of few layers."""
    sizes = costs.profile.microbatch_sizes.backward
    layers, size = range(costs.num_layers), sizes[len(sizes) // 2]  # a layer's share hardly depends on the size
    one = [(layer, layer) for layer in layers]
    seconds = [costs.forward_seconds(size, span) * 2 + costs.backward_seconds(size, span) for span in one]
    weights = [costs.weight_bytes(span) + costs.gradient_bytes(span) for span in one]
    found: dict[tuple[Span, ...], None] = {}
    tables = [table(seconds), table(weights)]
    for count in pack_counts(costs.num_layers, FINE):
        packings = [packs_of(starts, count, costs.num_layers) for starts in tables]
        if costs.num_layers <= FEW_LAYERS:
            cuts = combinations(range(1, costs.num_layers), count - 1)
            packings += [packs_between(borders, costs.num_layers) for borders in cuts]
        for packs in packings:
            if all(any(min(s) >= first and max(s) <= last for first, last in packs) for s in together):
                found[packs] = None
    if not found:
        found[((0, costs.num_layers - 1),)] = None
    return tuple(found)


def too_large(
    family: Sequence[Schedule], costs: Costs, memory_bytes: float, stashes: tuple[Literal["device", "host"], ...]
) -> str:
    """What to say where nothing fits."""
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
