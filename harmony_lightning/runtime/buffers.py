"""Module buffers on devices: read like weights, but written by forward.

Each buffer has one current holder, the host or one device. A device that needs it gets a copy from the holder; a
forward that writes it makes its device the holder. So microbatches see the writes of those before them, in their order,
on whichever devices they run, as in plain training. At the end of a pass written buffers go home to the module.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony_lightning.hardware.device import Device
from harmony_lightning.runtime.counters import Counters

Place = tuple[nn.Module, str]
"""A buffer's place: the module that has it, and its name there."""


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
        self._buffers: dict[tuple[int, str], tuple[Place, _Buffer]] = {}
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
        buffer = self._buffers[key][1]
        copy = buffer.copies.get(device.index)
        if copy is None:
            holder = next(iter(buffer.copies.values()), None)
            source = module._buffers[name] if holder is None else holder
            assert source is not None
            if not buffer.is_written:
                self._make_room(device.index, source.nbytes)
            copy = source.to(device.torch_device)
            if copy is source:
                copy = source.clone()
            if holder is None:
                self._counters.input_bytes += copy.nbytes
            else:
                self._counters.p2p_bytes += copy.nbytes
            buffer.copies[device.index] = copy
        return copy

    def _make_room(self, device: int, nbytes: int) -> None:
        """Account for a clean copy to come; the oldest ones go for it. Who works with one holds it himself."""
        for _, buffer in list(self._buffers.values()):
            if self._clean_nbytes[device] + nbytes <= self._limit_nbytes:
                break
            if not buffer.is_written and (copy := buffer.copies.pop(device, None)) is not None:
                self._clean_nbytes[device] -= copy.nbytes
        self._clean_nbytes[device] += nbytes

    def written(self, place: Place, device: Device, value: torch.Tensor) -> None:
        """A forward has written the buffer: `value` on `device` is the only current one."""
        module, name = place
        buffer = self._buffers[id(module), name][1]
        if not buffer.is_written:
            for holder, copy in buffer.copies.items():
                self._clean_nbytes[holder] -= copy.nbytes
        buffer.copies = {device.index: value}
        buffer.is_written = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def flush(self) -> None:
        """Bring written buffers home, into the module's own tensors, and drop all copies."""
        for (module, name), buffer in self._buffers.values():
            if not buffer.is_written:
                continue
            value = next(iter(buffer.copies.values())).detach()
            home = module._buffers.get(name)
            if home is not None and home.shape == value.shape and home.dtype == value.dtype:
                home.copy_(value)
            else:
                module._buffers[name] = value.cpu()
        self.discard()

    def drop_clean(self) -> None:
        """Free the device copies that nobody wrote; written ones stay until `flush`."""
        self._buffers = {key: entry for key, entry in self._buffers.items() if entry[1].is_written}
        self._clean_nbytes.clear()

    def discard(self) -> None:
        """Drop everything, writes too."""
        self._buffers.clear()
        self._clean_nbytes.clear()
