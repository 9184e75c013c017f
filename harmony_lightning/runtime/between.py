"""The function mode over user code that runs between steps: hooks, callbacks, metrics.

A step leaves tensors where the plan computed them, and user code may have kept some: `self.predictions.append(p)`, to be
put together with targets, which wait on the host, when the epoch ends. On one device that just works. So wherever such
code brings tensors of several devices together, they come to the root device first; what is on one device stays there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree

from harmony_lightning.hardware.device import Cluster


class Between(TorchFunctionMode):
    """Entered when a run is set up and left when it is torn down; `suspended` while a step has a mode of its own."""

    def __init__(self, cluster: Cluster, root: torch.device, notice: Callable[..., None]) -> None:
        """`notice` is told what functions are about to work with, whether they are shown its memory, and whether that
        `leaks` from torch to others."""
        super().__init__()
        self._notice = notice
        self._devices = frozenset(device.torch_device for device in cluster.devices)
        self._cluster = cluster
        self._root = root
        self._is_entered = False

    def enter(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]
        self._is_entered = True

    def leave(self) -> None:
        """May be called twice."""
        if self._is_entered:
            self._is_entered = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Costs nothing within, unless user code has a mode of its own in force on top of this one."""
        top = _get_current_function_mode()  # type: ignore[no-untyped-call]
        if not self._is_entered or top is not self:
            yield
            return
        self.leave()
        try:
            yield
        finally:
            self.enter()

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Within `suspended`: in force again, for user code that is called there."""
        if self._is_entered:
            yield
            return
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            leaves = pytree.tree_leaves((args, kwargs))
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute not in _FIXED:
                leaks = getattr(func, "__name__", "") in _LEAKS
                self._notice(leaves, shows=attribute != "grad", leaks=leaks)
            devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
            # Scalars of the host go everywhere; those of a GPU only with tensors of that GPU.
            devices |= {
                leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device in self._devices
            }
            if len(devices) > 1 and not devices.isdisjoint(self._devices) and not _takes_any(func):
                name = getattr(func, "__name__", "")
                is_write = isinstance(args[0], torch.Tensor) and (name.endswith("_") or name == "__setitem__")
                target = args[0].device if is_write else self._root

                def move(tensor: torch.Tensor) -> torch.Tensor:
                    return tensor.to(target)

                with self._cluster.activate():
                    args, kwargs = pytree.tree_map_only(torch.Tensor, move, (args, kwargs))
        return func(*args, **kwargs)


_FIXED = frozenset(("device", "dtype", "grad_fn", "is_leaf", "layout", "names", "ndim", "requires_grad", "shape"))
"""Attributes that an update does not change."""

_LEAKS = frozenset(("__array__", "__dlpack__", "data_ptr", "numpy"))
"""Functions behind which memory may be written without torch."""


def _takes_any(func: Callable[..., Any]) -> bool:
    """Copies between devices, and attributes, are what they are."""
    return getattr(func, "__name__", "") in ("__get__", "__set__", "copy_", "backward", "to")
