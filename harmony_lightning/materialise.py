"""Weights that were declared and not made: on the meta device, or in memory that was left as it was found.

A model larger than the host's patience is declared under `torch.device("meta")` or `trainer.init_module(empty_init=True)`
and gets its values later: from a checkpoint, or, here, from each module's own `reset_parameters` and then from the
`_init_weights(module)` of the nearest module around it that has one (the habit of `transformers` and of many others). That
goes module by module, so that the host never holds more than one copy of the weights. A checkpoint's values are not drawn
first.

Memory under `empty_init` is not touched, and so not taken, until something is written. What nothing was written to is known
by a mark: NaN in three places of a tensor whose initialisation was skipped.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from harmony_lightning.errors import ConfigurationError

_EVERYTHING: Collection[str] = ()


class SkippedInit(TorchFunctionMode):
    """Skips the functions of `torch.nn.init`, and marks the tensors they would have filled."""

    _marked = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **kwargs)
        tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
        if tensor.device.type != "meta" and tensor.is_floating_point() and tensor.numel():
            with torch.no_grad(), torch._C.DisableTorchFunction():
                for place in _places(tensor):
                    tensor[place] = torch.nan
            self._marked[tensor] = True
        return tensor

    @classmethod
    def is_empty(cls, tensor: torch.Tensor) -> bool:
        """Whether the tensor is marked and nothing was written over the marks."""
        return tensor in cls._marked and any(bool(tensor[place].isnan()) for place in _places(tensor))


def _places(tensor: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """The first, the middle and the last element: a row of padding may be filled by itself."""
    return ((0,) * tensor.dim(), tuple(n // 2 for n in tensor.shape), tuple(n - 1 for n in tensor.shape))


def materialise(root: nn.Module, loaded: Collection[str] = _EVERYTHING) -> None:
    """Give every weight and buffer that has none a value on the host; parameters stay the objects they are.

    Args:
        root: the module; what has values already keeps them.
        loaded: names of `state_dict` entries that are about to be loaded: they get memory and no values.

    Raises:
        ConfigurationError: a module cannot fill what it holds; the text names it.
    """
    for prefix, module in root.named_modules():
        own = {name: tensor for name, tensor in _own_tensors(module) if _lacks_value(tensor)}
        if not own:
            continue
        for name, tensor in own.items():
            if tensor.is_meta:
                _take_memory(module, name, tensor)
        to_draw = [name for name in own if f"{prefix}.{name}".lstrip(".") not in loaded]
        if to_draw:
            _draw(root, prefix, to_draw)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _lacks_value(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or SkippedInit.is_empty(tensor)


def _take_memory(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    memory = torch.empty_like(tensor, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        module._buffers[name] = memory
        return
    # Exchanged within the object: weights that are tied, or that somebody has listed already, stay what they are.
    torch.utils.swap_tensors(tensor, nn.Parameter(memory, tensor.requires_grad))  # type: ignore[no-untyped-call]


def _draw(root: nn.Module, name: str, to_draw: list[str]) -> None:
    """Have a module filled; of all its tensors only those `to_draw` change."""
    module = root.get_submodule(name)
    with torch.no_grad():
        kept = {name: tensor.clone() for name, tensor in _own_tensors(module) if name not in to_draw}
        before = dict(_own_tensors(module))
        for tensor in to_draw:
            _mark(before[tensor])
        for fill in _ways_to_fill(root, name):
            fill()
        after = dict(_own_tensors(module))
        for tensor, value in kept.items():
            after[tensor].copy_(value)
    missed = [tensor for tensor in to_draw if after[tensor] is before[tensor] and _is_marked(after[tensor])]
    if missed:
        raise ConfigurationError(
            f"module {name or 'itself'} ({type(module).__name__}) was declared without values (meta device or empty_init), "
            f"and nothing fills its {', '.join(missed)}: let its reset_parameters() do it, load a checkpoint that has "
            f"them (ckpt_path=...), or build the module with values"
        )


def _ways_to_fill(root: nn.Module, name: str) -> Iterator[Callable[[], Any]]:
    """The module's own, then that of the nearest module around it: the model's choice counts more than the default."""
    module = root.get_submodule(name)
    if callable(reset_parameters := getattr(module, "reset_parameters", None)):
        yield reset_parameters
    while name:
        name = name.rpartition(".")[0]
        if callable(init_weights := getattr(root.get_submodule(name), "_init_weights", None)):
            yield partial(init_weights, module)
            return


def _mark(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def _is_marked(tensor: torch.Tensor) -> bool:
    if not tensor.numel() or tensor.dtype == torch.bool:
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return bool((tensor == torch.iinfo(tensor.dtype).max).all())


@contextmanager
def skipped_init(is_enabled: bool) -> Iterator[None]:
    """Modules that are built within are left without values, if enabled."""
    if is_enabled:
        with SkippedInit():
            yield
    else:
        yield
