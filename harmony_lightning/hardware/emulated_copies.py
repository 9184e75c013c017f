"""Operations on emulated GPUs that are more than arithmetic: copies over the links, reads by the host, refusals."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from harmony_lightning.hardware.emulated_device import EmulatedDevice
from harmony_lightning.hardware.emulated_tensor import HOST, EmulatedTensor, resolve
from harmony_lightning.hardware.operations import SPECIAL, operation
from harmony_lightning.hardware.race_check import Memory
from harmony_lightning.hardware.shapes import run_on_shapes

aten = torch.ops.aten


def _count(source: EmulatedDevice | None, target: EmulatedDevice | None, nbytes: int) -> None:
    if source is target:
        return
    if target is None:
        assert source is not None
        source.traffic.device_to_host_bytes += nbytes
    elif source is None:
        target.traffic.host_to_device_bytes += nbytes
    else:
        target.traffic.peer_bytes += nbytes


def _end(tensor: Any) -> tuple[int, torch.Tensor, Memory] | None:
    """A device tensor as the machine knows it."""
    if type(tensor) is not EmulatedTensor:
        return None
    return tensor.home.index, tensor.inner_tensor, tensor.allocation.memory


def _to_copy(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> torch.Tensor:
    source = args[0]
    home = source.home if type(source) is EmulatedTensor else None
    inner = source.inner_tensor if home is not None else source
    kwargs = {**kwargs, "pin_memory": None}
    target = home
    if kwargs.get("device") is not None:
        target = resolve(kwargs["device"], home, devices)
        if target is None and torch.device(kwargs["device"]).type != "cpu":
            return func(inner, **kwargs)  # type: ignore[no-any-return]
        kwargs["device"] = HOST
    device = home or target
    is_fake = device is not None and device.machine.is_fake
    out: torch.Tensor = run_on_shapes(operation(func), (inner,), kwargs) if is_fake else func(inner, **kwargs)
    result = out if target is None else EmulatedTensor(out, target)
    _move(func, source, result, out.nbytes, is_asynchronous=bool(kwargs.get("non_blocking")))
    return result


def _copy_(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> torch.Tensor:
    target, source = args[0], args[1]
    home = next(tensor.home for tensor in (target, source) if type(tensor) is EmulatedTensor)
    if not home.machine.is_fake:
        func(
            target.inner_tensor if type(target) is EmulatedTensor else target,
            source.inner_tensor if type(source) is EmulatedTensor else source,
            *args[2:],
            **kwargs,
        )
    # The link carries what the target receives: as on CUDA, the source side converts and broadcasts first.
    is_asynchronous = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    _move(func, source, target, target.nbytes, is_asynchronous=is_asynchronous)
    return target  # type: ignore[no-any-return]


def _move(func: Any, source: torch.Tensor, target: torch.Tensor, nbytes: int, *, is_asynchronous: bool) -> None:
    """Count a copy that has been made, and tell the machine."""
    home = source.home if type(source) is EmulatedTensor else None
    goal = target.home if type(target) is EmulatedTensor else None
    _count(home, goal, nbytes)
    device = home or goal
    if device is None:
        return
    machine, ends = device.machine, (_end(source), _end(target))
    if home is goal:
        operands = ((tensor, memory, end is ends[1]) for end in ends if end for _, tensor, memory in (end,))
        agent, what = machine.use(device.index, func, operands)
        if machine.clock is not None:
            machine.clock.kernel(agent, what or "kernels", "float32", 0, source.nbytes + nbytes)
        return
    host = source if home is None else target if goal is None else None
    machine.copy(func, *ends, host, nbytes=nbytes, is_asynchronous=is_asynchronous)


def _foreach_copy_(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> None:
    for target, source in zip(args[0], args[1], strict=True):
        _copy_(aten.copy_.default, (target, source), kwargs, devices)


def _item(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> Any:
    tensor = args[0]
    tensor.home.traffic.device_to_host_bytes += tensor.element_size()
    machine = tensor.home.machine
    machine.copy(func, _end(tensor), None, None, nbytes=tensor.element_size(), is_asynchronous=False)
    return func(tensor.inner_tensor) if not machine.is_fake or tensor.dtype is not torch.bool else True


def _pack_padded(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> Any:
    """Lengths and batch sizes live on the host, as with CUDA: recurrent layers read them to plan their loop."""
    padded, lengths, *rest = args
    if type(padded) is not EmulatedTensor or type(lengths) is EmulatedTensor:
        raise RuntimeError(f"{func}: `lengths` must be a host tensor and the padded input a device tensor")
    data, batch_sizes = func(padded.inner_tensor, lengths, *rest, **kwargs)
    padded.home.machine.use(padded.home.index, func, [(padded.inner_tensor, padded.allocation.memory, False)])
    return EmulatedTensor(data, padded.home), batch_sizes


def _pad_packed(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> Any:
    data, batch_sizes, *rest = args
    if type(data) is not EmulatedTensor or type(batch_sizes) is EmulatedTensor:
        raise RuntimeError(f"{func}: `batch_sizes` must be a host tensor and the packed input a device tensor")
    padded, lengths = func(data.inner_tensor, batch_sizes, *rest, **kwargs)
    data.home.machine.use(data.home.index, func, [(data.inner_tensor, data.allocation.memory, False)])
    return EmulatedTensor(padded, data.home), lengths


def _refuse_pin(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> NoReturn:
    raise RuntimeError(f"cannot pin a tensor of shape {tuple(args[0].shape)} on {args[0].home.name}; only host tensors")


SPECIAL.update(
    {
        aten._to_copy.default: _to_copy,
        aten.copy_.default: _copy_,
        aten._foreach_copy_.default: _foreach_copy_,
        aten._local_scalar_dense.default: _item,
        aten._pack_padded_sequence.default: _pack_padded,
        aten._pad_packed_sequence.default: _pad_packed,
        aten._pin_memory.default: _refuse_pin,
    }
)
