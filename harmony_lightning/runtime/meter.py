"""Measures what a step takes on each device, so that the steps behind it may let more stay there (`plan.usage`).

A `Meter` watches a step in which nothing stays that need not, and weighs each tensor that might. Where several of those
are the same tensor, which waits only once, that shows when they do stay, and so does what is in flight then: `Holding`
watches such a step. Both take the `VisitPeaks` of theirs.
"""

import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from harmony_lightning.hardware.device import Device
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.plan import Held, Plan, Seen, Usage, VisitPeak

Place = tuple[int, int]
"""Device and microbatch."""


class Segment(Protocol):
    """What is asked of a `segment`."""

    pack: int
    microbatch: int
    device: Device

    @property
    def has_saved_much(self) -> bool: ...


class VisitPeaks:
    """The most in use beside slots for weights, visit by visit.

    Attributes:
        visits: so far, in their order.
        resting: in use in front of the step.
    """

    def __init__(self, devices: Sequence[Device], slots_nbytes: Callable[[], list[int]]) -> None:
        """`slots_nbytes` tells what slots for weights take on each device."""
        self.visits: list[VisitPeak] = []
        self._devices = devices
        self._slots_nbytes = slots_nbytes
        for device in devices:
            device.take_peak()
        self.resting = self._beside_slots([device.allocated_bytes() for device in devices])

    def end_visit(self, pack: int) -> None:
        """All microbatches have left the pack."""
        found = self._beside_slots([device.take_peak() for device in self._devices])
        self.visits.append(VisitPeak(pack=pack, nbytes=found))

    def _beside_slots(self, nbytes: list[int]) -> tuple[int, ...]:
        return tuple(total - slots for total, slots in zip(nbytes, self._slots_nbytes(), strict=True))


class Meter:
    """One step of one plan, from its first visit to its last."""

    def __init__(self, plan: Plan, peaks: VisitPeaks, *, trains: bool) -> None:
        self.trains = trains
        self._plan = plan
        self._peaks = peaks
        self._stash: dict[int, Counter[Place]] = {}
        self._activations: dict[str, Counter[Place]] = {}
        self._unknown: set[str] = set()
        self._seen: dict[Segment, set[int]] = {}
        """Memory of what has been counted of a segment's stash, which holds it until the segment is left."""

    def stash(self, segment: Segment, tensor: torch.Tensor) -> None:
        """A tensor goes to the host that might have waited where it is."""
        seen = self._seen.setdefault(segment, set())
        if segment.has_saved_much or storage_key(tensor) not in seen:
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
        self._peaks.end_visit(0)
        visits = self._peaks.visits
        if not self.trains:
            by_device = zip(*(visit.nbytes for visit in visits), strict=True)
            visits = [VisitPeak(pack=-1, nbytes=tuple(map(max, by_device)))]
        fused = set(self._plan.packs[-1].layers)
        return Usage(
            visits=tuple(visits),
            held=(
                *(Held(stashes=(pack,), nbytes=self._by_device(found, sum)) for pack, found in self._stash.items()),
                *(
                    Held(layers=(layer,), nbytes=self._by_device(found, max if layer in fused else sum))
                    for layer, found in self._activations.items()
                    if layer not in self._unknown
                ),
            ),
            resting=self._peaks.resting,
        )

    def _by_device(self, found: Counter[Place], total: Callable[[list[int]], int]) -> tuple[int, ...]:
        parts: list[list[int]] = [[0] for _ in self._peaks.resting]
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
    """Who holds what in one step, up to the end of its forward, and what that one takes.

    Attributes:
        peaks: of the step; None if it was not cut.
        is_complete: the step was carried out to its end.
    """

    def __init__(self, plan: Plan, num_devices: int) -> None:
        self._plan = plan
        self.peaks: VisitPeaks | None = None
        self.is_complete = False
        self._num_devices = num_devices
        self._storages: list[_Storage] = []
        self._present: dict[int, _Storage] = {}

    def end(self) -> None:
        """The step has been carried out to its end."""
        self.is_complete = True
        if self.peaks is not None:
            self.peaks.end_visit(0)

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
        found = (Held(stashes=p, layers=names, nbytes=tuple(nbytes)) for (p, names), nbytes in groups.items())
        return replace(usage, held=(*estimated, *found), seen=self._seen(usage.resting))

    def _seen(self, resting: Sequence[int]) -> Seen | None:
        """As if what others have on the devices were as much as when the step was measured."""
        if self.peaks is None:
            return None
        less = list(map(operator.sub, resting, self.peaks.resting))
        visits = (replace(visit, nbytes=tuple(map(operator.add, visit.nbytes, less))) for visit in self.peaks.visits)
        plan = self._plan
        return Seen(resident=plan.resident, stash_stays=plan.stash_stays, keep=plan.keep, visits=tuple(visits))


def _place(segment: Segment) -> Place:
    return segment.device.index, segment.microbatch
