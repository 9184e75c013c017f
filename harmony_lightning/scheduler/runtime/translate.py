"""From a schedule over a profile's layers to the plan that the runtime carries out."""

from itertools import accumulate

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan import Plan, Schedule
from harmony_lightning.scheduler.packing import pack_of_layers
from harmony_lightning.scheduler.runtime.sized_plan import check_for_runtime


def plan_of(schedule: Schedule, decomposition: Decomposition, memory_bytes: int, like: Plan | None = None) -> Plan:
    """Layers of the decomposition are those of the profile, in its order. What stays is left out: a measured step decides
    it. What a schedule does not tell is as in `like`.

    Raises:
        ConfigurationError: the runtime cannot carry the schedule out, or it is for other layers.
    """
    check_for_runtime(schedule)
    layers = decomposition.layers
    if schedule.num_layers != len(layers):
        raise ConfigurationError(f"the schedule is for {schedule.num_layers} layers, the module has {len(layers)}")
    spans = schedule.packs_backward
    packs = tuple(
        pack_of_layers(
            decomposition,
            layers[first : last + 1],
            is_updated_there=index in schedule.updated_there,
        )
        for index, (first, last) in enumerate(spans)
    )
    return Plan(
        mode=schedule.mode,
        num_devices=schedule.num_devices,
        memory_bytes=memory_bytes,
        microbatch_size=schedule.microbatch_backward,
        num_microbatches=-(-schedule.minibatch // schedule.microbatch_backward),
        packs=packs,
        stash=schedule.stash,
        prefetch=schedule.prefetch,
        keep=(layers[-1].name,),
        microbatches_per_forward=schedule.microbatches_per_forward,
        pipelines=schedule.pipelines,
        dealt=schedule.dealt,
        dealt_order=schedule.dealt_order,
        updates_stay=tuple(index for index in schedule.updates_stay if packs[index].update == "device"),
        narrow_dtype=like.narrow_dtype if like is not None else decomposition.narrow_dtype,
        gradient_wire=like.gradient_wire if like is not None else "exact",
    )


def schedule_of(plan: Plan, decomposition: Decomposition, minibatch: int) -> Schedule | None:
    """The inverse, for minibatches of so many samples; None if the layers of the plan are in another order."""
    if [name for pack in plan.packs for name in pack.layers] != [layer.name for layer in decomposition.layers]:
        return None
    ends = list(accumulate(len(pack.layers) for pack in plan.packs))
    spans = tuple((end - len(pack.layers), end - 1) for end, pack in zip(ends, plan.packs, strict=True))
    return Schedule(
        mode=plan.mode,
        num_devices=plan.num_devices,
        minibatch=minibatch,
        microbatch_forward=plan.microbatch_size,
        packs_forward=spans[:-1],
        microbatch_backward=plan.microbatch_size,
        packs_backward=spans,
        prefetch=plan.prefetch,
        stash=plan.stash,
        pipelines=plan.pipelines,
        dealt=plan.dealt,
        dealt_order=plan.dealt_order,
        updated_there=tuple(index for index, pack in enumerate(plan.packs) if pack.update == "device"),
        updates_stay=plan.updates_stay,
        microbatches_per_forward=plan.microbatches_per_forward,
    )
