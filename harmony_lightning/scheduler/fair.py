"""When tasks start and end if those that use a link or the host's memory at the same time share it fairly.

`simulate` gives each copy a fixed share, as if all GPUs copied all the time: fast enough for a search, and too slow where
they take turns. Here bandwidth is shared among those that copy (max-min: the tightest resource is shared equally, then the
next among the rest), as the virtual clock of emulated GPUs does it and, nearly, a real machine.
"""

import heapq
from collections.abc import Mapping
from functools import cache

from harmony_lightning.plan.graph import NUM_LANES, Kind, Task, TaskGraph, TaskTimes
from harmony_lightning.profiler import Machine

_IN = frozenset({Kind.WEIGHTS_IN, Kind.INPUT_IN, Kind.STASH_IN, Kind.GRADIENT_IN})
_OUT = frozenset({Kind.STASH_OUT, Kind.OUTPUT_OUT, Kind.GRADIENT_OUT, Kind.WEIGHT_GRADIENTS_OUT})
_PEER = frozenset({Kind.OUTPUT_PEER, Kind.GRADIENT_PEER, Kind.ALL_REDUCE})

_Resource = tuple[str, int]
"""What is shared, and whose it is; -1 for what all share."""


def fair_times(graph: TaskGraph, machine: Machine, priorities: Mapping[int, int] | None = None) -> TaskTimes:
    """Start and end of each task.

    Args:
        graph: tasks in the order in which lanes serve them.
        machine: what is shared.
        priorities: of tasks, by index, whose lane serves the one with the lowest first of those that are ready.
    """
    priorities = priorities or {}
    share = _Shares(machine)
    tasks = graph.tasks
    waiting_for = [0] * len(tasks)
    followers: list[list[int]] = [[] for _ in tasks]
    latest: dict[int, int] = {}
    for index, task in enumerate(tasks):
        before = {*task.after}
        if index not in priorities:
            before.update(latest[lane] for lane in task.lanes if lane in latest)
            latest.update(dict.fromkeys(task.lanes, index))
        waiting_for[index] = len(before)
        for one in before:
            followers[one].append(index)
    starts, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    ready = [index for index, count in enumerate(waiting_for) if not count]
    queue: list[tuple[int, int]] = []
    """Tasks with a priority that are ready; one of them is served at a time."""
    served: int | None = None
    busy: list[tuple[float, int]] = []
    """Ends of what takes a fixed time."""
    flowing: dict[int, float] = {}
    """Bytes still to come."""
    now = 0.0

    def finish(index: int) -> None:
        nonlocal served
        ends[index] = now
        if index == served:
            served = None
        for one in followers[index]:
            waiting_for[one] -= 1
            if not waiting_for[one]:
                ready.append(one)

    while True:
        while ready or (queue and served is None):
            if ready:
                index = ready.pop()
                if index in priorities:
                    heapq.heappush(queue, (priorities[index], index))
                    continue
            else:
                _, index = heapq.heappop(queue)
                served = index
            starts[index] = now
            seconds = share.fixed_seconds(tasks[index])
            if seconds > 0:
                heapq.heappush(busy, (now + seconds, index))
            elif share.nbytes(tasks[index]) > 0:
                flowing[index] = share.nbytes(tasks[index])
            else:
                finish(index)
        if not busy and not flowing:
            break
        rates = share.rates([tasks[index] for index in flowing]) if flowing else []
        due = {index: now + left / rate for (index, left), rate in zip(flowing.items(), rates, strict=True)}
        then = min([*due.values(), *((busy[0][0],) if busy else ())])
        for (index, left), rate in zip(list(flowing.items()), rates, strict=True):
            if due[index] <= then:
                del flowing[index]
            else:
                flowing[index] = left - rate * (then - now)
        now = then
        for index, end in due.items():
            if end <= then:
                finish(index)
        while busy and busy[0][0] <= now:
            _, index = heapq.heappop(busy)
            if (nbytes := share.nbytes(tasks[index])) > 0:
                flowing[index] = nbytes
            else:
                finish(index)
    return TaskTimes(graph=graph, starts=tuple(starts), ends=tuple(ends))


class _Shares:
    """Which resources a task needs, and what each of several gets."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._launch_seconds = machine.launch_seconds
        self._memory = 2 * machine.host_message_bytes_per_second
        """Reads and writes of host memory together."""
        link = machine.link_bytes_per_second or machine.host_link_bytes_per_second
        self._rates: dict[str, float] = {"in": link, "out": link, "memory": self._memory}
        if machine.host_link_shared_by > 1 or machine.host_link_bytes_per_second < link:
            self._rates |= dict.fromkeys(("uplink in", "uplink out"), machine.host_link_bytes_per_second)
        self._rates |= dict.fromkeys(("peer in", "peer out"), machine.peer_bytes_per_second)
        self._shared = cache(self._share)

    def nbytes(self, task: Task) -> float:
        return task.nbytes if self.resources(task) else 0.0

    def fixed_seconds(self, task: Task) -> float:
        """What comes before the bytes flow: all of a computation; of an update what memory alone would not take; of a copy
        what it takes to set it going."""
        if task.kind == Kind.UPDATE:
            return max(0.0, task.seconds - task.nbytes / self._memory)
        if not self.resources(task):
            return task.seconds
        return 0.0 if task.kind == Kind.WAIT else self._launch_seconds

    def resources(self, task: Task) -> tuple[_Resource, ...]:
        if not task.nbytes:  # what stays on a device takes its own time
            return ()
        device = task.lanes[0] // NUM_LANES
        if task.kind in _IN:
            return ("memory", -1), ("in", device), ("uplink in", -1)
        if task.kind in _OUT:
            return ("memory", -1), ("out", device), ("uplink out", -1)
        if task.kind in (Kind.UPDATE, Kind.WAIT):
            return (("memory", -1),)
        if task.kind in _PEER:
            other = task.lanes[-1] // NUM_LANES
            if not self._machine.peers_by_host:
                return ("peer out", device), ("peer in", other)
            return ("memory", -1), ("out", device), ("uplink out", -1), ("in", other), ("uplink in", -1)
        return ()

    def rates(self, tasks: list[Task]) -> list[float]:
        """Bytes per second that each gets when all flow at once."""
        return self._shared(tuple(map(self.resources, tasks)))

    def _share(self, resources: tuple[tuple[_Resource, ...], ...]) -> list[float]:
        """By what each of them uses. The same ones flow together again and again."""
        uses = [[r for r in one if r[0] in self._rates] for one in resources]
        left = {resource: self._rates[resource[0]] for use in uses for resource in use}
        users: dict[_Resource, list[int]] = {resource: [] for resource in left}
        for index, use in enumerate(uses):
            for resource in use:
                users[resource].append(index)
        rates = [0.0] * len(resources)
        unset = set(range(len(resources)))
        while unset:
            tightest = min((r for r in left if users[r]), key=lambda r: (left[r] / len(users[r]), r))
            rate = left[tightest] / len(users[tightest])
            for index in list(users[tightest]):
                rates[index] = rate
                unset.discard(index)
                for resource in uses[index]:
                    users[resource].remove(index)
                    left[resource] = max(0.0, left[resource] - rate)
        return rates
