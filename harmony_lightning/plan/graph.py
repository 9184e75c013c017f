"""The task graph: every copy and computation of a step, the lane that serves it, and what it waits for.

A schedule says what runs where; the graph says in which order the lanes of each device get work. Predicting a step and
measuring one both turn a graph into a `TaskTimes`.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.record import Record


class Lane(enum.IntEnum):
    """In-order queues of one device; those of device d are numbered from `d * NUM_LANES`."""

    SWAP_IN = 0
    PEER_IN = 1
    COMPUTE = 2
    PEER_OUT = 3
    SWAP_OUT = 4
    HOST = 5
    """What the host does for this device: updates, messages."""
    STASH_IN = 6
    """Stashes have a lane of their own where the runtime carries a schedule out."""
    CONTROLLER = 7
    """The thread that enqueues everything, where it does more than that; of device 0."""
    UPDATE_OUT = 8
    """What was updated on the device has a lane of its own there, too."""
    SUM_OUT = 9
    """And gradients that are added up over devices, on their way to the next one, or to the host."""
    SUM_IN = 10


NUM_LANES = len(Lane)


class Kind(enum.IntEnum):
    """What a task does."""

    WEIGHTS_IN = 0
    INPUT_IN = 1
    """A pack's input, from the host."""
    STASH_IN = 2
    GRADIENT_IN = 3
    """The gradient of a pack's output, from the host."""
    OUTPUT_PEER = 4
    """A pack's output, to the device of the next pack."""
    GRADIENT_PEER = 5
    """The gradient of a pack's input, to the device of the pack before."""
    FORWARD = 6
    RECOMPUTE = 7
    BACKWARD = 8
    ALL_REDUCE = 9
    RELEASE = 10
    """Freeing a pack's memory."""
    STASH_OUT = 11
    OUTPUT_OUT = 12
    GRADIENT_OUT = 13
    """The gradient of a pack's input, to the host."""
    WEIGHT_GRADIENTS_OUT = 14
    MESSAGE = 15
    """From one device's host memory to another's."""
    UPDATE = 16
    WAIT = 17
    """The controller lets what it has enqueued so far come to a point, or prepares inputs."""


COMPUTATIONS = frozenset({Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD})


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Record):
    """One copy or computation."""

    kind: int
    """A `Kind`."""
    lanes: tuple[int, ...]
    """Lanes that it occupies from start to end: one, or for a peer copy the sender's and the receiver's."""
    turn: int
    """Which pack, in order of execution: forward packs, then backward packs from last to first; over several steps."""
    microbatch: int
    seconds: float
    nbytes: float
    """Bytes that are moved; 0 for computations."""
    after: tuple[int, ...]
    """Indices of earlier tasks that must have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskGraph(Record):
    """Tasks in an order that respects `after`; every lane serves its tasks in this order."""

    num_devices: int
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        num_lanes = self.num_devices * NUM_LANES
        for index, task in enumerate(self.tasks):
            if any(not 0 <= before < index for before in task.after):
                raise ConfigurationError(f"task {index} waits for {task.after}, which must come before it: a deadlock")
            if not task.lanes or any(not 0 <= lane < num_lanes for lane in task.lanes):
                raise ConfigurationError(f"task {index} is on lanes {task.lanes}; there are {num_lanes}")
            if task.seconds < 0:
                raise ConfigurationError(f"task {index} takes {task.seconds} seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTimes(Record):
    """When each task of a graph started and ended, seconds from the start of the step."""

    graph: TaskGraph
    starts: tuple[float, ...]
    ends: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return max(self.ends, default=0.0)

    def busy_seconds(self, lane: int) -> float:
        """How long one lane had something to do."""
        return sum(task.seconds for task in self.graph.tasks if lane in task.lanes)

    def critical_path(self, last: int | None = None) -> Iterator[int]:
        """Indices of tasks from the last one to end, or the one given, back to the first: each ended just when the next one
        started."""
        tasks, ends = self.graph.tasks, self.ends
        previous: dict[int, int] = {}
        before: list[tuple[int, ...]] = [()] * len(tasks)
        for index in sorted(range(len(tasks)), key=lambda index: (ends[index], index)):  # updates go by priority
            task = tasks[index]
            before[index] = (*task.after, *(previous[lane] for lane in task.lanes if lane in previous))
            previous.update(dict.fromkeys(task.lanes, index))
        at = max(range(len(tasks)), key=lambda index: (ends[index], -index), default=None) if last is None else last
        while at is not None:
            yield at
            at = max(before[at], key=lambda index: (ends[index], -index), default=None)
