"""Puts what `training_step` returned for each microbatch together into what it would have returned for the minibatch.

A mean over the minibatch is the mean of the microbatches' means, each weighted with its share of the samples. Rows are
strung together again. What has no such rule is taken from the last microbatch, as with a variable written M times.

    loss, scalar float tensors, differing floats        weighted mean
    tensors and arrays with one row per sample          one after the other
    lists with one item per sample, or of any length    one after the other
    dicts, tuples, dataclasses, other lists             item by item
    ints, bools, equal floats                           the first
    anything else                                       the last

A tensor of another meaning whose leading size equals the samples of every microbatch is taken for rows; nothing tells the
two apart. Losses with `reduction="sum"` cannot be told from means either: the caller says what each loss counts.

No device is waited for: values are never compared on an accelerator.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from harmony_lightning.runtime.batch.rows import rebuild_sequence, replace_items


def merge_outputs(outputs: Sequence[Any], num_samples: Sequence[int], shares: Sequence[float] | None = None) -> Any:
    """One output for the minibatch, on the device of the first microbatch that has one.

    Microbatches that returned None are left out, and the others weigh more. A single output is returned as is. The merged
    loss is detached: the caller gives it a root of its own; everything else keeps the graph that the user left on it.

    Args:
        outputs: of each microbatch.
        num_samples: of each microbatch.
        shares: what each loss counts; None: its share of the samples of microbatches that returned anything.

    Raises:
        ValueError: outputs and num_samples differ in length, or are empty.
    """
    if not outputs or len(outputs) != len(num_samples):
        raise ValueError(
            f"{len(outputs)} outputs and {len(num_samples)} sample counts; need one of each per microbatch"
        )
    kept = [m for m, output in enumerate(outputs) if output is not None]
    if not kept:
        return None
    if len(kept) == 1:
        return outputs[kept[0]]
    values, counts = [outputs[m] for m in kept], [num_samples[m] for m in kept]
    loss_shares = _weights(counts) if shares is None else [shares[m] for m in kept]
    if all(isinstance(value, Tensor) for value in values):
        return _merge_loss(values, counts, loss_shares)
    if all(isinstance(value, Mapping) for value in values):
        return _merge_mappings(values, counts, loss_shares)
    return _merge(values, counts)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with each tensor in mappings, lists, tuples and dataclasses replaced; itself where none changes."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, Mapping):
        items = {key: map_tensors(function, item) for key, item in value.items()}
        changed = {key: item for key, item in items.items() if item is not value[key]}
        return replace_items(value, changed) if changed else value
    if isinstance(value, list | tuple):
        parts = [map_tensors(function, item) for item in value]
        is_same = all(part is item for part, item in zip(parts, value, strict=True))
        return value if is_same else rebuild_sequence(value, parts)
    if _is_dataclass(value):
        fields = {name: map_tensors(function, item) for name, item in _fields(value).items()}
        return _replace_fields(value, {n: item for n, item in fields.items() if item is not getattr(value, n)})
    return pytree.tree_map_only(Tensor, function, value)  # types that somebody has registered


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)}


def _replace_fields(value: Any, fields: Mapping[str, Any]) -> Any:
    """Copied, not constructed: `__post_init__` has done its work on it."""
    if not fields:
        return value
    result = copy.copy(value)
    for name, item in fields.items():
        object.__setattr__(result, name, item)
    return result


def loss_of(output: Any) -> Tensor | None:
    """The loss in what `training_step` returned: the tensor itself, or the mapping's "loss"."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    return output if isinstance(output, Tensor) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The same output with another loss; a mapping is copied, not written to.

    Raises:
        TypeError: the output carries no loss.
    """
    if loss_of(output) is None:
        raise TypeError(f"a training_step output of type {type(output).__name__} carries no loss to replace")
    return replace_items(output, {"loss": loss}) if isinstance(output, Mapping) else loss


def _merge(values: list[Any], counts: list[int]) -> Any:
    if len(values) < 2:
        return values[0] if values else None
    last = values[-1]
    if all(isinstance(value, Tensor) for value in values):
        return _merge_tensors(values, counts)
    if all(isinstance(value, Mapping) for value in values):
        return _merge_mappings(values, counts)
    if all(isinstance(value, np.ndarray) for value in values):
        return np.concatenate(values) if _are_rows(values, counts) else last
    is_alike = all(isinstance(value, list | tuple) for value in values) and len({len(value) for value in values}) == 1
    if all(isinstance(value, list) for value in values) and not (is_alike and _are_columns(values, counts)):
        return [item for value in values for item in value]
    if is_alike:
        return rebuild_sequence(values[0], [_merge_given(items, counts) for items in zip(*values, strict=True)])
    if all(_is_dataclass(value) and type(value) is type(last) for value in values):
        found = [_fields(value) for value in values]
        fields = {name: _merge_given([each.get(name) for each in found], counts) for name in found[0]}
        return _replace_fields(values[0], fields)
    if all(isinstance(value, float) for value in values) and any(value != values[0] for value in values):
        return sum(weight * value for weight, value in zip(_weights(counts), values, strict=True))
    if all(isinstance(value, int | float) for value in values):
        return values[0]
    return last


def _merge_given(values: Sequence[Any], counts: list[int]) -> Any:
    """Leaves out what is None."""
    kept = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None]
    return _merge([value for value, _ in kept], [count for _, count in kept])


def _are_columns(values: Sequence[list[Any]], counts: list[int]) -> bool:
    """Whether lists of equal length hold something else than one item per sample: `[logits, features]`."""
    if any(len(value) != count for value, count in zip(values, counts, strict=True)):
        return len(values[0]) > 0
    items = zip(*values, strict=True)
    return all(all(isinstance(i, Tensor | np.ndarray) for i in item) and _are_rows(item, counts) for item in items)


def _merge_mappings(values: list[Mapping[Any, Any]], counts: list[int], loss_shares: list[float] | None = None) -> Any:
    """With `loss_shares`, the item "loss" is the loss."""
    merged = {}
    for key in dict.fromkeys(key for value in values for key in value):
        found = [(value.get(key), count) for value, count in zip(values, counts, strict=True)]
        items = [item for item, _ in found if item is not None]
        weights = [count for item, count in found if item is not None]
        if loss_shares is not None and key == "loss" and items and all(isinstance(item, Tensor) for item in items):
            shares = [share for (item, _), share in zip(found, loss_shares, strict=True) if item is not None]
            merged[key] = _merge_loss(items, weights, shares)
        else:
            merged[key] = _merge(items, weights)
    return replace_items(values[0], merged)


def _merge_loss(losses: list[Tensor], counts: list[int], shares: list[float]) -> Tensor:
    losses = [loss.detach().to(losses[0].device) for loss in losses]
    if len({loss.shape for loss in losses}) == 1 and losses[0].numel() == 1:
        return _weighted_sum(losses, shares)
    return _merge_tensors(losses, counts)  # no scalar: Lightning refuses it as it would on one device


def _merge_tensors(values: list[Tensor], counts: list[int]) -> Tensor:
    if all(value.ndim == 0 and (value.is_floating_point() or value.is_complex()) for value in values):
        return _weighted_sum([value.to(values[0].device) for value in values], _weights(counts))
    if _are_rows(values, counts):
        return torch.cat([value.to(values[0].device) for value in values])
    return values[-1].to(values[0].device)


def _weighted_sum(values: list[Tensor], weights: list[float]) -> Tensor:
    """In float32 at least: half precision would round every partial sum."""
    dtype = values[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = sum(weight * value.to(wide) for weight, value in zip(weights, values, strict=True) if weight)
    return torch.as_tensor(total).to(dtype)


def _are_rows(values: Sequence[Any], counts: list[int]) -> bool:
    """One row per sample in each, and all of them alike but for the number of rows."""
    is_rows = all(value.ndim > 0 and value.shape[0] == count for value, count in zip(values, counts, strict=True))
    return is_rows and len({tuple(value.shape[1:]) for value in values}) == 1


def _weights(counts: list[int]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts] if total else [1 / len(counts)] * len(counts)
