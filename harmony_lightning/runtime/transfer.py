"""Copies that run beside compute: tensors that arrive on a device, and memory that copies from it still read.

A copy waits for what it reads and for the memory it writes, and never for compute that was enqueued behind those:
microbatches, and with them devices, would queue up behind each other.

    sender    COMPUTE  | microbatch 0 |E| microbatch 1 | ...
              PEER_OUT                 '--> copy --.
    receiver  PEER_IN                       copy --+-> arrived
              COMPUTE                               '--> waits when it first uses the tensor
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from harmony_lightning.hardware.device import Device, Event, Lane
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.units import format_nbytes

_TURNS_HELD = 2
"""Microbatches for which memory that a copy reads is always held: copies of one turn overlap with compute of the next."""


@dataclass(slots=True, eq=False)
class Arrival:
    """A tensor on its way to a device."""

    value: torch.Tensor
    device: Device
    arrived: Event | None = None
    """None if it is there, or the device's compute waits for it already."""

    def take(self) -> torch.Tensor:
        """The tensor; compute enqueued from now on may use it."""
        if self.arrived is not None:
            self.device.wait(Lane.COMPUTE, self.arrived)
            self.arrived = None
        return self.value

    def __del__(self) -> None:
        self.take()  # nobody has asked for it: its memory may be used again, behind the copy


@dataclass(slots=True)
class _Turn:
    number: int
    tensors: list[torch.Tensor] = field(default_factory=list)
    nbytes: int = 0
    end: Event | None = None


class Departures:
    """Device memory that copies from it may still be reading. Compute waits for the copies before the memory is freed.

    A copy to another device waits until that one has room, which may still be at another pack. So its source is held for as
    many microbatches as go through a pack, while there is memory to spare: else this device would wait for that one.
    """

    def __init__(
        self, devices: Sequence[Device], limit_nbytes: int = 0, num_microbatches: Callable[[], int] = lambda: 0
    ) -> None:
        """`limit_nbytes`: what copies to other devices may hold on a device for more microbatches than usual."""
        self._limit_nbytes = limit_nbytes
        self._num_microbatches = num_microbatches
        self._devices = devices
        self._turns: list[dict[Lane, deque[_Turn]]] = [{} for _ in devices]
        self._numbers = [0] * len(devices)
        """By device: of the present turn."""

    def hold(self, device: Device, lane: Lane, tensor: torch.Tensor) -> Event:
        """Keep the source of a copy that has just been enqueued on `lane`; returns the point behind the copy."""
        turns, number = self._turns[device.index].setdefault(lane, deque()), self._numbers[device.index]
        if not turns or turns[-1].number != number:
            turns.append(_Turn(number))
        turns[-1].tensors.append(tensor)
        turns[-1].nbytes += tensor.nbytes
        end = turns[-1].end = device.record(lane)
        return end

    def turn(self, device: Device) -> None:
        """Another microbatch comes to the device."""
        if not (lanes := self._turns[device.index]):
            return
        if any(turns and turns[-1].number == self._numbers[device.index] for turns in lanes.values()):
            self._numbers[device.index] += 1
        for lane, turns in lanes.items():
            total = sum(turn.nbytes for turn in turns)
            most = _TURNS_HELD if lane is not Lane.PEER_OUT else max(_TURNS_HELD, self._num_microbatches())
            while turns:
                age = self._numbers[device.index] - turns[0].number
                if age < _TURNS_HELD or (age < most and total <= self._limit_nbytes):
                    break
                total -= turns[0].nbytes
                self._free(device, turns.popleft())

    @property
    def is_empty(self) -> bool:
        return not any(turn.tensors for lanes in self._turns for turns in lanes.values() for turn in turns)

    def let_go(self) -> None:
        """Hold nothing any more."""
        for device in self._devices:
            self.release(device)

    def release(self, device: Device) -> bool:
        """Hold nothing of a device any more. Returns whether there was anything."""
        lanes = self._turns[device.index]
        turns = [turn for of_lane in lanes.values() for turn in of_lane]
        lanes.clear()
        for turn in turns:
            self._free(device, turn)
        return bool(turns)

    @staticmethod
    def _free(device: Device, turn: _Turn) -> None:
        if turn.end is not None:
            device.wait(Lane.COMPUTE, turn.end)
        turn.tensors.clear()


_Kind = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Landings:
    """Memory on each device in which the next tensor from another one arrives, set aside a microbatch ahead.

    A copy waits for the memory that it writes: for all compute enqueued when that was allocated. The first copy for a pack
    sets out when all of the pack before is enqueued, and so would wait until that is over, and compute would wait for it:

        COMPUTE  | pack 4, microbatch 6 | pack 4, microbatch 7 |      | pack 8, microbatch 0
        PEER_IN                                                 copy -'     memory allocated now
        PEER_IN                          copy -'                            memory allocated in front of microbatch 7
    """

    def __init__(self, devices: Sequence[Device], limit_nbytes: int) -> None:
        """`limit_nbytes`: what may be set aside on a device; what arrives next is taken to be like what arrived last."""
        self._devices = devices
        self._limit_nbytes = limit_nbytes
        self._last: dict[int, _Kind] = {}
        """By device: of what arrived last."""
        self._ready: dict[int, tuple[torch.Tensor, Event]] = {}

    def turn(self, device: Device) -> None:
        """Another microbatch comes to the device."""
        if device.index in self._ready or device.index not in self._last:
            return
        shape, strides, dtype = self._last[device.index]
        with torch._C.DisableTorchFunction(), torch.no_grad():
            try:
                memory = torch.empty_strided(shape, strides, dtype=dtype, device=device.torch_device)
            except OUT_OF_MEMORY:
                self._last.clear()  # it does without
                return
        self._ready[device.index] = memory, device.record(Lane.COMPUTE)

    def take(self, tensor: torch.Tensor, device: Device) -> tuple[torch.Tensor, Event]:
        """Memory for a copy of the tensor, and the point behind which it may be written."""
        found = self._ready.pop(device.index, None)
        if found is None or _kind(found[0]) != _kind(tensor):
            found = torch.empty_like(tensor, device=device.torch_device), device.record(Lane.COMPUTE)
        if tensor.nbytes <= self._limit_nbytes:
            self._last[device.index] = _kind(found[0])
        return found

    def give_back(self, device: Device) -> bool:
        """Memory of the device is short. Returns whether there was anything."""
        self._last.pop(device.index, None)
        return self._ready.pop(device.index, None) is not None

    def let_go(self) -> None:
        """Set nothing aside any more."""
        self._ready.clear()
        self._last.clear()


def _kind(tensor: torch.Tensor) -> _Kind:
    return tensor.shape, tensor.stride(), tensor.dtype


def send(
    tensor: torch.Tensor,
    source: Device,
    target: Device,
    departures: Departures,
    ready: Event | None = None,
    landings: Landings | None = None,
) -> Arrival:
    """Copy a tensor from device to device.

    Args:
        tensor: on `source`.
        source, target: different devices.
        departures: keeps the source's memory.
        ready: when the tensor is computed; None: behind all that is enqueued on `source` now.
        landings: have memory for it, perhaps.
    """
    if landings is not None:
        result, is_free = landings.take(tensor, target)
    else:
        result, is_free = torch.empty_like(tensor, device=target.torch_device), target.record(Lane.COMPUTE)
    source.wait(Lane.PEER_OUT, ready if ready is not None else source.record(Lane.COMPUTE))
    target.wait(Lane.PEER_IN, is_free)  # the memory may have been in use until then
    with source.lane(Lane.PEER_OUT, "peer"), target.lane(Lane.PEER_IN, "peer"):
        result.copy_(tensor, non_blocking=True)
    departures.hold(source, Lane.PEER_OUT, tensor)
    return Arrival(result, target, target.record(Lane.PEER_IN))


def empty_on_host(like: torch.Tensor, device: Device) -> torch.Tensor:
    """Host memory for a copy to or from the device, for which nobody waits.

    Raises:
        MemoryError: there is none. CUDA says "out of memory" then, as if it were the device's.
    """
    try:
        return torch.empty_like(like, device="cpu", pin_memory=device.torch_device.type == "cuda")
    except RuntimeError as error:
        raise MemoryError(f"the host has no {format_nbytes(like.nbytes)} that can be pinned: {error}") from error


def bring_in(tensor: torch.Tensor, device: Device) -> torch.Tensor:
    """Copy a tensor of the user's from the host; nobody waits, and he may write it at once."""
    if device.torch_device.type == "cpu" and device.torch_device.index is None:
        return tensor.to(device.torch_device)
    staged = empty_on_host(tensor, device).copy_(tensor)
    return staged.to(device.torch_device, non_blocking=True)
