"""Measures what a step takes on each device, so that the steps behind it may let more stay there (`plan.usage`).

A `Meter` watches a step in which nothing stays that need not, and weighs each tensor that might. Where several of those
are the same tensor, which waits only once, that shows when they do stay: `Holding` watches such a step.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from harmony_lightning.hardware.device import Device
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.plan import Held, Plan, Usage, VisitPeak
from harmony_lightning.runtime.segment import Segment

Place = tuple[int, int]
"""Device and microbatch."""


class Meter:
    """One step of one plan, from its first visit to its last."""

    def __init__(
        self, plan: Plan, devices: Sequence[Device], slots_nbytes: Callable[[], list[int]], *, trains: bool
    ) -> None:
        """`slots_nbytes` tells what slots for weights take on each device."""
        self.trains = trains
        self._plan = plan
        self._devices = devices
        self._slots_nbytes = slots_nbytes
        self._peaks: dict[tuple[int, bool], list[int]] = {}
        self._is_backward = False
        self._stash: dict[int, Counter[Place]] = {}
        self._activations: dict[str, Counter[Place]] = {}
        self._unknown: set[str] = set()
        self._seen: dict[Segment, set[int]] = {}
        """Memory of what has been counted of a segment's stash, which holds it until the segment is left."""
        for device in devices:
            device.take_peak()
        self._resting = self._beside_slots([device.allocated_bytes() for device in devices])

    def turn_back(self) -> None:
        """Forward is over."""
        self._is_backward = True

    def end_visit(self, pack: int) -> None:
        """All microbatches have left the pack."""
        found = self._beside_slots([device.take_peak() for device in self._devices])
        known = self._peaks.setdefault((pack if self.trains else -1, self._is_backward), found)
        known[:] = map(max, known, found)

    def stash(self, segment: Segment, tensor: torch.Tensor) -> None:
        """A tensor goes to the host that might have waited where it is."""
        seen = self._seen.setdefault(segment, set())
        is_held = segment.saved_nbytes <= segment.state.spare_nbytes
        if not is_held or storage_key(tensor) not in seen:
            seen.add(storage_key(tensor))
            self._stash.setdefault(segment.pack, Counter())[_place(segment)] += tensor.untyped_storage().nbytes()

    def activation(self, layer: str, segment: Segment, tensors: Iterable[torch.Tensor]) -> None:
        """A layer has been called, whose operations have saved these tensors."""
        storages = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        self._activations.setdefault(layer, Counter())[_place(segment)] += sum(storages.values())

    def forget_layer(self, layer: str) -> None:
        """What its operations would save alone is not known."""
        self._unknown.add(layer)

    def usage(self) -> Usage:
        """Of the step, which is over."""
        self.end_visit(0)
        fused = set(self._plan.packs[-1].layers)
        return Usage(
            visits=tuple(VisitPeak(pack=pack, nbytes=tuple(peak)) for (pack, _), peak in self._peaks.items()),
            held=(
                *(Held(stashes=(pack,), nbytes=self._by_device(found, sum)) for pack, found in self._stash.items()),
                *(
                    Held(layers=(layer,), nbytes=self._by_device(found, max if layer in fused else sum))
                    for layer, found in self._activations.items()
                    if layer not in self._unknown
                ),
            ),
            resting=tuple(self._resting),
        )

    def _beside_slots(self, nbytes: list[int]) -> list[int]:
        return [total - slots for total, slots in zip(nbytes, self._slots_nbytes(), strict=True)]

    def _by_device(self, found: Counter[Place], total: Callable[[list[int]], int]) -> tuple[int, ...]:
        parts: list[list[int]] = [[0] for _ in self._devices]
        for (device, _), nbytes in found.items():
            parts[device].append(nbytes)
        return tuple(map(total, parts))


@dataclass(slots=True)
class _Storage:
    nbytes: int
    device: int
    tensor: weakref.ref[torch.Tensor]
    """One that holds it; when that is gone, the address may be another storage's."""
    stashes: set[int] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)


class Holding:
    """Who holds what in one step, up to the end of its forward.

    Attributes:
        is_over: that was reached.
    """

    def __init__(self, plan: Plan, num_devices: int) -> None:
        self._plan = plan
        self.is_over = False
        self._num_devices = num_devices
        self._storages: list[_Storage] = []
        self._present: dict[int, _Storage] = {}

    def stash(self, segment: Segment, tensor: torch.Tensor) -> None:
        """`tensor` is an object that is held until backward."""
        self._find(segment, tensor).stashes.add(segment.pack)

    def activation(self, layer: str, segment: Segment, tensors: Iterable[torch.Tensor]) -> None:
        """The same for what operations of a layer have saved."""
        for tensor in tensors:
            self._find(segment, tensor).layers.add(layer)

    def _find(self, segment: Segment, tensor: torch.Tensor) -> _Storage:
        key = storage_key(tensor)
        found = self._present.get(key)
        if found is None or found.tensor() is None:
            nbytes = tensor.untyped_storage().nbytes()
            found = self._present[key] = _Storage(nbytes, segment.device.index, weakref.ref(tensor))
            self._storages.append(found)
        return found

    def correct(self, usage: Usage) -> Usage:
        """What was measured before, with what has been seen in the place of estimates."""
        plan, groups = self._plan, dict[tuple[tuple[int, ...], tuple[str, ...]], list[int]]()
        for one in self._storages:
            nbytes = groups.setdefault((tuple(sorted(one.stashes)), tuple(sorted(one.layers))), [0] * self._num_devices)
            nbytes[one.device] += one.nbytes
        fused = plan.packs[-1].layers
        estimated = (
            held
            for held in usage.held
            if any(p not in plan.stash_stays for p in held.stashes)
            or any(name not in plan.keep or name in fused for name in held.layers)
        )
        seen = (Held(stashes=p, layers=names, nbytes=tuple(nbytes)) for (p, names), nbytes in groups.items())
        return replace(usage, held=(*estimated, *seen))


def _place(segment: Segment) -> Place:
    return segment.device.index, segment.microbatch
