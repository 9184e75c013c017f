"""What a device will do next in backward, so that copies for it can set out while it still does something else."""

from collections.abc import Callable, Iterator, Sequence

from harmony_lightning.runtime.microbatch import Microbatch
from harmony_lightning.runtime.segment import Segment


class Lookahead:
    """Calls `prepare` with each segment when the one in front of it on the same device begins its backward; for the first
    ones of all devices, at once."""

    def __init__(self, microbatches: Sequence[Microbatch], prepare: Callable[[Segment], None]) -> None:
        self._prepare = prepare
        self._following: dict[Segment, Segment] = {}
        last: dict[int, Segment] = {}
        for segment in _order(microbatches):
            former = last.get(segment.device.index)
            if former is None:
                prepare(segment)
            else:
                self._following[former] = segment
            last[segment.device.index] = segment

    def begin(self, segment: Segment) -> None:
        following = self._following.pop(segment, None)
        if following is not None:
            self._prepare(following)


def _order(microbatches: Sequence[Microbatch]) -> Iterator[Segment]:
    """All segments in the order of backward: pack by pack from the last, microbatches in their order."""
    left = [list(microbatch.segments) for microbatch in microbatches]
    while waiting := [segments for segments in left if segments]:
        pack = max(segments[-1].pack for segments in waiting)
        for segments in waiting:
            while segments and segments[-1].pack == pack:
                yield segments.pop()
