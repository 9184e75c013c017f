"""Where tensors wait from forward to backward: on the device, or on the host.

Both the inputs that layers keep and whatever glue saves for its own backward pass through autograd's saved-tensor
hooks. With the stash on the host, a tensor leaves on the SWAP_OUT lane when it is saved and comes back when its backward
asks for it. Slot memory is never stashed, and neither is anything of the fused last pack, whose backward is next. Of a
weight only a reference is kept (`glue_weights`).

On the host stashes have planned places (`stash_places`). On devices they have none: each takes memory when it sets out
for the device, and so waits for the compute enqueued by then, in whose place it may come. It sets out when the visit in
front of its own begins; before that an area with two halves would have no room for it, either. Steps on the emulated
clock (`benchmarks/step_time --travelling --stash host`) are at most 0.2 % shorter if such copies wait for no compute at
all, as if memory had no end: 8B and 70B models on 3090s, GPT-2 XL on 1080 Tis. They are 2.3 % shorter where four 3090s
share the uplink of a desktop, but to ask for stashes two visits ahead gains nothing there. An area would hold all that a
visit needs until its end, where memory goes back layer by layer. And a layer may keep an input that came back, in its own
code or in a graph: memory of its own lives as long as somebody holds it, a place would be given to the next tensor.
"""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from harmony_lightning.hardware.device import Device, Event, Lane
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.segment import Segment
from harmony_lightning.runtime.stash_places import StashPlaces, Stay, Visit
from harmony_lightning.runtime.structure import without_repetition
from harmony_lightning.runtime.transfer import Arrival, Departures
from harmony_lightning.runtime.weights.glue_weights import WeightReference


@dataclass(slots=True, eq=False, weakref_slot=True)
class Stashed:
    """A tensor that waits on the host, and how it lay on the device: other strides may mean other kernels, and so other
    bits, when a layer is recomputed."""

    host: torch.Tensor
    """Without the dimensions along which the tensor only repeats itself."""
    shape: torch.Size
    stride: tuple[int, ...]
    device: Device
    stay: Stay
    left: Event = field(init=False)
    """Behind the copy to the host."""
    back: Arrival | None = None
    """On its way back, before anybody has asked for it."""

    def __del__(self) -> None:
        self.stay.end()


class _Held:
    """A tensor that waits where it is. Whoever writes its memory first gives the holder a copy."""

    __slots__ = ("__weakref__", "is_copied", "stashed", "value")

    def __init__(self, value: torch.Tensor) -> None:
        self.value: torch.Tensor | None = value
        self.is_copied = False
        self.stashed: Stashed | None = None
        """In its place, since memory was short."""


class Stash:
    """The hooks.

    Args:
        leaves: the segment that saves a tensor, if that is to go to the host; None if it stays where it is.
        is_weight_memory: whether a tensor lies where the plan has put weights, and so stays there.
        refer: what stands for a tensor that is a weight; None for others.
        restore: the inverse.
        counters: of bytes.
        places: on the host.
        with_room: calls a function that needs memory of a device.
        weigh: is told of each tensor that goes to the host, and its segment.
        note_stay: is told of each that waits where it is.
    """

    def __init__(
        self,
        leaves: Callable[[torch.Tensor], Segment | None],
        is_weight_memory: Callable[[torch.Tensor], bool],
        refer: Callable[[torch.Tensor], WeightReference | None],
        restore: Callable[[WeightReference], torch.Tensor],
        counters: Counters,
        departures: Departures,
        places: StashPlaces,
        with_room: Callable[[Device, Callable[[], Arrival]], Arrival] = lambda device, function: function(),
        weigh: Callable[[Segment, torch.Tensor], None] = lambda segment, tensor: None,
        note_stay: Callable[[torch.Tensor], None] = lambda tensor: None,
    ) -> None:
        self._leaves = leaves
        self._is_weight_memory = is_weight_memory
        self._refer = refer
        self._restore = restore
        self._counters = counters
        self._departures = departures
        self._places = places
        self._with_room = with_room
        self._weigh = weigh
        self._note_stay = note_stay
        self._held: dict[int, list[weakref.ref[_Held]]] = {}
        """What waits where it is, by its memory; in a step's forward as much as there are tensors saved."""
        self._ahead: weakref.WeakSet[Stashed] = weakref.WeakSet()
        """What is on its way back."""

    def pack(self, tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            return self._leave(tensor)

    def unpack(self, held: Any) -> torch.Tensor:
        if isinstance(held, _Held) and held.value is not None:
            return held.value
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self._return(held)

    def _leave(self, tensor: torch.Tensor) -> Any:
        if (reference := self._refer(tensor)) is not None:
            return reference
        segment = self._leaves(tensor)
        if segment is None or tensor.device != segment.device.torch_device or self._is_weight_memory(tensor):
            # Not the tensor itself: an operation that saves its own result would then hold itself alive for ever.
            value = tensor.detach()
            held_here = _Held(value)
            self._note_stay(value)
            self._held.setdefault(storage_key(tensor), []).append(weakref.ref(held_here))
            return held_here
        device = segment.device
        key = (storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        held = segment.stashed.get(key)
        if held is not None and held[1] == tensor._version:
            return held[2]
        self._weigh(segment, tensor)
        source, stashed = self._send_out(tensor, device, (segment.pack, segment.microbatch))
        if segment.has_saved_much:
            self._departures.release(device)  # it leaves because there is too much of it
        else:
            segment.stashed[key] = (source, tensor._version, stashed)
            segment.stash.append(weakref.ref(stashed))
        return stashed

    def _send_out(
        self, tensor: torch.Tensor, device: Device, visit: Visit | None = None
    ) -> tuple[torch.Tensor, Stashed]:
        """What is read on the device, and where it waits; `visit` in which it is saved."""
        source = without_repetition(tensor.detach())
        host, stay = self._places.take(source, device, visit)
        stashed = Stashed(host, tensor.shape, source.stride(), device, stay)
        device.wait(Lane.SWAP_OUT, device.record(Lane.COMPUTE))
        with device.lane(Lane.SWAP_OUT, "stash"):
            host.copy_(source, non_blocking=True)
        self._counters.stash_out_bytes += host.nbytes
        stashed.left = self._departures.hold(device, Lane.SWAP_OUT, source)
        return source, stashed

    @torch.no_grad()
    def spill(self, device: Device) -> bool:
        """Memory of the device is short: what waits there waits on the host from now on. Returns whether there was any."""
        found = False
        for stashed in list(self._ahead):
            if stashed.device is device:  # it comes when it is asked for
                found |= stashed.back is not None
                stashed.back = None
                self._ahead.discard(stashed)
        with torch._C.DisableTorchFunction():
            for held in [reference() for group in self._held.values() for reference in group]:
                value = None if held is None else held.value
                if (
                    held is None
                    or value is None
                    or value.device != device.torch_device
                    or self._is_weight_memory(value)
                ):
                    continue
                held.stashed, held.value, found = self._send_out(value, device)[1], None, True
                del value
            self._departures.release(device)
        return found

    def _return(self, held: Any) -> torch.Tensor:
        if isinstance(held, _Held):
            held = held.stashed
        if isinstance(held, WeightReference):
            return self._restore(held)
        assert isinstance(held, Stashed)
        arrival, held.back = held.back, None
        if arrival is None:
            arrival = self._with_room(held.device, lambda: self._bring(held))
        return arrival.take().expand(held.shape)

    def bring_back(self, segment: Segment) -> None:
        """The segment's backward will come: let what it has stashed set out for the device."""
        stash, segment.stash = segment.stash, []
        with torch._C.DisableTorchFunction(), torch.no_grad(), contextlib.suppress(*OUT_OF_MEMORY):
            for reference in reversed(stash):  # backward asks for the last one first
                if (stashed := reference()) is not None:
                    stashed.back = self._bring(stashed)
                    self._ahead.add(stashed)

    def _bring(self, stashed: Stashed) -> Arrival:
        device, host = stashed.device, stashed.host
        result = torch.empty_strided(host.shape, stashed.stride, dtype=host.dtype, device=device.torch_device)
        self._counters.stash_in_bytes += host.nbytes
        # The memory of `result` may have been in use by compute, and the host copy may still be on its way out.
        device.wait(Lane.STASH_IN, device.record(Lane.COMPUTE))
        device.wait(Lane.STASH_IN, stashed.left)
        with device.lane(Lane.STASH_IN, "stash"):
            result.copy_(host, non_blocking=True)
        return Arrival(result, device, device.record(Lane.STASH_IN))

    def before_write(self, target: torch.Tensor) -> None:
        """Glue is about to write a tensor in place: what backward needs of its memory must not change."""
        if not self._departures.is_empty:
            self._departures.let_go()  # copies may still be reading it
        for reference in self._held.get(storage_key(target), ()):
            held = reference()
            if held is not None and not held.is_copied and held.value is not None:
                held.value = held.value.clone()
                held.is_copied = True

    def end(self) -> None:
        """The step is over."""
        self._held.clear()
        self._places.end_step()
