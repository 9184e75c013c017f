"""Who listens when a schedule is carried out: a clock that adds up times, or a recorder that writes down the graph.

Both take tasks one by one in an order that respects what they wait for; so a step is scored in one pass, without a queue
of events and without building a graph first, which is what lets a search look at hundreds of schedules per second.
"""

from typing import Any, Protocol

from harmony_lightning.plan.graph import NUM_LANES, Kind, Task, TaskGraph

Event = Any
"""What a listener returns for a task, to be waited for by later ones; None waits for nothing."""


class Listener(Protocol):
    """Takes the tasks of a step."""

    def run(
        self, lane: int, seconds: float, kind: Kind, turn: int, microbatch: int, nbytes: float, *after: Event
    ) -> Event:
        """A task on one lane, after the lane's former task and after those given."""

    def run_on_both(
        self,
        lane: int,
        other: int,
        seconds: float,
        kind: Kind,
        turn: int,
        microbatch: int,
        nbytes: float,
        *after: Event,
    ) -> Event:
        """A task that occupies two lanes at once."""


class Clock:
    """Events are ends, in seconds."""

    def __init__(self, num_devices: int) -> None:
        self.free = [0.0] * (num_devices * NUM_LANES)
        """When each lane has done what it was given so far."""

    def run(
        self, lane: int, seconds: float, kind: Kind, turn: int, microbatch: int, nbytes: float, *after: float | None
    ) -> float:
        end = self.free[lane]
        for event in after:
            if event is not None and event > end:
                end = event
        end += seconds
        self.free[lane] = end
        return end

    def run_on_both(
        self, lane: int, other: int, seconds: float, kind: Kind, turn: int, microbatch: int, nbytes: float,
        *after: float | None,
    ) -> float:  # fmt: skip
        end = max(self.free[lane], self.free[other])
        for event in after:
            if event is not None and event > end:
                end = event
        end += seconds
        self.free[lane] = self.free[other] = end
        return end

    @property
    def seconds(self) -> float:
        """When everything is done."""
        return max(self.free)


class Recorder:
    """Events are indices of tasks."""

    def __init__(self, num_devices: int) -> None:
        self._num_devices = num_devices
        self._tasks: list[Task] = []

    def run(
        self, lane: int, seconds: float, kind: Kind, turn: int, microbatch: int, nbytes: float, *after: int | None
    ) -> int:
        return self._record((lane,), seconds, kind, turn, microbatch, nbytes, after)

    def run_on_both(
        self, lane: int, other: int, seconds: float, kind: Kind, turn: int, microbatch: int, nbytes: float,
        *after: int | None,
    ) -> int:  # fmt: skip
        return self._record((lane, other), seconds, kind, turn, microbatch, nbytes, after)

    def _record(
        self, lanes: tuple[int, ...], seconds: float, kind: Kind, turn: int, microbatch: int, nbytes: float,
        after: tuple[int | None, ...],
    ) -> int:  # fmt: skip
        self._tasks.append(
            Task(
                kind=int(kind),
                lanes=lanes,
                turn=turn,
                microbatch=microbatch,
                seconds=seconds,
                nbytes=nbytes,
                after=tuple(dict.fromkeys(event for event in after if event is not None)),
            )
        )
        return len(self._tasks) - 1

    @property
    def graph(self) -> TaskGraph:
        return TaskGraph(num_devices=self._num_devices, tasks=tuple(self._tasks))
