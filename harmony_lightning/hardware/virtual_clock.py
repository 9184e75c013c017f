"""The virtual clock: what an emulated machine did, and when a real one would have done it.

While a run goes on, each agent's work is noted in its order, with what it had to wait for and what it takes: seconds, or
bytes over links. `replay` gives it times afterwards, as a discrete-event simulation: an agent starts its next work when
the last is done and everything waited for has happened; flows that share a link or the host's memory share its bandwidth
fairly (max-min). Nothing is measured, and agents are visited in a fixed order, so equal runs have equal times to the bit.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from harmony_lightning.hardware.ordering import Agent, Agents
from harmony_lightning.hardware.presets import GpuModel, HostModel

Resource = tuple[str, int]
"""A link or a memory, and the device it belongs to; -1 for what all share."""
Capacity = Callable[[Resource], float | None]
"""Bytes per second of a resource; None if it limits nothing."""


Job = tuple[int, int]
"""Priority and number: agents that take jobs by priority do what is ready and comes first. Lanes have one job for ever."""
Queue = tuple[int, Job]
"""An agent and one of its jobs, whose works are done in their order: who waits for a work waits for all before it, too."""


class Activity(NamedTuple):
    """What one agent did in one piece. `device` is -1 for host threads."""

    device: int
    lane: str
    name: str
    start: float
    end: float
    nbytes: int
    flops: int


class Work:
    """One piece of an agent's work: seconds first, then bytes through resources."""

    __slots__ = ("after", "end", "flops", "flow", "name", "nbytes", "number", "queue", "resources", "seconds", "start")

    def __init__(
        self, name: str, after: Iterable["Work"], resources: tuple[Resource, ...], queue: Queue, number: int
    ) -> None:
        self.queue = queue
        self.number = number
        """In its queue a later work has a higher one."""
        self.name = name
        self.after = tuple(after)
        self.resources = resources
        self.seconds = 0.0
        self.flow = 0.0
        """Bytes that flow through `resources`."""
        self.nbytes = 0
        self.flops = 0
        self.start = self.end = -1.0


class VirtualClock:
    """Notes work. Each agent is noted by one thread at a time."""

    def __init__(self, agents: Agents, gpu: GpuModel, host: HostModel) -> None:
        self.gpu = gpu
        self.host = host
        self._agents = agents
        self._done: dict[int, list[Work]] = {}
        self._waits: dict[int, dict[Queue, Work]] = {}
        """By agent, what its next work has to wait for: the last of each queue."""
        self._heard: dict[tuple[int, int], Work] = {}
        """By lane and thread, what the lane is behind already."""
        self._jobs: dict[int, Job] = {}
        """By agent, the running one."""
        self._open: set[int] = set()
        """Agents whose last work may still grow: nobody waits for it as it is."""

    # While the run goes on --------------------------------------------------------------------------------------------

    def kernel(self, agent: Agent, what: str, dtype: str, flops: int, nbytes: int) -> None:
        seconds = max(flops / self.gpu.flops(dtype), nbytes / self.gpu.memory_bytes_per_second)
        work = self._last(agent, what, ())
        work.seconds += seconds + self.gpu.launch_seconds
        work.flops += flops
        work.nbytes += nbytes

    def copy(self, agent: Agent, what: str, nbytes: int, source: int | None, target: int | None) -> None:
        """Bytes from device to device; None is the host."""
        if source is not None and target is not None and self.gpu.peer_bytes_per_second is not None:
            resources: tuple[Resource, ...] = (("peer out", source), ("peer in", target))
        else:
            resources = (("host memory", -1),)
            if source is not None:
                resources += (("link out", source), ("uplink out", -1))
            if target is not None:
                resources += (("link in", target), ("uplink in", -1))
        work = self._last(agent, what, resources)
        work.seconds += self.gpu.launch_seconds
        work.flow += nbytes
        work.nbytes += nbytes

    def host_work(self, thread: Agent, what: str, flops: int, nbytes: int, num_updated: int) -> None:
        """What a host thread computes. `num_updated`: parameters that a fused update steps."""
        seconds = max(flops / self.host.flops_per_second, num_updated / self.host.update_parameters_per_second)
        # Memory and arithmetic overlap: what arithmetic takes longer than memory alone would is added.
        work = self._last(thread, what, (("host memory", -1),))
        work.seconds += max(0.0, seconds - nbytes / self.host.memory_bytes_per_second)
        work.flow += nbytes
        work.flops += flops
        work.nbytes += nbytes

    def begin_job(self, agent: Agent, priority: int) -> None:
        self._jobs[agent.id] = (priority, self._queue(agent)[1][1] + 1)
        self._open.discard(agent.id)

    def _queue(self, agent: Agent) -> Queue:
        return agent.id, self._jobs.get(agent.id, (0, 0))

    def point(self, agent: Agent) -> list[Work]:
        """What has to be done when the agent has come as far as it is now."""
        self._open.discard(agent.id)
        done = self._done.get(agent.id)
        return [*(done[-1:] if done else ()), *self._waits.get(agent.id, {}).values()]

    def enqueue(self, lane: Agent, thread: Agent) -> None:
        """The lane's next work starts when the thread has come to where it is now."""
        self._open.discard(thread.id)
        done = self._done.get(thread.id)
        if done and self._heard.get((lane.id, thread.id)) is not done[-1]:
            self._heard[lane.id, thread.id] = done[-1]
            self.wait(lane, done[-1:])

    def wait(self, agent: Agent, point: Iterable[Work]) -> None:
        """The agent's next work starts when all this is done."""
        if agent in self._agents.threads:
            # A work of its own that takes no time: lanes that hear from the thread come behind it.
            self._append(agent, "wait", point, ())
            self._open.discard(agent.id)
            return
        waits = self._waits.setdefault(agent.id, {})
        for work in point:
            known = waits.get(work.queue)
            if known is None or known.number < work.number:
                waits[work.queue] = work
                self._open.discard(agent.id)

    def busy_seconds(self, agent: Agent) -> float:
        """What the agent's work takes so far, waits and flows left aside."""
        return sum(work.seconds for work in self._done.get(agent.id, ()))

    def clear(self) -> None:
        """Forget what has been done; time starts again from 0."""
        self._done.clear()
        self._waits.clear()
        self._heard.clear()
        self._open.clear()

    def _last(self, agent: Agent, what: str, resources: tuple[Resource, ...]) -> Work:
        """The agent's running piece of work, or a new one."""
        if agent.id in self._open:
            last = self._done[agent.id][-1]
            if last.name == what and last.resources == resources:
                return last
        self._open.add(agent.id)
        return self._append(agent, what, self._waits.pop(agent.id, {}).values(), resources)

    def _append(self, agent: Agent, what: str, after: Iterable[Work], resources: tuple[Resource, ...]) -> Work:
        done = self._done.setdefault(agent.id, [])
        done.append(Work(what, after, resources, self._queue(agent), len(done)))
        return done[-1]

    # Afterwards -------------------------------------------------------------------------------------------------------

    def replay(self) -> tuple[Activity, ...]:
        """Everything since the start or the last `clear`, by agent and start. Seconds from 0."""
        order = [agent for agent in self._agents.all if agent not in self._agents.threads]
        order += sorted(self._agents.threads, key=lambda agent: agent.name)
        queues = [list(self._done.get(agent.id, ())) for agent in order]
        _simulate(queues, self._capacity)
        lanes = {agent.id: (d, lane.value) for d, of in enumerate(self._agents.lanes) for lane, agent in of.items()}
        for queue in queues:
            queue.sort(key=lambda work: work.start)
        return tuple(
            Activity(*lanes.get(agent.id, (-1, agent.name)), work.name, work.start, work.end, work.nbytes, work.flops)
            for agent, queue in zip(order, queues, strict=True)
            for work in queue
        )

    def _capacity(self, resource: Resource) -> float | None:
        kind = resource[0]
        if kind == "host memory":
            return self.host.memory_bytes_per_second
        if kind.startswith("uplink"):
            return self.host.uplink_bytes_per_second
        return self.gpu.peer_bytes_per_second if kind.startswith("peer") else self.gpu.link_bytes_per_second


class _Agenda:
    """What one agent has still to do."""

    def __init__(self, queue: Sequence[Work]) -> None:
        by_job: dict[Job, list[Work]] = {}
        for work in queue:
            work.start = work.end = -1.0
            by_job.setdefault(work.queue[1], []).append(work)
        self._jobs = [deque(by_job[job]) for job in sorted(by_job)]
        self._running: deque[Work] | None = None

    def next(self) -> Work | None:
        """What can start now: more of the running job, or the first job that need not wait; None if nothing can."""
        if not self._running:
            self._running = next((job for job in self._jobs if _is_ready(job)), None)
            if self._running is None:
                return None
            self._jobs.remove(self._running)
        work = self._running[0]
        return None if any(earlier.end < 0 for earlier in work.after) else work

    def finish(self, now: float) -> None:
        assert self._running
        self._running.popleft().end = now

    @property
    def is_done(self) -> bool:
        return not self._jobs and not self._running


def _is_ready(job: Iterable[Work]) -> bool:
    """Whether all that the job waits for before it does anything has happened."""
    for work in job:
        if any(earlier.end < 0 for earlier in work.after):
            return False
        if work.seconds > 0 or work.flow > 0:
            break
    return True


def _simulate(queues: Sequence[Sequence[Work]], capacity: Capacity) -> None:
    """Give every piece of work its start and end."""
    agendas = [_Agenda(queue) for queue in queues]
    latency: dict[int, tuple[float, Work]] = {}
    """By agent in the first part of its work: when that ends."""
    flowing: dict[int, tuple[float, Work]] = {}
    """By agent in the second part: bytes still to come."""
    now = 0.0

    def pass_latency(agent: int, work: Work) -> None:
        if work.flow > 0:
            flowing[agent] = (work.flow, work)
        else:
            agendas[agent].finish(now)

    while True:
        has_moved = True
        while has_moved:  # what takes no time lets others start at the same moment
            has_moved = False
            for agent, agenda in enumerate(agendas):
                if agent in latency or agent in flowing or (work := agenda.next()) is None:
                    continue
                work.start = now
                has_moved = True
                if work.seconds <= 0:
                    pass_latency(agent, work)
                else:
                    latency[agent] = (now + work.seconds, work)
        if not latency and not flowing:
            break
        rates = _share({agent: work.resources for agent, (_, work) in flowing.items()}, capacity)
        ends = {agent: now + left / rates[agent] for agent, (left, _) in flowing.items()}
        then = min([*(end for end, _ in latency.values()), *ends.values()])
        for agent, (left, work) in list(flowing.items()):
            if ends[agent] <= then:
                del flowing[agent]
                agendas[agent].finish(then)
            else:
                flowing[agent] = (left - rates[agent] * (then - now), work)
        now = then
        for agent, (end, work) in list(latency.items()):
            if end <= now:
                del latency[agent]
                pass_latency(agent, work)
    assert all(agenda.is_done for agenda in agendas), "a circle of waits"


def _share(flows: dict[int, tuple[Resource, ...]], capacity: Capacity) -> dict[int, float]:
    """Max-min fair rates: the tightest resource is shared equally among its flows, then the next among the rest."""
    left = {r: c for flow in flows.values() for r in flow if (c := capacity(r)) is not None}
    unset = dict(flows)
    rates: dict[int, float] = {}
    while unset:
        users = {r: [agent for agent, flow in unset.items() if r in flow] for r in left}
        tightest = min((r for r in left if users[r]), key=lambda r: (left[r] / len(users[r]), r))
        rate = left[tightest] / len(users[tightest])
        for agent in users[tightest]:
            rates[agent] = rate
            for resource in unset.pop(agent):
                if resource in left:
                    left[resource] = max(0.0, left[resource] - rate)
        del left[tightest]
    return rates
