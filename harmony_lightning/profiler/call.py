"""What one call of a layer costs on a device, when it is run as the runtime runs it.

Forward builds the layer's graph without any activation; backward makes those again by a second run that ends with the last
one it needs, differentiates, and adds the gradients of the weights to what is there (`runtime.layer.node`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.device import Device
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.profiler.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCost:
    """Seconds, and bytes on the device while it runs, its weights and inputs included."""

    forward_seconds: float = 0.0
    recompute_seconds: float = 0.0
    backward_seconds: float = 0.0
    """Recompute included."""
    forward_peak_bytes: int = 0
    backward_peak_bytes: int = 0
    kept_bytes: int = 0
    """What its operations save for backward beside its inputs and weights."""


class _Enough(BaseException):
    """Ends the second run. Not an `Exception`: the layer's own code must not catch it."""


class _Activations:
    """Saved tensors of one call: counted in forward, made again when backward asks for the first."""

    def __init__(self, run_again: Callable[[], Any], stopwatch: Stopwatch, known: Sequence[torch.Tensor]) -> None:
        """`known` are inputs and weights, which are there anyway."""
        self._run_again = run_again
        self._stopwatch = stopwatch
        self._known = {memory_key(tensor) for tensor in known}
        self._count = 0
        self._is_open = False
        self._made: dict[int, torch.Tensor] = {}
        self.nbytes = 0
        """Of all of them together, inputs and weights left out."""
        self.marks: list[tuple[Any, Any]] = []

    def save(self, tensor: torch.Tensor) -> int:
        self._count += 1
        return self._count - 1

    def load(self, position: int) -> torch.Tensor:
        if not self._is_open:
            raise UnsupportedError("a layer takes derivatives in its forward")
        if position not in self._made:
            self._made = self._make()
        return self._made.pop(position)

    def open(self) -> None:
        self._is_open = True

    def _make(self) -> dict[int, torch.Tensor]:
        made: dict[int, torch.Tensor] = {}

        def save(tensor: torch.Tensor) -> int:
            made[len(made)] = tensor.detach()
            if len(made) == self._count:
                raise _Enough
            return len(made) - 1

        begin = self._stopwatch.mark()
        with suppress(_Enough), torch.enable_grad(), saved_tensors_hooks(save, lambda position: made[position]):
            self._run_again()
        self.marks.append((begin, self._stopwatch.mark()))
        self.nbytes = nbytes_of([tensor for tensor in made.values() if memory_key(tensor) not in self._known])
        return made


def memory_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, as far as torch tells."""
    try:
        return storage_key(tensor)
    except RuntimeError:
        return id(tensor)


def nbytes_of(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of their memory, each storage once; of a tensor that repeats itself or is cut out, only what it shows."""
    by_storage: dict[int, int] = {}
    for tensor in tensors:
        shown = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            shown *= size if stride else 1
        key = memory_key(tensor)
        by_storage[key] = max(by_storage.get(key, 0), shown * tensor.element_size())
    return sum(by_storage.values())


def run_call(
    device: Device,
    stopwatch: Stopwatch,
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    args: Any,
    kwargs: Any,
) -> tuple[Any, CallCost]:
    """Run a layer forward and backward, as often as the stopwatch wants.

    Args:
        tensors: weights and buffers by name, on the device; those weights that train require a gradient.

    Returns:
        The result, without graph and memory; and what a run costs, the median of all but the first.
    """
    costs = []
    for _ in range(stopwatch.num_runs):
        result, cost = _run_once(device, stopwatch, module, tensors, args, kwargs)
        costs.append(cost)
    middle = sorted(costs[1:] or costs, key=lambda cost: cost.forward_seconds + cost.backward_seconds)
    return result, middle[len(middle) // 2]


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _run_once(
    device: Device,
    stopwatch: Stopwatch,
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    args: Any,
    kwargs: Any,
) -> tuple[Any, CallCost]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    inputs: list[torch.Tensor] = []

    def run(hooks: Any) -> Any:
        inputs[:] = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given]
        fresh = iter(inputs)
        own_args, own_kwargs = pytree.tree_unflatten(
            [next(fresh) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
        )
        with torch.enable_grad(), hooks:
            return torch.func.functional_call(module, dict(tensors), own_args, own_kwargs)

    class _NoHooks:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    activations = _Activations(lambda: run(_NoHooks()), stopwatch, [*given, *tensors.values()])
    # Weights and inputs are there already; everything else that comes to be counts.
    present = nbytes_of(given) + nbytes_of(list(tensors.values()))
    before = device.allocated_bytes()
    device.reset_peak()
    begin = stopwatch.mark()
    result = run(saved_tensors_hooks(activations.save, activations.load))
    end = stopwatch.mark()
    forward_peak = device.peak_bytes() - before + present
    results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    roots = [tensor for tensor in results if tensor.requires_grad]
    weights = [tensor for tensor in tensors.values() if tensor.requires_grad]
    targets = [tensor for tensor in inputs if tensor.requires_grad] + weights
    plain = pytree.tree_map_only(torch.Tensor, _without_memory, result)
    del result, results
    if not (roots and targets):
        seconds = stopwatch.seconds(begin, end)
        return plain, CallCost(forward_seconds=seconds, forward_peak_bytes=forward_peak)
    seeds = [torch.empty_like(root) for root in roots]
    edges = [get_gradient_edge(root) for root in roots]
    del roots  # the layer's results are gone when its backward comes
    device.reset_peak()
    activations.open()
    begin_backward = stopwatch.mark()
    gradients = torch.autograd.grad(edges, targets, seeds, allow_unused=True)
    with torch.no_grad():
        for gradient in gradients[len(targets) - len(weights) :]:
            if gradient is not None:
                gradient.add_(gradient)  # reads and writes what adding to another one does
    end_backward = stopwatch.mark()
    return plain, CallCost(
        forward_seconds=stopwatch.seconds(begin, end),
        recompute_seconds=sum(stopwatch.seconds(*marks) for marks in activations.marks),
        backward_seconds=stopwatch.seconds(begin_backward, end_backward),
        forward_peak_bytes=forward_peak,
        backward_peak_bytes=device.peak_bytes() - before + present,
        kept_bytes=activations.nbytes,
    )
