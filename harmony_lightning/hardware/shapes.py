"""Fake data: operations on shapes alone, with memory that nobody touches.

A tensor of any size costs no memory until one of its bytes is read or written: the system only reserves addresses. So
in a fake run everything is where it would be, with its address, its size and its lifetime, but large tensors are never
computed: the shapes of results come from torch's own meta kernels, and their memory is reserved and left alone. Small
tensors on the host stay real: counters, random states, samples' lengths. Small results are zero.
"""

import contextlib
import mmap
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.operations import Operation, tensors

_REAL_BYTES = 64 * 1024
"""Host tensors up to this size are computed."""
_NO_RESERVE = 0x4000
"""Linux: give addresses, whether or not there is memory for them. Python names the flag from 3.13 on."""


def is_real(values: Iterable[Any]) -> bool:
    """Whether an operation on the host over these arguments is to be computed."""
    return all(tensor.nbytes <= _REAL_BYTES for tensor in tensors(values))


def run_on_shapes(known: Operation, args: Any, kwargs: Any) -> Any:
    """What the operation returns, as tensors over untouched host memory; views and written arguments are the real ones.

    Raises:
        UnsupportedError: the shape of the result depends on numbers, which there are none of.
    """
    if known.is_idle:
        return known.func(*args, **kwargs)
    if known.tells_host and len(known.returned) == 1 and not known.returns_tensor:
        return True
    if known.mutates and None not in known.returned:
        out = (None,) * len(known.returned)  # nothing new comes of it
        return _results(known, args, kwargs, out if len(out) > 1 else None)
    try:
        out = _shapes(known.func, args, kwargs)
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedError(
            f"{known.func} cannot be run on shapes alone: {error}. Train with real data (fake=False), or keep what "
            "depends on numbers out of the step"
        ) from error
    return _results(known, args, kwargs, out)


_known: dict[Any, Any] = {}
"""Shapes of results by operation and arguments: the layers of a model are alike, and so are microbatches, while a meta
kernel takes longer than all else that is done for an operation."""
_MOST_KNOWN = 4096


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """What the meta kernel returns, for its shapes, strides and types alone."""
    try:
        key: Any = (func, torch.get_default_dtype(), _key(args), _key(tuple(kwargs.items())))
        found = _known.get(key)
    except TypeError:
        key, found = None, None
    if found is None:
        found = func(*pytree.tree_map(_meta, list(args)), **pytree.tree_map(_meta, dict(kwargs)))
        if key is not None:
            if len(_known) == _MOST_KNOWN:
                _known.clear()
            _known[key] = found
    return found


def _key(value: Any) -> Any:
    """All that a meta kernel learns of an argument. Raises TypeError if nobody knows."""
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return type(value), value  # 1 and True are equal
    if value is None or isinstance(value, torch.Generator):
        return None
    raise TypeError(value)


def _results(known: Operation, args: Any, kwargs: Any, out: Any) -> Any:
    outs = out if len(known.returned) > 1 else (out,)
    results = tuple(
        _reserve(value) if source is None else args[source[0]] if source[0] < len(args) else kwargs[source[1]]
        for value, source in zip(outs, known.returned, strict=False)
    )
    return results if len(known.returned) > 1 else results[0] if results else None


def addresses(nbytes: int) -> torch.Tensor:
    """Bytes on the host that stay untouched, and may be more than it has, where the system gives so many addresses."""
    if nbytes and sys.platform == "linux":
        with contextlib.suppress(OSError):
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
            return torch.frombuffer(mapping, dtype=torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.Generator):
        return None
    return torch.device("meta") if isinstance(value, torch.device) else value


def _reserve(shape: Any) -> Any:
    """Memory for tensors of these shapes."""
    if isinstance(shape, torch.Tensor):
        memory = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype, device="cpu")
        return memory.zero_() if memory.nbytes <= _REAL_BYTES else memory
    return pytree.tree_map_only(torch.Tensor, _reserve, shape) if isinstance(shape, (list, tuple)) else shape
