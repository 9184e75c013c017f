"""A simple plan from sizes alone: which layers form a pack, how large a microbatch is, what fits.

The rule: on each device a running pack and the next one (double buffering), each with its gradients, may take at most
`ARENA_SHARE` of the memory; the rest is for activations. Layers are gathered greedily in call order. When the largest
layer is too large for that, double buffering goes first, then the share grows, and when even one copy of the layer with
its gradients does not fit, an error says so.
"""

import sys
from collections.abc import Sequence
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
    stash: Literal["device", "host"],
    host_is_device: bool = False,
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
        stash: where layer inputs wait.
        host_is_device: nothing is swapped: one pack holds everything.
        together: names of layers that take turns in a loop and so belong in one pack.

    Raises:
        CapacityError: some layer cannot fit, with its name and the bytes.
    """
    groups = _groups(decomposition.layers, together)
    prefetch, limit = (0, sys.maxsize) if host_is_device else _limit(decomposition, groups, memory_bytes)
    if mode == "pp" and not host_is_device:
        share = (
            -(-decomposition.nbytes // (PACKS_PER_DEVICE * num_devices)) if num_devices > 1 else decomposition.nbytes
        )
        largest = max((_pack(decomposition, group).slot_nbytes for group in groups), default=0)
        limit = max(min(limit, share), largest)
    packs: list[Pack] = []
    members: Group = ()
    for group in groups:
        if members and _pack(decomposition, members + group).slot_nbytes > limit:
            packs.append(_pack(decomposition, members))
            members = ()
        members += group
    packs.append(_pack(decomposition, members))
    return Plan(
        mode=mode,
        num_devices=num_devices,
        memory_bytes=memory_bytes,
        microbatch_size=microbatch_size,
        num_microbatches=num_microbatches,
        packs=tuple(packs),
        stash=stash,
        prefetch=prefetch,
    )


def _pack(decomposition: Decomposition, layers: Group) -> Pack:
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


def _limit(decomposition: Decomposition, groups: Sequence[Group], memory_bytes: int) -> tuple[int, int]:
    """How many packs to prefetch, and the most bytes of weights in a pack."""
    glue = set(decomposition.glue)
    # A glue weight, and its gradient, is on a device while the code around some pack uses it.
    glue_nbytes = sum(w.nbytes * (1 + w.is_trainable) for w in decomposition.weights if w.name in glue)
    layers = [_pack(decomposition, (layer,)) for layer in decomposition.layers]
    # One layer's gradients are there twice for a moment: as its backward makes them, and in the slot they are added to.
    passing_nbytes = max((layer.trainable_nbytes for layer in layers), default=0)
    offered = memory_bytes - glue_nbytes - passing_nbytes
    packs = [_pack(decomposition, group) for group in groups]
    largest = max(packs, key=lambda pack: pack.slot_nbytes + pack.gradient_slot_nbytes, default=None)
    needed = largest.slot_nbytes + largest.gradient_slot_nbytes if largest else 0
    copies = 2 if any(weight.is_trainable for weight in decomposition.weights) else 1
    for prefetch, share in ((1, ARENA_SHARE), (0, ARENA_SHARE), (0, LAST_RESORT_SHARE)):
        budget = int(share * offered / (1 + prefetch))
        if needed <= budget:
            return prefetch, budget // copies
    assert largest is not None
    raise CapacityError(
        f"layer {' + '.join(largest.layers)} needs {format_nbytes(needed + passing_nbytes)} (weights "
        f"{format_nbytes(largest.slot_nbytes)}, gradients {format_nbytes(largest.gradient_slot_nbytes)} and "
        f"{format_nbytes(passing_nbytes)} as they are made) beside {format_nbytes(glue_nbytes)} of weights outside layers, "
        f"but each GPU offers {format_nbytes(memory_bytes)}, of which {1 - LAST_RESORT_SHARE:.0%} is kept for activations; "
        f"raise memory, or choose smaller layers with layers=[...]"
    )
