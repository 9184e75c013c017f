"""The race check: every access to memory must be ordered behind the accesses it depends on.

For each piece of memory it remembers who read and wrote which part of it, and in which epoch (`ordering`). A read must be
ordered behind earlier writes, a write behind earlier reads and writes; what is not raises `RaceError`, which names both.
An access that is covered by a later one in order is forgotten, so little is remembered at any time.

Device memory is watched from the moment it is allocated. To the lane that allocated it, it may be memory that the lane
has just freed (torch's caching allocator does that), so allocating counts as a write of that lane; and when memory is
freed, its lane must be ordered behind all other users. Host memory is watched from the first copy that runs without the
host waiting for it until it goes back to the system.
"""

import bisect
import collections
import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from harmony_lightning.errors import RaceError
from harmony_lightning.hardware.ordering import Agent, Agents

_Part = tuple[int, int, int]
"""Addresses from, to, and the agent."""
_Access = tuple[int, Agent, Any]
"""The epoch, the agent, and the operation."""


class Memory:
    """Who used a piece of memory. As long as only its owner has, the last epochs tell everything."""

    __slots__ = ("__weakref__", "is_private", "owner", "reads", "start", "stop", "writes")

    def __init__(self, start: int, stop: int, owner: Agent | None, what: Any = None) -> None:
        self.start = start
        self.stop = stop
        self.owner = owner
        self.is_private = owner is not None
        """Nobody but the owner has used it: order takes care of itself, and parts need not be told apart."""
        self.reads: dict[_Part, _Access] = {}
        self.writes: dict[_Part, _Access] = {}
        if owner is not None:
            self.writes[start, stop, owner.id] = (owner.epoch, owner, what)


class RaceCheck:
    """Raises on what is not ordered. Every method may be called from any thread."""

    def __init__(self, agents: Agents) -> None:
        self._agents = agents
        self._lock = threading.RLock()  # re-entered by finalizers
        self._starts: list[int] = []
        self._host: list[Memory] = []
        """Watched host memory by address."""
        self._gone: collections.deque[Memory] = collections.deque()
        self._found: str | None = None
        """A fault seen where nothing can be raised: in a finalizer."""
        self._is_spent = False
        """A fault has been raised: what follows is the way out of a broken step."""

    # Device memory ----------------------------------------------------------------------------------------------------

    def use(self, memory: Memory, agent: Agent, tensor: torch.Tensor, is_write: bool, what: Any) -> None:
        """`agent` is about to read or write `tensor`, which lies in `memory`."""
        if memory.is_private and memory.owner is agent:
            used = memory.writes if is_write else memory.reads
            used[memory.start, memory.stop, agent.id] = (agent.known[agent.id], agent, what)
            return
        with self._lock:
            memory.is_private = False
            self._use(memory, agent, *_extent(tensor), is_write, _Operation(what, tensor))

    def free(self, memory: Memory) -> None:
        """Device memory goes back to the lane that allocated it, which may use it again at once."""
        if memory.is_private or self._is_spent or memory.owner is None:
            return
        owner, threads = memory.owner, self._agents.threads
        for used in (memory.reads, memory.writes):
            for epoch, agent, what in used.values():
                if not owner.has_passed(agent.id, epoch) and not any(t.has_passed(agent.id, epoch) for t in threads):
                    self._found = self._found or (
                        f"memory of {owner.name} is freed while {_tell(agent, what)} may still use it; let "
                        f"{owner.name} wait for an event recorded behind that"
                    )

    # Host memory ------------------------------------------------------------------------------------------------------

    def use_host(self, agent: Agent, tensor: torch.Tensor, is_write: bool, what: Any, *, starts_watch: bool) -> None:
        """`agent` is about to read or write a host tensor. Unwatched memory is watched from now on if `starts_watch`."""
        if not (self._host or starts_watch) or type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            return
        with self._lock:
            self._forget_gone()
            lo, hi = _extent(tensor)
            memory = self._find(lo)
            if memory is None or hi > memory.stop:
                if not starts_watch or lo == hi:
                    return
                memory = self._watch(tensor.untyped_storage())
            self._use(memory, agent, lo, hi, is_write, _Operation(what, tensor))
            agent.version += 1  # what this thread enqueues next is ordered behind this

    def leave(self, thread: Agent) -> None:
        """The thread goes where it is not seen: nothing it can reach may still be in use."""
        self.raise_found()
        with self._lock:
            self._forget_gone()
            for memory in self._host:
                for used, does in ((memory.reads, "read"), (memory.writes, "write")):
                    for epoch, agent, what in used.values():
                        if agent not in self._agents.threads and not thread.has_passed(agent.id, epoch):
                            self._raise(
                                f"{thread.name} goes on to code that may use any host memory, while {_tell(agent, what)} "
                                f"may still {does} it; synchronise with an event recorded behind that"
                            )

    def reset(self) -> None:
        """Take a broken step for over."""
        if self._is_spent:
            self._is_spent, self._found = False, None
            self._agents.level()

    def raise_found(self) -> None:
        if self._found is not None and not self._is_spent:
            self._raise(self._found)

    # ------------------------------------------------------------------------------------------------------------------

    def _use(self, memory: Memory, agent: Agent, lo: int, hi: int, is_write: bool, what: "_Operation") -> None:
        if lo == hi:
            return
        self._compare(memory.writes, agent, lo, hi, is_write, "wrote", what)
        if is_write:
            self._compare(memory.reads, agent, lo, hi, is_write, "read", what)
        used = memory.writes if is_write else memory.reads
        used[lo, hi, agent.id] = (agent.known[agent.id], agent, what)

    def _compare(
        self, used: dict[_Part, _Access], agent: Agent, lo: int, hi: int, is_write: bool, did: str, what: "_Operation"
    ) -> None:
        covered: list[_Part] = []
        for part, (epoch, other, earlier) in used.items():
            if part[1] <= lo or hi <= part[0]:
                continue
            if not agent.has_passed(other.id, epoch) and not self._is_spent:
                self._raise(
                    f"{_tell(agent, what)} {'writes' if is_write else 'reads'} memory that {_tell(other, earlier)} {did}, "
                    f"and is not ordered behind it; let {agent.name} wait for an event recorded behind that"
                )
            if is_write and lo <= part[0] and part[1] <= hi:
                covered.append(part)
        for part in covered:
            del used[part]

    def _find(self, address: int) -> Memory | None:
        index = bisect.bisect_right(self._starts, address) - 1
        return self._host[index] if index >= 0 and address < self._host[index].stop else None

    def _watch(self, storage: torch.UntypedStorage) -> Memory:
        """Memory over the whole storage. What is watched already of it, as views with storages of their own, joins it."""
        start = storage.data_ptr()
        memory = Memory(start, start + storage.nbytes(), None)
        for other in [other for other in self._host if other.start < memory.stop and memory.start < other.stop]:
            memory.start, memory.stop = min(memory.start, other.start), max(memory.stop, other.stop)
            memory.reads |= other.reads
            memory.writes |= other.writes
            self._forget(other)
        index = bisect.bisect(self._starts, memory.start)
        self._starts.insert(index, memory.start)
        self._host.insert(index, memory)
        weakref.finalize(storage, self._gone.append, memory).atexit = False
        return memory

    def _forget_gone(self) -> None:
        while self._gone:
            self._forget(self._gone.popleft())

    def _forget(self, memory: Memory) -> None:
        index = bisect.bisect_left(self._starts, memory.start)
        if index < len(self._host) and self._host[index] is memory:
            del self._starts[index], self._host[index]

    def _raise(self, text: str) -> None:
        self._is_spent, self._found = True, None
        raise RaceError(text)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Operation:
    """An operation and the tensor it used, for messages."""

    __slots__ = ("_dtype", "_shape", "_what")

    def __init__(self, what: Any, tensor: torch.Tensor) -> None:
        self._what, self._shape, self._dtype = what, tensor.shape, tensor.dtype

    def __str__(self) -> str:
        return f"{_name(self._what)} on {tuple(self._shape)} {str(self._dtype).removeprefix('torch.')}"


def _tell(agent: Agent, what: Any) -> str:
    return f"{agent.name}: {what if isinstance(what, _Operation) else _name(what)}"


@functools.cache
def _name(what: Any) -> str:
    if isinstance(what, tuple):
        func, purpose = what
        return f"{_name(func)} ({purpose})" if purpose else _name(func)
    return str(what).removeprefix("aten.").removesuffix(".default")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first byte of a strided tensor to behind its last."""
    start, nbytes = tensor.data_ptr(), tensor.nbytes
    if nbytes and not tensor.is_contiguous():
        steps: Sequence[int] = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        nbytes = (1 + sum(steps)) * tensor.element_size()
    return start, start + nbytes
