"""A simple plan from sizes alone: which layers form a pack, how large a microbatch is, what fits.

The rule: on each device a running pack and the next one (double buffering), each with its gradients, may take at most
`ARENA_SHARE` of the memory; the rest is for activations. Layers are gathered greedily in call order. When the largest
layer is too large for that, double buffering goes first, then the share grows, and when even one copy of the layer with
its gradients does not fit, an error says so.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harmony_lightning.decomposer.decomposition import Decomposition, Layer
from harmony_lightning.errors import CapacityError
from harmony_lightning.plan import Pack, Plan, aligned
from harmony_lightning.units import format_nbytes

ARENA_SHARE = 0.5
"""Share of a device's memory that slots may take while there is a choice."""
LAST_RESORT_SHARE = 0.9
"""Share that they may take when the largest layer leaves no choice."""
PACKS_PER_DEVICE = 2
"""In pp mode: at least so many packs for each device, as far as there are layers, so that all devices have work."""
MICROBATCHES_PER_DEVICE = 4
"""The wrap-around pipeline of N devices idles (N - 1) of (M + N - 1) turns."""

Group = tuple[Layer, ...]


def unit_nbytes(total_nbytes: int, memory_bytes: int) -> int:
    """The most bytes of weights that a layer should have: two of them with gradients fit `ARENA_SHARE` of the memory."""
    return max(1, min(int(memory_bytes * ARENA_SHARE / 4), total_nbytes // 4))


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
    mode: Literal["pp", "dp"],
    num_devices: int,
    memory_bytes: int,
    microbatch_size: int,
    num_microbatches: int,
    microbatches_per_forward: int = 1,
    stash: Literal["device", "host"],
    host_is_device: bool = False,
    one_layer_per_pack: bool = False,
    together: Sequence[frozenset[str]] = (),
) -> Plan:
    """Packs under a memory limit.

    Args:
        decomposition: layers in call order.
        mode: pp deals packs, dp microbatches over the devices.
        num_devices: devices in the cluster.
        memory_bytes: what each offers.
        microbatch_size: samples.
        num_microbatches: of one minibatch.
        microbatches_per_forward: in one call of a layer.
        stash: where layer inputs wait.
        host_is_device: nothing is swapped: one pack holds everything.
        one_layer_per_pack: though several would fit.
        together: names of layers that take turns in a loop and so belong in one pack.

    Raises:
        CapacityError: some layer cannot fit, with its name and the bytes.
    """
    groups = _groups(decomposition.layers, together)
    limit = Limit(sys.maxsize, sys.maxsize, 0) if host_is_device else _limit(decomposition, groups, memory_bytes)
    if mode == "pp" and num_devices > 1:
        limit = limit.shared(decomposition, groups, PACKS_PER_DEVICE * num_devices)
    packs: list[Pack] = []
    members: Group = ()
    for group in groups:
        if members and (one_layer_per_pack or not limit.admits(pack_of_layers(decomposition, members + group))):
            packs.append(pack_of_layers(decomposition, members))
            members = ()
        members += group
    packs.append(pack_of_layers(decomposition, members))
    return Plan(
        mode=mode,
        num_devices=num_devices,
        memory_bytes=memory_bytes,
        microbatch_size=microbatch_size,
        num_microbatches=num_microbatches,
        microbatches_per_forward=microbatches_per_forward,
        packs=tuple(packs),
        stash=stash,
        prefetch=limit.prefetch,
        keep=packs[-1].layers[-1:],
    )


def pack_of_layers(decomposition: Decomposition, layers: Group) -> Pack:
    by_name = {weight.name: weight for weight in decomposition.weights}
    weights = [by_name[name] for name in dict.fromkeys(name for layer in layers for name in layer.weights)]
    trainable = [weight for weight in weights if weight.is_trainable]
    return Pack(
        layers=tuple(layer.name for layer in layers),
        parameters=tuple(weight.name for weight in weights),
        nbytes=sum(weight.nbytes for weight in weights),
        trainable_nbytes=sum(weight.nbytes for weight in trainable),
        slot_nbytes=sum(aligned(weight.nbytes) for weight in weights),
        gradient_slot_nbytes=sum(aligned(weight.nbytes) for weight in trainable),
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
    prefetch: int

    def admits(self, pack: Pack) -> bool:
        return pack.slot_nbytes <= self.slot_nbytes and pack.gradient_slot_nbytes <= self.gradient_slot_nbytes

    def shared(self, decomposition: Decomposition, groups: Sequence[Group], num_packs: int) -> "Limit":
        """So small that there are about `num_packs` packs, as far as groups allow."""
        largest = max((pack_of_layers(decomposition, group).slot_nbytes for group in groups), default=0)
        share = -(-decomposition.nbytes // num_packs)
        return replace(self, slot_nbytes=max(largest, min(self.slot_nbytes, share)))


def _limit(decomposition: Decomposition, groups: Sequence[Group], memory_bytes: int) -> Limit:
    """The largest packs that fit, with as much prefetch as fits.

    All slots of a device are equal, so the largest weights and the largest gradients count, whichever packs have them.
    """
    glue = set(decomposition.glue)
    # A glue weight, and its gradient, is on a device while the code around some pack uses it.
    glue_nbytes = sum(w.nbytes * (1 + w.is_trainable) for w in decomposition.weights if w.name in glue)
    layers = [pack_of_layers(decomposition, (layer,)) for layer in decomposition.layers]
    # One layer's gradients are there twice for a moment: as its backward makes them, and in the slot they are added to.
    passing_nbytes = max((layer.trainable_nbytes for layer in layers), default=0)
    offered = memory_bytes - glue_nbytes - passing_nbytes
    packs = [pack_of_layers(decomposition, group) for group in groups]
    largest = max(
        packs, key=lambda pack: pack.slot_nbytes + pack.gradient_slot_nbytes, default=pack_of_layers(decomposition, ())
    )
    slot_nbytes = max((pack.slot_nbytes for pack in packs), default=0)
    gradient_slot_nbytes = max((pack.gradient_slot_nbytes for pack in packs), default=0)
    for prefetch, share in ((1, ARENA_SHARE), (0, ARENA_SHARE), (0, LAST_RESORT_SHARE)):
        budget = int(share * offered / (1 + prefetch))
        if 0 <= slot_nbytes + gradient_slot_nbytes <= budget:
            # Half for each while the largest layers allow; nothing is set aside for gradients if there are none.
            for_gradients = min(budget // 2, budget - slot_nbytes) if gradient_slot_nbytes else 0
            for_gradients = max(for_gradients, gradient_slot_nbytes)
            return Limit(budget - for_gradients, for_gradients, prefetch)
    raise CapacityError(
        f"layer {' + '.join(largest.layers) or '(none)'} needs "
        f"{format_nbytes(slot_nbytes + gradient_slot_nbytes + passing_nbytes)} (weights {format_nbytes(slot_nbytes)}, "
        f"gradients {format_nbytes(gradient_slot_nbytes)} and {format_nbytes(passing_nbytes)} as they are made) beside "
        f"{format_nbytes(glue_nbytes)} of weights outside layers, but each GPU offers {format_nbytes(memory_bytes)}, of "
        f"which {1 - LAST_RESORT_SHARE:.0%} is kept for activations; raise memory, or choose smaller layers with "
        f"layers=[...]"
    )
