"""Real GPUs behind the protocol. Importing it touches none of them."""

import contextlib
import logging
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.device import Device, Event, Lane, Mark, Reached
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

_MARGIN_BYTES = 512 * 2**20
"""Left free when no limit is given: library workspaces and fragmentation, which no plan counts."""
_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU of the process, not only the current one."""


class CudaDevice:
    """One CUDA GPU. COMPUTE is the user's current stream; the swap lanes are streams of our own, made on first use.

    Args:
        index: position within the cluster, which may differ from CUDA's ordinal.
        torch_device: with its ordinal, as `torch.device("cuda", 1)`.
        memory_bytes: the limit, which `limit` has torch's caching allocator enforce; None offers what is free, less a
            margin, and no more than this process has been allowed.

    Raises:
        ConfigurationError: more memory is asked for than the GPU has.
    """

    def __init__(self, index: int, torch_device: torch.device, memory_bytes: int | None = None) -> None:
        if torch_device.type != "cuda" or torch_device.index is None:
            raise ConfigurationError(f"a CUDA device needs its ordinal, such as cuda:0; got {str(torch_device)!r}")
        self.index = index
        self.torch_device = torch_device
        free_bytes, total_bytes = torch.cuda.mem_get_info(torch_device)
        self._fraction: float | None = None
        """Of the GPU's memory, if there is a limit."""
        self._former_fraction: float | None = None
        """What this process was allowed before; None if the limit is not in force."""
        if memory_bytes is None:
            # What torch has already reserved in this process is not free to the driver, yet free to us.
            memory_bytes = free_bytes + torch.cuda.memory_reserved(torch_device) - _MARGIN_BYTES
            if memory_bytes <= 0:
                raise ConfigurationError(
                    f"{self.name} has only {format_nbytes(free_bytes)} of {format_nbytes(total_bytes)} free; end the "
                    "other processes on this GPU or choose another one"
                )
            if (allowed := torch.cuda.get_per_process_memory_fraction(torch_device)) < 1:
                memory_bytes = min(memory_bytes, int(allowed * total_bytes))
        else:
            if not 0 < memory_bytes <= total_bytes:
                raise ConfigurationError(
                    f"a limit of {format_nbytes(memory_bytes)} is asked for, but {self.name} has "
                    f"{format_nbytes(total_bytes)}; set memory to at most that"
                )
            self._fraction = memory_bytes / total_bytes
        self.memory_bytes = memory_bytes
        self._former_peak = 0
        """The most bytes that were alive in front of the last `take_peak`."""
        self._swap_streams: dict[Lane, torch.cuda.Stream] = {}
        self._outside = threading.local()
        """`stream`, by thread: the one that was current when a lane was entered; None outside of lanes."""

    @property
    def name(self) -> str:
        return f"gpu{self.index}"

    def limit(self) -> None:
        """Let the process have no more than `memory_bytes` if they were asked for, until `lift_limit`."""
        if self._fraction is not None and self._former_fraction is None:
            self._former_fraction = torch.cuda.get_per_process_memory_fraction(self.torch_device)
            torch.cuda.set_per_process_memory_fraction(self._fraction, self.torch_device)

    def lift_limit(self) -> None:
        former, self._former_fraction = self._former_fraction, None
        if former is not None:
            torch.cuda.set_per_process_memory_fraction(former, self.torch_device)

    @contextlib.contextmanager
    def lane(self, lane: Lane, what: str = "") -> Iterator[None]:
        outer = getattr(self._outside, "stream", None)
        self._outside.stream = self._stream(Lane.COMPUTE)
        try:
            with torch.cuda.stream(self._stream(lane)):
                yield
        finally:
            self._outside.stream = outer

    def record(self, lane: Lane) -> Event:
        # Whoever waits for it sleeps, and leaves its core to updates and casts.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream(lane))
        return event

    def wait(self, lane: Lane, event: Event) -> None:
        if not isinstance(event, torch.cuda.Event):
            raise TypeError(f"{self.name} can wait for CUDA events only, got {type(event).__name__}")
        self._stream(lane).wait_event(event)

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.torch_device)

    def peak_bytes(self) -> int:
        return max(self._former_peak, torch.cuda.max_memory_allocated(self.torch_device))

    def reset_peak(self) -> None:
        self._former_peak = 0
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def take_peak(self) -> int:
        taken = torch.cuda.max_memory_allocated(self.torch_device)
        self._former_peak = max(self._former_peak, taken)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return taken

    def random_state(self) -> torch.Tensor | None:
        return torch.cuda.get_rng_state(self.torch_device)

    def set_random_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state, self.torch_device)

    def seed_random(self, seed: int) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # The default generators exist only after it.
        torch.cuda.default_generators[self.torch_device.index].manual_seed(seed)

    def __repr__(self) -> str:
        return f"CudaDevice({self.name}, {self.torch_device}, {format_nbytes(self.memory_bytes)})"

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        if lane is Lane.COMPUTE:
            # Inside a swap lane torch's current stream is that lane's.
            return getattr(self._outside, "stream", None) or torch.cuda.current_stream(self.torch_device)
        if (stream := self._swap_streams.get(lane)) is None:
            # Whichever thread comes first: a lane of two streams would have no order.
            stream = self._swap_streams.setdefault(lane, torch.cuda.Stream(self.torch_device))  # type: ignore[no-untyped-call]
        return stream


def _unpin(cudart: Any, address: int, mapping: mmap.mmap) -> None:
    """`mapping` lives until this has run: NumPy from 2.5 on lets go of an array's memory before it tells that it goes."""
    cudart.cudaHostUnregister(address)


class CudaCluster:
    """The given CUDA devices, numbered from 0 in that order; `memory_bytes` limits each of them."""

    def __init__(self, devices: Sequence[torch.device], memory_bytes: int | None = None) -> None:
        if not devices:
            raise ConfigurationError("a CUDA cluster needs at least one device, got none; set devices, such as cuda:0")
        if len(set(devices)) < len(devices):
            raise ConfigurationError(f"a CUDA device may be named once only, got {', '.join(map(str, devices))}")
        self._devices = tuple(CudaDevice(index, device, memory_bytes) for index, device in enumerate(devices))
        for device in self._devices:  # when none of them has refused
            device.limit()
        self._has_warned = False

    @property
    def devices(self) -> Sequence[Device]:
        return self._devices

    @property
    def host_is_device(self) -> bool:
        return False

    def activate(self, *, continues: bool = False) -> AbstractContextManager[None]:
        """A thread begins on GPU 0, and what it asks CUDA for would make a context there, also where that GPU is none of
        ours: it takes hundreds of MiB, or is refused."""
        return torch.cuda.device(self._devices[0].torch_device)

    def mark(self) -> Mark:
        return Reached()

    def begin_job(self, priority: int) -> None: ...

    def result(self, tensor: torch.Tensor, root: torch.device) -> torch.Tensor:
        """The root waits for the loss of the last microbatch, and no lane beside COMPUTE would change that: Lightning
        divides and copies the loss at once, in front of backward. By the virtual clock it costs 8 ms in pp, 1.8 % of a
        step of GPT-2 XL cut to 14 blocks with 16384 tokens on four 3090s; in mixed mode nothing."""
        return tensor.to(root, non_blocking=root.type != "cpu")

    def close(self) -> None:
        for device in self._devices:
            device.lift_limit()

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Pinned in place: torch's own pinned allocator would round up to a power of two.

        In memory that child processes share. Of private memory that is pinned, a fork copies every page at once, for each
        worker of a data loader anew; and systems that do not (Linux before 5.9) give this process other pages than those
        that the GPUs know, as soon as it writes.
        """
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        try:
            mapping = mmap.mmap(-1, nbytes)
        except OSError as error:
            raise MemoryError(f"the host has no {format_nbytes(nbytes)} in one piece: {error}") from error
        memory = np.frombuffer(mapping, dtype=np.uint8)
        buffer = torch.from_numpy(memory)
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._devices[0].torch_device):
            error_code = int(cudart.cudaHostRegister(buffer.data_ptr(), nbytes, _REGISTER_PORTABLE))
        if error_code == 0:
            # The array goes when nobody looks into the memory any more. Not at exit: the driver cleans up itself.
            weakref.finalize(memory, _unpin, cudart, buffer.data_ptr(), mapping).atexit = False
            return buffer
        self._clear_last_error()
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "cannot pin host memory (cudaHostRegister error %d); copies to and from it block. Free host memory, or "
                "raise the memory limit of the container that this runs in",
                error_code,
            )
        return buffer

    def trim_device_memory(self) -> None:
        torch.cuda.empty_cache()

    def trim_host_memory(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device.torch_device)  # what copies may still use is not given back
        torch._C._host_emptyCache()

    def _clear_last_error(self) -> None:
        """Let the next kernel launch report the failure here, else it would surface in the user's first operation."""
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._devices[0].torch_device)

    def __repr__(self) -> str:
        return f"CudaCluster({', '.join(str(device.torch_device) for device in self._devices)})"
