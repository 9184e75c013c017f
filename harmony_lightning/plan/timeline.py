"""Timelines: what every lane of every device did, and when. Predicted and measured ones look the same."""

from dataclasses import dataclass
from itertools import pairwise

from harmony_lightning.record import Record

HOST = -1
"""The device of spans that host threads worked on; their lane is the thread's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span(Record):
    """One piece of work on one lane."""

    device: int
    lane: str
    name: str
    start: float
    """Seconds since the beginning of the timeline."""
    end: float
    nbytes: int
    """Bytes moved over a link, or read and written in memory."""
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline(Record):
    """Spans by device and lane, in their order there."""

    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """From 0 to the end of the last span."""
        return max((span.end for span in self.spans), default=0.0)

    def lane(self, device: int, lane: str) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if (span.device, span.lane) == (device, lane))

    def busy_seconds(self, device: int, lane: str) -> float:
        """How long a lane worked."""
        return sum(span.end - span.start for span in self.lane(device, lane))

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Of each training step but the last, from the end of its first forward to that of the next step's: what comes
        before that waits for no weights, and so may be early."""
        first = "forward of pack 0, microbatch 0"
        devices = {span.device for span in self.spans if span.name == first}  # any one, where that pack is dealt
        spans = [span for device in devices for span in self.lane(device, "compute")]
        ends: list[float] = []
        is_behind = True
        for span in sorted(spans, key=lambda span: span.start):
            if span.name == first:
                if is_behind:
                    ends.append(span.end)
                ends[-1], is_behind = span.end, False
            is_behind |= span.name.startswith("backward")
        return tuple(end - start for start, end in pairwise(ends))
