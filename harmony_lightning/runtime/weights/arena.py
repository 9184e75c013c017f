"""Arenas: many weights in one flat piece of memory, so that a pack moves in one copy.

On the host, the user's `Parameter` objects stay what they are; only their memory is moved, each into its place in its
pack's arena. There is no second copy. Each parameter gets a storage of its own over that memory, of exactly its size:
saving, pickling or sharing one parameter touches that parameter and not the whole arena.
"""

import ctypes
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harmony_lightning.hardware.device import Cluster
from harmony_lightning.plan import Plan, aligned

Memory = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Region:
    """Where one tensor lies in an arena, and how it is laid out there."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def view(self, arena: torch.Tensor) -> torch.Tensor:
        """The tensor within `arena` (uint8, flat)."""
        return arena[self.start : self.stop].view(self.dtype).as_strided(self.shape, self.stride)

    def alias(self, memory: Memory) -> torch.Tensor:
        """The tensor within host memory, with a storage of its own over exactly its bytes. It holds `memory` alive."""
        count = self.shape.numel()
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        own = torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.start)
        return own.as_strided(self.shape, self.stride)


Layout = dict[str, Region]


def lay_out(
    parameters: Mapping[str, torch.Tensor],
    names: Iterable[str],
    dtypes: Mapping[str, torch.dtype] = types.MappingProxyType({}),
) -> Layout:
    """Regions for the named tensors, one behind the other, each aligned. `dtypes` of those that have another one there."""
    layout: Layout = {}
    start = 0
    for name in names:
        tensor = parameters[name]
        stride = tensor.stride() if _is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
        dtype = dtypes.get(name, tensor.dtype)
        nbytes = tensor.numel() * dtype.itemsize
        layout[name] = Region(start, start + nbytes, dtype, tensor.shape, stride)
        start += aligned(nbytes)
    return layout


def trained_first(parameters: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[str]:
    """Laid out so, those that train lie together, and can travel without the frozen ones."""
    return sorted(names, key=lambda name: not parameters[name].requires_grad)


def narrow_types(plan: Plan, names: Iterable[str]) -> dict[str, torch.dtype]:
    """What narrow weights are off the host."""
    return {} if plan.narrow_dtype is None else dict.fromkeys(names, getattr(torch, plan.narrow_dtype))


def layout_nbytes(layout: Layout) -> int:
    return max((aligned(region.stop) for region in layout.values()), default=0)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a gapless piece of memory in some order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def return_freed_memory() -> None:
    """Give memory that weights have moved out of back to the system. The C library keeps most of it otherwise (measured:
    52 of 64 MB), and the weights would seem to exist twice."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class HostArena:
    """The host memory of one pack's weights, or of the optimizer's states for them."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], names: Iterable[str], cluster: Cluster) -> None:
        """Moves the memory of the named parameters, or other tensors, which must be on the host, into a new arena."""
        self.layout = lay_out(parameters, names)
        self.bytes = cluster.host_buffer(layout_nbytes(self.layout))
        self._parameters = [parameters[name] for name in self.layout]
        self._addresses: list[int] = []
        self.move_in()

    def is_out_of_date(self) -> bool:
        """Whether user code has exchanged the memory of weights (`parameter.data = ...`) since they moved here."""
        return any(p.data_ptr() != address for p, address in zip(self._parameters, self._addresses, strict=True))

    @torch.no_grad()
    def move_in(self) -> None:
        """Take in weights that lie elsewhere."""
        memory = self.bytes.numpy()
        for parameter, region in zip(self._parameters, self.layout.values(), strict=True):
            own = region.alias(memory)
            if own.data_ptr() != parameter.data_ptr():
                own.copy_(parameter)
                parameter.data = own
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
