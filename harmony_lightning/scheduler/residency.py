"""What stays on the devices: the memory that a measured step has left goes to what saves most per byte.

    activations of the fused last pack   of one microbatch at a time, and save as many recomputes as there are microbatches
    stashes                              each byte saves two copies, out and in
    weights                              each byte saves one copy in
    activations of other packs           each byte saves its share of a recompute, and copies nothing

In this order, as far as they fit: where one does not, its device takes no more. So with more memory the same ones stay and
others beside them, and neither copies nor recomputes ever increase.

Weights occupy their device all the time, stashes and activations from the forward of their pack to its backward. So the
most that a device holds is the largest, over all visits, of what was measured then and what stays then.
"""

import dataclasses
from collections.abc import Iterator, Sequence

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
    best, full = plan, set[int]()
    for candidate in _candidates(plan, usage, moves_stash):
        pack = candidate.pack
        devices = set(plan.devices_of(pack))
        if not devices.isdisjoint(full):
            continue
        wider = candidate.added_to(best)
        found = peaks(wider, usage, plan)
        if too_small := {device for device in devices if found[device] > memory[device]}:
            full |= too_small
        else:
            best = wider
    return dataclasses.replace(best, peak_bytes=tuple(peaks(best, usage, plan)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """Something of a pack that may stay: a layer's activations, its weights or its stash."""

    pack: int
    layer: str | None = None
    is_weights: bool = False

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
