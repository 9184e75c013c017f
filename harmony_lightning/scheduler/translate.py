"""From a schedule over a profile's layers to the plan that the runtime carries out."""

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan import Plan, Schedule
from harmony_lightning.scheduler.packing import pack_of_layers
from harmony_lightning.scheduler.runtime_steps import check_for_runtime


def plan_of(schedule: Schedule, decomposition: Decomposition, memory_bytes: int) -> Plan:
    """Layers of the decomposition are those of the profile, in its order.

    Raises:
        ConfigurationError: the runtime cannot carry the schedule out, or it is for other layers.
    """
    check_for_runtime(schedule)
    layers = decomposition.layers
    if schedule.num_layers != len(layers):
        raise ConfigurationError(f"the schedule is for {schedule.num_layers} layers, the module has {len(layers)}")
    spans = schedule.packs_backward
    return Plan(
        mode=schedule.mode,
        num_devices=schedule.num_devices,
        memory_bytes=memory_bytes,
        microbatch_size=schedule.microbatch_backward,
        num_microbatches=-(-schedule.minibatch // schedule.microbatch_backward),
        packs=tuple(pack_of_layers(decomposition, layers[first : last + 1]) for first, last in spans),
        stash=schedule.stash,
        prefetch=schedule.prefetch,
        keep=(layers[-1].name,),
    )
