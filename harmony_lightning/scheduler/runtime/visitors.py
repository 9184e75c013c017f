"""Which microbatches come to a device for a pack, where they come from and where they go, and which go together."""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from harmony_lightning.plan.schedule import Schedule

Group = dict[int, list[int]]
"""By device, microbatches that go through a pack's layers in one call."""


class Visitors:
    """The microbatches of a pack that come to a device.

    Attributes:
        sizes: their samples.
        count: how many they are.
        all, arriving, leaving: the same, the last one by its share where it is smaller; those that come from other devices,
            and those that go to others.
        group: so many go through the pack together.
        moments: the first one and the last two, where most or least of the others wait.
    """

    def __init__(
        self, sizes: Sequence[int], present: Sequence[int], arriving: Sequence[int], leaving: Sequence[int], group: int
    ) -> None:
        """Of all microbatches, with these sizes: those that come here, and those of them that are on other devices in the
        pack before, and in the next one; how many go through together."""
        self.sizes = [sizes[m] for m in present]
        self.count = len(present)
        self.all = sum(self.sizes) / sizes[0]
        self.arriving = sum(sizes[m] for m in arriving) / sizes[0]
        self.leaving = sum(sizes[m] for m in leaving) / sizes[0]
        self.group = min(self.count, group)
        self.moments = sorted({0, max(0, self.count - 2), self.count - 1})
        self._present, self._arriving, self._leaving = present, arriving, leaving

    def left(self, m: int) -> float:
        """Microbatches behind the m-th one here."""
        return self.all - 1 - m if m < self.count - 1 else 0.0

    def stayed(self, m: int) -> int:
        """Of those in front of it, how many are here in the pack before, too."""
        return m - bisect_left(self._arriving, self._present[m])

    def gone(self, m: int) -> int:
        """How many of those that leave are in front of microbatch m of all."""
        return bisect_left(self._leaving, m)

    def index(self, m: int) -> int:
        """Among all microbatches."""
        return self._present[m]


def visitors_of(schedule: Schedule, device: int, pack: int, sizes: tuple[int, ...]) -> Visitors:
    """Those of one pack on one device; `sizes` are those of all microbatches."""
    last = len(schedule.packs_backward) - 1
    group = schedule.microbatches_per_forward if pack < last else 1
    if not {pack - 1, pack, pack + 1}.isdisjoint(schedule.dealt):
        present = [m for m in range(len(sizes)) if schedule.device(pack, m) == device]
        arriving = [m for m in present if pack and schedule.device(pack - 1, m) != device]
        leaving = [m for m in present if pack < last and schedule.device(pack + 1, m) != device]
        return Visitors(sizes, present, arriving, leaving, group)
    pipeline, travels = device // schedule.depth, schedule.depth > 1
    return _evenly(sizes, pipeline, schedule.num_copies, travels and pack > 0, travels and pack < last, group)


@lru_cache(maxsize=256)
def _evenly(sizes: tuple[int, ...], start: int, step: int, arrives: bool, leaves: bool, group: int) -> Visitors:
    """Every so many of them, all from other devices or none, and all to others or none: most packs are alike in that."""
    present = range(start, len(sizes), step)
    return Visitors(sizes, present, present if arrives else (), present if leaves else (), group)


def groups_of(places: Sequence[int], size: int) -> list[Group]:
    """All microbatches, by their devices in a pack, as `runtime.step` forms groups: no more than so many on any device."""
    groups: list[Group] = [{}]
    for m, d in enumerate(places):
        if len(groups[-1].get(d, ())) == size or (size == 1 and m):
            groups.append({})
        groups[-1].setdefault(d, []).append(m)
    return groups


def members(group: Group) -> list[int]:
    """In their order over all devices."""
    return next(iter(group.values())) if len(group) == 1 else sorted(itertools.chain(*group.values()))


def following_visits(visitors: Sequence[Sequence[int]]) -> list[dict[int, int]]:
    """By position and device that is visited there, the position at which it is visited next."""
    following: list[dict[int, int]] = []
    upcoming: dict[int, int] = {}
    for position in range(len(visitors) - 1, -1, -1):
        following.append({d: upcoming[d] for d in visitors[position] if d in upcoming})
        upcoming.update(dict.fromkeys(visitors[position], position))
    return following[::-1]
