"""Which tensors may take part in one operation on an emulated GPU, and what becomes of those that CUDA would refuse."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from harmony_lightning.hardware.emulated_device import EmulatedDevice
from harmony_lightning.hardware.operations import Operation, tensors

log = logging.getLogger(__name__)

aten = torch.ops.aten


def _home(tensor: torch.Tensor) -> EmulatedDevice | None:
    """The emulated GPU that a tensor is on; None for the host."""
    home = getattr(tensor, "home", None)
    return home if isinstance(home, EmulatedDevice) else None


def may_mix(
    known: Operation, args: Any, kwargs: Any, ours: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor]
) -> bool:
    """Whether CUDA would take these: they are on one device, beside which only host scalars and host indices are read."""
    if not ours:
        return True
    home, func = _home(ours[0]), known.func
    if any(_home(tensor) is not home for tensor in ours):
        return False
    assert home is not None
    indices: list[torch.Tensor] = []
    if func in _HOST_INDICES:
        indices = [index for index in args[1] if index is not None and _home(index) is None]
        hosts = [host for host in hosts if all(host is not index for index in indices)]
    if func in _HOST_BATCH_SIZES:
        hosts = [host for host in hosts if host is not args[1]]
    written = known.written(args, kwargs)
    if any(host.dim() > 0 or any(host is target for target in written) for host in hosts):
        return False
    home.traffic.host_to_device_bytes += sum(host.nbytes for host in (*indices, *hosts))
    return True


def bring_together(
    run: Callable[..., Any], known: Operation, args: Any, kwargs: Any, home: EmulatedDevice | None
) -> Any:
    """What CUDA refuses, for code that was written for the host: tensors meet where one is written, else on the device
    `home`, or on the host if it is None. While a cluster is in use these are tensors of one device and the host's, and the
    cluster must not be strict.

    Args:
        run: runs an operation on emulated devices.
    """
    homes = {_home(tensor) for tensor in known.written(args, kwargs)}
    if home is not None:
        others = {_home(tensor) for tensor in tensors((args, kwargs.values()))} - {None, home}
        if home.machine.is_strict or others:
            _refuse(known.func, args, kwargs)
        _tell_once(f"a layer's code brings host tensors and those of {home.name} together; CUDA would refuse")
    if len(homes) > 1:
        _refuse(known.func, args, kwargs)
    home = homes.pop() if homes else home

    def come(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [come(item) for item in value]
        if isinstance(value, torch.Tensor) and _home(value) is not home:
            goal = {"device": torch.device("cpu") if home is None else home.torch_device}
            return run(aten._to_copy.default, (value,), goal, home.cluster_devices if home is not None else None)
        return value

    args, kwargs = come(args), {name: come(value) for name, value in kwargs.items()}
    return known.func(*args, **kwargs) if home is None else run(known.func, args, kwargs, home.cluster_devices)


@functools.cache
def _tell_once(text: str) -> None:
    log.warning("harmony: %s", text)


def _refuse(func: Any, args: Any, kwargs: Any) -> NoReturn:
    found: list[str] = []

    def note(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                note(item)
        elif isinstance(value, torch.Tensor):
            home = _home(value)
            place = home.name if home is not None else "host"
            found.append(f"{tuple(value.shape)} on {place}")

    note([*args, *kwargs.values()])
    raise RuntimeError(
        f"{func}: expected all tensors to be on the same device, but found {', '.join(found)}; move them to one "
        "device with .to()"
    )


_HOST_BATCH_SIZES = {aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data}
"""Recurrent layers over packed sequences; only inference mode lets them come here in one piece."""
_HOST_INDICES = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
