"""What is in force on a thread while it works with emulated GPUs: a dispatch mode, and factories that keep the index."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from harmony_lightning.hardware.emulated_device import EmulatedDevice
from harmony_lightning.hardware.emulated_tensor import EmulatedTensor, below_functions, run
from harmony_lightning.hardware.operations import operation, tensors
from harmony_lightning.hardware.shapes import is_real, run_on_shapes

aten = torch.ops.aten
_COPIES = {aten.to, aten.item}
"""Operations that are made of a copy, if it takes one."""


@functools.cache
def _calls_others(func: Any) -> bool:
    """Whether an operation is made of others, and what it returns is new: `einsum`, `lstm`; not `reshape`."""
    return func._can_decompose() and all(result.alias_info is None for result in func._schema.returns)


class EmulatedMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives `cpu:i` its meaning on this thread, for operations that no device tensor takes part in."""

    def __init__(self, devices: Sequence[EmulatedDevice]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices = devices

    @override
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if torch.is_inference_mode_enabled():
            # Elsewhere autograd takes operations that are made of others apart before they come here, and autocast sees
            # what these call. In inference mode they come whole, and autocast has been passed already.
            if _calls_others(func):
                with torch._C._RestorePythonTLSSnapshot():  # type: ignore[attr-defined]
                    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
                        with self:
                            out = func.decompose(*args, **(kwargs or {}))
                        return pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t._is_view() else t, out)
            if func._overloadpacket in _COPIES:  # whole, they would not tell that they copy
                with self:
                    return func.decompose(*args, **(kwargs or {}))
        with below_functions():
            return self._dispatch(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    def _dispatch(self, func, types, args, kwargs):  # type: ignore[no-untyped-def]
        if EmulatedTensor in types:
            return run(func, args, kwargs or {}, self.devices)
        if kwargs:
            # Host memory needs no pinning for an emulated GPU, and pinning fails where there is no real one.
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            device = kwargs.get("device")
            if device is not None and device.index is not None:
                return run(func, args, kwargs, self.devices)
            return self._run_on_host(func, args, kwargs)
        if func is aten._pin_memory.default:
            return args[0].clone()
        return self._run_on_host(func, args, {})

    def _run_on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of the calling thread on host memory, which the machine wants to know of."""
        known, machine = operation(func), self.devices[0].machine
        if machine.is_fake and not is_real((args, kwargs.values())):
            out = run_on_shapes(known, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if not known.is_idle:
            machine.use_host(func, tensors((args, kwargs.values())), known.written(args, kwargs))
            if machine.clock is not None:
                num_updated = sum(tensor.numel() for tensor in args[0]) if known.is_fused_update else 0
                machine.clock.host_work(
                    machine.agents.thread(),
                    "update" if num_updated else "host",
                    known.flops(args, kwargs, out),
                    known.nbytes(args, kwargs, out),
                    num_updated,
                )
        return out


# `torch.tensor(data, device="cpu:0")` drops the index before any dispatch mode sees it, so these names are replaced
# while a cluster is active on any thread. On threads without one the replacement gives what the original gives.
_LITERALS: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(torch, name) for name in ("tensor", "as_tensor", "asarray")
}
_literals_lock = threading.Lock()
_literals_users = 0


@contextlib.contextmanager
def literals_on_devices() -> Iterator[None]:
    global _literals_users
    with _literals_lock:
        _literals_users += 1
        if _literals_users == 1:
            for name, original in _LITERALS.items():
                setattr(torch, name, _follow_device(original))
    try:
        yield
    finally:
        with _literals_lock:
            _literals_users -= 1
            if _literals_users == 0:
                for name, original in _LITERALS.items():
                    setattr(torch, name, original)


def _follow_device(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def literal(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        if kwargs.get("device") is None or tensor.device == torch.device(kwargs["device"]):
            return tensor
        return tensor.detach().to(kwargs["device"]).requires_grad_(tensor.requires_grad)

    return literal
