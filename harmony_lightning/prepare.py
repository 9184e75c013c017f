"""From a module to a plan: decompose, then pack. Strategy and command line both come through here."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from harmony_lightning.config import HarmonyConfig
from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.decomposer.discover import decompose, decompose_as
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.device import Cluster
from harmony_lightning.plan import Plan, check_plan, plan_fault, refit
from harmony_lightning.scheduler import make_plan, unit_nbytes
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much comes at once."""

    microbatch_size: int
    num_microbatches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOrder:
    """What a traced step showed: layers by first call, and sets of layers that take turns."""

    layers: tuple[str, ...] = ()
    loops: tuple[frozenset[str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrow:
    """What steps have shown of autocast."""

    weights: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By layer, those of its weights of which it uses nothing but what autocast casts them to."""
    dtype: Literal["bfloat16", "float16"] | None = None
    """Autocast's type."""


def prepare(
    root: nn.Module,
    cluster: Cluster,
    config: HarmonyConfig,
    workload: Workload,
    call_order: CallOrder | None = None,
    narrow: Narrow | None = None,
    state_nbytes: Mapping[str, tuple[int, ...]] | None = None,
    share: float = 1.0,
) -> tuple[Decomposition, Plan]:
    """The layers of `root` and the plan for one step of this workload.

    `state_nbytes` has, by weight, the bytes of each tensor that the optimizer will remember; None if the host is to update
    all packs, whatever the configuration says. The plan is for a `share` of the memory that is offered.

    Raises:
        ConfigurationError: a weight is not on the host, or a knob fits nothing.
        CapacityError: some layer cannot fit.
    """
    _check_masters(root)
    decomposition, memory_bytes = layers_of(root, cluster, config)
    if cluster.host_is_device:
        state_nbytes = None
    if state_nbytes is not None:
        decomposition = decomposition.with_states(state_nbytes)
    if call_order is not None:
        decomposition = decomposition.reordered(call_order.layers)
    if narrow is not None:
        wide = {name for name, parameter in root.named_parameters() if parameter.dtype is torch.float32}
        decomposition = decomposition.narrowed({layer: names & wide for layer, names in narrow.weights.items()})
    plan = make_plan(
        decomposition,
        mode="pp" if config.mode == "auto" else config.mode,
        pipelines=1 if cluster.host_is_device or config.pipelines == "auto" else config.pipelines,
        num_devices=len(cluster.devices),
        memory_bytes=int(share * memory_bytes),
        microbatch_size=workload.microbatch_size,
        num_microbatches=workload.num_microbatches,
        microbatches_per_forward=config.microbatches_per_forward,
        stash="device" if cluster.host_is_device or config.stash == "device" else "host",
        update=_update(config, state_nbytes),
        host_is_device=cluster.host_is_device,
        one_layer_per_pack=config.one_layer_per_pack,
        together=call_order.loops if call_order is not None else (),
        narrow_dtype=narrow.dtype if narrow is not None else None,
        gradient_wire=config.gradient_wire,
    )
    return decomposition, plan


def tell(plan: Plan) -> None:
    """A line in the log, for a plan that is taken up."""
    log.info(
        "harmony plan: %s, %d layers in %d packs (largest %s), %d device(s) of %s, stash on the %s, "
        "%d packs updated on devices",
        "mixed" if plan.dealt or plan.pipelines > 1 else plan.mode,
        sum(len(pack.layers) for pack in plan.packs),
        len(plan.packs),
        format_nbytes(max(pack.nbytes for pack in plan.packs)),
        plan.num_devices,
        format_nbytes(plan.memory_bytes),
        plan.stash,
        sum(pack.update == "device" for pack in plan.packs),
    )


def _update(
    config: HarmonyConfig, state_nbytes: Mapping[str, tuple[int, ...]] | None
) -> Literal["device", "host", "first"]:
    return "host" if state_nbytes is None or config.update == "auto" else config.update


def prepare_given(
    root: nn.Module, cluster: Cluster, plan: Plan, *, is_under_way: bool = False
) -> tuple[Decomposition, Plan]:
    """The layers of `root` that a given plan names; they need not be those that would be found without it. And the plan: if
    the run `is_under_way`, for the weights that train by now.

    Raises:
        ConfigurationError: a weight is not on the host, or the plan is for another module or another number of devices.
        CapacityError: the plan's slots do not fit the devices.
    """
    _check_masters(root)
    modules = dict(root.named_modules(remove_duplicate=False))
    for index, pack in enumerate(plan.packs):
        for name in pack.layers:
            if name not in modules:
                raise plan_fault(plan, index, f"the plan names layer {name!r}, which this module does not have")
    decomposition = decompose_as(root, [name for pack in plan.packs for name in pack.layers])
    plan, given = refit(plan, decomposition) if is_under_way else plan, plan
    check_plan(plan, decomposition, len(cluster.devices), min(device.memory_bytes for device in cluster.devices))
    if plan is not given:
        log.warning(
            "harmony: other weights train than when plan= was made; its packs stay, with slots for the gradients of these, "
            "and those where that makes a difference are updated on the host; leave plan= out for a new plan"
        )
    return decomposition, plan


def _check_masters(root: nn.Module) -> None:
    for name, parameter in root.named_parameters():
        if parameter.device.type != "cpu":
            raise ConfigurationError(
                f"weight {name} is on {parameter.device}; the strategy needs the module on the host, because there its "
                f'masters live: build it on the CPU, or declare it under torch.device("meta")'
            )


def layers_of(root: nn.Module, cluster: Cluster, config: HarmonyConfig) -> tuple[Decomposition, int]:
    """The layers of `root` in the order of registration, and the bytes that each device offers.

    Raises:
        ConfigurationError: a choice of layers matches nothing.
    """
    memory_bytes = min(device.memory_bytes for device in cluster.devices)
    if config.memory_bytes is not None:
        memory_bytes = min(memory_bytes, config.memory_bytes)
    nbytes = sum(parameter.nbytes for parameter in root.parameters())
    updates_there = config.update == "device" and not cluster.host_is_device
    return decompose(root, unit_nbytes(nbytes, memory_bytes, updates_there), config.layers), memory_bytes
