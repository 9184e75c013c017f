"""Tensors within a layer's arguments and results, and copies of the mutable objects around them."""

import copy
import functools
import random
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch.nn.utils.rnn import PackedSequence
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

_CLOSED = (*_PLAIN, torch.nn.Module, _FUNCTIONS)


Put = Callable[[torch.Tensor], torch.Tensor]


def copy_structure(value: Any, copies: dict[int, Any] | None = None, put: Put = lambda tensor: tensor) -> Any:
    """A copy of an object graph with `put(tensor)` for each tensor. Modules are shared, everything mutable is not.

    A layer may write into an object that it is given, as attention layers append to a key-value cache; its recompute
    must find the object as the forward found it.
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        return put(value)
    if not is_opaque(value):
        return value
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, tuple | frozenset):
        items = [copy_structure(item, copies, put) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list | dict | set | deque):
        result: Any = copy.copy(value)
        copies[id(value)] = result
        if not isinstance(value, set):
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                result[key] = copy_structure(value[key], copies, put)
        for name, item in getattr(value, "__dict__", {}).items():
            object.__setattr__(result, name, copy_structure(item, copies, put))
        return result
    if isinstance(value, torch.Generator):
        result = torch.Generator(value.device)
        result.set_state(value.get_state())
        return result
    if isinstance(value, numpy.random.Generator | numpy.random.RandomState | random.Random):
        return copy.deepcopy(value)
    if getattr(type(value), "__new__") not in (object.__new__, types.SimpleNamespace.__new__):  # noqa: B009
        return value  # numbers, generators and the like: not made of parts that could be copied one by one
    result = copies[id(value)] = type(value).__new__(type(value))  # type: ignore[call-overload]
    state = object.__getstate__(value)
    for part in state if isinstance(state, tuple) else (state,):
        for name, item in (part or {}).items():
            object.__setattr__(result, name, copy_structure(item, copies, put))
    return result


def place_tensors(value: Any, place: Put, seen: set[int] | None = None) -> Any:
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


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Those that a function is given. (`pytree` takes ten times as long, and there are many functions.)"""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def is_opaque(value: Any) -> bool:
    """Whether a leaf may hold state that a layer can write."""
    return not isinstance(value, torch.Tensor) and not isinstance(value, _CLOSED)


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is a value, which nobody can write."""
    return isinstance(leaf, _PLAIN)


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, of its indices too where it is sparse."""
    if tensor.layout is torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.values().nbytes + tensor.crow_indices().nbytes + tensor.col_indices().nbytes
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.values().nbytes + tensor.ccol_indices().nbytes + tensor.row_indices().nbytes
    return tensor.nbytes


def version_of(tensor: torch.Tensor) -> int:
    """How often it has been written; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


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

    A tensor that stands in several places is one tensor, and stays one: layers ask `query is key`. Batch sizes of packed
    sequences belong to the rest: recurrent layers read them on the host, whatever the device.
    """

    __slots__ = ("_containers", "_opaque", "_own", "_places", "_rest", "_spec")

    def __init__(self, args: Any, kwargs: Any) -> None:
        self._own: Any = (args, tuple(kwargs.values()))
        self._containers: list[tuple[Any, Any, list[Any]]] = []
        """Lists and dicts of the user's, those that stand for them in a call, and what was in these at first."""
        flat, self._spec = _flatten(args, kwargs)
        self._rest: list[Any] = flat
        self._places: list[tuple[int, int]] = []
        """Leaf index, and index among the distinct tensors."""
        self._opaque = [] if _is_flat(self._spec) else [i for i, leaf in enumerate(flat) if is_opaque(leaf)]

    def take_tensors(self) -> list[torch.Tensor]:
        """The distinct tensors, which are not held here from now on."""
        indices: dict[int, int] = {}
        tensors: list[torch.Tensor] = []
        batch_sizes = frozenset[int]() if _is_flat(self._spec) else _batch_sizes(self._own, self._rest)
        for place, leaf in enumerate(self._rest):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in batch_sizes:
                if id(leaf) not in indices:
                    indices[id(leaf)] = len(tensors)
                    tensors.append(leaf)
                self._places.append((place, indices[id(leaf)]))
        for place, _ in self._places:
            self._rest[place] = None
        return tensors

    @property
    def has_objects(self) -> bool:
        """Whether there may be tensors within opaque leaves."""
        return bool(self._opaque)

    @property
    def has_containers(self) -> bool:
        """Whether lists or dicts of the user's count, in front of `keep_written` or behind it."""
        return bool(self._containers)

    def place_tensors(self, place: Put) -> None:
        """Those within opaque leaves: graphs, caches, data classes."""
        for i in self._opaque:
            self._rest[i] = place_tensors(self._rest[i], place)
        for _, built, _ in self._containers:
            place_tensors(built, place)

    def build(self, tensors: list[torch.Tensor]) -> tuple[Any, Any]:
        """The arguments with these tensors, in the order of `take_tensors`, in place."""
        flat = list(self._rest)
        for place, index in self._places:
            flat[place] = tensors[index]
        if _is_flat(self._spec):
            number, names = self._spec
            return tuple(flat[:number]), dict(zip(names, flat[number:], strict=True))
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        built = (args, tuple(kwargs.values()))
        self._containers = list(_pairs(built if self._own is None else self._own, built))
        return args, kwargs

    def keep_written(self) -> None:
        """The call is over: of lists and dicts, those count from now on that it has written."""
        self._containers = [
            (own, built, items)
            for own, built, items in self._containers
            if len(built) != len(items)
            or any(new is not old for new, old in zip(_items(built), items, strict=True))
            or (own is not built and isinstance(own, dict) and list(own) != list(built))
        ]

    def hand_over(self) -> None:
        """Let the user's lists and dicts be as those that stood for them."""
        for own, built, items in self._containers:
            kept = {id(item): former for item, former in zip(items, _items(own), strict=True)}
            if isinstance(own, dict):
                for key in [key for key in own if key not in built]:
                    del own[key]
                own.update((key, kept.get(id(item), item)) for key, item in built.items())
            else:
                new = [kept.get(id(item), item) for item in built]
                own.clear()
                own.extend(new)
        self._own, self._containers = None, []

    def is_like(self, other: "Arguments") -> bool:
        """Whether the two differ in their tensors only, and hold nothing that a call could write."""
        return (
            self._spec == other._spec
            and self._places == other._places
            and not (self._opaque or other._opaque)
            and next(_pairs(self._own, self._own), None) is None
            and all(
                one is another or (is_plain(one) and one == another)
                for one, another in zip(self._rest, other._rest, strict=True)
            )
        )

    def snapshot(self, put: Put = lambda tensor: tensor) -> "Arguments":
        """The same with copies of objects that the call may write, and `put(tensor)` for each tensor in them; `self` if
        there are none."""
        if not self._opaque:
            return self
        twin = object.__new__(Arguments)
        twin._places, twin._spec, twin._opaque = self._places, self._spec, self._opaque
        twin._own, twin._containers = None, []
        twin._rest = list(self._rest)
        shared: dict[int, Any] = {}
        for i in self._opaque:
            twin._rest[i] = copy_structure(self._rest[i], shared, put)
        return twin


def _flatten(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """As `pytree` does, which takes ten times as long for what most layers are given."""
    flat = [*args, *kwargs.values()]
    if [leaf for leaf in flat if not isinstance(leaf, _LEAVES)]:
        return pytree.tree_flatten((args, kwargs))
    return flat, (len(args), tuple(kwargs))


def _batch_sizes(arguments: Any, flat: list[Any]) -> frozenset[int]:
    """Identities of those of packed sequences; for most arguments a look at their leaves tells that there are none."""
    if not any(isinstance(leaf, torch.Tensor) and leaf.dtype is torch.int64 and leaf.dim() == 1 for leaf in flat):
        return frozenset()
    nodes = pytree.tree_leaves(arguments, is_leaf=lambda node: isinstance(node, PackedSequence))
    return frozenset(id(node.batch_sizes) for node in nodes if isinstance(node, PackedSequence))


def _is_flat(spec: Any) -> bool:
    """Whether `_flatten` has found no containers."""
    return isinstance(spec, tuple)


def flatten_result(result: Any) -> tuple[list[Any], Any]:
    """`pytree.tree_flatten`, with a short way for what most layers return; `unflatten_result` undoes it."""
    return ([result], None) if isinstance(result, torch.Tensor) else pytree.tree_flatten(result)


def unflatten_result(leaves: list[Any], spec: Any) -> Any:
    return leaves[0] if spec is None else pytree.tree_unflatten(leaves, spec)


_LEAVES = (torch.Tensor, str, bytes, int, float, complex, type(None), torch.dtype, torch.device)

_MUTABLE = (list, deque, dict, OrderedDict, defaultdict)
"""Containers that are taken apart, so that a call gets others in their place."""


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _pairs(own: Any, built: Any) -> Iterator[tuple[Any, Any, list[Any]]]:
    """Those within `own`, each with that in the same place within `built` and what is in this."""
    if type(own) in _MUTABLE:
        yield own, built, _items(built)
    elif type(own) is not tuple:
        return
    for one, other in zip(_items(own), _items(built), strict=True):
        yield from _pairs(one, other)
