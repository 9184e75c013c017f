"""Sums of gradients that several devices have of a pack, on their way to the host: from device to device, in pieces.

    gpu0   a --.
    gpu1       '-> a + b --.
    gpu2                   '-> (a + b) + c --> host          each adds its own in its SWAP_OUT lane, and sends in SUM_OUT

All devices send at the same time, each another piece. So links carry a pack's gradients once in each direction, as in a
reduce-scatter, the host receives sums, and no compute waits for another device. They are added in the order of devices, as
one device adds up the same microbatches.
"""

from collections.abc import Sequence

import torch

from harmony_lightning.hardware.device import Device, Event, Lane
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.plan import summed_nbytes
from harmony_lightning.runtime.updates.gradient_slots import GradientSlot
from harmony_lightning.runtime.weights.arena import layout_nbytes

_WHAT = "sums of gradients"


@torch.inference_mode(False)
def landings_for(slots: Sequence[GradientSlot], devices: Sequence[Device]) -> list[torch.Tensor] | None:
    """Memory for a piece on each device but the first, uint8. None unless all slots hold gradients of all the pack's
    weights, in one type, or if a device has no memory left: then the host adds up what they send."""
    types = {region.dtype for region in slots[0].layout.values()}
    if len(types) > 1 or any(len(slot.written) < len(slot.layout) for slot in slots):
        return None
    landings = []
    for slot in slots[1:]:
        with devices[slot.device].lane(Lane.SWAP_OUT, _WHAT):
            try:
                landings.append(torch.empty_like(slot.bytes[: summed_nbytes(layout_nbytes(slot.layout))]))
            except OUT_OF_MEMORY:
                return None
    return landings


@torch.inference_mode(False)
@torch.no_grad()
def pass_on(
    slots: Sequence[GradientSlot],
    devices: Sequence[Device],
    landings: Sequence[torch.Tensor],
    buffer: torch.Tensor | None,
) -> Event:
    """Empty the slots of a pack into a buffer of the host, added up in their order; if there is none, all but the last,
    into that. Returns the point behind that."""
    (dtype,) = {region.dtype for region in slots[0].layout.values()}
    nbytes, size = layout_nbytes(slots[0].layout), len(landings[0])
    owners = [devices[slot.device] for slot in slots]
    for owner in owners:
        made = owner.record(Lane.COMPUTE)
        owner.wait(Lane.SUM_OUT, made)
        owner.wait(Lane.SWAP_OUT, made)
    for start in range(0, nbytes, size):
        stop = min(nbytes, start + size)
        parts = [slot.bytes[start:stop] for slot in slots]
        for source, landing in enumerate(landings):
            sender, owner, come = owners[source], owners[source + 1], landing[: stop - start]
            with sender.lane(Lane.SUM_OUT, _WHAT), owner.lane(Lane.SWAP_OUT, _WHAT):
                come.copy_(parts[source], non_blocking=True)
                parts[source + 1].view(dtype).add_(come.view(dtype))
            owner.wait(Lane.SUM_OUT, owner.record(Lane.SWAP_OUT))
        if buffer is not None:
            with owners[-1].lane(Lane.SUM_OUT, _WHAT):
                buffer[start:stop].copy_(parts[-1], non_blocking=True)
    for owner, slot in zip(owners, slots, strict=True):
        if buffer is not None or slot is not slots[-1]:
            slot.left = owner.record(Lane.SUM_OUT)
            slot.empty()
    return owners[-1].record(Lane.SUM_OUT)
