"""Schedules that the runtime can carry out, in families: each packing (`packings`) and microbatch size with one placement.
They do not depend on how much memory there is, nor tell what it is used for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, NamedTuple

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan.schedule import Schedule, Span
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.packing import dealt_order
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.search.breeding import packs_between
from harmony_lightning.scheduler.search.packings import pack_counts, packs_of, table
from harmony_lightning.scheduler.search.sizes import choose_sizes
from harmony_lightning.units import format_nbytes

FINE = 12
"""Up to so many packs every number is tried; beyond twice that, numbers in growing steps."""

COARSE = 6
"""The same for placements beside pp, where several are searched: there are many, and large models take seconds each."""

FEW_LAYERS = 5
"""Of so many every packing is tried."""

Mode = Literal["auto", "pp", "dp", "mixed"]
"""What is asked for. Auto: all there is. Mixed: all but dp. Pp: one pipeline, or the given number, and no dealt pack."""
Stash = Literal["device", "host"]


class Placed(NamedTuple):
    """A placement that is searched by itself."""

    mode: Literal["pp", "dp"]
    pipelines: int = 1
    is_dealt: bool = False
    """Whether the last pack is."""


def runtime_families(
    costs: Costs,
    minibatch: int,
    mode: Mode,
    pipelines: int | None,
    deals: bool | None,
    size: int | None,
    together: tuple[frozenset[int], ...],
) -> Iterator[tuple[Schedule, ...]]:
    """`pipelines`, `deals` and `size` of microbatches are the only ones; None for many."""
    gpus = costs.machine.gpus
    placed_so = list(placements(mode, gpus, pipelines, deals))
    for placed in placed_so:
        packings = _packings(costs, together, FINE if placed == Placed("pp") or len(placed_so) == 1 else COARSE)
        samples = -(-minibatch // (gpus if placed.mode == "dp" else placed.pipelines))
        sizes = choose_sizes(costs, "backward", samples) if size is None else [size]
        family = (
            Schedule(
                mode=placed.mode,
                num_devices=gpus,
                pipelines=placed.pipelines,
                minibatch=minibatch,
                microbatch_forward=one,
                packs_forward=packs[:-1],
                microbatch_backward=one,
                packs_backward=packs,
                prefetch=1,
            )
            for one in sizes
            for packs in packings
            # Of fewer nothing is to be dealt.
            if not placed.is_dealt or deals or (one < minibatch and len(packs) > 1)
        )
        if members := tuple(deal_last(schedule, costs) if placed.is_dealt else schedule for schedule in family):
            yield members


def deal_last(schedule: Schedule, costs: Costs) -> Schedule:
    """Microbatches of its last pack go round the devices."""
    packs = schedule.packs_backward
    sizes = [round(costs.weight_bytes(span)) for span in packs]
    order = dealt_order(sizes, schedule.num_devices, -(-schedule.minibatch // schedule.microbatch_backward))
    return replace(schedule, dealt=(len(packs) - 1,), dealt_order=order)


def placements(mode: Mode, gpus: int, pipelines: int | None = None, deals: bool | None = None) -> Iterator[Placed]:
    """Of schedules: with so many pipelines, if a number is given; that deal their last pack or not, if that is given."""
    if pipelines is not None and (pipelines < 1 or (mode == "dp" and pipelines > 1)):
        raise ConfigurationError(
            f"pipelines must be a positive number, and are of pp and mixed, got {pipelines} in mode {mode!r}"
        )
    if mode != "dp":
        are_many = mode != "pp" and pipelines is None
        counts = [n for n in range(1, max(2, gpus)) if gpus % n == 0] if are_many else [pipelines or 1]
        is_one = counts[0] == 1 and gpus > 1
        if not (is_one and deals):
            yield from (Placed("pp", count) for count in counts)
        if is_one and (deals or (deals is None and mode != "pp")):
            yield Placed("pp", 1, is_dealt=True)
    if mode == "dp" or (mode == "auto" and gpus > 1 and pipelines is None):
        yield Placed("dp")


def _packings(costs: Costs, together: tuple[frozenset[int], ...], fine: int) -> tuple[tuple[Span, ...], ...]:
    """Packs of about equal seconds and of about equal weights; any packs of few layers."""
    sizes = costs.profile.microbatch_sizes.backward
    layers, size = range(costs.num_layers), sizes[len(sizes) // 2]  # a layer's share hardly depends on the size
    one = [(layer, layer) for layer in layers]
    seconds = [costs.forward_seconds(size, span) * 2 + costs.backward_seconds(size, span) for span in one]
    weights = [costs.weight_bytes(span) + costs.gradient_bytes(span) for span in one]
    found: dict[tuple[Span, ...], None] = {}
    tables = [table(seconds), table(weights)]
    for count in sorted({*pack_counts(costs.num_layers, fine), costs.num_layers}):
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
