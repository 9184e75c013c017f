"""A check that can be switched on: does cutting the minibatch leave its loss what it is?

A loss with `reduction="sum"`, one that couples samples, or a mean over tokens cannot be told from a mean over samples by
looking at it. But the first minibatch can be run both ways, in one piece and in microbatches, and the losses compared.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.device import Device
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.runtime.batch.outputs import loss_of
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.randomness import HostState

_METRIC_STATE = ("_update_count", "_computed", "_forward_cache")


@contextmanager
def untouched(module: nn.Module, devices: Sequence[Device]) -> Iterator[None]:
    """Within, the module is in evaluation mode and without gradients, so that neither dropout nor batch statistics hide
    what is looked for. Afterwards its modes, buffers and metrics, and all random generators, are as before."""
    modes = {inner: inner.training for inner in module.modules()}
    buffers = [(owner, name, b, b.clone()) for owner in modes for name, b in owner._buffers.items() if b is not None]
    metrics = [
        (metric, {name: _copy(getattr(metric, name)) for name in (*metric._defaults, *_METRIC_STATE)})
        for metric in modes
        if isinstance(metric, Metric)
    ]
    host, on_devices = HostState.capture(), [(device, device.random_state()) for device in devices]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for inner, mode in modes.items():
            inner.training = mode
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                owner._buffers[name] = buffer.copy_(value)
        for metric, states in metrics:
            for name, value in states.items():
                setattr(metric, name, value)
        host.restore()
        for device, state in on_devices:
            if state is not None:
                device.set_random_state(state)


def losses_of_pieces(engine: Engine, step: Callable[[Any], Any], pieces: Sequence[Any]) -> list[float] | str:
    """The loss of each piece, run whole; or why there is none."""
    losses = []
    for piece in pieces:
        try:
            loss = loss_of(engine.run(functools.partial(step, piece)))
        except OUT_OF_MEMORY as error:
            return f"a minibatch in one piece does not fit ({error})"
        if loss is None or loss.numel() != 1:
            return "training_step returned no loss"
        losses.append(float(loss))
    return losses


def _copy(state: Any) -> Any:
    """Of a metric's state, which updates write in place or replace."""
    return state.detach().clone() if isinstance(state, torch.Tensor) else copy.copy(state)


def compare_losses(
    whole: float, parts: Sequence[float], shares: Sequence[float], num_samples: Sequence[int], tolerance: float
) -> None:
    """Raises ConfigurationError, with the way out, if the microbatches' losses do not make up that of the minibatch.

    Args:
        whole: loss of the minibatch in one piece.
        parts: loss of each microbatch.
        shares: what each of them counts.
        num_samples: samples of each microbatch.
        tolerance: largest relative difference that rounding may make.
    """
    total = math.fsum(share * part for share, part in zip(shares, parts, strict=True) if share)
    if _is_close(whole, total, tolerance):
        return
    size = sum(num_samples)
    mean = math.fsum(count * part for count, part in zip(num_samples, parts, strict=True)) / size
    remedies: list[tuple[str, Callable[[], bool]]] = [
        ("loss_weight='sum' gives that loss: choose it", lambda: _is_close(whole, math.fsum(parts), tolerance)),
        ("loss_weight='mean' gives that loss: choose it", lambda: _is_close(whole, mean, tolerance)),
    ]
    advice = next(
        (text for text, fits in remedies if fits()),
        "if the loss is a mean over something else than samples, such as tokens, give loss_weight=fn, which counts that "
        f"in a microbatch; if it couples the samples of a batch, train in one piece with microbatch_size={size}; if not "
        "samples are the first dimension of the batch's tensors, but time is, give split_batch=fn",
    )
    raise ConfigurationError(
        f"check of microbatches: training_step returned {whole:.6g} for the first minibatch of {size} samples in one "
        f"piece, but its {len(parts)} microbatches make {total:.6g} together; {advice}"
    )


def _is_close(one: float, other: float, tolerance: float) -> bool:
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance * 1e-3) or (one != one and other != other)
