"""What a step was seen to take, beside the slots for weights: what a plan needs to know to let more stay on the devices."""

from dataclasses import dataclass

from harmony_lightning.record import Record

ByDevice = tuple[int, ...]


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
