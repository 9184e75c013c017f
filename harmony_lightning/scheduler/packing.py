"""A simple plan from sizes alone: which layers form a pack, how large a microbatch is, what fits.

The rule: on each device a running pack and the next one (double buffering), each with its gradients, may take at most
`ARENA_SHARE` of the memory; the rest is for activations. Layers are gathered greedily in call order. When the largest
layer is too large for that, double buffering goes first, then the share grows, and when even one copy of the layer with
its gradients does not fit, an error says so.
"""

import functools
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harmony_lightning.decomposer.decomposition import Decomposition, Layer
from harmony_lightning.errors import CapacityError
from harmony_lightning.plan import Pack, Plan, aligned
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

ARENA_SHARE = 0.5
"""Share of a device's memory that slots may take while there is a choice."""
LAST_RESORT_SHARE = 0.9
"""Share that they may take when the largest layer leaves no choice."""
STEP_TEMPORARIES = 2
"""Tensors of a weight's size that an optimizer makes for a moment while a device steps the weight, as Adam does for the
root of the second moment and its quotient. Weights are stepped one by one there, small ones together."""
PACKS_PER_DEVICE = 2
"""In pp mode: at least so many packs for each device, as far as there are layers, so that all devices have work."""
MICROBATCHES_PER_DEVICE = 4
"""The wrap-around pipeline of N devices idles (N - 1) of (M + N - 1) turns."""

_CHOICES = ((1, ARENA_SHARE), (0, ARENA_SHARE), (0, LAST_RESORT_SHARE))
"""Packs that are prefetched, and the share of the memory that slots may take, best first."""

Group = tuple[Layer, ...]


def unit_nbytes(total_nbytes: int, memory_bytes: int, updates_on_device: bool = False) -> int:
    """The most bytes of weights that a layer should have: two of them with gradients fit `ARENA_SHARE` of the memory. Where
    devices update them, they have a second copy there, and two states of their size: a moment and its square, say."""
    copies = 2 if not updates_on_device else 5
    return max(1, min(int(memory_bytes * ARENA_SHARE / (2 * copies)), total_nbytes // 4))


def automatic_microbatch_size(
    num_samples: int, num_devices: int, *, min_samples: int = 1, host_is_device: bool = False
) -> int:
    """Samples per microbatch: enough microbatches to keep every device busy, one on the host."""
    if host_is_device:
        return max(1, num_samples)
    return max(min_samples, -(-num_samples // (MICROBATCHES_PER_DEVICE * num_devices)), 1)


def make_plan(
    decomposition: Decomposition,
    *,
    mode: Literal["pp", "dp", "mixed"],
    pipelines: int = 1,
    num_devices: int,
    memory_bytes: int,
    microbatch_size: int,
    num_microbatches: int,
    microbatches_per_forward: int = 1,
    stash: Literal["device", "host"],
    update: Literal["device", "host", "first"] = "host",
    host_is_device: bool = False,
    one_layer_per_pack: bool = False,
    together: Sequence[frozenset[str]] = (),
    narrow_dtype: Literal["bfloat16", "float16"] | None = None,
    gradient_wire: Literal["exact", "half"] = "exact",
) -> Plan:
    """Packs under a memory limit.

    Args:
        decomposition: layers in call order.
        mode: pp deals packs, dp microbatches over the devices; mixed deals packs, but microbatches of the last one.
        pipelines: where packs are dealt, so many side by side; if several, no more is dealt in mixed mode.
        num_devices: devices in the cluster.
        memory_bytes: what each offers.
        microbatch_size: samples.
        num_microbatches: of one minibatch.
        microbatches_per_forward: in one call of a layer.
        stash: where layer inputs wait.
        update: where packs are updated; on the host, too, if the device has no room for that. first: the first pack of each
            device there, all others on the host.
        host_is_device: nothing is swapped: one pack holds everything.
        one_layer_per_pack: though several would fit.
        together: names of layers that take turns in a loop and so belong in one pack, if it fits; else each turn swaps.
        narrow_dtype: of narrow weights, if layers have any.
        gradient_wire: how gradients of those travel.

    Raises:
        CapacityError: some layer cannot fit, with its name and the bytes.
    """
    groups = _groups(decomposition.layers, together)
    limit = Limit(sys.maxsize, sys.maxsize, None, 0)
    if not host_is_device:
        place: Literal["device", "host"] = "device" if update == "device" else "host"
        groups, limit = _fitting(decomposition, groups, memory_bytes, place)
    pack = functools.partial(pack_of_layers, decomposition, is_updated_there=limit.update_slot_nbytes is not None)
    if mode != "dp" and num_devices > 1:
        limit = limit.shared(decomposition, groups, PACKS_PER_DEVICE * num_devices // pipelines)
    packs: list[Pack] = []
    members: Group = ()
    for group in groups:
        if members and (one_layer_per_pack or not limit.admits(pack(members + group))):
            packs.append(pack(members))
            members = ()
        members += group
    packs.append(pack(members))
    plan = Plan(
        mode="dp" if mode == "dp" else "pp",
        pipelines=pipelines,
        num_devices=num_devices,
        memory_bytes=memory_bytes,
        microbatch_size=microbatch_size,
        num_microbatches=num_microbatches,
        microbatches_per_forward=microbatches_per_forward,
        packs=tuple(packs),
        stash=stash,
        prefetch=limit.prefetch,
        keep=packs[-1].layers[-1:],
        narrow_dtype=narrow_dtype,
        gradient_wire=gradient_wire,
    )
    if mode == "mixed" and num_devices > 1 and pipelines == 1:
        order = dealt_order([pack.nbytes for pack in packs], num_devices, num_microbatches)
        plan = replace(plan, dealt=(len(packs) - 1,), dealt_order=order)
    if update == "first":
        return with_first_on_devices(plan, decomposition)
    return plan if limit.update_slot_nbytes is None else replace(plan, updates_stay=_staying(plan, limit))


def dealt_order(sizes: Sequence[int], num_devices: int, num_microbatches: int, num_dealt: int = 1) -> tuple[int, ...]:
    """Devices of the last packs' microbatches, for backward to begin early; `sizes` are the packs' bytes:

        device of pack n-4  | forward |  dealt packs  |                 | backward
        device of pack n-3    | forward |  dealt packs  |        | backward
        device of pack n-2      | forward | dealt |         | backward

    The device of the pack before ends its forward last, and all others wait for its backward. Each microbatch goes to the
    device that is done with it soonest, compared with when its backward can begin. Times are taken from weights: two
    operations for each in forward, four in backward, and two when forward is done again, as in all but the last pack.
    """
    others, first = num_devices - 1, len(sizes) - num_dealt
    if num_microbatches <= num_devices or first < 1:  # one each, and sums are those of one device
        return ()
    forward, backward = 2 * sizes[first - 1], 6 * sizes[first - 1]
    both = 8 * sum(sizes[first:-1]) + 6 * sizes[-1]
    devices = [(first + i) % num_devices for i in range(num_devices)]
    begins = [-forward * (others - i) for i in range(num_devices)]
    may_end = [backward * (others - i) for i in range(num_devices)]
    counts = [0] * num_devices
    for _ in range(num_microbatches):
        soonest = min(range(num_devices), key=lambda i: (begins[i] + both * (counts[i] + 1) - may_end[i], i))
        counts[soonest] += 1
    turns = [(begins[i] + both * n, i) for i, count in enumerate(counts) for n in range(count)]
    return tuple(devices[i] for _, i in sorted(turns))


def pack_of_layers(decomposition: Decomposition, layers: Group, *, is_updated_there: bool = False) -> Pack:
    """`is_updated_there`: a device updates it."""
    by_name = {weight.name: weight for weight in decomposition.weights}
    weights = [by_name[name] for name in dict.fromkeys(name for layer in layers for name in layer.weights)]
    trainable = [weight for weight in weights if weight.is_trainable]
    # One that other packs use, too, has gradients in several places; the host adds them up and updates it.
    others = (layer for layer in decomposition.layers if layer not in layers) if is_updated_there else ()
    tied = {name for layer in others for name in layer.weights}
    states = [nbytes for weight in trainable if weight.name not in tied for nbytes in weight.state_nbytes]
    is_updated_there &= any(weight.name not in tied for weight in trainable)
    # In a slot a weight has one type: it is narrow if it is for all layers of the pack that have it.
    wide = {name for layer in layers for name in layer.weights if name not in layer.narrow}
    sizes = [weight.nbytes if weight.name in wide else weight.nbytes // 2 for weight in weights]
    return Pack(
        layers=tuple(layer.name for layer in layers),
        parameters=tuple(weight.name for weight in weights),
        nbytes=sum(sizes),
        trainable_nbytes=sum(weight.nbytes for weight in trainable),
        slot_nbytes=sum(map(aligned, sizes)),
        gradient_slot_nbytes=sum(aligned(weight.nbytes) for weight in trainable),
        narrow=tuple(weight.name for weight in weights if weight.name not in wide),
        narrow_trainable_nbytes=sum(weight.nbytes for weight in trainable if weight.name not in wide),
        update="device" if is_updated_there else "host",
        state_nbytes=sum(states) if is_updated_there else 0,
        state_slot_nbytes=sum(map(aligned, states)) if is_updated_there else 0,
    )


def _groups(layers: Sequence[Layer], together: Sequence[frozenset[str]]) -> list[Group]:
    """Layers in order; those that must stay together form one group at the place of the first."""
    groups: list[Group] = []
    done: set[str] = set()
    for layer in layers:
        if layer.name in done:
            continue
        names = next((names for names in together if layer.name in names), frozenset((layer.name,)))
        groups.append(tuple(other for other in layers if other.name in names))
        done |= names
    return groups


@dataclass(frozen=True, slots=True)
class Limit:
    """What a pack may have."""

    slot_nbytes: int
    gradient_slot_nbytes: int
    update_slot_nbytes: int | None
    """None if the host updates all packs."""
    prefetch: int

    def admits(self, pack: Pack) -> bool:
        return (
            pack.slot_nbytes <= self.slot_nbytes
            and pack.gradient_slot_nbytes <= self.gradient_slot_nbytes
            and pack.update_slot_nbytes <= (self.update_slot_nbytes or 0)
        )

    def shared(self, decomposition: Decomposition, groups: Sequence[Group], num_packs: int) -> "Limit":
        """So small that there are about `num_packs` packs, as far as groups allow."""
        largest = max((pack_of_layers(decomposition, group).slot_nbytes for group in groups), default=0)
        share = -(-decomposition.travelling_nbytes // num_packs)
        return replace(self, slot_nbytes=max(largest, min(self.slot_nbytes, share)))


def _staying(plan: Plan, limit: Limit) -> tuple[int, ...]:
    """Packs that have room to stay where they are updated, within what slots may take; the first ones, if not all."""
    nbytes_per_slot = limit.slot_nbytes + limit.gradient_slot_nbytes + (limit.update_slot_nbytes or 0)
    room = (1 + plan.prefetch) * nbytes_per_slot - (plan.arena_nbytes() - plan.updates_nbytes)
    staying: list[int] = []
    for device in range(plan.num_devices):
        here = [index for index, pack in enumerate(plan.packs) if pack.update == "device"]
        here = [index for index in here if plan.update_device(index) == device]
        for number in range(len(here), 0, -1):
            if replace(plan, updates_stay=tuple(here[:number])).update_slots_nbytes(device) <= room:
                staying += here[:number]
                break
    return tuple(sorted(staying))


def with_first_on_devices(
    plan: Plan, decomposition: Decomposition, share: float = ARENA_SHARE, *, is_told: bool = True
) -> Plan:
    """The plan with the first pack of each device updated where it is, and staying there: of those that have weights of
    their own, as many as slots have room for in a share of the memory. A search asks for many, of which nobody `is_told`.
    """
    level = logging.INFO if is_told else logging.DEBUG
    for index in range(min(plan.depth, len(plan.packs))):
        names = plan.packs[index].layers
        layers = tuple(layer for layer in decomposition.layers if layer.name in names)
        pack = pack_of_layers(decomposition, layers, is_updated_there=True)
        if pack.update == "host" or (index > 0 and index in plan.dealt):
            log.log(
                level,
                "harmony: pack %d has no weights of its own to be updated there, and is updated on the host",
                index,
            )
            continue
        packs = (*plan.packs[:index], pack, *plan.packs[index + 1 :])
        wider = replace(plan, packs=packs, updates_stay=(*plan.updates_stay, index))
        largest_weight = max(w.nbytes for w in decomposition.weights if w.name in pack.parameters)
        nbytes = wider.arena_nbytes() + STEP_TEMPORARIES * largest_weight
        if nbytes > share * plan.memory_bytes:
            log.log(
                level,
                "harmony: pack %d is updated on the host: on its device slots would take %s, each has %s, of which "
                "%.0f %% are for activations",
                index,
                format_nbytes(nbytes),
                format_nbytes(plan.memory_bytes),
                100 * (1 - share),
            )
            continue
        plan = wider
    return plan


def _fitting(
    decomposition: Decomposition, groups: list[Group], memory_bytes: int, update: Literal["device", "host"]
) -> tuple[list[Group], Limit]:
    """As many of the groups as fit, with the layers of others one by one; and the limit."""

    def needed(loop: Group) -> int:
        """Its sums of gradients are complete when all turns are over, and until then beside their slot."""
        pack = pack_of_layers(decomposition, loop)
        return pack.slot_nbytes + pack.gradient_slot_nbytes + pack.trainable_nbytes

    while True:
        loops = [group for group in groups if len(group) > 1]
        largest = max(loops, key=needed, default=())
        try:
            limit = _limit(decomposition, groups, memory_bytes, update)
            if needed(largest) <= LAST_RESORT_SHARE * memory_bytes:
                return groups, limit
        except CapacityError:
            if not loops:
                raise
        kept = [frozenset(layer.name for layer in loop) for loop in loops if loop is not largest]
        groups = _groups(decomposition.layers, kept)
        log.info(
            "harmony: layers %s take turns, and do not fit a GPU together: they are swapped for each turn",
            " + ".join(layer.name for layer in largest),
        )


def _limit(
    decomposition: Decomposition, groups: Sequence[Group], memory_bytes: int, update: Literal["device", "host"]
) -> Limit:
    """The largest packs that fit, with as much prefetch as fits.

    All slots of a device are equal, so the largest weights, gradients and updates count, whichever packs have them.
    """
    glue = set(decomposition.glue)
    # A glue weight, and its gradient, is on a device while the code around some pack uses it.
    glue_nbytes = sum(w.nbytes * (1 + w.is_trainable) for w in decomposition.weights if w.name in glue)
    layers = [pack_of_layers(decomposition, (layer,)) for layer in decomposition.layers]
    # One layer's gradients are there twice for a moment: as its backward makes them, and in the slot they are added to.
    passing_nbytes = max((layer.trainable_nbytes - layer.narrow_trainable_nbytes // 2 for layer in layers), default=0)
    offered = memory_bytes - glue_nbytes - passing_nbytes
    packs = [pack_of_layers(decomposition, group, is_updated_there=update == "device") for group in groups]
    largest = max(
        packs, key=lambda pack: pack.slot_nbytes + pack.gradient_slot_nbytes, default=pack_of_layers(decomposition, ())
    )
    slot_nbytes = max((pack.slot_nbytes for pack in packs), default=0)
    gradient_slot_nbytes = max((pack.gradient_slot_nbytes for pack in packs), default=0)
    if update == "device":
        update_slot_nbytes = max((pack.update_slot_nbytes for pack in packs), default=0)
        nbytes = max(1, slot_nbytes + gradient_slot_nbytes + update_slot_nbytes)
        largest_weight = max((w.nbytes for w in decomposition.weights if w.is_trainable), default=0)
        temporary_nbytes = max(passing_nbytes, STEP_TEMPORARIES * largest_weight)
        for prefetch, share in _CHOICES:
            scale = share * (memory_bytes - glue_nbytes - temporary_nbytes) / (1 + prefetch) / nbytes
            if scale >= 1:
                return Limit(
                    slot_nbytes=int(scale * slot_nbytes),
                    gradient_slot_nbytes=int(scale * gradient_slot_nbytes),
                    update_slot_nbytes=int(scale * update_slot_nbytes),
                    prefetch=prefetch,
                )
        log.warning(
            "harmony: the host updates all packs: for layer %s to be updated on a device that must offer %s, each has %s",
            " + ".join(largest.layers),
            format_nbytes(glue_nbytes + temporary_nbytes + int(nbytes / LAST_RESORT_SHARE)),
            format_nbytes(memory_bytes),
        )
    for prefetch, share in _CHOICES:
        budget = int(share * offered / (1 + prefetch))
        if 0 <= slot_nbytes + gradient_slot_nbytes <= budget:
            # Half for each while the largest layers allow, less for narrow weights; nothing is set aside for gradients if
            # there are none.
            wide = decomposition.nbytes
            share_of_gradients = budget * wide // max(1, wide + decomposition.travelling_nbytes)
            for_gradients = min(share_of_gradients, budget - slot_nbytes) if gradient_slot_nbytes else 0
            for_gradients = max(for_gradients, gradient_slot_nbytes)
            return Limit(budget - for_gradients, for_gradients, None, prefetch)
    raise CapacityError(
        f"layer {' + '.join(largest.layers) or '(none)'} needs "
        f"{format_nbytes(slot_nbytes + gradient_slot_nbytes + passing_nbytes)} (weights {format_nbytes(slot_nbytes)}, "
        f"gradients {format_nbytes(gradient_slot_nbytes)} and {format_nbytes(passing_nbytes)} as they are made) beside "
        f"{format_nbytes(glue_nbytes)} of weights outside layers, but each GPU offers {format_nbytes(memory_bytes)}, of "
        f"which {1 - LAST_RESORT_SHARE:.0%} is kept for activations; raise memory, or choose smaller layers with "
        f"layers=[...]"
    )
