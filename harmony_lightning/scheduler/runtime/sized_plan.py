"""A schedule as the plan that the runtime would carry out, its packs known by their bytes alone: so slots, placement and
priorities in a simulation are the plan's own, and not told a second time.
"""

from collections.abc import Sequence
from dataclasses import replace

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan import Pack, Plan
from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs


def check_for_runtime(schedule: Schedule) -> None:
    """Raises ConfigurationError if the runtime cannot carry the schedule out."""
    if schedule.packs_forward != schedule.packs_backward[:-1]:
        raise ConfigurationError("the runtime carries out plans whose packs are the same forward and backward")
    if schedule.microbatch_forward != schedule.microbatch_backward:
        raise ConfigurationError("the runtime carries out plans with one microbatch size")


def sized_plan(schedule: Schedule, costs: Costs) -> Plan:
    """Packs of it have no layers and no parameters; bytes are rounded, not aligned.

    Raises:
        ConfigurationError: the runtime cannot carry the schedule out.
    """
    check_for_runtime(schedule)
    packs = tuple(_pack(schedule, costs, index) for index in range(len(schedule.packs_backward)))
    return Plan(
        mode=schedule.mode,
        num_devices=schedule.num_devices,
        memory_bytes=costs.machine.memory_bytes,
        microbatch_size=schedule.microbatch_backward,
        num_microbatches=-(-schedule.minibatch // schedule.microbatch_backward),
        packs=packs,
        stash=schedule.stash,
        prefetch=schedule.prefetch,
        resident=schedule.resident,
        stash_stays=schedule.stash_stays,
        pipelines=schedule.pipelines,
        dealt=schedule.dealt,
        dealt_order=schedule.dealt_order,
        updates_stay=tuple(index for index in schedule.updates_stay if packs[index].update == "device"),
        microbatches_per_forward=schedule.microbatches_per_forward,
    )


def named_plan(schedule: Schedule, costs: Costs, memory_bytes: int, names: Sequence[str] | None = None) -> Plan:
    """The same where each device offers so much, with layers known by their names, or else by their numbers."""
    names = names or [str(layer) for layer in range(schedule.num_layers)]
    plan = sized_plan(schedule, costs)
    packs = tuple(
        replace(pack, layers=tuple(names[first : last + 1]))
        for pack, (first, last) in zip(plan.packs, schedule.packs_backward, strict=True)
    )
    return replace(plan, memory_bytes=memory_bytes, packs=packs, keep=packs[-1].layers[-1:])


def _pack(schedule: Schedule, costs: Costs, index: int) -> Pack:
    span = schedule.packs_backward[index]
    weights, gradients = round(costs.weight_bytes(span)), round(costs.gradient_bytes(span))
    is_updated_there = index in schedule.updated_there and gradients > 0
    states = round(costs.optimizer_bytes(span)) if is_updated_there else 0
    narrow = min(gradients, round(costs.narrow_bytes(span)))
    return Pack(
        layers=(),
        parameters=(),
        nbytes=weights,
        trainable_nbytes=gradients,
        slot_nbytes=weights,
        gradient_slot_nbytes=gradients,
        narrow_trainable_nbytes=narrow,
        update="device" if is_updated_there else "host",
        state_nbytes=states,
        state_slot_nbytes=states,
    )
