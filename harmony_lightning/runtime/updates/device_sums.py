"""Sums of gradients that several devices have of a pack, on their way to the host: from device to device, in pieces.

    gpu0   a --.
    gpu1       '-> a + b --.
    gpu2                   '-> (a + b) + c --> host          each adds its own in its SWAP_OUT lane, and sends in SHARE_OUT

All devices send at the same time, each another piece. So links carry a pack's gradients once in each direction, as in a
reduce-scatter, the host receives sums, and no compute waits for another device. They are added in the order of devices, as
one device adds up the same microbatches.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from harmony_lightning.hardware.device import Device, Event, Lane
from harmony_lightning.plan import summed_nbytes
from harmony_lightning.runtime.updates.gradient_slots import GradientSlot
from harmony_lightning.runtime.weights.arena import layout_nbytes

Result = TypeVar("Result")

_WHAT = "sums of gradients"


class WithRoom(Protocol):
    """Calls a function that needs memory of a device."""

    def __call__(self, device: Device, function: Callable[[], Result], /) -> Result: ...


def can_pass_on(slots: Sequence[GradientSlot]) -> bool:
    """Whether these, of one pack, all hold gradients of all its weights, in one type."""
    types = {region.dtype for region in slots[0].layout.values()}
    return len(types) == 1 and all(len(slot.written) == len(slot.layout) for slot in slots)


@torch.inference_mode(False)
@torch.no_grad()
def pass_on(
    slots: Sequence[GradientSlot], devices: Sequence[Device], with_room: WithRoom, buffer: torch.Tensor | None
) -> Event:
    """Empty the slots of a pack into a buffer of the host, added up in their order; if there is none, all but the last,
    into that. Returns the point behind that."""
    (dtype,) = {region.dtype for region in slots[0].layout.values()}
    nbytes = layout_nbytes(slots[0].layout)
    size = summed_nbytes(nbytes)
    owners = [devices[slot.device] for slot in slots]
    landings: list[torch.Tensor] = []
    for owner, slot in zip(owners, slots, strict=True):
        made = owner.record(Lane.COMPUTE)
        owner.wait(Lane.SHARE_OUT, made)
        owner.wait(Lane.SWAP_OUT, made)
        with owner.lane(Lane.SWAP_OUT, _WHAT):
            landings.append(with_room(owner, functools.partial(torch.empty_like, slot.bytes[:size])))
    for start in range(0, nbytes, size):
        stop = min(nbytes, start + size)
        parts = [slot.bytes[start:stop] for slot in slots]
        for target in range(1, len(slots)):
            sender, owner, landing = owners[target - 1], owners[target], landings[target][: stop - start]
            with sender.lane(Lane.SHARE_OUT, _WHAT), owner.lane(Lane.SWAP_OUT, _WHAT):
                landing.copy_(parts[target - 1], non_blocking=True)
                parts[target].view(dtype).add_(landing.view(dtype))
            owner.wait(Lane.SHARE_OUT, owner.record(Lane.SWAP_OUT))
        if buffer is not None:
            with owners[-1].lane(Lane.SHARE_OUT, _WHAT):
                buffer[start:stop].copy_(parts[-1], non_blocking=True)
    for owner, slot in zip(owners, slots, strict=True):
        if buffer is not None or slot is not slots[-1]:
            slot.left = owner.record(Lane.SHARE_OUT)
            slot.empty()
    return owners[-1].record(Lane.SHARE_OUT)
