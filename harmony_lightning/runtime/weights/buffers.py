"""Module buffers on devices: read like weights, but written by forward.

Each buffer has one current holder, the host or one device. A device that needs it gets a copy from the holder; a
forward that writes it makes its device the holder. So microbatches see the writes of those before them, in their order,
on whichever devices they run, as in plain training. At the end of a pass written buffers go home to the module, and before
if user code between layers uses one.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony_lightning.hardware.device import Device
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.structure import nbytes_of
from harmony_lightning.runtime.transfer import bring_in

_STAGED_NBYTES = 2**20
"""Buffers of up to so many bytes come by pinned memory, so that nobody waits for what the device was given before. Larger
ones, which may be quantised weights, would take too much of it."""

Place = tuple[nn.Module, str]
"""A buffer's place: the module that has it, and its name there."""
_Key = tuple[int, str]


@dataclass(slots=True)
class _Buffer:
    copies: dict[int, torch.Tensor] = field(default_factory=dict)
    """By device; all hold the current value."""
    is_written: bool = False
    """The host's value is out of date."""


class BufferStore:
    """Device copies of the buffers of interposed modules during one pass.

    Args:
        counters: of bytes.
        limit_nbytes: what clean copies may take on each device before the oldest give way. A module whose weights are
            buffers (a quantised one) belongs to no pack, and nothing else would end its stay.
    """

    def __init__(self, counters: Counters, limit_nbytes: int = sys.maxsize) -> None:
        self._buffers: dict[_Key, tuple[Place, _Buffer]] = {}
        self._homes: dict[int, tuple[torch.Tensor, _Key]] = {}
        """The modules' own tensors, by identity."""
        self._counters = counters
        self._limit_nbytes = limit_nbytes
        self._clean_nbytes: Counter[int] = Counter()
        """By device: of copies that were fetched and are still held."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def fetch(self, place: Place, device: Device) -> torch.Tensor:
        """The current value on `device`; a forward may write it in place and must then call `written`."""
        module, name = place
        key = (id(module), name)
        if key not in self._buffers:
            self._buffers[key] = (place, _Buffer())
            home = module._buffers[name]
            assert home is not None
            self._homes[id(home)] = home, key
        buffer = self._buffers[key][1]
        copy = buffer.copies.get(device.index)
        if copy is None:
            holder = next(iter(buffer.copies.values()), None)
            source = module._buffers[name] if holder is None else holder
            assert source is not None
            if not buffer.is_written:
                self._make_room(device.index, nbytes_of(source))
            is_staged = holder is None and type(source) is torch.Tensor and nbytes_of(source) <= _STAGED_NBYTES
            copy = bring_in(source, device) if is_staged else source.to(device.torch_device)
            if copy is source:
                copy = source.clone()
            if holder is None:
                self._counters.input_bytes += nbytes_of(copy)
            else:
                self._counters.p2p_bytes += nbytes_of(copy)
            buffer.copies[device.index] = copy
        return copy

    def _make_room(self, device: int, nbytes: int) -> None:
        """Account for a clean copy to come; the oldest ones go for it. Who works with one holds it himself."""
        for _, buffer in list(self._buffers.values()):
            if self._clean_nbytes[device] + nbytes <= self._limit_nbytes:
                break
            if not buffer.is_written and (copy := buffer.copies.pop(device, None)) is not None:
                self._clean_nbytes[device] -= nbytes_of(copy)
        self._clean_nbytes[device] += nbytes

    def written(self, place: Place, device: Device, value: torch.Tensor) -> None:
        """A forward has written the buffer: `value` on `device` is the only current one."""
        module, name = place
        buffer = self._buffers[id(module), name][1]
        if not buffer.is_written:
            for holder, copy in buffer.copies.items():
                self._clean_nbytes[holder] -= nbytes_of(copy)
        buffer.copies = {device.index: value}
        buffer.is_written = True

    @property
    def is_empty(self) -> bool:
        return not self._buffers

    def come_home(self, tensor: torch.Tensor) -> torch.Tensor:
        """User code is about to use a tensor, which is returned; if it is a buffer's own, it gets the current value."""
        if id(tensor) in self._homes:
            _, key = self._homes.pop(id(tensor))
            place, buffer = self._buffers.pop(key)
            if buffer.is_written:
                _bring_home(place, buffer)
            else:
                for device, copy in buffer.copies.items():
                    self._clean_nbytes[device] -= nbytes_of(copy)
        return tensor

    def flush(self) -> None:
        """Bring written buffers home, into the module's own tensors, and drop all copies."""
        for place, buffer in self._buffers.values():
            if buffer.is_written:
                _bring_home(place, buffer)
        self.discard()

    def drop_clean(self) -> None:
        """Free the device copies that nobody wrote; written ones stay until `flush`."""
        self._buffers = {key: entry for key, entry in self._buffers.items() if entry[1].is_written}
        self._homes = {home: entry for home, entry in self._homes.items() if entry[1] in self._buffers}
        self._clean_nbytes.clear()

    def discard(self) -> None:
        """Drop everything, writes too."""
        self._buffers.clear()
        self._homes.clear()
        self._clean_nbytes.clear()


@torch.inference_mode(False)
@torch.no_grad()
def _bring_home(place: Place, buffer: _Buffer) -> None:
    module, name = place
    value = next(iter(buffer.copies.values())).detach()
    home = module._buffers.get(name)
    if home is not None and home.shape == value.shape and home.dtype == value.dtype:
        home.copy_(value)
    else:
        module._buffers[name] = value.cpu()
