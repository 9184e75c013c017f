"""What stays on the devices: the memory that a measured step has left goes to what saves most per byte.

    activations of the fused last pack   of one microbatch at a time, and save as many recomputes as there are microbatches
    stashes                              each byte saves two copies, out and in
    weights                              each byte saves one copy in
    activations of other packs           each byte saves its share of a recompute, and copies nothing

In this order, as far as they fit: where one does not, its device takes no more. What belongs to a dealt pack stays on all
of its devices, or on none of them; where it fits it has its place in either case. So with more memory the same ones stay
and others beside them, and neither copies nor recomputes ever increase.

Weights occupy their device all the time, stashes and activations from the first visit to their pack to the last. So the
most that a device holds is the largest, over all visits, of what was measured then and what stays then. That counts a
little twice: of a stash that was on its way out, and of activations that were made again, some microbatches' were there
when the step was measured. Where a step has been seen in which something stayed, it is that step that counts, for plans by
which no less does.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence

from harmony_lightning.plan import Held, Plan, Seen, Usage, VisitPeak

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
    best, full = plan, set[int]()
    if (seen := usage.seen) is not None:
        as_seen = dataclasses.replace(plan, resident=seen.resident, stash_stays=seen.stash_stays, keep=seen.keep)
        if not any(found > most for found, most in zip(peaks(as_seen, usage, plan), memory, strict=True)):
            best = as_seen
    counted = best
    """With all that has a place on some device."""
    for candidate in _candidates(plan, usage, moves_stash):
        devices = set(plan.devices_of(candidate.pack))
        if candidate.is_part_of(best) or devices <= full:
            continue
        wider = candidate.added_to(counted)
        found = peaks(wider, usage, plan)
        if too_small := {device for device in devices if found[device] > memory[device]}:
            full |= too_small if candidate.pack in plan.dealt else devices
        if not devices <= full:  # what does not stay for want of memory elsewhere has its place here all the same
            counted = wider
        if devices.isdisjoint(full):
            best = candidate.added_to(best)
    found = peaks(best, usage, plan)
    return dataclasses.replace(best, peak_bytes=tuple(map(sum, zip(found, grown or [0] * len(found), strict=True))))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """Something of a pack that may stay: a layer's activations, its weights or its stash."""

    pack: int
    layer: str | None = None
    is_weights: bool = False

    def is_part_of(self, plan: Plan) -> bool:
        if self.layer is not None:
            return self.layer in plan.keep
        return self.pack in (plan.resident if self.is_weights else plan.stash_stays)

    def added_to(self, plan: Plan) -> Plan:
        if self.layer is not None:
            return dataclasses.replace(plan, keep=(*plan.keep, self.layer))
        if self.is_weights:
            return dataclasses.replace(plan, resident=tuple(sorted((*plan.resident, self.pack))))
        return dataclasses.replace(plan, stash_stays=tuple(sorted((*plan.stash_stays, self.pack))))


def _candidates(plan: Plan, usage: Usage, moves_stash: bool) -> Iterator[_Candidate]:
    """In the order in which they are taken; an order that depends neither on the memory nor on what was taken before."""
    last = len(plan.packs) - 1
    weighed = {name for held in usage.held for name in held.layers}

    def layers(pack: int) -> Iterator[_Candidate]:
        names = (name for name in plan.packs[pack].layers if name in weighed and name not in plan.keep)
        return (_Candidate(pack=pack, layer=name) for name in names)

    yield from layers(last)
    if usage.held and plan.stash == "host" and not moves_stash:
        # The latest ones are there for the shortest time.
        yield from (_Candidate(pack=pack) for pack in reversed(range(last)))
    # Small ones first, as a large one may be the end; the last ones find their slots again anyway.
    sizes = {pack: plan.packs[pack].slot_nbytes for pack in range(last + 1) if plan.packs[pack].nbytes}
    yield from (_Candidate(pack=pack, is_weights=True) for pack in sorted(sizes, key=lambda pack: (sizes[pack], pack)))
    # A layer whose inputs leave is not worth keeping; one that is called for several microbatches at once cannot be.
    if not moves_stash and plan.microbatches_per_forward == 1:
        for pack in reversed(range(last)):
            yield from layers(pack)


def peaks(plan: Plan, usage: Usage, measured: Plan) -> list[int]:
    """The most that each device holds in a step like the measured one."""
    devices = range(plan.num_devices)
    now = _holders(plan, usage.held, measured)
    found = [_most(usage.visits, _waiting(usage.visits, usage.held, now, device), device) for device in devices]
    if usage.seen is not None:
        visits, then = usage.seen.visits, _holders(usage.seen, usage.held, measured)
        for device in devices:
            waits = _waiting(visits, usage.held, now, device)
            waited = _waiting(visits, usage.held, then, device)
            most = _most(visits, map(operator.sub, waits, waited), device)
            leaves = any(not a <= b for one, a, b in zip(usage.held, then, now, strict=True) if one.nbytes[device])
            found[device] = max(most, found[device]) if leaves else most
    return [plan.slots_nbytes(device) + most for device, most in enumerate(found)]


def _holders(plan: Plan | Seen, held: Sequence[Held], measured: Plan) -> list[set[int]]:
    """The packs for which each of these waits."""
    pack_of = {layer: index for index, pack in enumerate(measured.packs) for layer in pack.layers}
    kept, stays = set(plan.keep) - set(measured.keep), set(plan.stash_stays)
    return [stays.intersection(one.stashes) | {pack_of[name] for name in kept.intersection(one.layers)} for one in held]


def _waiting(
    visits: Sequence[VisitPeak], held: Sequence[Held], holders: Sequence[set[int]], device: int
) -> Iterator[int]:
    """Bytes that wait on a device during each visit: from the first one to a pack that holds them to the last."""
    first: dict[int, int] = {}
    last = {visit.pack: turn for turn, visit in enumerate(visits)}
    for turn, visit in enumerate(visits):
        first.setdefault(visit.pack, turn)
    changes = [0] * (len(visits) + 1)
    for one, packs in zip(held, holders, strict=True):
        if one.nbytes[device] and (visited := packs & last.keys()):
            changes[min(first[pack] for pack in visited)] += one.nbytes[device]
            changes[max(last[pack] for pack in visited) + 1] -= one.nbytes[device]
    return itertools.accumulate(changes[:-1])


def _most(visits: Sequence[VisitPeak], waits: Iterable[int], device: int) -> int:
    return max(visit.nbytes[device] + more for visit, more in zip(visits, waits, strict=True))
