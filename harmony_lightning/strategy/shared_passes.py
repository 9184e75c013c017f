"""Evaluation batches that share one pass over the packs: `HarmonyConfig.evaluation_batches`.

Lightning's loop runs batch after batch, and from outside it still looks so: hooks, logs, outputs and errors of each batch
come in its turn. But when the step of the first batch of a group is asked for, the steps of the whole group run, and what
came of the others waits to be asked for:

    loop      start 0  step 0    end 0    start 1  step 1  end 1    start 2  step 2  end 2
    run                0, 1, 2                     (kept)                    (kept)

So a step may depend neither on what user code does between two steps nor on what another step leaves behind. Where user
code could come between, batches stay alone (`overrides.comes_between_steps`), and so they do while a module is in training
mode. What only shows when a step runs ends the sharing: the first step of each kind runs alone, and if it draws random
numbers or takes derivatives across layers, so do all that follow.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harmony_lightning.runtime.together import Raised
from harmony_lightning.strategy.look_ahead import Fetched, LookAhead
from harmony_lightning.strategy.merged_log import MergedLog


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A step that has run ahead of its turn."""

    place: int
    """In the pass."""
    outcome: Any
    log: MergedLog | None


class SharedPasses:
    """The evaluation of one strategy, from set-up to teardown.

    Attributes:
        num_batches: how many share a pass, at most.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self._is_known: set[str] = set()
        """Steps of which one has run, and nothing speaks against shared passes."""
        self._is_alone: set[str] = set()
        """Steps that do not share passes any more."""
        self._look_ahead: LookAhead | None = None
        self._step = ""
        self._kept: deque[_Kept] = deque()
        self._brought: deque[tuple[Fetched, Any]] = deque()
        """Batches on their device whose turn has not come."""

    def begin(self, loop: Any, step: str, is_alone: bool) -> None:
        """A loop is about to ask for its first batch. Where batches stay alone, its fetcher stays what it is."""
        self._look_ahead = None
        self._step = step
        self._kept.clear()
        self._brought.clear()
        if not is_alone and step not in self._is_alone:
            self._look_ahead = loop._data_fetcher = LookAhead(loop._data_fetcher, self._group_size)

    def _group_size(self) -> int:
        if self._step in self._is_alone:
            return 1
        return self.num_batches if self._step in self._is_known else 1

    @property
    def is_on(self) -> bool:
        return self._look_ahead is not None

    @property
    def has_kept(self) -> bool:
        """Whether the step that is asked for has run already."""
        return bool(self._kept)

    def arguments_of_group(self, loop: Any, arguments: tuple[Any, ...], bring: Callable[[Any, int], Any]) -> list[Any]:
        """Arguments of the steps that run together: those of the first, and of the batches that follow it.

        Args:
            loop: the running loop.
            arguments: of the first step.
            bring: (batch, dataloader index) -> batch as a step is given it.
        """
        assert self._look_ahead is not None
        group = [arguments]
        for fetched in self._look_ahead.following if self._group_size() > 1 else ():
            batch = bring(fetched.batch, fetched.dataloader_idx)
            self._brought.append((fetched, batch))
            has_many = loop.num_dataloaders > 1 and getattr(loop, "_is_sequential", True)
            named = loop._build_kwargs(batch, fetched.batch_idx, fetched.dataloader_idx if has_many else None)
            group.append(loop._build_step_args_from_hook_kwargs(named, self._step))
        return group

    def brought(self, bring: Callable[[], Any]) -> Any:
        """A batch on its device: one that came there before if the loop asks for it, otherwise what `bring` gives."""
        is_next = bool(self._brought) and self._look_ahead is not None and self._look_ahead.last is self._brought[0][0]
        return self._brought.popleft()[1] if is_next else bring()

    def keep(self, outcomes: Sequence[Any], log: MergedLog | None, *, is_last: bool) -> None:
        """A group has run, the last one of its kind if `is_last`. Batches without outcome will be brought again."""
        self._is_known.add(self._step)
        if is_last:
            self._is_alone.add(self._step)
        self._kept.extend(_Kept(place=place, outcome=outcome, log=log) for place, outcome in enumerate(outcomes))
        while len(self._brought) > max(0, len(self._kept) - 1):
            self._brought.pop()

    def give(self) -> Any:
        """The output of the step that is asked for; its logs go to Lightning, or its error is raised."""
        kept = self._kept.popleft()
        if isinstance(kept.outcome, Raised):
            raise kept.outcome.error
        if kept.log is not None:
            kept.log.replay_of(kept.place)
        return kept.outcome
