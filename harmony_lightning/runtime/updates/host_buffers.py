"""Host memory in which gradients arrive.

The controller runs far ahead of the devices; without a bound it would ask for memory for all gradients at once. So a new
buffer waits until the gradients of some packs before have been dealt with. Updates free their gradients, and the buffers
go round; where gradients stay, in `Parameter.grad`, there is a new one each time.
"""

import weakref
from collections import deque
from collections.abc import Iterable

import torch

from harmony_lightning.hardware.device import Cluster, Mark
from harmony_lightning.runtime.weights.arena import Layout
from harmony_lightning.runtime.worker import HostWorker, Ticket


class HostBuffers:
    """Buffers that are used again when the last tensor over them is gone; `limit` are in use while they go round, and
    `late_limit` for late updates."""

    def __init__(self, cluster: Cluster, worker: HostWorker, limit: int, late_limit: int = 0) -> None:
        self._cluster = cluster
        self._worker = worker
        self._limits = limit, late_limit
        self._in_use: tuple[deque[tuple[torch.Tensor, Ticket]], ...] = deque(), deque()
        """What was taken last, with the jobs that work with it; that for late updates apart."""
        self._dealt_with: list[torch.Tensor] = []
        """What those before have worked with: free, or kept by somebody."""
        self._free: dict[int, Mark] = {}
        """By identity of the buffer: the point at which the last user was done."""

    def take(self, nbytes: int, *, is_late: bool = False) -> torch.Tensor:
        in_use = self._in_use[is_late]
        if len(in_use) >= self._limits[is_late]:
            buffer, ticket = in_use.popleft()
            ticket.join()
            self._worker.raise_error()  # the step is lost, and what was sent since may still be on its way here
            self._dealt_with.append(buffer)
        for index, buffer in enumerate(self._dealt_with):
            if nbytes <= buffer.numel() <= 2 * nbytes and (free_since := self._free.pop(id(buffer), None)) is not None:
                free_since.synchronize()
                del self._dealt_with[index]
                return buffer
        return self._cluster.host_buffer(nbytes)

    def lend(self, buffer: torch.Tensor, layout: Layout, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors over the buffer, which is free when they are all gone, whoever holds them."""
        memory = buffer.numpy()
        weakref.finalize(memory, self._return, buffer).atexit = False
        return {name: layout[name].alias(memory) for name in names}

    def _return(self, buffer: torch.Tensor) -> None:
        self._free[id(buffer)] = self._cluster.mark()

    def follow(self, buffer: torch.Tensor, ticket: Ticket, *, is_late: bool = False) -> None:
        """The job works with the buffer, and frees it if nobody keeps what it holds."""
        self._in_use[is_late].append((buffer, ticket))
