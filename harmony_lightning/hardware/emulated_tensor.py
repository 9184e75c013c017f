"""Tensors on emulated GPUs, and what each operation on them does.

A device tensor is a wrapper around a host tensor. Every operation runs as plain CPU code on the inner tensors, bitwise
the same; the wrapper adds what a GPU would: tensors of different devices do not mix, an allocation over the limit
fails, and every byte that crosses a link is counted.

    wrapper (size, stride, device cpu:i) --.inner_tensor--> host tensor --> storage
                                         \\-.allocation----> Allocation --------^   one per storage, shared by its views

All of this happens below autograd, which sees ordinary tensors of device `cpu:i`.
"""

import contextlib
import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override

from harmony_lightning.errors import ConfigurationError, DeviceOutOfMemoryError, UnsupportedError
from harmony_lightning.hardware.emulated_device import Allocation, EmulatedDevice
from harmony_lightning.hardware.emulated_mixing import bring_together, may_mix
from harmony_lightning.hardware.operations import Operation, operation
from harmony_lightning.hardware.shapes import run_on_shapes

aten = torch.ops.aten
_PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python).add(torch._C.DispatchKey.PythonTLSSnapshot)
HOST = torch.device("cpu")

below_functions = torch._C.DisableTorchFunction
"""Dispatch happens below torch functions: what it calls must not reach function modes again. Autograd's backward comes
here with them in force."""


class EmulatedTensor(torch.Tensor):
    """A tensor on an emulated GPU. Made by torch's own functions (`.to("cpu:0")`, factories), not by hand."""

    inner_tensor: torch.Tensor
    allocation: Allocation
    home: EmulatedDevice

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, home: EmulatedDevice) -> "EmulatedTensor":
        if inner.layout is not torch.strided:
            raise UnsupportedError(
                f"{home.name} cannot hold a {inner.layout} tensor of shape {tuple(inner.shape)}; emulated GPUs hold "
                "dense tensors only (for embeddings: sparse=False)"
            )
        allocation = home.hold(inner.untyped_storage())
        # A wrapper is never an inference tensor: the view of a normal tensor must not be one, and whether this is a view
        # is not known here.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            wrapper: EmulatedTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=home.torch_device,
            )
        if inner.is_conj():
            torch._C._set_conj(wrapper, True)
        if inner.is_neg():
            torch._C._set_neg(wrapper, True)
        wrapper.inner_tensor = inner
        wrapper.allocation = allocation
        wrapper.home = home
        return wrapper

    @classmethod
    @override
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        with below_functions():
            return run(func, args, kwargs or {}, None)

    def __tensor_flatten__(self) -> tuple[list[str], EmulatedDevice]:
        return ["inner_tensor"], self.home

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], home: EmulatedDevice, size: Any, stride: Any
    ) -> "EmulatedTensor":
        return EmulatedTensor(inner["inner_tensor"], home)

    @property
    def data(self) -> torch.Tensor:
        return _BASE_DATA.__get__(self)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, EmulatedTensor):
            _BASE_DATA.__set__(self, value)
            self.inner_tensor, self.allocation, self.home = value.inner_tensor, value.allocation, value.home
        else:
            # What `module.to("cpu")` does: the same Python object becomes a host tensor, and so does its gradient.
            host = self._dress(value.detach())
            if isinstance(self.grad, EmulatedTensor):
                host.grad = self.grad.inner_tensor.clone()
            torch.utils.swap_tensors(self, host)  # type: ignore[no-untyped-call]

    @property
    @override
    def device(self) -> torch.device:  # type: ignore[override]
        """`cpu:i` while the cluster is in use on this thread. Behind it, unless the cluster is strict, a tensor that was
        kept is one of the host's for code that asks, as it is for operations (`bring_together`)."""
        if self.home.machine.is_strict or torch._C._len_torch_dispatch_stack():
            return self.home.torch_device
        return HOST

    @override
    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner_tensor.untyped_storage()

    @override
    def data_ptr(self) -> int:
        return self.inner_tensor.data_ptr()

    @override
    def new_tensor(  # type: ignore[override]
        self, data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        host = torch.tensor(data, dtype=kwargs.pop("dtype", None) or self.dtype, **kwargs)
        return host.to(self.home.torch_device if device is None else device).requires_grad_(requires_grad)

    @override
    def tolist(self) -> Any:
        return self.cpu().tolist()

    @override
    def numpy(self, *, force: bool = False) -> Any:
        """A copy, for which the calling thread waits. A real GPU refuses; code that was written for the host need not."""
        return self.cpu().numpy(force=force)

    def __bool__(self) -> bool:
        return bool(self._number()) if _is_hidden() else super().__bool__()

    def __int__(self) -> int:
        return int(self._number()) if _is_hidden() else super().__int__()

    def __index__(self) -> int:
        return operator.index(self._number()) if _is_hidden() else super().__index__()

    def __float__(self) -> float:
        return float(self._number()) if _is_hidden() else super().__float__()

    def __complex__(self) -> complex:
        return complex(self._number()) if _is_hidden() else super().__complex__()

    def _number(self) -> Any:
        if self.numel() != 1:
            raise ValueError("only one element tensors can be converted to Python scalars")
        with below_functions():
            return run(aten._local_scalar_dense.default, (self,), {}, None)

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"EmulatedTensor({self.inner_tensor!r}, device={self.home.name!r}{grad})"

    @override
    def __format__(self, format_spec: str) -> str:
        return format(self.item(), format_spec) if self.dim() == 0 else object.__format__(self, format_spec)

    def __copy__(self) -> torch.Tensor:
        return self._dress(self.detach())

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if not self.is_leaf:
            raise RuntimeError("only graph leaves support deepcopy; detach() the tensor first")
        # Through the inner tensor, so that tensors that share a storage share it after the copy as well.
        twin = self._dress(EmulatedTensor(copy.deepcopy(self.inner_tensor, memo), self.home))
        memo[id(self)] = twin
        if self.grad is not None:
            twin.grad = copy.deepcopy(self.grad, memo)
        return twin

    @override
    def __reduce_ex__(self, proto: Any) -> Any:
        """Pickles as a host tensor: a file must not depend on who was emulated when it was written."""
        return self._dress(self.detach().cpu()).__reduce_ex__(proto)  # type: ignore[no-untyped-call]

    def _dress(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as what this one is to its user: a parameter or not, with the attributes hung on it."""
        if isinstance(self, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, self.requires_grad)
        else:
            tensor.requires_grad_(self.requires_grad)
        own = {"inner_tensor", "allocation", "home", "_is_param"}
        tensor.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        return tensor


_BASE_DATA: Any = torch.Tensor.data


def _is_hidden() -> bool:
    """Whether torch passes by `__torch_dispatch__`, as `torch.tensor` does while it reads the items of a list."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory: the address of the storage that holds the numbers."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
    except NotImplementedError:  # within a transform of `torch.func`
        return id(tensor)


def run(func: Any, args: Any, kwargs: Any, devices: Sequence[EmulatedDevice] | None) -> Any:
    """Run `func` on the inner tensors. `devices` is what the mode in force takes `cpu:i` for, None without a mode."""
    known = operation(func)
    if known.run is not None:
        return known.run(func, args, kwargs, devices)
    ours: list[EmulatedTensor] = []
    hosts: list[torch.Tensor] = []
    inner_args = [_unwrap(arg, ours, hosts) for arg in args]
    inner_kwargs = {name: _unwrap(arg, ours, hosts) for name, arg in kwargs.items()} if kwargs else kwargs
    home = ours[0].home if ours else None
    if known.is_factory:
        if kwargs.get("device") is not None:
            home = resolve(kwargs["device"], home, devices)
            inner_kwargs["device"] = HOST if home is not None else kwargs["device"]
        inner_kwargs.pop("pin_memory", None)
    elif (hosts or any(tensor.home is not home for tensor in ours)) and not may_mix(known, args, kwargs, ours, hosts):
        return bring_together(run, known, args, kwargs, home if devices is not None else None)
    if home is not None and home.machine.is_fake:
        out = run_on_shapes(known, inner_args, inner_kwargs)
    elif known.calls_others:
        # Where Python is asked autocast is over. Within the kernel it is what it was, and Python is not asked again.
        with torch._C._RestorePythonTLSSnapshot(), torch._C._ExcludeDispatchKeyGuard(_PYTHON):  # type: ignore[attr-defined]
            out = func(*inner_args, **inner_kwargs)
    else:
        out = func(*inner_args, **inner_kwargs)
    if home is None:
        return out
    if not known.is_idle:
        _account(home, known, args, kwargs, ours, hosts, (inner_args, inner_kwargs, out))
    if not known.mutates:
        return _wrap(out, home)
    for index, name in known.mutates:
        _follow(args[index] if index < len(args) else kwargs.get(name))
    if not known.returned:
        return out
    outs = out if len(known.returned) > 1 else (out,)
    results = tuple(
        _wrap(value, home) if source is None else args[source[0]] if source[0] < len(args) else kwargs[source[1]]
        for value, source in zip(outs, known.returned, strict=True)
    )
    return results if len(results) > 1 else results[0]


def _account(
    home: EmulatedDevice,
    known: Operation,
    args: Any,
    kwargs: Any,
    ours: Sequence["EmulatedTensor"],
    hosts: Sequence[torch.Tensor],
    inner: tuple[Any, Any, Any],
) -> None:
    """Tell the machine what has been read, written and computed."""
    machine = home.machine
    written = known.written(args, kwargs) if known.mutates else ()
    operands = (
        (t.inner_tensor, t.allocation.memory, any(t is w for w in written)) for t in ours if t.home.machine is machine
    )
    agent, what = machine.use(home.index, known.func, operands)
    if hosts:
        machine.use_host(known.func, hosts)
    if machine.clock is not None:
        dtype = str(ours[0].dtype).removeprefix("torch.") if ours else "float32"
        machine.clock.kernel(agent, what or "kernels", dtype, known.flops(*inner), known.nbytes(*inner))
    if known.tells_host:
        machine.synchronize(agent)


def _unwrap(value: Any, ours: list[EmulatedTensor], hosts: list[torch.Tensor]) -> Any:
    if type(value) is EmulatedTensor:
        ours.append(value)
        return value.inner_tensor
    if isinstance(value, (list, tuple)):
        return [_unwrap(item, ours, hosts) for item in value]
    if isinstance(value, torch.Tensor):
        hosts.append(value)
    return value


def _wrap(value: Any, home: EmulatedDevice) -> Any:
    if isinstance(value, torch.Tensor):
        return EmulatedTensor(value, home)
    if isinstance(value, (list, tuple)):
        return (
            [_wrap(item, home) for item in value] if isinstance(value, list) else tuple(_wrap(v, home) for v in value)
        )
    return value


def _follow(value: Any) -> None:
    """Bring a wrapper in line with its inner tensor, which an operation wrote to and may have reshaped or resized."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _follow(item)
        return
    if type(value) is not EmulatedTensor:
        return
    inner, allocation = value.inner_tensor, value.allocation
    storage = inner.untyped_storage()
    try:
        if storage._cdata != allocation.storage._cdata:
            value.allocation = value.home.hold(storage)
        elif storage.nbytes() != allocation.nbytes:
            value.home.recharge(allocation)
    except DeviceOutOfMemoryError:
        allocation.storage.resize_(allocation.nbytes)
        inner.set_(allocation.storage, value.storage_offset(), value.size(), value.stride())
        raise
    if (
        inner.size() != value.size()
        or inner.stride() != value.stride()
        or inner.storage_offset() != value.storage_offset()
    ):
        _BASE_DATA.__set__(value, EmulatedTensor(inner, value.home))


def resolve(
    device: torch.device | str, home: EmulatedDevice | None, devices: Sequence[EmulatedDevice] | None
) -> EmulatedDevice | None:
    """The emulated device that `device` names, None for the host and for devices that are not ours (meta)."""
    device = torch.device(device)
    known = home.cluster_devices if home is not None else devices
    if device.type != "cpu" or device.index is None or known is None:
        return None
    if device.index >= len(known):
        raise ConfigurationError(
            f"{device} is no device of this cluster, which has {', '.join(d.name for d in known)}; raise num_gpus or "
            f"use an index below {len(known)}"
        )
    return known[device.index]
