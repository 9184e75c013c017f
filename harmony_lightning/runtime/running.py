"""What is noted in the runtime's state while a layer's own code runs, or what surrounds it.

Around each call of a layer, and each second run, so these are no generators, which take three times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode, _push_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

from harmony_lightning.hardware.device import Device, Lane
from harmony_lightning.runtime.glue_backward import GlueBackward
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.thread_state import Autocast


class InsideLayer:
    """The code within is a layer's own, on `device`: calls are not interposed, tensors are not imported. `is_watched` if
    somebody must see all the same what functions get."""

    __slots__ = ("_is_cached", "_is_watched", "_lane", "_state", "_watcher")

    def __init__(self, state: RuntimeState, device: Device, *, is_watched: bool = False) -> None:
        self._state = state
        self._lane = device.lane(Lane.COMPUTE)
        self._is_watched = is_watched
        self._watcher: TorchFunctionMode | None = None

    def __enter__(self) -> None:
        state = self._state
        self._lane.__enter__()
        state.depth += 1
        self._is_cached = torch.is_autocast_cache_enabled()
        # Leaves over slot memory keep their identity while what lies there changes: a cached cast would be stale.
        torch.set_autocast_cache_enabled(False)
        if not self._is_watched:
            self._watcher = state.take_off_watcher()

    def __exit__(self, *error: object) -> None:
        if self._watcher is not None:
            _push_mode(self._watcher)  # type: ignore[no-untyped-call]
        torch.set_autocast_cache_enabled(self._is_cached)
        self._state.depth -= 1
        self._lane.__exit__(*error)  # type: ignore[arg-type]


class Recomputing(InsideLayer):
    """The code within runs a layer again: what it saves is used at once and stays where it is."""

    __slots__ = ("_before", "_mode")

    def __enter__(self) -> None:
        super().__enter__()
        state = self._state
        self._before, state.is_recomputing = state.is_recomputing, True
        self._mode = _pop_dispatch_mode() if isinstance(_get_current_dispatch_mode(), GlueBackward) else None

    def __exit__(self, *error: object) -> None:
        if self._mode is not None:
            _push_dispatch_mode(self._mode)
        self._state.is_recomputing = self._before
        super().__exit__(*error)


@contextmanager
def unwatched(state: RuntimeState) -> Iterator[None]:
    """The code within is not the user's, or a layer's own. A function mode costs microseconds for every function, and a
    layer calls a hundred."""
    watcher = state.take_off_watcher()
    try:
        yield
    finally:
        if watcher is not None:
            _push_mode(watcher)  # type: ignore[no-untyped-call]


@contextmanager
def differentiating(state: RuntimeState, device: Device, *, has_glue: bool) -> Iterator[None]:
    """The code within is a segment's backward. That of the last one is run where the user's step still has its precision,
    but on one device backward is behind the step: functions that autocast would cast are not cast there."""
    before, state.is_differentiating = state.is_differentiating, True
    within = None
    if state.outside is not None and state.outside != (autocast := Autocast.capture()):
        within = autocast
        state.outside.apply()
    tries_again = has_glue and not state.cluster.host_is_device
    if tries_again:
        _push_dispatch_mode(GlueBackward(device, state.memory.with_room))
    try:
        yield
    finally:
        if tries_again:
            _pop_dispatch_mode()
        if within is not None:
            within.apply()
        state.is_differentiating = before
