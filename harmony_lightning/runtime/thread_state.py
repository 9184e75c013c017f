"""What torch keeps per thread, kept per microbatch instead.

Microbatches are greenlets of one thread. One may be parked inside the user's `with torch.no_grad():`, `autocast`,
`inference_mode`, any function, dispatch or saved-tensor mode, or a function that torch.compile has compiled; none of that
may leak to the others. So at each switch the state *above* the runtime's own base is taken off the thread and put back
when the microbatch goes on.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._C._dynamo import eval_frame as _compiler
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

_hooks = torch._C._autograd
AUTOCAST_TYPES = ("cpu", "cuda")
DEFAULT_DTYPE = threading.RLock()
"""Held by whoever has changed torch's default type for a while behind the forward, as that is one for all threads, and by
updates that make states."""


class Autocast(NamedTuple):
    """Autocast switches of one thread, for every device type that the runtime serves, and torch's default type, which
    "true" precisions set instead. A tuple: one is made for each call of a layer and each switch, in a third of a
    dataclass's time."""

    enabled: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]
    default_dtype: torch.dtype
    is_cached: bool

    @classmethod
    def capture(cls) -> "Autocast":
        cpu, cuda = AUTOCAST_TYPES
        return cls(
            (torch.is_autocast_enabled(cpu), torch.is_autocast_enabled(cuda)),
            (torch.get_autocast_dtype(cpu), torch.get_autocast_dtype(cuda)),
            torch.get_default_dtype(),
            torch.is_autocast_cache_enabled(),
        )

    def apply(self) -> None:
        for kind, enabled, dtype in zip(AUTOCAST_TYPES, self.enabled, self.dtypes, strict=True):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if self.default_dtype is not torch.get_default_dtype():
            torch.set_default_dtype(self.default_dtype)
        torch.set_autocast_cache_enabled(self.is_cached)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within, the thread is in this state; the process's default type does not change under an update that needs it."""
        before = Autocast.capture()
        with DEFAULT_DTYPE if before.default_dtype is not self.default_dtype else nullcontext():
            self.apply()
            try:
                yield
            finally:
                before.apply()


class ThreadState:
    """The thread as it is at one moment. `park` takes what lies above another state off the thread, `resume` puts it
    back; both belong to the same microbatch and alternate."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = Autocast.capture()
        self._num_function_modes = torch._C._len_torch_function_stack()
        self._num_dispatch_modes = torch._C._len_torch_dispatch_stack()
        self._saved_tensor_hooks = _hooks._top_saved_tensors_default_hooks(True)
        self._compiler = _compiler.get_eval_frame_callback()

    def park(self) -> "Parked":
        """Bring the thread back to this state and return what was taken off."""
        # First, as the compiler takes every function that is called while it is on.
        if (compiler := _compiler.get_eval_frame_callback()) is not self._compiler:
            _compiler.set_eval_frame(self._compiler)
        function_modes = []
        while torch._C._len_torch_function_stack() > self._num_function_modes:
            function_modes.append(_pop_function_mode())  # type: ignore[no-untyped-call]
        dispatch_modes = []
        while torch._C._len_torch_dispatch_stack() > self._num_dispatch_modes:
            dispatch_modes.append(_pop_dispatch_mode())
        saved_tensor_hooks = []
        while (top := _hooks._top_saved_tensors_default_hooks(True)) != self._saved_tensor_hooks and top is not None:
            saved_tensor_hooks.append(top)
            _hooks._pop_saved_tensors_default_hooks()
        parked = Parked(
            grad=torch.is_grad_enabled(),
            autocast=None if (autocast := Autocast.capture()) == self._autocast else autocast,
            function_modes=tuple(reversed(function_modes)),
            dispatch_modes=tuple(reversed(dispatch_modes)),
            saved_tensor_hooks=tuple(reversed(saved_tensor_hooks)),
            # The guard remembers the whole thread state of the microbatch and brings it back when it is dropped; so
            # guards of several microbatches may come and go in any order.
            inference_guard=torch._C._InferenceMode(self._inference)
            if torch.is_inference_mode_enabled() != self._inference
            else None,
            compiler=compiler,
        )
        if parked.autocast is not None:
            self._autocast.apply()
        _set_grad_enabled(self._grad)
        return parked


@dataclass(slots=True)
class Parked:
    """State of a microbatch that is not running."""

    grad: bool
    autocast: Autocast | None
    """None where it is no other than below."""
    function_modes: tuple[Any, ...] = ()
    dispatch_modes: tuple[Any, ...] = ()
    saved_tensor_hooks: tuple[Any, ...] = ()
    inference_guard: Any = None
    compiler: Any = None
    """torch.compile's look at each call: a callable, None where it is off, False where only compiled code is looked up."""

    def resume(self) -> None:
        """Put the state back onto the thread."""
        self.inference_guard = None
        _set_grad_enabled(self.grad)
        if self.autocast is not None:
            self.autocast.apply()
        for mode in self.dispatch_modes:
            _push_dispatch_mode(mode)
        for mode in self.function_modes:
            _push_function_mode(mode)  # type: ignore[no-untyped-call]
        for pack, unpack in self.saved_tensor_hooks:
            _hooks._push_saved_tensors_default_hooks(pack, unpack)
        if self.compiler is not _compiler.get_eval_frame_callback():
            _compiler.set_eval_frame(self.compiler)


def _set_grad_enabled(enabled: bool) -> None:
    # Function modes are asked about it, though it takes no tensors.
    if torch.is_grad_enabled() != enabled:
        torch._C._set_grad_enabled(enabled)
