"""A copy of a user's module to experiment with: it shares weights or has none, and knows no trainer.

What the user's step writes goes to the copy, so profiling leaves no trace in the module. What is large, and nothing to
experiment with, is left out: optimizers, whose states may be twice the weights, are None; data sets are shared.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from harmony_lightning.errors import UnsupportedError


def make_twin(root: nn.Module, *, has_numbers: bool) -> nn.Module:
    """A deep copy whose parameters are on the meta device, or look into the memory of the originals if it `has_numbers`.

    Raises:
        UnsupportedError: something in the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in root.parameters():
        value = parameter.detach() if has_numbers else torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for module in root.modules():
        for name in ("_trainer", "_fabric"):
            if (owner := vars(module).get(name)) is not None:
                memo[id(owner)] = None
                if (data := getattr(owner, "datamodule", None)) is not None:
                    memo[id(data)] = None
        for value in _attributes(module):
            if isinstance(value, Optimizer | LRScheduler):
                memo[id(value)] = None
            elif isinstance(value, Dataset | DataLoader) and not isinstance(value, nn.Module):
                memo[id(value)] = value
    try:
        return copy.deepcopy(root, memo)
    except Exception as error:
        raise UnsupportedError(
            f"the module cannot be copied to be profiled: {type(error).__name__}: {error}"
        ) from error


def _attributes(module: nn.Module) -> Iterator[Any]:
    """Within lists and dicts, too."""
    for name, value in vars(module).items():
        if name not in ("_modules", "_parameters", "_buffers"):
            yield from pytree.tree_leaves(value)


def describe(module: nn.Module) -> str:
    """What two layers must share to cost the same: types, settings, shapes of weights and buffers, mode."""
    parts = []
    for name, inner in module.named_modules():
        parts.append(
            f"{name}:{type(inner).__module__}.{type(inner).__qualname__}({inner.extra_repr()}){inner.training}"
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        parts.append(f"{name}:{tuple(tensor.shape)}{tensor.stride()}{tensor.dtype}{tensor.requires_grad}")
    return "\n".join(parts)
