"""What an emulated machine knows of order: who works, and what each has waited for.

*Agents* work in order: each lane of each device, and each host thread. Two agents are ordered only by what one learns of
the other: a lane learns from the thread that enqueues work on it, and from events it waits for; a thread learns from
events and marks it synchronises with. Each agent counts its own progress in *epochs* and remembers, per agent, the last
epoch that it is ordered behind: a vector clock (Lamport 1978, Mattern 1989; epochs as in FastTrack, Flanagan and Freund,
PLDI 2009). Nothing here depends on how long anything took, so a fault shows whatever the timing was.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from harmony_lightning.hardware.device import Lane

_NUM_THREADS = 8
"""Threads that vector clocks have room for at first; they grow."""


class Agent:
    """A lane or a host thread.

    Attributes:
        name: "gpu0 swap-in", or the thread's name.
        known: by agent, the last epoch that this one's next work is ordered behind; its own is the running epoch.
        version: changes whenever `known` may have.
        heard: by thread, its version when this lane learned from it last.
    """

    __slots__ = ("heard", "id", "known", "name", "version")

    def __init__(self, id: int, name: str, width: int) -> None:
        self.id = id
        self.name = name
        self.known = [0] * max(width, id + 1)
        self.known[id] = 1
        self.version = 0
        self.heard: dict[int, int] = {}

    @property
    def epoch(self) -> int:
        return self.known[self.id]

    def publish(self) -> list[int]:
        """What somebody is ordered behind who waits for this point. Later work belongs to a new epoch."""
        known = self.known.copy()
        self.known[self.id] += 1
        self.version += 1
        return known

    def learn(self, known: Sequence[int]) -> None:
        """Order all later work behind this point."""
        mine = self.known
        mine.extend([0] * (len(known) - len(mine)))
        for agent, epoch in enumerate(known):
            if epoch > mine[agent]:
                mine[agent] = epoch
        self.version += 1

    def has_passed(self, agent: int, epoch: int) -> bool:
        """Whether this agent's next work is ordered behind that epoch of another."""
        return agent < len(self.known) and self.known[agent] >= epoch

    def __repr__(self) -> str:
        return f"Agent({self.name}, {self.known})"


class Agents:
    """All agents of one machine, and whose work the calling thread enqueues."""

    def __init__(self, num_devices: int) -> None:
        self._width = len(Lane) * num_devices + _NUM_THREADS
        self.all: list[Agent] = []
        self.lanes = [{lane: self._add(f"gpu{d} {lane.value}") for lane in Lane} for d in range(num_devices)]
        self.threads: list[Agent] = []
        self._by_name: dict[str, Agent] = {}
        self._local = threading.local()
        self._lock = threading.Lock()

    def _add(self, name: str) -> Agent:
        agent = Agent(len(self.all), name, self._width)
        self.all.append(agent)
        return agent

    def thread(self) -> Agent:
        """The calling thread. One that ended and one of the same name that came later are taken for the same."""
        try:
            return self._local.agent  # type: ignore[no-any-return]
        except AttributeError:
            name = threading.current_thread().name
            with self._lock:
                if name not in self._by_name:
                    self._by_name[name] = self._add("host" if name == "MainThread" else f"host {name}")
                    self.threads.append(self._by_name[name])
                self._local.agent = self._by_name[name]
                self._local.entered = [[(Lane.COMPUTE, "")] for _ in self.lanes]
            return self._local.agent  # type: ignore[no-any-return]

    @contextmanager
    def entered(self, device: int, lane: Lane, what: str) -> Iterator[None]:
        """The calling thread's work on `device` goes to `lane`."""
        self.thread()
        stack = self._local.entered[device]
        stack.append((lane, what or stack[-1][1]))
        try:
            yield
        finally:
            stack.pop()

    def present(self, device: int) -> tuple[Agent, str]:
        """The lane that the calling thread's work on `device` goes to, ordered behind the thread; and what it is doing."""
        thread = self.thread()
        lane, what = self._local.entered[device][-1]
        agent = self.lanes[device][lane]
        if agent.heard.get(thread.id) != thread.version:
            self.hear(agent)
        return agent, what

    def hear(self, lane: Agent) -> None:
        """Order the lane's next work behind the calling thread, which enqueues it."""
        thread = self.thread()
        lane.learn(thread.publish())
        lane.heard[thread.id] = thread.version

    def level(self) -> None:
        """Order everything that comes behind everything that was, after a step that failed."""
        width = len(self.all)
        latest = [max(agent.known[i] if i < len(agent.known) else 0 for agent in self.all) for i in range(width)]
        for agent in self.all:
            agent.learn(latest)
            agent.known[agent.id] += 1
