"""Host memory in which gradients arrive.

The controller runs far ahead of the devices; without a bound it would ask for memory for all gradients at once. So a new
buffer waits until the gradients of some packs before have been dealt with. Updates free their gradients, and the buffers
go round; where gradients stay, in `Parameter.grad`, there is a new one each time.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Mapping

import torch

from harmony_lightning.hardware.device import Cluster, Mark
from harmony_lightning.plan import Urgency
from harmony_lightning.runtime.weights.arena import Layout
from harmony_lightning.runtime.worker import HostWorker, Ticket


class HostBuffers:
    """Buffers that are used again when the last tensor over them is gone; `limits` tells how many are in use at once while
    they go round."""

    def __init__(self, cluster: Cluster, worker: HostWorker, limits: Mapping[Urgency, int]) -> None:
        self._cluster = cluster
        self._worker = worker
        self._limits = limits
        self._in_use: dict[Urgency, deque[tuple[torch.Tensor, Ticket]]] = {urgency: deque() for urgency in limits}
        """What was taken last, with the jobs that work with it."""
        self._ready: list[torch.Tensor] = []
        """What those before have worked with, and nobody keeps."""
        self._kept: list[torch.Tensor] = []
        """What somebody kept, such as `Parameter.grad`, until this backward. It may have become free in it, but by a job
        that is still to be done as devices count time, for which no copy should wait."""
        self._free: dict[int, Mark] = {}
        """By identity of the buffer: the point at which the last user was done."""

    def begin(self) -> None:
        """A backward begins: the jobs of the one before are done."""
        for buffer in self._kept:
            if id(buffer) in self._free:
                self._ready.append(buffer)
        self._kept = [buffer for buffer in self._kept if id(buffer) not in self._free]

    def take(self, nbytes: int, urgency: Urgency = "next") -> torch.Tensor:
        in_use = self._in_use[urgency]
        if in_use and len(in_use) >= self._limits[urgency]:
            buffer, ticket = in_use.popleft()
            ticket.join()
            self._worker.raise_error()  # the step is lost, and what was sent since may still be on its way here
            (self._ready if id(buffer) in self._free else self._kept).append(buffer)
        for index, buffer in enumerate(self._ready):
            if nbytes <= buffer.numel() <= 2 * nbytes:
                self._free.pop(id(buffer)).synchronize()
                del self._ready[index]
                return buffer
        return self._cluster.host_buffer(nbytes)

    def lend(self, buffer: torch.Tensor, layout: Layout, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors over the buffer, which is free when they are all gone, whoever holds them."""
        memory = buffer.numpy()
        weakref.finalize(memory, self._return, buffer).atexit = False
        return {name: layout[name].alias(memory) for name in names}

    def _return(self, buffer: torch.Tensor) -> None:
        self._free[id(buffer)] = self._cluster.mark()

    def follow(self, buffer: torch.Tensor, ticket: Ticket, urgency: Urgency = "next") -> None:
        """The job works with the buffer, and frees it if nobody keeps what it holds."""
        self._in_use[urgency].append((buffer, ticket))
