"""What stays on the devices: the memory that a measured step has left goes to what saves most per byte.

    activations of the fused last pack   of one microbatch at a time, and save as many recomputes as there are microbatches
    stashes                              each byte saves two copies, out and in
    weights                              each byte saves one copy in
    activations of other packs           each byte saves its share of a recompute, and copies nothing

In this order each one stays that still fits. More memory then never means less saved: it differs first in something that
fits now and did not before, which alone is larger than all that could take its place.

Weights occupy their device all the time, stashes and activations from the forward of their pack to its backward. So the
most that a device holds is the largest, over all visits, of what was measured then and what stays then.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from harmony_lightning.plan import Plan, Usage

HEADROOM = 1 / 32
"""Share of the memory that is left free: allocators lose some, and steps of one size differ a little."""


def let_stay(plan: Plan, usage: Usage, grown: Sequence[int] = (), *, moves_stash: bool = False) -> Plan:
    """The plan with as much residency as fits.

    Args:
        plan: under which the step was measured.
        usage: of that step.
        grown: bytes by which each device has less left now than then.
        moves_stash: stashes go to the host whatever is left.
    """
    memory = [int(plan.memory_bytes * (1 - HEADROOM)) - extra for extra in grown or [0] * plan.num_devices]
    best = plan
    for candidate in _candidates(plan, usage, moves_stash):
        wider = dataclasses.replace(
            best,
            resident=_with(best.resident, candidate.resident),
            stash_stays=_with(best.stash_stays, candidate.stash_stays),
            keep=(*best.keep, *candidate.keep),
        )
        if not set(candidate.needs_stash) <= set(best.stash_stays):
            continue
        if all(peak <= limit for peak, limit in zip(peaks(wider, usage, plan), memory, strict=True)):
            best = wider
    return dataclasses.replace(best, peak_bytes=tuple(peaks(best, usage, plan)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    resident: tuple[int, ...] = ()
    stash_stays: tuple[int, ...] = ()
    keep: tuple[str, ...] = ()
    needs_stash: tuple[int, ...] = ()
    """A layer is only worth keeping if its inputs stay, too."""


def _candidates(plan: Plan, usage: Usage, moves_stash: bool) -> Iterator[_Candidate]:
    last = len(plan.packs) - 1
    weighed: dict[str, int] = {}
    for held in usage.held:
        for name in held.layers:
            weighed[name] = weighed.get(name, 0) + sum(held.nbytes)

    def layers(pack: int) -> list[str]:
        """Those that may be kept, cheapest first."""
        names = [name for name in plan.packs[pack].layers if name in weighed and name not in plan.keep]
        return sorted(names, key=lambda name: weighed[name])

    yield from (_Candidate(keep=(name,)) for name in layers(last))
    has_stash = bool(usage.held) and plan.stash == "host" and not moves_stash
    # The latest ones are there for the shortest time.
    yield from (_Candidate(stash_stays=(pack,)) for pack in reversed(range(last)) if has_stash)
    # The last ones find their slots again anyway.
    yield from (_Candidate(resident=(pack,)) for pack in range(last + 1) if plan.packs[pack].nbytes)
    for pack in reversed(range(last)):
        needs = (pack,) if plan.stash == "host" else ()
        yield from (_Candidate(keep=(name,), needs_stash=needs) for name in layers(pack))


def peaks(plan: Plan, usage: Usage, measured: Plan) -> list[int]:
    """The most that each device holds in a step like the measured one."""
    pack_of = {layer: index for index, pack in enumerate(plan.packs) for layer in pack.layers}
    kept = set(plan.keep) - set(measured.keep)
    # By device and pack: what waits from its forward on.
    waits = [[0] * len(plan.packs) for _ in range(plan.num_devices)]
    for held in usage.held:
        holders = [p for p in held.stashes if p in plan.stash_stays] + [pack_of[n] for n in held.layers if n in kept]
        for device, nbytes in enumerate(held.nbytes if holders else ()):
            waits[device][min(holders)] += nbytes
    return [
        plan.slots_nbytes(device) + max(visit.nbytes[device] + sum(waiting[: visit.pack + 1]) for visit in usage.visits)
        for device, waiting in enumerate(waits)
    ]


def _with(indices: Iterable[int], more: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({*indices, *more}))
