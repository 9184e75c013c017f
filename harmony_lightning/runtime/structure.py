"""Tensors within a layer's arguments and results, and copies of the mutable objects around them."""

import copy
import functools
import random
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, type)

_FUNCTIONS = (
    types.FunctionType
    | types.BuiltinFunctionType
    | types.MethodType
    | types.MethodWrapperType
    | functools.partial  # type: ignore[type-arg]
    | weakref.ref  # type: ignore[type-arg]
    | torch.jit.ScriptFunction  # type: ignore[type-arg]
)
"""Not all that can be called: a graph of PyG can."""


def copy_structure(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """A copy of an object graph in which tensors and modules are shared and everything mutable around them is not.

    A layer may write into an object that it is given, as attention layers append to a key-value cache; its recompute
    must find the object as the forward found it.
    """
    copies = {} if copies is None else copies
    if not is_opaque(value):
        return value
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, tuple | frozenset):
        items = [copy_structure(item, copies) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list | dict | set | deque):
        result: Any = copy.copy(value)
        copies[id(value)] = result
        if not isinstance(value, set):
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                result[key] = copy_structure(value[key], copies)
        for name, item in getattr(value, "__dict__", {}).items():
            object.__setattr__(result, name, copy_structure(item, copies))
        return result
    if isinstance(value, torch.Generator):
        result = torch.Generator(value.device)
        result.set_state(value.get_state())
        return result
    if isinstance(value, numpy.random.Generator | numpy.random.RandomState | random.Random):
        return copy.deepcopy(value)
    if getattr(type(value), "__new__") is not object.__new__:  # noqa: B009
        return value  # numbers, generators and the like: not made of parts that could be copied one by one
    result = copies[id(value)] = object.__new__(type(value))
    state = object.__getstate__(value)
    for part in state if isinstance(state, tuple) else (state,):
        for name, item in (part or {}).items():
            object.__setattr__(result, name, copy_structure(item, copies))
    return result


def place_tensors(value: Any, place: Callable[[torch.Tensor], torch.Tensor], seen: set[int] | None = None) -> Any:
    """Put `place(tensor)` for every tensor of an object graph, in the objects themselves; they keep their identity.

    Returns the value, or what stands for it if it is a tensor or cannot be written.
    """
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        return place(value)
    if not is_opaque(value) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, tuple):
        items = [place_tensors(item, place, seen) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list | dict | deque):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            if (new := place_tensors(value[key], place, seen)) is not value[key]:
                value[key] = new
    state = object.__getstate__(value)
    for part in state if isinstance(state, tuple) else (state,):
        for name, item in (part if isinstance(part, dict) else {}).items():
            if (new := place_tensors(item, place, seen)) is not item:
                object.__setattr__(value, name, new)
    return value


def is_opaque(value: Any) -> bool:
    """Whether a leaf may hold state that a layer can write."""
    return not isinstance(value, _PLAIN) and not isinstance(value, torch.Tensor | torch.nn.Module | _FUNCTIONS)


def without_repetition(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one element along each dimension of stride 0, as `expand` makes them."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def clone_with_strides(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that lies in memory as the tensor does. `clone` closes gaps, and other strides may mean other kernels."""
    once = without_repetition(tensor)
    if tensor.requires_grad and once.shape != tensor.shape:
        return tensor.clone()  # each element has a gradient of its own
    copied = torch.empty_strided(once.shape, once.stride(), dtype=tensor.dtype, device=tensor.device)
    copied.copy_(once)
    return copied if once is tensor else copied.expand(tensor.shape)


class Arguments:
    """Flattened arguments of a call: tensors apart from the rest.

    A tensor that stands in several places is one tensor, and stays one: layers ask `query is key`.
    """

    __slots__ = ("_opaque", "_places", "_rest", "_spec")

    def __init__(self, args: Any, kwargs: Any) -> None:
        flat, self._spec = pytree.tree_flatten((args, kwargs))
        self._rest: list[Any] = flat
        self._places: list[tuple[int, int]] = []
        """Leaf index, and index among the distinct tensors."""
        self._opaque = [i for i, leaf in enumerate(flat) if is_opaque(leaf)]

    def take_tensors(self) -> list[torch.Tensor]:
        """The distinct tensors, which are not held here from now on."""
        indices: dict[int, int] = {}
        tensors: list[torch.Tensor] = []
        for place, leaf in enumerate(self._rest):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in indices:
                    indices[id(leaf)] = len(tensors)
                    tensors.append(leaf)
                self._places.append((place, indices[id(leaf)]))
        for place, _ in self._places:
            self._rest[place] = None
        return tensors

    def place_tensors(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Those within opaque leaves: graphs, caches, data classes."""
        for i in self._opaque:
            self._rest[i] = place_tensors(self._rest[i], place)

    def build(self, tensors: list[torch.Tensor]) -> tuple[Any, Any]:
        """The arguments with these tensors, in the order of `take_tensors`, in place."""
        flat = list(self._rest)
        for place, index in self._places:
            flat[place] = tensors[index]
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return args, kwargs

    def snapshot(self) -> "Arguments":
        """The same with copies of objects that the call may write; `self` if there are none."""
        if not self._opaque:
            return self
        twin = object.__new__(Arguments)
        twin._places, twin._spec, twin._opaque = self._places, self._spec, self._opaque
        twin._rest = list(self._rest)
        shared: dict[int, Any] = {}
        for i in self._opaque:
            twin._rest[i] = copy_structure(self._rest[i], shared)
        return twin
