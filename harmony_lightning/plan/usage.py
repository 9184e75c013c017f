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
class LayerActivations(Record):
    """What operations inside a layer saved for their backward, the layer's inputs and weights left out."""

    layer: str
    nbytes: ByDevice
    """Of all microbatches together; in the last pack, of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(Record):
    """One step, measured under a plan by which nothing stays that need not."""

    visits: tuple[VisitPeak, ...]
    stash: tuple[ByDevice, ...] = ()
    """By pack: what waited from forward to backward, of all microbatches together; empty for steps that train nothing."""
    activations: tuple[LayerActivations, ...] = ()
    resting: ByDevice
    """In use in front of the step, slots for weights left out."""
