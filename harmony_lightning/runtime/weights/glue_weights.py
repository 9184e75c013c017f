"""Weights that user code uses between layers: copies on devices, made when they are asked for.

A regulariser or a norm over all weights touches more than any GPU holds, in forward and again in backward. So a copy
gives way to the next one where memory is short, and what glue saves of a copy for its backward is a reference: which part
of which weight. The masters do not change in between, so that the copy can be made again.

Weights of no layer are different: the plan has set room aside for them, and they stay for the visit.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.device import Device
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.runtime.counters import Counters


@dataclass(slots=True, eq=False, weakref_slot=True)
class WeightReference:
    """What glue has saved of a weight."""

    name: str
    device: Device
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    version: int
    """Of the master, when the copy was made."""
    value: torch.Tensor | None = field(default=None)
    """On the host: the master as it was, since somebody has written it."""


class GlueWeights:
    """Device copies of masters during one visit.

    Args:
        parameters: the masters by name.
        planned: names of those that may stay for the visit.
        counters: of bytes.
        limit_nbytes: what other copies may take on each device before the oldest give way; the newest always stays.
        await_updates: returns when weights of these names are not being updated.
        host_is_device: copies are the masters themselves.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        planned: Collection[str],
        counters: Counters,
        limit_nbytes: int,
        await_updates: Callable[[Iterable[str]], None] = lambda names: None,
        *,
        host_is_device: bool,
    ) -> None:
        self._parameters = parameters
        self._planned = frozenset(planned)
        self._counters = counters
        self._limit_nbytes = limit_nbytes
        self._await_updates = await_updates
        self._host_is_device = host_is_device
        self._copies: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}
        """With the master's version; least recently used first."""
        self._names: dict[int, str] = {}
        """By the memory of a copy."""
        self._references: dict[str, weakref.WeakSet[WeightReference]] = {}

    def __bool__(self) -> bool:
        """Whether there are copies now."""
        return bool(self._copies)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fetch(self, name: str, device: Device) -> torch.Tensor:
        """The weight on `device`, without gradient."""
        key = (name, device.index)
        entry = self._copies.pop(key, None)
        if entry is None:
            self._await_updates((name,))
            source = self._parameters[name].detach()
            if not self._host_is_device:
                self._make_room(device, source.nbytes)
                self._counters.swap_in_bytes += source.nbytes
            copy = source.to(device.torch_device)
            entry = copy, source._version
            self._names[storage_key(copy)] = name
        self._copies[key] = entry
        return entry[0].detach()

    def _make_room(self, device: Device, nbytes: int) -> None:
        """For one more copy the oldest go. Who works with one holds it himself."""
        held = [key for key in self._copies if key[1] == device.index and key[0] not in self._planned]
        total = nbytes + sum(self._copies[key][0].nbytes for key in held)
        for key in held:
            if total <= self._limit_nbytes:
                return
            copy, _ = self._copies.pop(key)
            self._names.pop(storage_key(copy), None)
            total -= copy.nbytes

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of the copies."""
        return bool(self._copies) and storage_key(tensor) in self._names

    def refer(self, tensor: torch.Tensor, device: Device, used: Collection[str]) -> WeightReference | None:
        """A reference to what a tensor on `device` shows of a weight.

        None if it is something else, or must be kept: a weight that trains, but whose use here is not counted in `used`,
        may be updated before this segment's backward.
        """
        if self._host_is_device or not self._copies or tensor.layout is not torch.strided:
            return None
        name = self._names.get(storage_key(tensor))
        entry = None if name is None else self._copies.get((name, device.index))
        if name is None or entry is None or (name not in used and self._parameters[name].requires_grad):
            return None
        copy, version = entry
        if storage_key(copy) != storage_key(tensor) or tensor.dtype != copy.dtype or tensor._version != 0:
            return None
        reference = WeightReference(
            name, device, tensor.shape, tensor.stride(), int(tensor.storage_offset() - copy.storage_offset()), version
        )
        self._references.setdefault(name, weakref.WeakSet()).add(reference)
        return reference

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self, reference: WeightReference) -> torch.Tensor:
        """The tensor that was saved.

        Raises:
            UnsupportedError: the master has changed since.
        """
        name, device = reference.name, reference.device
        if reference.value is not None:
            self._counters.swap_in_bytes += reference.value.nbytes
            copy = reference.value.to(device.torch_device)
        elif self._parameters[name]._version != reference.version:
            raise UnsupportedError(
                f"weight {name} was changed between its use outside of layers and the backward of that (by an optimizer's "
                f"step?), so the gradient cannot be computed; torch refuses that, too. Call backward before the step"
            )
        else:
            copy = self.fetch(name, device)
        return copy.as_strided(reference.shape, reference.stride, copy.storage_offset() + reference.offset)

    @torch.no_grad()
    def before_write(self, memory: int) -> None:
        """User code is about to write the master at this address: those who refer to it get its present value."""
        for name, references in self._references.items():
            waiting = [reference for reference in references if reference.value is None]
            if waiting and self._parameters[name].data_ptr() == memory:
                value = self._parameters[name].detach().clone()
                for reference in waiting:
                    if reference.version == self._parameters[name]._version:
                        reference.value = value

    def clear(self) -> None:
        """No copy is needed any more; references stay valid."""
        self._copies.clear()
        self._names.clear()
