"""Stands in for an evaluation loop's data fetcher, and knows which batches come next.

Lightning's loop fetches a batch, runs its step, and only then fetches the next one. Steps that are to share a pass over the
packs need their batches together. So a group is fetched when its first batch is asked for:

    loop asks for      batch 0     batch 1     batch 2     batch 3
    fetched            0 1 2       -           -           3 4 5
    `following`        1 2         2                       4 5

A group ends where a dataloader does. An error in the dataset is raised in the turn of the batch that it took the place of.

Nothing of Lightning is imported, so both of its packages are served.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What one call of the fetcher has come to."""

    batch: Any = None
    batch_idx: int = 0
    dataloader_idx: int = 0
    is_last: bool
    """What the fetcher's `done` was behind it."""
    error: BaseException | None = None
    """Raised instead of a batch: the end of the data, or an error in it."""


class LookAhead:
    """An iterator over (batch, batch_idx, dataloader_idx); everything else is the fetcher's own.

    Args:
        fetcher: Lightning's, ready to be asked.
        group_size: how many batches belong together, asked for each group.

    Attributes:
        last: the batch given last.
    """

    def __init__(self, fetcher: Any, group_size: Callable[[], int]) -> None:
        self._fetcher = fetcher
        self._group_size = group_size
        self._waiting: deque[Fetched] = deque()
        self._num_in_group = 0
        """Of those that wait, how many belong to the group of `last`."""
        self.last: Fetched | None = None

    @property
    def following(self) -> tuple[Fetched, ...]:
        """Batches of the same group that will be asked for next."""
        return tuple(self._waiting)[: self._num_in_group]

    @property
    def done(self) -> bool:
        return bool(self._fetcher.done) if self.last is None else self.last.is_last

    def __iter__(self) -> "LookAhead":
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if not self._num_in_group:
            self._num_in_group = self._gather(max(1, self._group_size()))
        self._num_in_group -= 1
        self.last = fetched = self._waiting.popleft()
        if fetched.error is not None:
            raise fetched.error
        return fetched.batch, fetched.batch_idx, fetched.dataloader_idx

    def _gather(self, size: int) -> int:
        """Fetch until `size` batches of one dataloader wait, or something else comes; returns how many there are."""
        for count in range(size):
            if len(self._waiting) == count:
                self._waiting.append(self._fetch())
            first, latest = self._waiting[0], self._waiting[count]
            if latest.error is not None or latest.dataloader_idx != first.dataloader_idx:
                return max(1, count)
        return size

    def _fetch(self) -> Fetched:
        try:
            batch, batch_idx, dataloader_idx = next(self._fetcher)
        except Exception as error:
            return Fetched(is_last=self._fetcher.done, error=error)
        return Fetched(
            batch=batch, batch_idx=batch_idx, dataloader_idx=dataloader_idx, is_last=bool(self._fetcher.done)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fetcher, name)
