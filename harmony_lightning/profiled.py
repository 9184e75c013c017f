"""From a module to a plan by profile and search: cache, then profile, then search. Strategy and command line come here.

`prepare` makes a plan from sizes alone, before anything is known of batches and speed; this takes both into account.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.cuda import CudaCluster
from harmony_lightning.hardware.device import Cluster
from harmony_lightning.hardware.emulated import EmulatedCluster
from harmony_lightning.plan import Plan, Schedule
from harmony_lightning.profiler import Machine
from harmony_lightning.profiler.cache import cached
from harmony_lightning.profiler.machine import preset_machine
from harmony_lightning.profiler.measure import Measured, Progress, fingerprint_of, measure_profile
from harmony_lightning.profiler.topology import machine_at_hand
from harmony_lightning.profiler.visits import Step
from harmony_lightning.runtime.batch.outputs import loss_of
from harmony_lightning.runtime.checkpointing import transparent_checkpoints
from harmony_lightning.runtime.weights.narrow import Reading
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.explain import describe
from harmony_lightning.scheduler.packing import pack_of_layers, with_first_on_devices
from harmony_lightning.scheduler.runtime.levels import Levels
from harmony_lightning.scheduler.runtime.sized_plan import named_plan
from harmony_lightning.scheduler.runtime.translate import plan_of, schedule_of
from harmony_lightning.scheduler.search.found import Found
from harmony_lightning.scheduler.search.genetic_runtime import breed_runtime
from harmony_lightning.scheduler.search.runtime import search_runtime
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.92
"""Of a GPU's memory that a plan may fill by prediction: predictions are a few per cent off, and allocators fragment."""
_UPDATE_ACCESSES = 28
"""Bytes of host memory that a step of Adam reads and writes per parameter in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to plan for."""

    minibatch: int
    """Samples per step, all GPUs together."""
    memory_bytes: int
    """Of each GPU."""
    mode: Literal["auto", "pp", "dp", "mixed"] = "auto"
    """`mixed` is all that auto tries but dp."""
    pipelines: int | None = None
    deals: bool | None = None
    """Whether the last pack is dealt."""
    microbatch_size: int | None = None
    """None, of all three: the search chooses."""
    stashes: tuple[Literal["device", "host"], ...] = ("device", "host")
    moves_stash: bool = False
    """Stashes go to the host whatever is left."""
    stays: bool = False
    """What fits stays on the devices, as in steps behind the first; seconds are those of such steps."""
    update: Literal["auto", "host", "first", "device"] = "host"
    """Where weights are updated, as in `HarmonyConfig`; auto: the search chooses for each pack. Where layers do not tell
    what the optimizer remembers of them, it is what Adam does."""
    update_operations: float = 1.0
    """By which the optimizer steps one weight."""
    update_accesses: float = 0.0
    """How often these read or write as many bytes as the weight has; at least what a fused Adam does."""
    microbatches_per_forward: int = 1
    planner: Literal["bounds", "genetic"] = "bounds"
    """Which search: as `HarmonyConfig.planner`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and where it comes from."""

    plan: Plan
    decomposition: Decomposition
    """Layers in the order in which they are called."""
    found: Found
    costs: Costs
    default: Found | None = None
    """What the default planner finds, where another one was asked for."""


def machine_of(cluster: Cluster) -> Machine | None:
    """What a cluster offers; None where nobody knows how fast it is."""
    if isinstance(cluster, EmulatedCluster):
        clock = cluster.machine.clock
        if clock is None:
            return None
        memory_bytes = min(device.memory_bytes for device in cluster.devices)
        return preset_machine(len(cluster.devices), clock.gpu, clock.host, memory_bytes)
    if isinstance(cluster, CudaCluster):
        machine, _ = machine_at_hand([device.torch_device for device in cluster.devices])
        memory_bytes = min(device.memory_bytes for device in cluster.devices)
        return replace(machine, gpus=len(cluster.devices), memory_bytes=memory_bytes)
    return None


def clusters_to_profile(root: nn.Module, cluster: Cluster) -> list[Cluster]:
    """Where layers are costed: on the GPUs themselves; on shapes, where they are emulated, and, as torch does not know the
    shapes of every operation, with numbers where the run has numbers, too."""
    if not isinstance(cluster, EmulatedCluster) or cluster.machine.clock is None:
        return [cluster]
    memory_bytes, clock = cluster.devices[0].memory_bytes, cluster.machine.clock
    has_numbers = not cluster.fake and not any(parameter.is_meta for parameter in root.parameters())
    return [
        EmulatedCluster(1, memory_bytes, preset=clock.gpu, host=clock.host, check_races=False, fake=is_fake)
        for is_fake in (True, False)
        if is_fake or has_numbers
    ]


def step_of(
    context: Callable[[], AbstractContextManager[Any]] = nullcontext, arguments: tuple[Any, ...] | None = None
) -> Step:
    """The user's `training_step` within a context, such as that of its precision. `arguments` follow the batch; None: what
    its signature asks for."""

    def step(module: nn.Module, batch: Any) -> torch.Tensor | None:
        function: Any = module.training_step
        more = arguments
        if more is None:
            more = (0,) if function.__code__.co_argcount > 2 else ()
        with transparent_checkpoints(lambda: True), context():
            return loss_of(function(batch, *more))

    return step


def with_narrow_weights(
    decomposition: Decomposition, root: nn.Module, batch: Any, precision: str, step: Step | None = None
) -> Decomposition:
    """The decomposition of a module on the meta device as it is under a precision of Lightning's: with narrow weights, if
    that is a mixed one. They are found by one step of shapes, up to where that looks at values, such as to log the loss."""
    if not precision.endswith("-mixed"):
        return decomposition
    reading = Reading({id(p): name for name, p in root.named_parameters() if p.dtype is torch.float32})
    hooks = []
    for layer in decomposition.layers:
        module = root.get_submodule(layer.name)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=layer.name: reading.enter(name)))
        hooks.append(module.register_forward_hook(lambda *_: reading.enter(None)))
    try:
        with torch.no_grad(), torch.device("meta"), reading:
            (step or step_of())(root, pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), batch))
    except Exception as error:  # the user's code looks at values, say
        log.info("harmony profile: weights are taken to be used as they were until a step of shapes ended: %s", error)
    finally:
        for hook in hooks:
            hook.remove()
    return replace(
        decomposition.narrowed(reading.uses.narrow()),
        narrow_dtype="bfloat16" if precision.startswith("bf16") else "float16",
    )


def update_seconds(machine: Machine) -> Callable[[int], float]:
    """By number of weights: what a fused Adam takes on the host."""
    memory = 2 * machine.host_message_bytes_per_second

    def seconds(count: int) -> float:
        rate = machine.update_parameters_per_second
        return max(count / rate if rate else 0.0, _UPDATE_ACCESSES * count / memory)

    return seconds


def profile(
    root: nn.Module,
    decomposition: Decomposition,
    batch_of: Callable[[int], Any],
    step: Step,
    cluster: Cluster,
    machine: Machine,
    *,
    largest: int,
    smallest: int = 1,
    precision: str = "",
    is_fresh: bool = False,
    progress: Progress = lambda size: None,
) -> tuple[Measured, bool]:
    """What the layers cost, from the cache or measured now; and whether it was there.

    Raises:
        CapacityError: not even the smallest microbatch fits.
        UnsupportedError: the step cannot be run aside; the message says why.
    """

    def make() -> Measured:
        first, *others = clusters_to_profile(root, cluster)
        try:
            return measure_on(first)
        except UnsupportedError as error:
            if not others:
                raise
            measured = measure_on(others[0])
            log.info("harmony profile: made with numbers, as shapes alone do not do: %s", error)
            return measured

    def measure_on(where: Cluster) -> Measured:
        return measure_profile(
            root,
            decomposition,
            batch_of,
            step,
            where,
            largest=largest,
            smallest=smallest,
            update_seconds=update_seconds(machine),
            source=f"{machine.gpu}, {precision or 'as it is'}",
            progress=progress,
        )

    if is_fresh:
        return make(), False
    shapes = pytree.tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), str(t.dtype)), batch_of(smallest))
    key = fingerprint_of(root, decomposition, machine.to_json(), str(shapes), f"{smallest}-{largest}", precision)
    return cached(Measured, key, make)


def find_plan(
    measured: Measured, machine: Machine, decomposition: Decomposition, question: Question, in_use: Plan | None = None
) -> Planned:
    """The best plan that the search finds.

    `in_use` is a plan for the same layers, which is found itself unless another one is faster.

    Raises:
        CapacityError: nothing fits.
    """
    ordered = decomposition.reordered(measured.profile.names)
    travelling = [pack_of_layers(ordered, (layer,)).nbytes for layer in ordered.layers]
    trained = {weight.name for weight in ordered.weights if weight.is_trainable}
    weights = [len(trained.intersection(layer.weights)) for layer in ordered.layers]
    how = question.update_operations, question.update_accesses
    costs = Costs(measured.profile, machine, travelling, ordered.state_nbytes, weights, *how)
    places = {name: index for index, name in enumerate(measured.profile.names)}
    present = schedule_of(in_use, ordered, question.minibatch) if in_use is not None else None

    def stay(schedule: Schedule) -> Schedule:
        return Levels(schedule, costs, moves_stash=question.moves_stash).at(question.memory_bytes)

    def abilities(schedule: Schedule) -> Schedule:
        schedule = replace(schedule, microbatches_per_forward=question.microbatches_per_forward)
        if question.update == "device":
            return replace(schedule, updated_there=tuple(range(len(schedule.packs_backward))))
        if question.update == "first":
            # Bytes do: packs with all their weights would be made for each of many schedules.
            plan = named_plan(schedule, costs, question.memory_bytes, [layer.name for layer in ordered.layers])
            plan = with_first_on_devices(plan, ordered, is_told=False)
            there = tuple(index for index, pack in enumerate(plan.packs) if pack.update == "device")
            return replace(schedule, updated_there=there, updates_stay=plan.updates_stay)
        return schedule

    tied = ordered.tied

    def movable(schedule: Schedule) -> list[int]:
        """Packs with weights that train, none of which another pack has, too."""
        if question.update != "auto":
            return []
        spans = schedule.packs_backward
        packs = (p for p, span in enumerate(spans) if costs.gradient_bytes(span) and p not in schedule.dealt)
        return [p for p in packs if not any(_is_cut(layers, spans[p]) for layers in tied)]

    asked: dict[str, Any] = {
        "minibatch": question.minibatch,
        "mode": question.mode,
        "memory_bytes": MEMORY_SHARE * question.memory_bytes,
        "stashes": question.stashes,
        "pipelines": question.pipelines,
        "deals": question.deals,
        "microbatch_size": question.microbatch_size,
        "together": tuple(frozenset(places[name] for name in loop) for loop in measured.loops),
        "abilities": abilities,
        "movable": movable,
        "in_use": present,
    }
    stay_bytes = question.memory_bytes if question.stays else None
    found = search_runtime(costs, **asked, stay_bytes=stay_bytes, moves_stash=question.moves_stash)
    default = None
    if question.planner == "genetic":
        found, default = breed_runtime(costs, **asked, stay=stay if question.stays else None), found
        log.info(
            "harmony plan: bred, %.4g s per step (search took %.2f s); the default planner's takes %.4g s (%.2f s)",
            found.best.seconds,
            found.search_seconds,
            default.best.seconds,
            default.search_seconds,
        )
    plan = plan_of(found.best.schedule, ordered, question.memory_bytes, in_use)
    if present is not None and _is_same(found.best.schedule, present):
        assert in_use is not None
        plan = in_use
    log.info(
        "harmony plan: %s%s; predicted %.4g s per step and %s on each GPU of %s (search took %.2f s)",
        describe(found.best.schedule),
        ", as it was" if plan is in_use else "",
        found.best.seconds,
        format_nbytes(found.best.peak_bytes),
        format_nbytes(question.memory_bytes),
        found.search_seconds,
    )
    return Planned(plan=plan, decomposition=ordered, found=found, costs=costs, default=default)


def _is_cut(layers: frozenset[int], span: tuple[int, int]) -> bool:
    """Whether some of them are within a pack, and some are not."""
    return 0 < sum(span[0] <= layer <= span[1] for layer in layers) < len(layers)


def _is_same(one: Schedule, other: Schedule) -> bool:
    """Whether nothing but what stays differs."""
    return replace(one, resident=(), stash_stays=(), keep=()) == other


def host_bytes(planned: Planned) -> float:
    """Host memory that training needs: weights, optimizer states, gradients on their way, stashes."""
    costs, schedule = planned.costs, planned.found.best.schedule
    everything = (0, costs.num_layers - 1)
    states = sum(costs.profile.kind(layer).optimizer_state_bytes for layer in range(costs.num_layers))
    largest = max(costs.gradient_bytes(span) for span in schedule.packs_backward)
    buffers = min(costs.gradient_bytes(everything), planned.plan.num_gradient_buffers * largest)
    last = schedule.packs_backward[-1][0]
    stash = costs.stash_bytes(schedule.minibatch, (0, last - 1)) if schedule.stash == "host" and last else 0.0
    masters = sum(costs.profile.kind(layer).weight_bytes for layer in range(costs.num_layers))
    casts = masters - costs.weight_bytes(everything)  # of narrow weights, which are half as large
    return masters + casts + costs.profile.glue_bytes + states + buffers + stash
