"""Which leaves of a minibatch have one row per sample, and how each of its nodes is cut.

A dataloader may yield anything, and a wrong cut is worse than none: a mask of shape [length, length] that is sliced like a
batch of rows gives wrong gradients without an error. So there is one rule, and where it does not hold the minibatch stays
whole, with the reason in words:

    one leading size over every leaf with rows      {"x": [8, 3, 32, 32], "names": 8 strings, "scale": 0.5}
                                                          ^ cut             ^ cut               ^ shared by all

A list (or tuple) has two readings. As *columns* it is descended, each leaf below having all rows: `[x, y]`. As *samples* it
is sliced itself, one item per row: strings, numbers, or the dicts of boxes of a detection task. Columns win where both fit,
unless the items look like samples (images of unequal size, structures that carry a scalar each): then nobody can know, and
the minibatch stays whole. A tuple or list of bare tensors that is the whole batch is always columns.

What cannot be seen: tensors that agree in a leading size which is not the batch (all sequence-first, say), and a list of
settings that happens to have one item per row. The user's own split is the way out of both, and of all that is refused.
"""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Cut: TypeAlias = Callable[[int, int], Any]
"""(start, length) -> these rows of one node of the batch, in the node's own type."""

_CHANNELS = (1, 3, 4)
_TEXT = str | bytes
_NUMBER = int | float | complex | np.generic


def num_samples(batch: Any) -> int | None:
    """The leading size that all leaves of the batch share; None where there is no such size."""
    try:
        return read_rows(batch)[0]
    except Refusal:
        return None


def replace_items(mapping: Mapping[Any, Any], items: Mapping[Any, Any]) -> Any:
    """A shallow copy of the mapping, of the same type, with these items set."""
    if isinstance(mapping, MutableMapping):
        result = copy.copy(mapping)
        for key, value in items.items():
            result[key] = value
        return result
    return type(mapping)({**mapping, **items})  # type: ignore[call-arg]


def rebuild_sequence(sequence: Sequence[Any], items: Sequence[Any]) -> Any:
    """A list, tuple or namedtuple of the same type with these items."""
    if hasattr(sequence, "_make"):
        return sequence._make(items)
    return type(sequence)(items)  # type: ignore[call-arg]


class Refusal(Exception):
    """This batch, or this reading of it, cannot be cut; the text says why."""


class _Mismatch(Refusal):
    """A leaf that does not have the size which is being tried."""

    def __init__(self, path: str, rows: int) -> None:
        super().__init__(f"{_leaf(path)} has {rows} rows")


@dataclasses.dataclass(slots=True, kw_only=True)
class _Notes:
    """What was decided on the way through one reading: paths and lists."""

    sampled: list[tuple[str, Sequence[Any]]] = dataclasses.field(default_factory=list)
    """Read as samples."""
    doubtful: list[str] = dataclasses.field(default_factory=list)
    """Read as columns, while samples of the same number are as probable."""
    is_anchored: bool = False
    """Whether a leaf that can be read in one way only has the size."""


def _leaf(path: str) -> str:
    return f"leaf {path}" if path else "the batch"


def read_rows(batch: Any) -> tuple[int, Cut]:
    """The size, and the cut at that size.

    Any size that fits must be that of the first leaf with rows or of a list around it, so few sizes are ever tried.
    """
    sizes = _candidates(batch, "")
    if sizes is None:
        raise Refusal(f"no leaf of a batch of type {type(batch).__name__} has rows")
    readings: dict[int, tuple[Cut, _Notes]] = {}
    refusal: Refusal | None = None
    for size, path in sizes or [(-1, "")]:
        notes = _Notes()
        try:
            cut = _plan(batch, size, "", notes)
        except _Mismatch as mismatch:
            refusal = refusal or Refusal(f"{mismatch}, {_leaf(path)} has {size}")
        except Refusal as other:
            refusal = refusal or other
        else:
            if cut is not None:
                readings.setdefault(size, (cut, notes))
    if not readings:
        raise refusal or Refusal(f"no leaf of a batch of type {type(batch).__name__} has rows")
    (size, (cut, notes)), *others = readings.items()
    doubtful = notes.doubtful + [
        path for _, (_, other) in others for path, items in other.sampled if _looks_like_samples(items)
    ]
    if not notes.is_anchored:
        # {"a": [x4, y4], "b": [x6, y6]}: lists of two that only look like two samples each
        doubtful += [path for path, items in notes.sampled if not _looks_like_samples(items)]
    if doubtful:
        raise Refusal(f"{_leaf(doubtful[0])} may be a list of samples or of columns")
    return size, cut


def _candidates(node: Any, path: str) -> list[tuple[int, str]] | None:
    """(size, whose) of the first leaf with rows and of the lists around it, innermost first.

    None where nothing below has rows; empty where the first such leaf has no size of its own.
    """
    if _is_opaque(node):
        return []
    if isinstance(node, Tensor | np.ndarray):
        return [(node.shape[0], path)] if node.ndim else None
    if _is_graph_batch(node):
        return [(len(node.to_data_list()), path)]
    inner = next(
        (found for key, child in _children(node) if (found := _candidates(child, path + key)) is not None), None
    )
    if not _is_list(node):
        return inner
    if inner is None and all(item is None for item in node):
        return None
    return [*(inner or []), (len(node), path)]


def _plan(node: Any, size: int, path: str, notes: _Notes) -> Cut | None:
    """How to cut the node into rows out of `size`; None for what all microbatches share."""
    if _is_opaque(node):
        raise Refusal(f"{_leaf(path)} is a {_describe(node)}, which cannot be cut along the batch")
    if isinstance(node, Tensor | np.ndarray):
        if node.ndim == 0:
            return None
        if node.shape[0] != size:
            raise _Mismatch(path, node.shape[0])
        notes.is_anchored = True
        if isinstance(node, Tensor):
            return lambda start, length: node.narrow(0, start, length)
        return lambda start, length: node[start : start + length]
    if _is_graph_batch(node):
        graphs = node.to_data_list()
        if len(graphs) != size:
            raise _Mismatch(path, len(graphs))
        notes.is_anchored = True
        return lambda start, length: type(node).from_data_list(graphs[start : start + length])
    if _is_list(node):
        return _plan_list(node, size, path, notes)
    cuts = {key: cut for key, child in _children(node) if (cut := _plan(child, size, path + key, notes)) is not None}
    if not cuts:
        return None
    return lambda start, length: _rebuild(
        node, {key: cut(start, length) for key, cut in cuts.items()}, start, length, size
    )


def _plan_list(node: Sequence[Any], size: int, path: str, notes: _Notes) -> Cut | None:
    below = _Notes()
    columns: list[Cut | None] = []
    refusal: Refusal | None = None
    try:
        columns = [_plan(item, size, f"{path}[{index}]", below) for index, item in enumerate(node)]
    except Refusal as caught:
        refusal = caught
    is_columns = any(cut is not None for cut in columns)
    is_samples = len(node) == size and _may_be_samples(node, is_root=path == "")
    if is_columns:
        notes.is_anchored |= below.is_anchored
        notes.sampled += below.sampled
        notes.doubtful += below.doubtful
        if is_samples and _looks_like_samples(node):
            notes.doubtful.append(path)

        def cut_columns(start: int, length: int) -> Any:
            pairs = zip(columns, node, strict=True)
            return rebuild_sequence(node, [item if cut is None else cut(start, length) for cut, item in pairs])

        return cut_columns
    if is_samples:
        notes.sampled.append((path, node))
        notes.is_anchored |= not any(isinstance(item, Tensor | np.ndarray) for item in node)
        return lambda start, length: rebuild_sequence(node, node[start : start + length])
    if refusal is not None:
        raise refusal
    if all(item is None for item in node):
        return None
    raise _Mismatch(path, len(node))


def _may_be_samples(node: Sequence[Any], *, is_root: bool) -> bool:
    """Whether the items may be one sample each: all of a kind, and no container of columns by convention."""
    items = [item for item in node if item is not None]
    if not items:
        return False
    has_rows = any(_candidates(item, "") is not None for item in items)
    if not has_rows and not is_root:
        return True  # text, numbers and settings per sample need not be alike
    if len({_kind(item) for item in items}) > 1:
        return False
    if not is_root or not has_rows:
        return True
    # The batch itself is this list. `(x, mask)` is no pair of samples, and neither is a pair of whole minibatches from two
    # dataloaders: only items that are no minibatches themselves can be samples.
    return any(_has_scalar(item) or num_samples(item) is None for item in items)


def _looks_like_samples(node: Sequence[Any]) -> bool:
    """Whether a list that could be cut as columns is more probably one of samples."""
    items = [item for item in node if item is not None]
    if all(isinstance(item, Tensor | np.ndarray) for item in items):
        is_images = all(item.ndim == 3 and item.shape[0] in _CHANNELS for item in items)
        return is_images or len({tuple(item.shape[1:]) for item in items}) > 1
    return any(_has_scalar(item) for item in items)


def _kind(node: Any, *, is_outermost: bool = True) -> Hashable:
    """Equal for what a collate function would have made the same way."""
    if isinstance(node, _TEXT):
        return "text"
    if isinstance(node, _NUMBER):
        return "number"
    if isinstance(node, Tensor | np.ndarray):
        return ("tensor", node.ndim, str(node.dtype) if is_outermost else None)
    if _is_list(node):
        kinds = [_kind(item, is_outermost=False) for item in node]
        if set(kinds) <= {"text", "number"}:
            return (type(node), "plain")
        return (type(node), tuple(kinds) if isinstance(node, tuple) else frozenset(kinds))
    return (type(node), frozenset((key, _kind(child, is_outermost=False)) for key, child in _children(node)))


def _has_scalar(node: Any) -> bool:
    if isinstance(node, Tensor | np.ndarray):
        return node.ndim == 0
    if isinstance(node, _TEXT | _NUMBER):
        return True
    return any(_has_scalar(child) for _, child in _children(node))


# --- the shapes that a node may have -----------------------------------------------------------------------------------


def _is_list(node: Any) -> bool:
    """A list or tuple whose items are numbered. A namedtuple has fields; a torch.Size is one value."""
    return isinstance(node, list | tuple) and not hasattr(node, "_fields") and not isinstance(node, torch.Size)


def _is_graph_batch(node: Any) -> bool:
    """PyG's Batch and those made like it: tensors of all nodes of all graphs, with a list of graphs as the other form."""
    return not isinstance(node, type) and hasattr(node, "to_data_list") and hasattr(type(node), "from_data_list")


def _is_opaque(node: Any) -> bool:
    """Holds tensors, and slicing those along their first dimension would be wrong or is unknown."""
    if isinstance(node, PackedSequence):
        return True
    if isinstance(node, Tensor):
        return node.is_nested or node.layout != torch.strided
    if isinstance(node, np.ndarray | _TEXT | _NUMBER | range | Mapping | list | tuple | type) or node is None:
        return False
    if _is_graph_batch(node) or dataclasses.is_dataclass(node):
        return False
    if isinstance(node, Iterator):
        return True  # sharing it would let one microbatch consume what belongs to the others
    return any(_holds_rows(child, depth=3) for child in _attributes(node))


def _holds_rows(node: Any, depth: int) -> bool:
    if isinstance(node, Tensor | np.ndarray):
        return node.ndim > 0
    if depth == 0 or isinstance(node, _TEXT | _NUMBER | range | type):
        return False
    return any(_holds_rows(child, depth - 1) for child in _attributes(node))


def _attributes(node: Any) -> Iterator[Any]:
    """What an object of unknown type holds."""
    yield from getattr(node, "__dict__", {}).values()
    for cls in type(node).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(node, name, None)
    if isinstance(node, Mapping):
        yield from node.values()
    elif isinstance(node, Collection):
        yield from node


def _describe(node: Any) -> str:
    if isinstance(node, Tensor):
        return "nested tensor" if node.is_nested else f"tensor of layout {node.layout}"
    return type(node).__name__


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """(name, child) of a container; the name is how Python would write the access, and is unique."""
    if isinstance(node, Mapping):
        yield from ((f"[{key!r}]", child) for key, child in node.items())
    elif isinstance(node, tuple) and hasattr(node, "_fields"):
        yield from ((f".{name}", child) for name, child in zip(node._fields, node, strict=True))
    elif _is_list(node):
        yield from ((f"[{index}]", child) for index, child in enumerate(node))
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        yield from ((f".{field.name}", getattr(node, field.name, None)) for field in dataclasses.fields(node))


def _rebuild(node: Any, parts: dict[str, Any], start: int, length: int, size: int) -> Any:
    """The mapping, namedtuple or dataclass with the children of these names replaced."""
    if isinstance(node, Mapping):
        result = replace_items(node, {key: parts[f"[{key!r}]"] for key in node if f"[{key!r}]" in parts})
        if isinstance(node, UserDict):
            # A tokenizer's BatchEncoding keeps one Encoding per row beside its tensors.
            for name, value in vars(node).items():
                if name != "data" and isinstance(value, list) and len(value) == size:
                    setattr(result, name, value[start : start + length])
        return result
    if isinstance(node, tuple):
        return rebuild_sequence(node, [parts.get(name, child) for name, child in _children(node)])
    # Copied, not constructed: `__post_init__` already ran on these values, and its work must not be done twice.
    result = copy.copy(node)
    for name, value in parts.items():
        object.__setattr__(result, name.removeprefix("."), value)
    return result


def leading_sizes(node: Any) -> Iterator[int]:
    """The leading sizes of all tensors, wrong ones among them."""
    if isinstance(node, PackedSequence):
        yield int(node.batch_sizes[0])
    elif isinstance(node, Tensor | np.ndarray):
        if node.ndim:
            yield node.shape[0]
    elif isinstance(node, _TEXT | _NUMBER | type) or node is None:
        return
    else:
        for _, child in _children(node):
            yield from leading_sizes(child)
