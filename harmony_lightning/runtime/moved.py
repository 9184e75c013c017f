"""Copies on a segment's device of tensors from elsewhere, each made once as long as the tensor's value is the same.

Few are used again: masks, encoder states. Code that looks at every weight once must not gather them all on the device.
"""

import torch

from harmony_lightning.hardware.device import Device
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.structure import nbytes_of, version_of
from harmony_lightning.runtime.transfer import Arrival, bring_in

_NUM_KEPT = 16
"""Of several, no more bytes either than a pack's weights have."""

Copies = dict[int, tuple[torch.Tensor, int, Arrival]]
"""By identity of the source, with the source's version; it is held so that its identity stays taken."""


class Moved:
    """Those of one segment on one device, the one that was used last behind all others."""

    def __init__(self, state: RuntimeState, device: Device) -> None:
        self._state = state
        self._device = device
        self._copies: Copies = {}

    def expect(self, copies: Copies) -> None:
        """These were sent here before the microbatch came."""
        self._copies.update(copies)

    def clear(self) -> None:
        self._copies.clear()

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the value on this device, which belongs to no graph."""
        version = version_of(tensor)
        copy = self._copies.pop(id(tensor), None)
        if copy is None or copy[1] != version:
            copy = (tensor, version, self._bring_over(tensor.detach()))
        self._copies[id(tensor)] = copy
        while len(self._copies) > 1 and (
            len(self._copies) > _NUM_KEPT
            or sum(nbytes_of(kept.value) for _, _, kept in self._copies.values()) > self._state.slot_nbytes
        ):
            del self._copies[next(iter(self._copies))]
        if not self._state.is_device(tensor.device):
            self._make_room()
        return copy[2].take()

    @torch.inference_mode(False)  # such tensors do not count their versions, and a layer may write its input
    @torch.no_grad()
    def _bring_over(self, tensor: torch.Tensor) -> Arrival:
        return self._state.memory.with_room(self._device, lambda: self._copy_over(tensor))

    def _copy_over(self, tensor: torch.Tensor) -> Arrival:
        home = self._state.find_device(tensor.device)
        if home is not None:
            return self._state.send(tensor, home, self._device)
        self._state.counters.input_bytes += nbytes_of(tensor)
        return Arrival(bring_in(tensor, self._device), self._device)

    def _make_room(self) -> None:
        """Of tensors on the host, such as former weights, the user may have as many as of weights."""
        held = [key for key, (source, _, _) in self._copies.items() if not self._state.is_device(source.device)]
        total = sum(nbytes_of(self._copies[key][2].value) for key in held)
        for key in held[:-1]:
            if total <= self._state.spare_nbytes:
                return
            total -= nbytes_of(self._copies.pop(key)[2].value)
