"""Steps that share one pass over the packs, and come out as if each had run after the one before.

They interleave at pack borders, so a later step has begun when an earlier one goes on. That is no difference as long as
steps only read the weights. Where order shows, it is kept:

    random numbers     only the first step that has not ended may draw; another one that does is given up, its draws undone
    metrics            whoever touches one first waits for its turn (`Turns.first`)
    buffers            layers write them in the order of the steps, as every pack is visited in that order
    exceptions         the error of step m is its outcome; later steps are given up

A step that is given up has begun for nothing: it must run again, alone, in its turn. Only what its own Python code has
written until then is written twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harmony_lightning.runtime.microbatch import Microbatch


@dataclass(frozen=True, slots=True)
class Raised:
    """The outcome of a step that ended with an error."""

    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """What came of steps that were to share a pass."""

    outcomes: tuple[Any, ...]
    """Results of the steps from the first on, the last one perhaps `Raised`. Steps without outcome were given up."""
    obstacle: str | None
    """Why such steps had better run one by one: "step" is the subject."""


class Turns:
    """Who may go on.

    Attributes:
        obstacle: what has been found that keeps steps from sharing a pass.
    """

    def __init__(self, microbatches: Sequence[Microbatch]) -> None:
        self._microbatches = list(microbatches)
        self.obstacle: str | None = None

    @property
    def left(self) -> list[Microbatch]:
        """Neither ended nor given up, in order."""
        return [microbatch for microbatch in self._microbatches if not microbatch.is_done]

    @property
    def first(self) -> Microbatch:
        """The one that may do anything: all before it have ended."""
        return self.left[0]

    @property
    def ready(self) -> list[Microbatch]:
        """Those that do not wait for their turn."""
        left = self.left
        return [microbatch for microbatch in left if microbatch is left[0] or not microbatch.awaits_turn]

    def give_up_from(self, index: int) -> list[Microbatch]:
        """Steps from this one on will not run here; returns them."""
        given_up = self._microbatches[index:]
        del self._microbatches[index:]
        return given_up

    def outcomes(self) -> tuple[Any, ...]:
        return tuple(microbatch.result for microbatch in self._microbatches)
