"""Where stashes lie on the host: in one arena per device, at offsets planned from what steps before have done.

torch's own allocator of pinned memory gives each tensor a power of two, and never gives it back: 3840 MiB for the 3000 of
GPT-2 XL and 10240 tokens in float32, 1.2 to 1.6 times as much for activations that are 1600, 5120 or 6656 wide, as much for
4096 or 8192. An arena has the exact size, like those of weights. Which tensors leave for the host, how large they are and
how long they wait is not known before a step has been run; so those of the first steps, and whatever comes later that was
not foreseen, get memory of their own, and are counted.

A place is given out again when what waited there is gone, be it steps later, as with a graph that the user keeps. No copy
has to be waited for then: compute has waited for what came back from there, and what leaves next waits for compute.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from harmony_lightning.hardware.device import Cluster, Device
from harmony_lightning.plan import Lifetime, aligned, lay_at_offsets
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.transfer import empty_on_host
from harmony_lightning.runtime.weights.arena import lay_out
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

_WORTH_IT = 8
"""Places are planned anew when one byte in so many had none: to pin memory takes longer than to do without."""

Visit = tuple[int, int]
"""Pack and microbatch."""
_Key = tuple[int, int, int]
"""The same, and how many had left from there before in the step."""


class Stay:
    """The time that something is on the host, by a clock of its device that counts leavings and ends of one step."""

    __slots__ = ("_clock", "nbytes", "start", "stop")

    def __init__(self, clock: "count[int]", nbytes: int) -> None:
        self._clock = clock
        self.nbytes = nbytes
        self.start = next(clock)
        self.stop: int | None = None

    def end(self) -> None:
        self.stop = next(self._clock)

    def or_longer(self, other: Lifetime | None) -> Lifetime:
        """Both this and that one. What is still there will go when the step is over."""
        stop = next(self._clock) if self.stop is None else self.stop
        if other is None:
            return Lifetime(self.start, stop, aligned(self.nbytes))
        largest = max(other.nbytes, aligned(self.nbytes))
        return Lifetime(min(other.start, self.start), max(other.stop, stop), largest)


@dataclass(slots=True, eq=False)
class _Place:
    offset: int
    nbytes: int
    overlapping: list["_Place"] = field(default_factory=list)
    """Itself, and those that others have at other times."""
    stay: Stay | None = None
    """Of the one that had it last."""

    @property
    def is_free(self) -> bool:
        return all(place.stay is None or place.stay.stop is not None for place in self.overlapping)


class StashPlaces:
    """Those of all devices.

    Args:
        cluster: gives the memory.
        counters: of what had no place.
        decision: what the plan lets stay on devices: while that changes from step to step, no places are planned.
    """

    def __init__(self, cluster: Cluster, counters: Counters, decision: Callable[[], object]) -> None:
        self._cluster = cluster
        self._counters = counters
        self._decision = decision
        self._decided = decision()
        """That of the running step."""
        self._is_over = False
        """Whether what leaves next belongs to another step."""
        self._arenas = [_Arena() for _ in cluster.devices]

    def take(self, source: torch.Tensor, device: Device, visit: Visit | None) -> tuple[torch.Tensor, Stay]:
        """Host memory for a copy of `source`, which leaves `device`; whoever has it tells its stay when it ends.

        Args:
            visit: in which it is saved; None if it goes later, because memory is short.
        """
        arena = self._arenas[device.index]
        with torch.inference_mode(False):
            if self._is_over:
                self._begin_step()
            stay = Stay(arena.clock, source.nbytes)
            if visit is not None and (place := arena.take(visit, stay)) is not None:
                region = lay_out({"": source}, ("",))[""]
                return region.view(arena.memory[place.offset :]), stay
            self._counters.unplaced_stashes += 1
            return empty_on_host(source, device), stay

    def end_step(self) -> None:
        self._is_over = True

    def _begin_step(self) -> None:
        before, self._decided, self._is_over = self._decided, self._decision(), False
        if before == self._decided and any(arena.is_worth_planning for arena in self._arenas):
            self._cluster.trim_host_memory()
            for arena in self._arenas:
                if arena.is_worth_planning:
                    arena.plan(self._cluster)
        for arena in self._arenas:
            arena.begin_step()


class _Arena:
    """Of one device.

    Attributes:
        memory: bytes.
        clock: of the step.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._places: dict[_Key, _Place] = {}
        self._known: dict[_Key, Lifetime] = {}
        """What places have been planned from."""
        self._is_refused = False
        """Whether there was no memory for so much at once."""
        self.begin_step()

    def begin_step(self) -> None:
        self.clock = count()
        self._stays: dict[_Key, Stay] = {}
        self._num_left: Counter[Visit] = Counter()
        self._missed_nbytes = 0

    def take(self, visit: Visit, stay: Stay) -> _Place | None:
        """The place for what leaves next in this visit, if there is one and it is free."""
        key = (*visit, self._num_left[visit])
        self._num_left[visit] += 1
        self._stays[key] = stay
        place = self._places.get(key)
        if place is None or place.nbytes < stay.nbytes:
            self._missed_nbytes += stay.nbytes
            return None
        if not place.is_free:
            return None
        place.stay = stay
        return place

    @property
    def is_worth_planning(self) -> bool:
        return not self._is_refused and self._missed_nbytes * _WORTH_IT > sum(
            stay.nbytes for stay in self._stays.values()
        )

    def plan(self, cluster: Cluster) -> None:
        """Places for all that has left in this step, and in those from which places have been planned before."""
        for key, stay in self._stays.items():
            self._known[key] = stay.or_longer(self._known.get(key))
        lifetimes = tuple(self._known.values())
        offsets = lay_at_offsets(lifetimes)
        is_in_use = not all(place.is_free for place in self._places.values())
        places = [_Place(offset, one.nbytes) for offset, one in zip(offsets, lifetimes, strict=True)]
        _find_overlapping(places)
        total = max((place.offset + place.nbytes for place in places), default=0)
        if total > self.memory.numel() or is_in_use:
            self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # the former memory goes first
            try:
                self.memory = cluster.host_buffer(total)
            except (MemoryError, RuntimeError) as error:
                log.warning(
                    "harmony: the host has not %s in one piece for what waits there from forward to backward, which goes "
                    "on in pieces: %s",
                    format_nbytes(total),
                    str(error).splitlines()[0],
                )
                self._is_refused, places = True, []
        self._places = dict(zip(self._known, places, strict=False))


def _find_overlapping(places: Sequence[_Place]) -> None:
    present: list[_Place] = []
    for place in sorted(places, key=lambda place: place.offset):
        present = [other for other in present if other.offset + other.nbytes > place.offset]
        for other in present:
            other.overlapping.append(place)
            place.overlapping.append(other)
        place.overlapping.append(place)
        present.append(place)
