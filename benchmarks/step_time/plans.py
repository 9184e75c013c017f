"""Plans by hand, for rows in which weights do not stay: every pack is swapped in for its forward and for its backward."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.plan import Plan
from harmony_lightning.scheduler.packing import dealt_order, make_plan, with_first_on_devices

LAYERS = ("embedding", "blocks.*", "head")
SLOTS_SHARE = 0.75
"""Of the memory of a device, if first packs are updated there; activations of one microbatch need the rest."""

LEAST_DEALT = 4
"""Microbatches for each device, for blocks to be dealt."""


def travelling(
    module: nn.Module,
    *,
    mode: Literal["pp", "mixed"],
    num_gpus: int,
    memory_bytes: int,
    microbatch_size: int,
    num_microbatches: int,
    stash: Literal["device", "host"],
) -> Plan:
    """One layer per pack, all of them swapped, and everything but the head computed twice. Weights of linear layers are
    bfloat16, as autocast casts them."""
    layers = decomposition(module)
    plan = make_plan(
        layers,
        mode=mode,
        num_devices=num_gpus,
        memory_bytes=memory_bytes,
        microbatch_size=microbatch_size,
        num_microbatches=num_microbatches,
        stash=stash,
        one_layer_per_pack=True,
        narrow_dtype="bfloat16",
    )
    return replace(left_over_dealt(plan) if mode == "mixed" else plan, prefetch=1)


def left_over_dealt(plan: Plan) -> Plan:
    """The plan with blocks that are left over, when each device has as many, dealt with the head. Else some devices would
    have one more than others. It takes many microbatches: each of them goes through all that is dealt on one device."""
    left_over = (len(plan.packs) - 2) % plan.num_devices
    if not left_over or plan.num_microbatches < LEAST_DEALT * plan.num_devices:
        return plan
    sizes = [pack.nbytes for pack in plan.packs]
    order = dealt_order(sizes, plan.num_devices, plan.num_microbatches, num_dealt=1 + left_over)
    last = len(plan.packs)
    return replace(plan, dealt=tuple(range(last - 1 - left_over, last)), dealt_order=order)


def first_on_devices(plan: Plan, module: nn.Module) -> Plan:
    """The plan with the first pack of each device updated there, for which masters and states come and leave, where there
    is room."""
    layers = decomposition(module).with_states(_states(module))
    return replace(with_first_on_devices(plan, layers, SLOTS_SHARE), updates_stay=())


def decomposition(module: nn.Module) -> Decomposition:
    """Blocks are layers, whatever their size."""
    found = decompose(
        module, sum(parameter.nbytes for parameter in module.parameters()), ("embedding", "blocks.*", "head")
    )
    narrow = {
        f"{layer.name}.{name}.weight".replace("..", ".")
        for layer in found.layers
        for name, inner in module.get_submodule(layer.name).named_modules()
        if isinstance(inner, nn.Linear)
    }
    return found.narrowed({layer.name: narrow & set(layer.weights) for layer in found.layers})


def _states(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Of fused AdamW: two moments, and a count of steps."""
    return {name: (weight.nbytes, weight.nbytes, torch.float32.itemsize) for name, weight in module.named_parameters()}
