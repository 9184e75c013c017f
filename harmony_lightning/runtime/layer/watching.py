"""Runs a layer's own code on weights of a device, under a watch where some of them are narrow or may become so."""

from collections.abc import Callable
from typing import Any

import torch

from harmony_lightning.hardware.device import Device
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.weights.narrow import Guard, Probe, Watch
from harmony_lightning.runtime.weights.weight_slot import Weights

Begin = Callable[[torch.Tensor, bool], torch.Tensor]
"""Makes what a layer gets of a weight on its device; the second says whether the weight trains."""


def run_layer(
    state: RuntimeState,
    site: Site,
    device: Device,
    weights: Weights,
    buffers: list[torch.Tensor],
    args: Any,
    kwargs: Any,
    begin: Begin,
    *,
    sums_narrow: bool,
    is_joint: bool = False,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """What the layer returns, and float32 versions of narrow weights that its code has asked for.

    Args:
        begin: makes those of their values on the device.
        sums_narrow: gradients of several uses in one microbatch are summed as they are.
        is_joint: the call is for several microbatches; nothing is learned from it.
    """
    watch = _watch(state, site, device, weights, begin, sums_narrow=sums_narrow, may_learn=not is_joint)
    if watch is None:
        return site.run(weights, buffers, args, kwargs), {}
    before, state.watching = state.watching, watch
    try:
        result = watch.run(lambda: site.run(weights, buffers, args, kwargs))
    finally:
        state.watching = before
    watch.conclude(state.uses, site.layer, sums_narrow=sums_narrow)
    return result, watch.wide


def _watch(
    state: RuntimeState,
    site: Site,
    device: Device,
    weights: Weights,
    begin: Begin,
    *,
    sums_narrow: bool,
    may_learn: bool,
) -> Watch | None:
    if site.pack is None or state.cluster.host_is_device:
        return None
    kind = device.torch_device.type

    def autocast() -> torch.dtype | None:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    if names := state.narrow[site.pack]:
        narrow = {id(weights[name]): name for name in site.weight_names if name in names}
        dtype = next((weights[name].dtype for name in narrow.values()), None)
        if dtype is not None:
            return Guard(
                narrow,
                autocast,
                dtype,
                lambda name: begin(state.glue.fetch(name, device), weights[name].requires_grad),
                sums_narrow=sums_narrow,
            )
    if not (state.is_learning and may_learn):
        return None
    dtype = autocast()
    if state.uses.dtype is None and dtype in (torch.bfloat16, torch.float16):
        state.uses.dtype = dtype
    if dtype is None or dtype is not state.uses.dtype or site.is_compiled:
        for name in site.weight_names:
            state.uses.note(site.layer, name, is_cast=False)
        return None
    return Probe({id(weights[n]): n for n in site.weight_names if weights[n].dtype is torch.float32}, dtype)
