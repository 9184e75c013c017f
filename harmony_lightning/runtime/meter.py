"""Measures what a step takes on each device, so that the steps behind it may let more stay there (`plan.usage`)."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from harmony_lightning.hardware.device import Device
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.plan import LayerActivations, Plan, Usage, VisitPeak
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
        if not self.trains:
            pack = -1
        found = self._beside_slots([device.take_peak() for device in self._devices])
        known = self._peaks.setdefault((pack, self._is_backward), found)
        known[:] = map(max, known, found)

    def stash(self, segment: Segment, tensor: torch.Tensor) -> None:
        """A tensor waits from forward to backward."""
        seen = self._seen.setdefault(segment, set())
        if segment.saved_nbytes > segment.state.spare_nbytes or storage_key(tensor) not in seen:
            seen.add(storage_key(tensor))
            place = segment.device.index, segment.microbatch
            self._stash.setdefault(segment.pack, Counter())[place] += tensor.untyped_storage().nbytes()

    def activation(self, layer: str, segment: Segment, nbytes: int) -> None:
        """A layer has been called, whose operations have saved so much."""
        place = segment.device.index, segment.microbatch
        self._activations.setdefault(layer, Counter())[place] += nbytes

    def usage(self) -> Usage:
        """Of the step, which is over."""
        self.end_visit(0)
        plan = self._plan
        fused = set(plan.packs[-1].layers)
        return Usage(
            visits=tuple(VisitPeak(pack=pack, nbytes=tuple(peak)) for (pack, _), peak in self._peaks.items()),
            stash=tuple(self._by_device(self._stash.get(p, Counter()), sum) for p in range(len(plan.packs)) if self.trains),
            activations=tuple(
                LayerActivations(layer=layer, nbytes=self._by_device(found, max if layer in fused else sum))
                for layer, found in self._activations.items()
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

