"""Turns: the packs of a step in the order in which they are carried out, and what later ones wait for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Optional

from harmony_lightning.plan.graph import NUM_LANES, Lane
from harmony_lightning.plan.schedule import Schedule, Span
from harmony_lightning.scheduler.clock import Event


@dataclass(slots=True, kw_only=True, eq=False)
class Turn:
    """All microbatches of one pack, forward or backward, on one device."""

    index: int
    """In order of execution, counted on over steps."""
    pack: int
    """Index among the forward or the backward packs."""
    span: Span
    device: int
    is_forward: bool
    is_fused: bool
    """The last backward pack: it runs forward too."""
    former: Optional["Turn"]
    """Where the input, or the gradient of the output, comes from; None for the first forward pack of a step."""
    left: Optional["Turn"]
    """The turn before on the same device."""
    left2: Optional["Turn"]
    """The one before that."""
    right: Optional["Turn"] = None
    """The turn after it on the same device, if it is of the same step and somebody looked ahead."""
    computed: list[Event] = field(default_factory=list)
    """By microbatch: its last computation here."""
    recomputed: list[Event] = field(default_factory=list)
    sent: list[Event] = field(default_factory=list)
    """By microbatch: its output, or the gradient of its input, has reached the host, if it goes there."""
    released: Event = None
    """The memory of its weights, and of their gradients, is free."""

    def lane(self, lane: Lane) -> int:
        return NUM_LANES * self.device + lane


def turns(schedule: Schedule, former_step: Sequence[Turn] = ()) -> Iterator[Turn]:
    """Turns of one step, after those of the step before; in dp those of one device, which stands for all.

    The user of each turn fills in its events before they are asked for by later ones.
    """
    devices = schedule.order_of_devices()
    num_forward, num_backward = len(schedule.packs_forward), len(schedule.packs_backward)
    lefts: dict[int, Turn] = {turn.device: turn for turn in former_step}
    former: Turn | None = None
    for position, device in enumerate(devices):
        is_forward = position < num_forward
        pack = position if is_forward else num_forward + num_backward - 1 - position
        left = lefts.get(device)
        former = lefts[device] = Turn(
            index=position + (former_step[-1].index + 1 if former_step else 0),
            pack=pack,
            span=schedule.packs_forward[pack] if is_forward else schedule.packs_backward[pack],
            device=device,
            is_forward=is_forward,
            is_fused=position == num_forward,
            former=former,
            left=left,
            left2=left.left if left else None,
        )
        yield former
