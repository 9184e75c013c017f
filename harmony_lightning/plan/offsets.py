"""Where in one piece of memory things lie that are there at different times.

What is alive at the same time must not overlap; the total should be little above the most that is alive at once, which
none can go below. (In general that is hard to do best: dynamic storage allocation. Packs of which each meets only its
neighbours are an easy case: they lie at the two ends in turn.)

    high      bbbbbbbb    dddddddd
              bbbbbbbb
    low   aaaaaaaa    cccccccc    eeee
          time ->
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

ALIGNMENT = 64
"""Bytes: start of every weight in an arena. The host allocator's own, so kernels see the alignment they are used to."""


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Something that is in memory from `start` up to, not including, `stop`, in whatever unit of time."""

    start: int
    stop: int
    nbytes: int

    def meets(self, other: "Lifetime") -> bool:
        """Whether both are there at some time."""
        return self.start < other.stop and other.start < self.stop


def most_alive(lifetimes: Sequence[Lifetime]) -> int:
    """Bytes that are there at once at most."""
    changes = [(one.start, one.nbytes) for one in lifetimes] + [(one.stop, -one.nbytes) for one in lifetimes]
    alive = most = 0
    for _, nbytes in sorted(changes):  # what ends goes before what begins
        alive += nbytes
        most = max(most, alive)
    return most


@lru_cache(maxsize=4096)
def lay_at_offsets(lifetimes: tuple[Lifetime, ...]) -> tuple[int, ...]:
    """Offsets in bytes, in the order given; multiples of whatever all sizes are multiples of."""
    least = most_alive(lifetimes)
    if least == sum(one.nbytes for one in lifetimes):  # all are there at some time
        return tuple(accumulate((one.nbytes for one in lifetimes[:-1]), initial=0))[: len(lifetimes)]
    best: tuple[int, tuple[int, ...]] | None = None
    for offsets in _ways(lifetimes, least):
        total = extent(lifetimes, offsets)
        if best is None or total < best[0]:
            best = total, offsets
        if total == least:
            break
    return () if best is None else best[1]


def extent(lifetimes: Sequence[Lifetime], offsets: Sequence[int]) -> int:
    """Bytes that all take together."""
    return max((offset + one.nbytes for one, offset in zip(lifetimes, offsets, strict=True)), default=0)


def _ways(lifetimes: Sequence[Lifetime], least: int) -> Iterator[tuple[int, ...]]:
    keys: tuple[Callable[[Lifetime], tuple[int, ...]], ...] = (
        _begin,
        lambda one: (-one.nbytes, one.start),
        lambda one: (-one.nbytes * (one.stop - one.start), one.start),
    )
    for key in keys:
        order = sorted(range(len(lifetimes)), key=lambda index: (*key(lifetimes[index]), index))
        for ceiling in (least, None):
            yield _place(lifetimes, order, ceiling, is_in_time=key is _begin)


def _begin(one: Lifetime) -> tuple[int, ...]:
    return one.start, -one.nbytes


def _place(
    lifetimes: Sequence[Lifetime], order: Sequence[int], ceiling: int | None, *, is_in_time: bool
) -> tuple[int, ...]:
    """One after the other, each as low as it can be; with a ceiling every second one as high below that as it can be."""
    placed: dict[int, int] = {}
    near: list[int] = []
    """Those that others still to come may meet."""
    for turn, index in enumerate(order):
        one = lifetimes[index]
        if is_in_time:
            near = [i for i in near if lifetimes[i].stop > one.start]
        near.append(index)
        taken = sorted((placed[i], placed[i] + lifetimes[i].nbytes) for i in near[:-1] if lifetimes[i].meets(one))
        gaps: list[tuple[int, int]] = []
        end = 0
        for start, stop in taken:
            gaps.append((end, start))
            end = max(end, stop)
        gaps.append((end, max(ceiling or 0, end + one.nbytes)))
        fitting = [(low, high) for low, high in gaps if high - low >= one.nbytes]
        is_high = ceiling is not None and turn % 2 == 1
        placed[index] = fitting[-1][1] - one.nbytes if is_high else fitting[0][0]
    return tuple(placed[index] for index in range(len(lifetimes)))
