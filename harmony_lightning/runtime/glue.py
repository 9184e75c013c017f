"""The function mode over the user's code between layers ("glue").

It looks at every torch function that glue calls and has the running segment bring its tensors. Three kinds of functions
are not so: those that only read a tensor take it as it is; those that move one to another device do what they say; and
those that write their first argument (or each of a list of tensors, or `out`) write a host tensor that takes part in no
graph (a queue, a moving average, a metric) where it lives, and anything else as an import, which then stands for the
original in the rest of the microbatch.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from harmony_lightning.runtime.derivatives import (
    DERIVATIVES,
    Uncuttable,
    crosses_cuts,
    differentiate_weights,
    inputs_of,
    keeps_graph,
    refuse_second_derivatives,
)
from harmony_lightning.runtime.host_arithmetic import HostArithmetic
from harmony_lightning.runtime.layer.objects import ObjectTensors
from harmony_lightning.runtime.randomness import drawing_anew
from harmony_lightning.runtime.segment import Segment

_READS = frozenset(
    """__array__ __get__ __set__ __len__ __repr__ __format__ __bool__ __int__ __float__ __index__ __contains__ __hash__
    __deepcopy__ __reduce_ex__ _set_grad_enabled data_ptr dense_dim detach dim element_size get_device
    has_names item ndimension nelement numel numpy register_post_accumulate_grad_hook requires_grad_
    retain_grad size sparse_dim storage storage_offset stride tolist untyped_storage""".split()  # noqa: SIM905
)
"""Functions that take tensors as they are: they leave no trace in the autograd graph and compute nothing on a device."""
_TOLD = frozenset(
    """dim dtype element_size is_complex is_floating_point is_leaf is_nested is_quantized is_sparse layout names ndim
    ndimension nelement numel requires_grad shape size stride __len__""".split()  # noqa: SIM905
)
"""Functions and attributes of which each version of a tensor tells the same."""
_COMPUTED_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
"""Attributes whose getters make tensors that belong to the autograd graph."""
_MOVES = frozenset(("to", "cpu", "cuda"))
_WRITES = re.compile(r"__setitem__|__i(?!nvert)\w+__|.*[^_]_")
"""In-place operators and methods."""
_PACKS = frozenset(("_pack_padded_sequence", "_pad_packed_sequence", "tensor_split"))
"""Functions whose second argument, lengths, batch sizes or indices, lives on the host whatever the device."""


_HOST = torch.device("cpu")


class Glue(TorchFunctionMode):
    """In force while user code runs.

    Args:
        current: tells the segment that the code runs in, None inside a layer.
        is_device: whether a device is one of the cluster's.
        before_write: called with tensors that are about to be written.
        objects: what a layer that is running has been given within objects.
    """

    def __init__(
        self,
        current: Callable[[], Segment | None],
        is_device: Callable[[torch.device], bool],
        before_write: Callable[[torch.Tensor], None],
        objects: Callable[[], ObjectTensors | None],
        notice: Callable[[Any], None],
    ) -> None:
        super().__init__()
        self._objects = objects
        self._notice = notice
        self._before_write = before_write
        self.host_arithmetic: HostArithmetic | None = None
        """While user code may work on gradients and masters by itself."""
        self._current = current
        self._is_device = is_device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        segment = self._current()
        if segment is None:
            if (objects := self._objects()) is not None and not _is_told_by_anybody(func):
                with torch._C.DisableTorchFunction():
                    args, kwargs = _map_tensors(objects.take, args), _map_tensors(objects.take, kwargs)
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if not segment.is_cut and torch._C._current_graph_task_id() != -1:
                segment = segment.where((args, kwargs))
            self._notice((args, kwargs))
        if not (buffers := segment.state.buffers).is_empty:
            with torch._C.DisableTorchFunction():
                _map_tensors(buffers.come_home, (args, kwargs))
        kind = _KINDS.get(func) or _classify(func)
        if kind == "write" and not args:  # `nn.init` names its arguments
            args = tuple(kwargs[name] for name in ("tensor", "input") if name in kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name not in ("tensor", "input")}
        if kind == "derivative":
            with torch._C.DisableTorchFunction():
                of_weights = any(segment.state.weight_name(tensor) for tensor in inputs_of(func, args, kwargs))
                outputs = args[0] if args else kwargs.get("outputs", kwargs.get("tensors", ()))
                if segment.is_cut and (of_weights or crosses_cuts(outputs)):
                    raise Uncuttable
            if of_weights:
                gradients = differentiate_weights(segment.state, func, args, kwargs)
                if self.host_arithmetic is not None:
                    self.host_arithmetic.note(gradients)
                return gradients
        if kind == "exchange" and args[0].device == _HOST:
            # A master, or a module's buffer, stays on the host, wherever its new value was computed.
            self._before_write(args[0])
            func(args[0], segment.present(args[1]).detach().to(_HOST))
            segment.state.notice_write(args[0])
            return None
        if kind == "hook" and args[0].grad_fn is not None:
            tensor, hook = (*args, *kwargs.values())
            return func(*_originals(segment, (tensor, _where_there_is_a_gradient(hook))))
        if kind in ("read", "exchange", "derivative", "hook"):
            result = self._read(segment, func, _originals(segment, args), kwargs)
            if kind == "derivative" and result is None and keeps_graph(func, args, kwargs):
                with torch._C.DisableTorchFunction():
                    refuse_second_derivatives(segment.state)
            return result
        segment.has_glue = True
        if (host := self.host_arithmetic) is not None:
            with torch._C.DisableTorchFunction():
                if host.concerns(segment.state, args, kwargs, is_write=kind == "write"):
                    if kind == "write":
                        _map_tensors(self._before_write, args[0])
                    return host.run(segment.state, func, args, kwargs)
        with torch._C.DisableTorchFunction():
            if kind == "move" and isinstance(args[0], torch.Tensor) and not args[0].requires_grad:
                if self.host_arithmetic is not None and "non_blocking" in kwargs:
                    # A loss scaler follows the gradients, which are on the host here, and reads there at once.
                    kwargs = {**kwargs, "non_blocking": False}
                return func(*_originals(segment, args), **kwargs)
            if (kind == "write" or kwargs.get("inplace") is True) and isinstance(args[0], torch.Tensor):
                return self._write(segment, func, args, kwargs)
            if kind == "write" and _is_list_of_tensors(args[0]):
                return self._write_each(segment, func, args, kwargs)
            if isinstance(out := kwargs.get("out"), torch.Tensor):
                return self._write_out(segment, func, args, kwargs, out)
            lengths = args[1].cpu() if kind == "pack" and isinstance(args[1], torch.Tensor) else None
            args = _bring_all(segment, args)
            if lengths is not None:
                args = (args[0], lengths, *args[2:])
            kwargs = {name: _bring_all(segment, value) for name, value in kwargs.items()}
        if "device" in kwargs:
            kwargs["device"] = self._local_device(segment, kwargs["device"])
        return _with_room(segment, lambda: func(*args, **kwargs))

    def _read(self, segment: Segment, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if self.host_arithmetic is not None and isinstance(result, torch.Tensor):
            with torch._C.DisableTorchFunction():
                if not result.requires_grad and self.host_arithmetic.descends(segment.state, args[0]):
                    self.host_arithmetic.note(result)
        return result

    def _write(self, segment: Segment, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        target, others = args[0], (args[1:], kwargs)
        self._before_write(target)
        is_differentiated = torch.is_grad_enabled() and _any_requires_grad((target, others))
        is_elsewhere = target.device != segment.device.torch_device and target.grad_fn is None
        # A weight that trains is written itself, for torch to refuse that where a gradient would go on from it.
        is_trained = target.requires_grad and segment.state.weight_name(target) is not None
        if is_trained or (is_elsewhere and not is_differentiated):
            rest, named = _move(others, target.device)
            result = func(target, *rest, **named)
            segment.state.notice_write(target)
            return result
        written = segment.bring_written(target)
        rest, named = _bring_all(segment, args[1:]), _bring_all(segment, kwargs)
        return _with_room(segment, lambda: func(written, *rest, **named))

    def _write_each(self, segment: Segment, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """`torch._foreach_mul_(list, ...)` and its like, tensor by tensor: some may stay where they are, and others not.
        Lists beside the first go in step with it."""
        num = len(args[0])
        rows = [
            [arg[i : i + 1] if isinstance(arg, tuple | list) and len(arg) == num else arg for arg in args]
            for i in range(num)
        ]
        for target, *others in rows:
            self._write(segment, lambda one, *rest, **named: func([one], *rest, **named), (target[0], *others), kwargs)

    def _write_out(
        self, segment: Segment, func: Callable[..., Any], args: Any, kwargs: Any, out: torch.Tensor
    ) -> torch.Tensor:
        """`func(..., out=tensor)`: no gradient passes through it, so it is a result that is copied."""
        rest = {name: _bring_all(segment, value) for name, value in kwargs.items() if name != "out"}
        brought = _bring_all(segment, args)
        result = _with_room(segment, lambda: func(*brought, **rest))
        if out.shape != result.shape:
            out.resize_(result.shape)
        self._write(segment, torch.Tensor.copy_, (out, result), {})
        entry = segment.replaced.get(id(out))
        return out if entry is None else entry[1]

    def _local_device(self, segment: Segment, device: Any) -> Any:
        """New tensors belong on the segment's device when the user says "on the GPU"."""
        if device is None or isinstance(device, int):
            return device if device is None else segment.device.torch_device
        device = torch.device(device)
        means_any_gpu = device.index is None and device.type == "cuda"
        return segment.device.torch_device if means_any_gpu or self._is_device(device) else device


_KINDS: dict[Any, str] = {}


def _classify(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
        kind = "exchange"
    elif func == torch.Tensor.register_hook:
        kind = "hook"
    elif func in DERIVATIVES:
        kind = "derivative"
    elif name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _COMPUTED_ATTRIBUTES:
        kind = "compute"
    elif name in _READS or name.startswith("is_"):
        kind = "read"
    elif name in _PACKS:
        kind = "pack"
    elif name in _MOVES:
        kind = "move"
    elif _WRITES.fullmatch(name):
        kind = "write"
    else:
        kind = "compute"
    _KINDS[func] = kind
    return kind


def _where_there_is_a_gradient(hook: Callable[..., Any]) -> Callable[[torch.Tensor | None], Any]:
    """A hook of a tensor's that is not called where no gradient comes: a layer that does not differentiate its input gives
    none to it, but autograd walks on all the same, as it would not if it saw the operations within."""

    def called(gradient: torch.Tensor | None) -> Any:
        return None if gradient is None else hook(gradient)

    return called


def _is_told_by_anybody(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name) in _TOLD


def _originals(segment: Segment, args: tuple[Any, ...]) -> tuple[Any, ...]:
    replaced = segment.replaced
    if not replaced or not args or not isinstance(args[0], torch.Tensor):
        return args
    entry = replaced.get(id(args[0]))
    return args if entry is None else (entry[1], *args[1:])


def _with_room(segment: Segment, function: Callable[[], Any]) -> Any:
    return segment.state.memory.with_room(segment.device, drawing_anew(function, segment.device))


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, tuple | list) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)


def _bring_all(segment: Segment, value: Any) -> Any:
    return _map_tensors(segment.bring, value)


def _move(value: Any, device: torch.device) -> Any:
    return _map_tensors(lambda tensor: tensor.detach().to(device), value)


def _map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Arguments of torch functions are tensors, and lists, tuples and dicts of them."""
    if isinstance(value, torch.Tensor):
        return function(value)
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_map_tensors(function, item) for item in value])
    if kind is dict:
        return {key: _map_tensors(function, item) for key, item in value.items()}
    return value


def _any_requires_grad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, tuple | list):
        return any(_any_requires_grad(item) for item in value)
    if isinstance(value, dict):
        return any(_any_requires_grad(item) for item in value.values())
    return False
