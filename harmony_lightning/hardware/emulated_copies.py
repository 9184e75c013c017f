"""Operations on emulated GPUs that are more than arithmetic: copies over the links, reads by the host, refusals."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from harmony_lightning.hardware.emulated_device import EmulatedDevice
from harmony_lightning.hardware.emulated_tensor import HOST, SPECIAL, EmulatedTensor, resolve

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


def _to_copy(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> torch.Tensor:
    source = args[0]
    home = source.home if type(source) is EmulatedTensor else None
    inner = source.inner_tensor if home is not None else source
    kwargs = {**kwargs, "pin_memory": None}
    target = home
    if kwargs.get("device") is not None:
        target = resolve(kwargs["device"], () if home is None else (home,), devices)
        if target is None and torch.device(kwargs["device"]).type != "cpu":
            return func(inner, **kwargs)  # type: ignore[no-any-return]
        kwargs["device"] = HOST
    out: torch.Tensor = func(inner, **kwargs)
    result = out if target is None else EmulatedTensor(out, target)
    _count(home, target, out.nbytes)
    return result


def _copy_(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> torch.Tensor:
    target, source = args[0], args[1]
    is_target_ours, is_source_ours = type(target) is EmulatedTensor, type(source) is EmulatedTensor
    func(
        target.inner_tensor if is_target_ours else target,
        source.inner_tensor if is_source_ours else source,
        *args[2:],
        **kwargs,
    )
    # The link carries what the target receives: as on CUDA, the source side converts and broadcasts first.
    _count(source.home if is_source_ours else None, target.home if is_target_ours else None, target.nbytes)
    return target  # type: ignore[no-any-return]


def _foreach_copy_(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> None:
    for target, source in zip(args[0], args[1], strict=True):
        _copy_(aten.copy_.default, (target, source), kwargs, devices)


def _item(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> Any:
    tensor = args[0]
    tensor.home.traffic.device_to_host_bytes += tensor.element_size()
    return func(tensor.inner_tensor)


def _pack_padded(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> Any:
    """Lengths and batch sizes live on the host, as with CUDA: recurrent layers read them to plan their loop."""
    padded, lengths, *rest = args
    if type(padded) is not EmulatedTensor or type(lengths) is EmulatedTensor:
        raise RuntimeError(f"{func}: `lengths` must be a host tensor and the padded input a device tensor")
    data, batch_sizes = func(padded.inner_tensor, lengths, *rest, **kwargs)
    return EmulatedTensor(data, padded.home), batch_sizes


def _refuse_pin(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> NoReturn:
    raise RuntimeError(f"cannot pin a tensor of shape {tuple(args[0].shape)} on {args[0].home.name}; only host tensors")


SPECIAL.update(
    {
        aten._to_copy.default: _to_copy,
        aten.copy_.default: _copy_,
        aten._foreach_copy_.default: _foreach_copy_,
        aten._local_scalar_dense.default: _item,
        aten._pack_padded_sequence.default: _pack_padded,
        aten._pin_memory.default: _refuse_pin,
    }
)
