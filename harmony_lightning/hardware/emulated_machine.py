"""An emulated machine around its devices: who works in which order, whether that is free of races, how long it takes.

Everything that happens on emulated GPUs, and to host memory while they are at work, passes here on its way: kernels,
copies, waits, reads and writes by host threads. The numbers have been computed by then; only order and time are modelled.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from harmony_lightning.hardware.device import Lane
from harmony_lightning.hardware.ordering import Agent, Agents
from harmony_lightning.hardware.race_check import Memory, RaceCheck
from harmony_lightning.hardware.virtual_clock import VirtualClock, Work

_PACKAGE = str(Path(__file__).parent)


class Point:
    """A point that a lane or a host thread has reached; serves as event and as mark."""

    __slots__ = ("_known", "_machine", "_work")

    def __init__(self, machine: "Machine", agent: Agent) -> None:
        self._machine = machine
        self._known = agent.publish()
        self._work: list[Work] = machine.clock.point(agent) if machine.clock is not None else []

    def synchronize(self) -> None:
        """The calling thread waits for the point."""
        self.order(self._machine.agents.thread())

    def observe(self) -> None:
        """The calling thread is behind the point by other means than waiting, so this takes no time."""
        if self._machine.counts("observe"):
            self._machine.agents.thread().learn(self._known)

    def order(self, agent: Agent) -> None:
        """The package asks that the agent's later work comes behind the point."""
        if self._machine.counts("wait"):
            self.join(agent)

    def join(self, agent: Agent) -> None:
        agent.learn(self._known)
        if self._machine.clock is not None:
            self._machine.clock.wait(agent, self._work)


class Machine:
    """Lanes, threads, and what watches them.

    Attributes:
        check: None if races are not looked for.
        clock: None if nobody asked for times.
        waits: where the package waits, by file and line, and how often; None unless somebody collects them.
        is_fake: large tensors have shapes and no numbers.
        is_strict: host tensors are refused on devices where CUDA would.
        ignored: a place whose waits do nothing: tests show with it that the check would notice their absence.
    """

    def __init__(self, num_devices: int, *, is_checked: bool, is_fake: bool = False, is_strict: bool = True) -> None:
        self.is_fake = is_fake
        self.is_strict = is_strict
        self.agents = Agents(num_devices)
        self.check = RaceCheck(self.agents) if is_checked else None
        self.clock: VirtualClock | None = None
        self.waits: dict[str, int] | None = None
        self.ignored: str | None = None

    # Order ------------------------------------------------------------------------------------------------------------

    def lane(self, device: int, lane: Lane, what: str) -> AbstractContextManager[None]:
        return self.agents.entered(device, lane, what)

    def record(self, device: int, lane: Lane) -> Point:
        agent = self.agents.lanes[device][lane]
        self.agents.hear(agent)
        return Point(self, agent)

    def wait(self, device: int, lane: Lane, event: Any) -> None:
        if not isinstance(event, Point):
            raise TypeError(f"an emulated GPU can wait for its own kind of events only, got {type(event).__name__}")
        event.order(self.agents.lanes[device][lane])

    def mark(self) -> Point:
        return Point(self, self.agents.thread())

    def counts(self, kind: str) -> bool:
        """Whether the wait that is being asked for has any effect."""
        if self.waits is None and self.ignored is None:
            return True
        place = f"{_caller()} {kind}"
        if self.waits is not None:
            self.waits[place] = self.waits.get(place, 0) + 1
        return place != self.ignored

    def synchronize(self, agent: Agent) -> None:
        """The calling thread waits for everything on a lane, as a copy that does not return before it is done makes it."""
        Point(self, agent).join(self.agents.thread())

    # Work -------------------------------------------------------------------------------------------------------------

    def _present(self, device: int) -> tuple[Agent, str]:
        present = self.agents.present(device)
        if self.clock is not None:
            self.clock.enqueue(present[0], self.agents.thread())
        return present

    def use(self, device: int, func: Any, operands: Iterable[tuple[torch.Tensor, Memory, bool]]) -> tuple[Agent, str]:
        """Work on a device reads and writes tensors in its memory. Returns who does it, and for what."""
        agent, what = self._present(device)
        check = self.check
        if check is not None:
            check.raise_found()
            for tensor, memory, is_write in operands:
                check.use(memory, agent, tensor, is_write, (func, what))
        return agent, what

    def use_host(self, func: Any, tensors: Iterable[torch.Tensor], written: Sequence[Any] = ()) -> None:
        """The calling thread reads and writes host tensors."""
        if self.check is not None:
            thread = self.agents.thread()
            for tensor in tensors:
                self.check.use_host(thread, tensor, any(tensor is w for w in written), func, starts_watch=False)

    def copy(
        self,
        func: Any,
        source: tuple[int, torch.Tensor, Memory] | None,
        target: tuple[int, torch.Tensor, Memory] | None,
        host: torch.Tensor | None,
        *,
        nbytes: int,
        is_asynchronous: bool,
    ) -> None:
        """A copy over a link, from or to `host` where the other side is None.

        As on CUDA: between host and device it runs on the device's lane, and unless asked otherwise the thread waits for
        it; between devices it runs on the source's lane, which waits for the target's and is waited for by it.
        """
        ends = [end for end in (source, target) if end is not None]
        lanes = [self._present(device) for device, _, _ in ends]
        agent, what = lanes[0]
        if len(lanes) == 2:
            Point(self, lanes[1][0]).join(agent)
        if self.check is not None:
            self.check.raise_found()
            for end in ends:
                self.check.use(end[2], agent, end[1], end is target, (func, what))
            if host is not None:
                # What arrives on the host may be handed to another thread, which is not behind the copy by itself.
                starts_watch = is_asynchronous or target is None
                self.check.use_host(agent, host, target is None, (func, what), starts_watch=starts_watch)
        if self.clock is not None:
            name = what or "copy"
            self.clock.copy(agent, name, nbytes, source and source[0], target and target[0])
        if len(lanes) == 2:
            Point(self, agent).join(lanes[1][0])
        elif not is_asynchronous:
            self.synchronize(agent)


def _caller() -> str:
    """File and line in the package, outside of this room, that is waiting."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else ""
