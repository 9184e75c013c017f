"""Where tensors wait from forward to backward: on the device, or on the host.

Both the inputs that layers keep and whatever glue saves for its own backward pass through autograd's saved-tensor
hooks. With the stash on the host, a tensor leaves on the SWAP_OUT lane when it is saved and comes back when its backward
asks for it. Slot memory is never stashed, and neither is anything of the fused last pack, whose backward is next. Of a
weight only a reference is kept (`glue_weights`).
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from harmony_lightning.hardware.device import Device, Event, Lane
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.glue_weights import WeightReference
from harmony_lightning.runtime.segment import Segment
from harmony_lightning.runtime.structure import without_repetition


@dataclass(frozen=True, slots=True)
class _Stashed:
    """A tensor that waits on the host, and how it lay on the device: other strides may mean other kernels, and so other
    bits, when a layer is recomputed."""

    host: torch.Tensor
    """Without the dimensions along which the tensor only repeats itself."""
    shape: torch.Size
    stride: tuple[int, ...]
    device: Device
    left: Event
    """Behind the copy to the host."""


class _Held:
    """A tensor that waits where it is. Whoever writes its memory first gives the holder a copy."""

    __slots__ = ("__weakref__", "is_copied", "value")

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value
        self.is_copied = False


class Stash:
    """The hooks.

    Args:
        leaves: the segment that saves a tensor, if that is to go to the host; None if it stays where it is.
        is_weight_memory: whether a tensor lies where the plan has put weights, and so stays there.
        refer: what stands for a tensor that is a weight; None for others.
        restore: the inverse.
        counters: of bytes.
    """

    def __init__(
        self,
        leaves: Callable[[torch.Tensor], Segment | None],
        is_weight_memory: Callable[[torch.Tensor], bool],
        refer: Callable[[torch.Tensor], WeightReference | None],
        restore: Callable[[WeightReference], torch.Tensor],
        counters: Counters,
    ) -> None:
        self._leaves = leaves
        self._is_weight_memory = is_weight_memory
        self._refer = refer
        self._restore = restore
        self._counters = counters
        self._leaving: list[tuple[Device, torch.Tensor]] = []
        """Device tensors that a copy may still be reading."""
        self._left_before: list[tuple[Device, torch.Tensor]] = []
        """Those of the turn before; copies of two turns overlap with compute."""
        self._held: dict[int, weakref.WeakSet[_Held]] = {}
        """What waits where it is, by its memory."""

    def pack(self, tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self._leave(tensor)

    def unpack(self, held: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self._return(held)

    def _leave(self, tensor: torch.Tensor) -> Any:
        if (reference := self._refer(tensor)) is not None:
            return reference
        segment = self._leaves(tensor)
        if segment is None or tensor.device != segment.device.torch_device or self._is_weight_memory(tensor):
            # Not the tensor itself: an operation that saves its own result would then hold itself alive for ever.
            held_here = _Held(tensor.detach())
            self._held.setdefault(storage_key(tensor), weakref.WeakSet()).add(held_here)
            return held_here
        device = segment.device
        key = (storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        held = segment.stashed.get(key)
        if held is not None and held[1] == tensor._version:
            return held[2]
        source = without_repetition(tensor.detach())
        with torch.inference_mode(False):
            host = torch.empty_like(source, device="cpu", pin_memory=device.torch_device.type == "cuda")
        device.wait(Lane.SWAP_OUT, device.record(Lane.COMPUTE))
        with device.lane(Lane.SWAP_OUT, "stash"):
            host.copy_(source, non_blocking=True)
        self._counters.stash_out_bytes += host.nbytes
        self._leaving.append((device, source))
        stashed = _Stashed(host, tensor.shape, source.stride(), device, device.record(Lane.SWAP_OUT))
        if segment.saved_nbytes > segment.state.spare_nbytes:
            self.let_go()  # it leaves because there is too much of it
        else:
            segment.stashed[key] = (source, tensor._version, stashed)
        return stashed

    def _return(self, held: Any) -> torch.Tensor:
        if isinstance(held, _Held):
            return held.value
        if isinstance(held, WeightReference):
            return self._restore(held)
        assert isinstance(held, _Stashed)
        device = held.device
        self._counters.stash_in_bytes += held.host.nbytes
        result = torch.empty_strided(
            held.host.shape, held.stride, dtype=held.host.dtype, device=device.torch_device, pin_memory=False
        )
        # The memory of `result` may have been in use by compute, and the host copy may still be on its way out.
        device.wait(Lane.SWAP_IN, device.record(Lane.COMPUTE))
        device.wait(Lane.SWAP_IN, held.left)
        with device.lane(Lane.SWAP_IN, "stash"):
            result.copy_(held.host, non_blocking=True)
        device.wait(Lane.COMPUTE, device.record(Lane.SWAP_IN))
        return result.expand(held.shape)

    def before_write(self, target: torch.Tensor) -> None:
        """Glue is about to write a tensor in place: what backward needs of its memory must not change."""
        if self._leaving or self._left_before:
            self.let_go()  # copies to the host may still be reading it
        for held in self._held.get(storage_key(target), ()):
            if not held.is_copied:
                held.value = held.value.clone()
                held.is_copied = True

    def end(self) -> None:
        """The step is over."""
        self.let_go()
        self._held.clear()

    def turn(self) -> None:
        """Another microbatch comes: what left in the turn before the last one need not be held any more."""
        self._free(self._left_before)
        self._left_before, self._leaving = self._leaving, []

    def let_go(self) -> None:
        """End of a visit: device memory whose copies were enqueued may be used again behind them."""
        self._free([*self._left_before, *self._leaving])
        self._left_before, self._leaving = [], []

    @staticmethod
    def _free(left: list[tuple[Device, torch.Tensor]]) -> None:
        for device in {device.index: device for device, _ in left}.values():
            device.wait(Lane.COMPUTE, device.record(Lane.SWAP_OUT))
        left.clear()
