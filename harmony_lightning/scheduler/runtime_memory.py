"""How many bytes a schedule needs on each device when the runtime carries it out.

Slots for weights and gradients are there throughout. Beside them, while a microbatch is in a pack: what the layer that runs
needs, the stashes of all layers of the pack, which leave and come back beside compute, and what the other microbatches have
left for the next pack or wait for from it.
"""

from collections.abc import Iterator

from harmony_lightning.plan.offsets import Lifetime, lay_at_offsets
from harmony_lightning.plan.schedule import Schedule, Span, split
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.sized_plan import sized_plan


def runtime_peak_bytes(schedule: Schedule, costs: Costs) -> float:
    """The most that any device holds if nothing stays that need not."""
    packs = schedule.packs_backward

    def slots(device: int) -> float:
        here = [packs[p] for p in _packs_on(schedule, device)]
        return _in_turn(schedule, [costs.weight_bytes(span) for span in here])

    return max(slots(device) + nbytes for device, _, nbytes in visit_bytes(schedule, costs))


def visit_bytes(schedule: Schedule, costs: Costs) -> Iterator[tuple[int, int, float]]:
    """By device and pack: the most that is in use while microbatches are there, slots for weights left out. In dp devices
    that do what another one does are left out, too."""
    packs, num_devices = schedule.packs_backward, schedule.num_devices
    is_pp, last = schedule.mode == "pp", len(schedule.packs_backward) - 1
    sizes = split(schedule.minibatch, schedule.microbatch_backward)
    size = sizes[0]
    here = [[packs[p] for p in _packs_on(schedule, d)] for d in range(num_devices)]
    gradients = (_in_turn(schedule, [costs.gradient_bytes(span) for span in mine]) for mine in here if mine)
    fixed: float = max(gradients) + 2 * costs.profile.glue_bytes
    if not is_pp and num_devices > 1:
        # Gradients of the other devices come to the first one by one.
        fixed += max(costs.gradient_bytes((layer, layer)) for layer in range(costs.num_layers))
    fixed += _update_bytes(schedule, costs)
    joint = min(schedule.microbatches_per_forward, len(sizes)) * size
    for d in range(num_devices):
        mine = _packs_on(schedule, d)
        if not mine or (not is_pp and d >= len(sizes)):
            break
        if not is_pp and d and len(sizes[d::num_devices]) == len(sizes[::num_devices]):
            continue  # as the first device
        samples = schedule.minibatch if is_pp else sum(sizes[d::num_devices])
        kept = 0.0
        """Stashes that wait here."""
        for p in mine:
            entering, leaving = _boundary(costs, packs, p, samples)
            # What has been sent from here is held until the device is visited again: outputs, until the next pack, or the
            # backward of this one; gradients, until the backward of the pack before.
            sent = _boundary(costs, packs, p - num_devices, samples)[1] if is_pp and p >= num_devices else 0.0
            sent_back = 0.0
            if is_pp and num_devices > 1:
                sent_back = _boundary(costs, packs, p + num_devices, samples)[0] if p + num_devices <= last else leaving
            stash = 0.0 if p == last else costs.stash_bytes(size, packs[p])
            if p == last:
                need = _fused(costs, size, packs[p]) + max(entering, sent) + 3 * costs.input_bytes(size, packs[p][0])
            else:
                need = _forward_bytes(costs, joint, packs[p]) + max(leaving, entering, sent) + stash
                need += 2 * costs.input_bytes(size, packs[p][0]) + (2 * stash if schedule.stash == "host" else 0)
                back = costs.working_bytes("backward", size, packs[p]) + max(leaving + sent_back, entering)
                back += 2 * stash if schedule.stash == "host" else 0
                need = max(need, back)
            if schedule.stash == "device" and p != last:
                kept += costs.stash_bytes(samples, packs[p])
            yield d, p, fixed + kept + need


def _packs_on(schedule: Schedule, device: int) -> list[int]:
    is_pp, count = schedule.mode == "pp", schedule.num_devices
    return [p for p in range(len(schedule.packs_backward)) if not is_pp or p % count == device or p in schedule.dealt]


def _forward_bytes(costs: Costs, samples: int, span: Span) -> float:
    """Of a joint call, too, which may be larger than any that was profiled."""
    most = costs.profile.microbatch_sizes.forward[-1]
    return costs.working_bytes("forward", min(samples, most), span) * max(1.0, samples / most)


def _update_bytes(schedule: Schedule, costs: Costs) -> float:
    """Slots for updates on the device that has most, and tensors that steps make for a moment."""
    if not schedule.updated_there:
        return 0.0
    plan = sized_plan(schedule, costs)
    return plan.updates_nbytes + 2 * max(costs.gradient_bytes((q, q)) for q in range(costs.num_layers))


def _in_turn(schedule: Schedule, sizes: list[float]) -> int:
    """Bytes of slots for packs that come one after the other, as the plan lays them: `Plan.slot_offsets`, and
    `Plan.gradient_offsets`, which leaves out frozen packs."""
    present = (round(size) for size in sizes if size)
    lifetimes = tuple(Lifetime(turn, turn + 1 + schedule.prefetch, nbytes) for turn, nbytes in enumerate(present))
    ends = (offset + life.nbytes for offset, life in zip(lay_at_offsets(lifetimes), lifetimes, strict=True))
    return max(ends, default=0)


def _boundary(costs: Costs, packs: tuple[Span, ...], pack: int, samples: int) -> tuple[float, float]:
    """Inputs and outputs of all microbatches of one device."""
    entering = costs.input_bytes(samples, packs[pack][0]) if pack else 0.0
    leaving = costs.input_bytes(samples, packs[pack + 1][0]) if pack + 1 < len(packs) else 0.0
    return entering, leaving


def _fused(costs: Costs, size: int, span: Span) -> float:
    """The last pack: inputs of its layers wait on the device from forward to backward, which is next."""
    inputs = sum(costs.input_bytes(size, layer) for layer in range(span[0], span[1] + 1))
    return inputs + max(costs.working_bytes(way, size, span) for way in ("forward", "backward"))
