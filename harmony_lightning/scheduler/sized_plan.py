"""A schedule as the plan that the runtime would carry out, its packs known by their bytes alone: so slots, placement and
priorities in a simulation are the plan's own, and not told a second time.
"""

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
    return Plan(
        mode=schedule.mode,
        num_devices=schedule.num_devices,
        memory_bytes=costs.machine.memory_bytes,
        microbatch_size=schedule.microbatch_backward,
        num_microbatches=-(-schedule.minibatch // schedule.microbatch_backward),
        packs=tuple(_pack(schedule, costs, index) for index in range(len(schedule.packs_backward))),
        stash=schedule.stash,
        prefetch=schedule.prefetch,
        resident=schedule.resident,
        stash_stays=schedule.stash_stays,
    )


def _pack(schedule: Schedule, costs: Costs, index: int) -> Pack:
    span = schedule.packs_backward[index]
    weights, gradients = round(costs.weight_bytes(span)), round(costs.gradient_bytes(span))
    return Pack(
        layers=(),
        parameters=(),
        nbytes=weights,
        trainable_nbytes=gradients,
        slot_nbytes=weights,
        gradient_slot_nbytes=gradients,
    )
