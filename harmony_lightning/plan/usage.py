"""What a step was seen to take, beside the slots for weights: what a plan needs to know to let more stay on the devices.

And what tensors on their way between devices may take, for the runtime and for those who predict it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from harmony_lightning.plan.offsets import aligned
from harmony_lightning.record import Record

ByDevice = tuple[int, ...]

_TRAVELLING = 8
"""Of the memory, one in so many bytes. Where packs go round N devices, M - N microbatches wait in front of one of them, and
what finds no room there, or where it comes from, holds up all: 3.2 GB of the 8B model's activations with 32 microbatches of
8192 tokens on eight devices. With half as much room a step was 6 % longer (`benchmarks/step_time`)."""


def travelling_nbytes(memory_bytes: int, prefetch: int) -> int:
    """What tensors may take on a device that are on their way to others, and what those that come from others may, beyond
    the running microbatch and its neighbours. Where not even a second pack fits, nothing is to spare."""
    return memory_bytes // _TRAVELLING if prefetch else 0


_PIECES, _LEAST_PIECE = 32, 4 * 2**20
"""Of what is passed on over N devices the last one has to wait for N - 1 pieces before its first; the smaller they are, the
more copies there are."""


def summed_nbytes(nbytes: int) -> int:
    """What comes at once of so many bytes of gradients that are added up over devices."""
    return min(nbytes, max(_LEAST_PIECE, aligned(-(-nbytes // _PIECES))))


@dataclass(frozen=True, slots=True, kw_only=True)
class VisitPeak(Record):
    """While microbatches were in one pack, forward or backward."""

    pack: int
    """-1 for a whole step that trains nothing."""
    nbytes: ByDevice
    """The most that was in use at once, slots for weights left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held(Record):
    """Memory that waits from forward to backward if any of these stays; several may hold the same tensor."""

    stashes: tuple[int, ...] = ()
    """Packs with it in their stash."""
    layers: tuple[str, ...] = ()
    """Layers with it among their activations, of which inputs and weights are no part."""
    nbytes: ByDevice
    """Of all microbatches together; of a layer of the last pack, of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen(Record):
    """A step like the measured one in which something stayed: copies that were in flight then were fewer."""

    resident: tuple[int, ...]
    stash_stays: tuple[int, ...]
    keep: tuple[str, ...]
    """What stayed, as plans tell it."""
    visits: tuple[VisitPeak, ...]
    """What stayed is part of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(Record):
    """One step, measured under a plan by which nothing stays that need not."""

    visits: tuple[VisitPeak, ...]
    """In their order."""
    held: tuple[Held, ...] = ()
    """Empty for a step that trains nothing."""
    resting: ByDevice
    """In use in front of the step, slots for weights left out."""
    seen: Seen | None = None
    """What has come of that, where it is known."""

    def including(self, other: "Usage") -> "Usage":
        """Of a step with the calls of both, each the most that it was seen to take. `seen` was of other calls."""
        most: dict[tuple[tuple[int, ...], tuple[str, ...]], ByDevice] = {}
        for one in (*self.held, *other.held):
            key = one.stashes, one.layers
            most[key] = _largest(most.get(key, one.nbytes), one.nbytes)
        return Usage(
            visits=tuple(_merged(self.visits, other.visits)),
            held=tuple(Held(stashes=p, layers=names, nbytes=nbytes) for (p, names), nbytes in most.items()),
            resting=tuple(map(min, self.resting, other.resting)),  # what is there by then beside it counts as grown
        )


def _merged(visits: Sequence[VisitPeak], others: Sequence[VisitPeak]) -> Iterator[VisitPeak]:
    """One step may skip packs that another visits."""
    matcher = SequenceMatcher(None, [one.pack for one in visits], [one.pack for one in others], autojunk=False)
    for kind, start, stop, other_start, other_stop in matcher.get_opcodes():
        both = visits[start:stop], others[other_start:other_stop]
        if kind == "equal":
            yield from (replace(a, nbytes=_largest(a.nbytes, b.nbytes)) for a, b in zip(*both, strict=True))
        else:
            yield from (*both[0], *both[1])


def _largest(one: ByDevice, other: ByDevice) -> ByDevice:
    return tuple(map(max, one, other))
