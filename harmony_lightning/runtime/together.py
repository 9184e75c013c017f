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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.runtime.derivatives import Uncuttable
from harmony_lightning.runtime.microbatch import Microbatch
from harmony_lightning.runtime.randomness import Replay
from harmony_lightning.runtime.user_code import UserCode
from harmony_lightning.runtime.visits import next_in_forward, visit


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


class SharedPass:
    """One pass over the packs that several steps share."""

    def __init__(self, code: UserCode, functions: Sequence[Callable[[], Any]]) -> None:
        self._code = code
        self._state = code.state
        self.microbatches = [
            Microbatch(code.state, m, function, None, is_cut=True) for m, function in enumerate(functions)
        ]
        self._turns = Turns(self.microbatches)

    def run(self) -> Together:
        """All steps, to their end or until they are given up."""
        state, turns, plan = self._state, self._turns, self._state.plan
        with visit(state, 0, self.microbatches, next_in_forward(plan, 0, self.microbatches)):
            for microbatch in self.microbatches:
                self._let_go_on(microbatch)
        while ready := turns.ready:
            pack = min(m.waits_for for m in ready if m.waits_for is not None)
            visitors = [m for m in ready if m.waits_for == pack]
            with visit(state, pack, visitors, next_in_forward(plan, pack, turns.left)):
                for microbatch in visitors:
                    self._let_go_on(microbatch)
        return Together(outcomes=turns.outcomes(), obstacle=turns.obstacle)

    def _let_go_on(self, microbatch: Microbatch) -> None:
        turns = self._turns
        if microbatch not in turns.left:
            return
        is_first, device = microbatch is turns.first, microbatch.device
        drawn = Replay(device)
        self._state.departures.turn(device)
        try:
            with self._code.running(microbatch):
                microbatch.go_on(device)
        except Uncuttable:
            turns.obstacle = "it takes derivatives across layers"
            self._code.kill(turns.give_up_from(microbatch.index))
        except Exception as error:
            is_memory = isinstance(error, OUT_OF_MEMORY)
            if is_memory and len(self.microbatches) > 1:
                turns.obstacle = f"{len(self.microbatches)} at once do not fit ({error})"
                self._code.kill(turns.give_up_from(microbatch.index))
            else:
                microbatch.end(Raised(error))
                self._code.kill(turns.give_up_from(microbatch.index + 1))
        drawn.keep_what_was_drawn(device)
        if not drawn.is_empty:
            turns.obstacle = "it draws random numbers"
            if not is_first:
                drawn.begin(device)
                self._code.kill(turns.give_up_from(microbatch.index))

    def take_turn(self) -> None:
        """Called from user code of one of the steps: wait until all before it have ended."""
        microbatch = self._code.microbatch
        if microbatch is not None and not self._state.depth:
            while microbatch is not self._turns.first:
                microbatch.park(microbatch.segment.pack, awaits_turn=True)
