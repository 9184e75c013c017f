"""How many bytes an optimizer will remember of each weight, before it has taken a step: devices that update weights need
room for that, and the plan comes first.

It is seen on the tiny copies on which separability is tried: what has the shape of its parameter there, in whole or in some
dimensions, will have it for the real one. Parameters of one kind are taken to be treated alike. Should that ever be wrong,
it costs memory that nobody has planned, not correctness.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from harmony_lightning.hardware.operations import operation
from harmony_lightning.runtime.randomness import HostState
from harmony_lightning.runtime.updates.separability import clone_small, options_of

_Shape = tuple[int | None, ...]
"""Sizes; None for that of the parameter in the same dimension."""


def predict_state_nbytes(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    """By weight, the bytes of each tensor that goes along when a device steps it; who is not stepped is left out."""
    streams = HostState.capture()
    try:
        kinds = _kinds_of_states(optimizer)
    finally:
        streams.restore()
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, tuple[int, ...]] = {}
    for group in optimizer.param_groups:
        options = options_of(group)
        for parameter in group["params"]:
            kind = (options, parameter.dtype, parameter.dim())
            if id(parameter) in names and kind in kinds:
                found[names[id(parameter)]] = tuple(_nbytes(shape, dtype, parameter) for shape, dtype in kinds[kind])
    return found


def work_of_step(optimizer: Optimizer) -> tuple[float, float]:
    """Operations by which it steps one weight, on an average, and how often these read or write as many bytes as the weight
    has, where states are there."""
    streams = HostState.capture()
    try:
        clone = clone_small(optimizer)
        _step(clone)
        with _Counting() as counting:
            type(clone).step(clone)
    finally:
        streams.restore()
    weights = [parameter for group in clone.param_groups for parameter in group["params"]]
    return counting.number / max(1, len(weights)), counting.nbytes / max(1, sum(weight.nbytes for weight in weights))


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number, self.nbytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known, kwargs = operation(func), kwargs or {}
        result = func(*args, **kwargs)
        if not known.is_idle:
            self.number += 1
            self.nbytes += known.nbytes(args, kwargs, result)
        return result


def _step(clone: Optimizer) -> None:
    for group in clone.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    type(clone).step(clone)


def _kinds_of_states(optimizer: Optimizer) -> dict[Any, list[tuple[_Shape, torch.dtype]]]:
    clone = clone_small(optimizer)
    for _ in range(2):  # some begin with their first step to remember, some with their second
        _step(clone)
    kinds: dict[Any, list[tuple[_Shape, torch.dtype]]] = {}
    for group in clone.param_groups:
        is_fused = bool(group.get("fused"))
        for parameter in group["params"]:
            values = [value for value in clone.state.get(parameter, {}).values() if isinstance(value, torch.Tensor)]
            kinds[options_of(group), parameter.dtype, parameter.dim()] = [
                (_shape(value, parameter), value.dtype) for value in values if value.dim() or is_fused
            ]
    return kinds


def _shape(value: torch.Tensor, parameter: torch.Tensor) -> _Shape:
    if value.dim() != parameter.dim():
        return tuple(value.shape)
    return tuple(None if mine == its else mine for mine, its in zip(value.shape, parameter.shape, strict=True))


def _nbytes(shape: _Shape, dtype: torch.dtype, parameter: torch.Tensor) -> int:
    count = 1
    for dimension, size in enumerate(shape):
        count *= parameter.shape[dimension] if size is None else size
    return count * dtype.itemsize
