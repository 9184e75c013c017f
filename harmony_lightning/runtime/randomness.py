"""Random streams: one for each microbatch, and a replay for each recomputed layer.

A microbatch's random numbers must not depend on which packs, GPUs or order the plan chose. So each microbatch owns a
stream that is switched in and out with it:

- a minibatch that is one microbatch goes on with the process's own streams, exactly as without this package;
- otherwise the step draws one number from torch's global host generator, and microbatch `m` starts from
  `microbatch_seed(drawn, m)`. The global stream advances by that one draw per step, whatever the plan.

A stream covers torch's host generator, the generator of the device the microbatch is on, Python's `random` and NumPy's
legacy global generator.
"""

import ctypes
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy
import torch

from harmony_lightning.hardware.device import Device

_GOLDEN = 0x9E3779B97F4A7C15  # odd constant of the splitmix64 generator (Steele, Lea, Flood 2014)
_MASK = (1 << 64) - 1

Result = TypeVar("Result")


def draw_step_seed() -> int:
    """One draw from torch's global host generator: the root of the streams of one step."""
    return int(torch.empty((), dtype=torch.int64).random_().item())


def microbatch_seed(step_seed: int, microbatch: int) -> int:
    """The seed of a microbatch's streams: splitmix64 of the step's seed and the microbatch's index."""
    state = (step_seed + (microbatch + 1) * _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1


_STATE_NBYTES = 2500
"""Of a Mersenne Twister: 624 words, and the position among them."""


class _Python:
    """Python's global generator. Its own functions make a tuple of 625 numbers, which takes 10 us; its memory is read in
    0.1 us, and the normal number that it keeps for later is an attribute."""

    def __init__(self) -> None:
        self._generator: Any = random._inst  # type: ignore[attr-defined]
        self._memory = (ctypes.c_char * _STATE_NBYTES).from_address(id(self._generator) + object.__basicsize__)
        position, *words = struct.unpack("i624I", self._memory.raw)
        self._is_known = random.getstate()[1] == (*words, position)

    def state(self) -> Any:
        """Equal for equal states."""
        return (self._memory.raw, self._generator.gauss_next) if self._is_known else random.getstate()

    def restore(self, state: Any) -> None:
        if self._is_known:
            self._memory.raw, self._generator.gauss_next = state
        else:
            random.setstate(state)


class _Numpy:
    """NumPy's global generator. Reading or setting it costs 60 us, so its raw memory is looked at and written, and only
    programs that really draw from it pay. (The raw memory does not tell of a second normal number that the generator keeps
    for later; as long as nobody draws there is none.)
    """

    def __init__(self) -> None:
        address: int = numpy.random.mtrand._rand._bit_generator.ctypes.state_address  # type: ignore[attr-defined]
        self._raw = (ctypes.c_char * _STATE_NBYTES).from_address(address)
        self._is_used = False
        self._expected: bytes | None = None
        """The memory when nobody has drawn since it was last looked at."""

    def expect(self) -> None:
        """The generator has been set; moves from here on are draws."""
        self._expected = self._memory()

    def state(self) -> Any:
        """For `restore`, and for `drawn`."""
        memory = self._memory()
        if self._expected is None and self._state()[3]:  # a normal number is kept
            self._is_used = True
        self._is_used |= self._expected not in (None, memory)
        return self._state() if self._is_used else memory

    def drawn(self, before: Any) -> Any:
        """The state in front, if somebody has drawn since; None otherwise."""
        self._expected = self._memory()
        if isinstance(before, bytes):
            if before == self._expected:
                return None
            self._is_used = True
            return _in_full(before)
        now = self._state()
        same = now[2:] == before[2:] and numpy.array_equal(now[1], before[1])
        return None if same else before

    def restore(self, state: Any) -> None:
        """Set what `state` has given, or `numpy.random.get_state`."""
        if isinstance(state, bytes) and not self._is_used and self._expected == self._memory():
            self._raw.raw = state
        else:
            numpy.random.set_state(_in_full(state) if isinstance(state, bytes) else state)
        self.expect()

    @staticmethod
    def _state() -> tuple[Any, ...]:
        return cast(tuple[Any, ...], numpy.random.get_state())

    def _memory(self) -> bytes:
        return self._raw.raw


def _in_full(memory: bytes) -> tuple[Any, ...]:
    """The state in NumPy's own form, of a generator that keeps no normal number."""
    words = numpy.frombuffer(memory, dtype=numpy.uint32)
    return ("MT19937", words[:624].copy(), int(words[624]), 0, 0.0)


_python, _numpy = _Python(), _Numpy()


class HostState(NamedTuple):
    """The host's generators at one moment."""

    torch: torch.Tensor
    python: Any
    numpy: Any

    @classmethod
    def capture(cls) -> "HostState":
        return cls(torch.default_generator.get_state(), _python.state(), _numpy.state())

    def restore(self) -> None:
        torch.default_generator.set_state(self.torch)
        _python.restore(self.python)
        _numpy.restore(self.numpy)


class Stream:
    """The random stream of one microbatch: suspended state while another microbatch runs."""

    def __init__(self, seed: int | None) -> None:
        """`seed` None: go on with whatever the process's generators hold."""
        self._seed = seed
        self._host: HostState | None = None
        self._device: torch.Tensor | None = None

    def resume(self) -> None:
        if self._host is not None:
            self._host.restore()
        elif self._seed is not None:
            torch.default_generator.manual_seed(self._seed)
            random.seed(self._seed)
            numpy.random.seed(self._seed & 0xFFFFFFFF)
        _numpy.expect()

    def suspend(self) -> None:
        self._host = HostState.capture()

    def enter_device(self, device: Device) -> None:
        """Bring the stream's device part to `device`, which may be another than before."""
        if self._device is not None:
            device.set_random_state(self._device)
        elif self._seed is not None:
            device.seed_random(self._seed)

    def leave_device(self, device: Device) -> None:
        self._device = device.random_state()


class StepStreams:
    """The streams of one training step after the other, each begun, perhaps undone, and ended."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._num_microbatches = 0
        self._seed: int | None = None
        self._undone_seed: int | None = None
        """Of a step that was given up and will be run again."""
        self._own = Stream(None)
        """The process's, as it was when the step began."""
        self._own_on_devices: list[torch.Tensor | None] = []

    def begin(self, num_microbatches: int) -> list[Stream | None]:
        """Those of the microbatches; None stands for the process's own."""
        self._num_microbatches = num_microbatches
        self._seed, self._undone_seed = self._undone_seed, None
        if num_microbatches > 1 and self._seed is None:
            self._seed = draw_step_seed()
        self._own.suspend()
        self._own_on_devices = [device.random_state() for device in self._devices]
        if num_microbatches == 1 or self._seed is None:
            return [None] * num_microbatches
        return [Stream(microbatch_seed(self._seed, m)) for m in range(num_microbatches)]

    def undo(self) -> None:
        """The step is given up, and the next one will draw the same numbers."""
        self._undone_seed = self._seed
        self._resume_own()

    def end(self) -> None:
        """Microbatches with streams of their own have left the process's as it was."""
        if self._num_microbatches > 1:
            self._resume_own()

    def _resume_own(self) -> None:
        self._own.resume()
        for device, state in zip(self._devices, self._own_on_devices, strict=True):
            if state is not None:
                device.set_random_state(state)


class Replay:
    """The random state in front of a layer's forward, kept only if the forward drew from it."""

    __slots__ = ("_device_state", "_numpy", "_python", "_torch")

    def __init__(self, device: Device) -> None:
        self._torch: torch.Tensor | None = torch.default_generator.get_state()
        self._python: Any = _python.state()
        self._numpy: Any = _numpy.state()
        self._device_state = device.random_state()

    def keep_what_was_drawn(self, device: Device) -> None:
        """Called after the forward: forget the states of generators that did not move."""
        if self._torch is not None and _are_equal(self._torch, torch.default_generator.get_state()):
            self._torch = None
        if self._python == _python.state():
            self._python = None
        self._numpy = _numpy.drawn(self._numpy)
        if self._device_state is not None:
            now = device.random_state()
            if now is not None and _are_equal(self._device_state, now):
                self._device_state = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was drawn."""
        on_host = self._torch is not None or self._python is not None or self._numpy is not None
        return not on_host and self._device_state is None

    def begin(self, device: Device) -> "Replay":
        """Set the kept states; returns the present ones, whose own `begin` undoes it."""
        present = object.__new__(Replay)
        present._torch = None if self._torch is None else torch.default_generator.get_state()
        present._python = None if self._python is None else _python.state()
        present._numpy = None if self._numpy is None else numpy.random.get_state()
        present._device_state = None if self._device_state is None else device.random_state()
        self._set(device)
        return present

    def _set(self, device: Device) -> None:
        if self._torch is not None:
            torch.default_generator.set_state(self._torch)
        if self._python is not None:
            _python.restore(self._python)
        if self._numpy is not None:
            numpy.random.set_state(self._numpy)
        if self._device_state is not None:
            device.set_random_state(self._device_state)


def drawing_anew(function: Callable[[], Result], device: Device) -> Callable[[], Result]:
    """A function of torch's, on `device`, that draws the same numbers whenever it is called: it may have failed behind its
    draw, for want of memory. Such functions draw from torch's generators alone."""
    host, own = torch.default_generator.get_state(), device.random_state()
    is_first = True

    def call() -> Result:
        nonlocal is_first
        if not is_first:
            torch.default_generator.set_state(host)
            if own is not None:
                device.set_random_state(own)
        is_first = False
        return function()

    return call


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of states on the host; `torch.equal` compares byte by byte, through the dispatcher."""
    return bool(one.numpy().tobytes() == other.numpy().tobytes())
