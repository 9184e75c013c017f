"""What the runtime asks of a GPU, and nothing more.

Two implementations obey this protocol: `cuda.CudaDevice` and `emulated.EmulatedDevice`; `host.HostDevice` is the trivial
third for training without any GPU. Nothing above this room asks which one it holds.

Each device has lanes, in-order queues of work, one for kernels and one for each kind of copy, so that no copy waits behind
one that is not due yet. A lane runs ahead of Python; what one lane produces another may touch only after it has waited for
an event recorded behind the producer.
"""

import enum
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch


class Lane(enum.Enum):
    """In-order queue of work on one device."""

    COMPUTE = "compute"
    SWAP_IN = "swap-in"
    """Weights, from the host."""
    SWAP_OUT = "swap-out"
    """Gradients and stashes, to the host."""
    UPDATE_OUT = "update-out"
    """Weights that were updated on the device, and states of the optimizer, to the host, where they are not soon needed."""
    STASH_IN = "stash-in"
    """Stashes, from the host."""
    PEER_IN = "peer-in"
    """From another device. A copy between devices is in both lanes, the sender's and the receiver's."""
    PEER_OUT = "peer-out"
    SUM_OUT = "sum-out"
    """Gradients, to other devices that add them up: into their SWAP_OUT lanes, from which sums leave."""


class Event(Protocol):
    """A point in a lane's queue, reached or not."""

    def synchronize(self) -> None:
        """Block the calling thread until the lane has reached the point."""


class Mark(Event, Protocol):
    """A point that a host thread has reached."""

    def observe(self) -> None:
        """The caller knows, by a lock, that the point has been passed: its later work comes behind it."""


class Device(Protocol):
    """One GPU, as the runtime sees it. `index` counts from 0 within the cluster."""

    index: int
    torch_device: torch.device
    memory_bytes: int
    """The limit: what this device offers to the runtime and the user's code together."""

    @property
    def name(self) -> str:
        """ "gpu0", for messages."""

    def lane(self, lane: Lane, what: str = "") -> AbstractContextManager[None]:
        """Work enqueued inside goes to `lane`; `what` it is, in timelines and messages."""

    def record(self, lane: Lane) -> Event:
        """The point behind everything enqueued on `lane` so far."""

    def wait(self, lane: Lane, event: Event) -> None:
        """Let later work on `lane` start only when `event` is reached; does not block the caller."""

    def allocated_bytes(self) -> int:
        """Bytes of tensors alive on the device now."""

    def peak_bytes(self) -> int:
        """The most bytes that were alive at once since the last `reset_peak`."""

    def reset_peak(self) -> None: ...

    def take_peak(self) -> int:
        """The most bytes that were alive at once since the last call; `peak_bytes` stays what it is."""

    def random_state(self) -> torch.Tensor | None:
        """State of the device's own random generator; None if the host's generator serves it."""

    def set_random_state(self, state: torch.Tensor) -> None: ...

    def seed_random(self, seed: int) -> None:
        """Seed the device's own generator, if it has one."""


class Reached:
    """A point that has been reached, where lanes are synchronous or locks give the order already."""

    def synchronize(self) -> None: ...

    def observe(self) -> None: ...


class Cluster(Protocol):
    """The GPUs of one server."""

    @property
    def devices(self) -> Sequence[Device]: ...

    @property
    def host_is_device(self) -> bool:
        """True when the only device is the host itself: nothing to swap."""

    def activate(self, *, continues: bool = False) -> AbstractContextManager[None]:
        """Whatever must be in force on the calling thread while tensors on these devices are worked with.

        When it is left, anybody may touch any host memory, so no copy may be in flight; unless the step `continues`.
        """

    def mark(self) -> Mark:
        """The point that the calling thread has reached, for another thread to come behind."""

    def begin_job(self, priority: int) -> None:
        """The calling thread, which takes jobs by priority, lowest first, turns to another. An emulated host may find that
        another one would have been due first."""

    def result(self, tensor: torch.Tensor, root: torch.device) -> torch.Tensor:
        """What a step has computed, on the root device, where the user's code expects it. Nobody waits for it."""

    def close(self) -> None:
        """Lift whatever limits were set on the process. The cluster may be used again."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """An uninitialised uint8 host tensor that the devices can copy to and from without blocking."""

    def trim_device_memory(self) -> None:
        """Slots of another plan come: what torch keeps of freed memory for later must not lie in their way in pieces."""

    def trim_host_memory(self) -> None:
        """Wait for all that the devices do, and give the system back what torch keeps of pinned memory for later."""
