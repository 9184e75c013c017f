"""Host memory in which gradients arrive.

The controller runs far ahead of the devices; without a bound it would ask for memory for all gradients at once. So a new
buffer waits until the gradients of some packs before have been dealt with. Updates free their gradients, and the buffers
go round; where gradients stay, in `Parameter.grad`, there is a new one each time.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterable

import torch

from harmony_lightning.hardware.device import Cluster, Mark
from harmony_lightning.runtime.arena import Layout
from harmony_lightning.runtime.worker import HostWorker, Ticket


class HostBuffers:
    """Buffers that are used again when the last tensor over them is gone; `limit` are in use at once while they go round."""

    def __init__(self, cluster: Cluster, worker: HostWorker, limit: int) -> None:
        self._cluster = cluster
        self._worker = worker
        self._limit = limit
        self._in_use: deque[Ticket] = deque()
        """What is done with the buffers that were taken last."""
        self._free: list[tuple[torch.Tensor, Mark]] = []
        """With the point at which the last user was done; oldest first."""
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        if len(self._in_use) < self._limit:
            return self._cluster.host_buffer(nbytes)
        self._in_use.popleft().wait()
        self._worker.raise_error()  # the step is lost, and what was sent since may still be on its way here
        with self._lock:
            fitting = next((entry for entry in self._free if nbytes <= entry[0].numel() <= 2 * nbytes), None)
            if fitting is None:
                return self._cluster.host_buffer(nbytes)
            self._free = [entry for entry in self._free if entry is not fitting]
        buffer, returned = fitting
        returned.synchronize()
        return buffer

    def follow(self, ticket: Ticket) -> None:
        """What was taken last is used by this job, and free behind it if nobody keeps what it holds."""
        self._in_use.append(ticket)

    def lend(self, buffer: torch.Tensor, layout: Layout, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors over the buffer, which comes back when they are all gone, whoever holds them."""
        memory = buffer.numpy()
        weakref.finalize(memory, self._return, buffer).atexit = False
        return {name: layout[name].alias(memory) for name in names}

    def _return(self, buffer: torch.Tensor) -> None:
        with self._lock:
            self._free.append((buffer, self._cluster.mark()))
