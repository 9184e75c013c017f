"""Whether a plan, perhaps written by hand, fits a module and a cluster.

What one pack has wrong is shown in a grid (`plan.grid`). A plan cannot dead-lock: it says what is where, not who waits for
whom, and one controller enqueues all tasks in one order. Packs in another order than their layers are called make a step
slower, not wrong; that is known behind the first step, which tells (`order_fault`).
"""

from collections import Counter
from collections.abc import Sequence

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import CapacityError, ConfigurationError
from harmony_lightning.plan.grid import grid
from harmony_lightning.plan.offsets import aligned
from harmony_lightning.plan.plan import Plan
from harmony_lightning.units import format_nbytes


def check_plan(plan: Plan, decomposition: Decomposition, num_devices: int, memory_bytes: int) -> None:
    """`memory_bytes` are those that each device offers.

    Raises:
        ConfigurationError: the plan cannot be carried out; with the pack and the layer.
        CapacityError: its slots do not fit a device.
    """
    if plan.num_devices != num_devices:
        raise ConfigurationError(f"the plan is for {plan.num_devices} devices, the cluster has {num_devices}")
    weights = {layer.name: layer.weights for layer in decomposition.layers}
    pack_of = {name: index for index, pack in enumerate(plan.packs) for name in pack.layers}
    planned = Counter(name for pack in plan.packs for name in pack.layers)
    for name in (*planned, *weights):
        if name not in weights:
            raise plan_fault(plan, pack_of[name], f"the plan names layer {name!r}, which this module does not have")
        if planned[name] > 1:
            text = f"the plan must have layer {name!r} in one pack, it has it in {planned[name]}"
            raise plan_fault(plan, pack_of[name], text)
        if not planned[name]:
            raise ConfigurationError(f"the plan must have layer {name!r} in one pack, it has it in none")
    for index in range(len(plan.packs)):
        _check_pack(plan, index, decomposition, weights)
    _check_capacity(plan, memory_bytes)


def _check_pack(plan: Plan, index: int, decomposition: Decomposition, weights: dict[str, tuple[str, ...]]) -> None:
    pack = plan.packs[index]
    by_name = {weight.name: weight for weight in decomposition.weights}
    expected = {weight for name in pack.layers for weight in weights[name]}
    if set(pack.parameters) != expected or len(pack.parameters) != len(expected):
        odd = sorted(expected.symmetric_difference(pack.parameters)) or ["(one twice)"]
        raise plan_fault(plan, index, f"pack {index} must have the weights of its layers, once each; look at {odd[0]}")
    if odd := sorted(set(pack.narrow) - expected):
        raise plan_fault(plan, index, f"pack {index} says that weight {odd[0]} is narrow, which none of its layers has")
    sizes = [by_name[name].nbytes // (2 if name in pack.narrow else 1) for name in expected]
    if pack.nbytes != sum(sizes):
        raise plan_fault(plan, index, f"pack {index} says {pack.nbytes} bytes of weights, its layers have {sum(sizes)}")
    gradients = [aligned(by_name[name].nbytes) for name in expected if by_name[name].is_trainable]
    for field, least in (("slot_nbytes", sum(map(aligned, sizes))), ("gradient_slot_nbytes", sum(gradients))):
        # Without a slot at all, gradients of what has begun to train since are added up wherever there is room.
        told = getattr(pack, field)
        if told < least and (told or field == "slot_nbytes"):
            remedy = f"write {least}, or leave plan= out, if some of them were frozen when the plan was made"
            raise plan_fault(plan, index, f"pack {index} has {field} of {told}, its weights need {least}; {remedy}")


def _check_capacity(plan: Plan, memory_bytes: int) -> None:
    offered = min(memory_bytes, plan.memory_bytes)
    for device in range(plan.num_devices):
        needed = plan.slots_nbytes(device) + plan.gradient_slots_nbytes(device) + plan.update_slots_nbytes(device)
        if needed <= offered:
            continue
        largest = max(plan.packs_on(device), key=lambda index: plan.packs[index].slot_nbytes)
        stay = f"let fewer packs be resident than {len(plan.resident)}" if plan.resident else "make packs smaller"
        raise CapacityError(
            f"slots for weights and gradients take {format_nbytes(needed)} of gpu{device}, of which the plan may use "
            f"{format_nbytes(plan.memory_bytes)} and the cluster offers {format_nbytes(memory_bytes)}; {stay}, the largest "
            f"of which is pack {largest}\n{grid(plan, largest, device)}"
        )


def order_fault(plan: Plan, order: Sequence[str]) -> str | None:
    """What to tell if packs are in another order than their layers are called in; None if they are not."""
    pack_of = {name: index for index, pack in enumerate(plan.packs) for name in pack.layers}
    latest, caller = -1, ""
    for name in order:
        index = pack_of.get(name, latest)
        if index < latest:
            return (
                f"layer {name!r} of pack {index} is called behind {caller!r} of pack {latest}: each call out of turn waits "
                f"for its weights; put packs in the order of calls\n{grid(plan, index)}"
            )
        latest, caller = index, name
    return None


def plan_fault(plan: Plan, index: int, text: str) -> ConfigurationError:
    """What to raise for what one pack has wrong."""
    return ConfigurationError(f"{text}\n{grid(plan, index)}")
