"""One run of a user's step on a device, layer by layer: which layers it calls with what, and what each visit costs.

Each distinct call, one layer's structure with one shape of inputs, is run and costed once; from then on its result is made
up by its shape. So a model of eighty equal blocks takes as long as one of three. The autograd graph is cut at each layer;
the code behind a layer, up to the next one, counts with that layer, as it runs in the same segment.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

from harmony_lightning.hardware.device import Device
from harmony_lightning.profiler.call import CallCost, memory_key, nbytes_of, run_call
from harmony_lightning.profiler.stopwatch import Stopwatch
from harmony_lightning.profiler.twin import describe

Step = Callable[[nn.Module, Any], torch.Tensor | None]
"""The user's step on a module and a batch; returns the loss, if there is one."""


@dataclass(slots=True)
class Glue:
    """Code behind a layer."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    forward_bytes: int = 0
    """The most that it holds beside the layer's result."""
    backward_bytes: int = 0
    saved: dict[int, int] = field(default_factory=dict)
    """Bytes that its backward needs, by storage."""


@dataclass(slots=True)
class Visit:
    """One call of one layer."""

    layer: str
    cost: CallCost
    input_nbytes: int
    glue: Glue = field(default_factory=Glue)


class CallCache:
    """What distinct calls cost, and the shapes of their results. Serves many runs of one module."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[CallCost, Any]] = {}
        self._structures: dict[int, str] = {}

    def structure(self, module: nn.Module) -> str:
        if id(module) not in self._structures:
            self._structures[id(module)] = describe(module)
        return self._structures[id(module)]


@dataclass(frozen=True, slots=True)
class _Shape:
    """A result that is made up again."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool


def visit_layers(
    twin: nn.Module,
    layers: Sequence[str],
    batch: Any,
    step: Step,
    device: Device,
    stopwatch: Stopwatch,
    cache: CallCache,
) -> list[Visit]:
    """Run one step; returns its visits in order. The twin is as before, but for what its own code has written.

    Args:
        twin: from `make_twin`.
        batch: on the device.

    Raises:
        What the step raises; out-of-memory errors too.
    """
    run = _Run(device, stopwatch, cache)
    modules = dict(twin.named_modules())
    with ExitStack() as stack:
        for name in layers:
            stack.callback(_interpose(modules[name], name, run))
        # As in a run: autograd's own threads for GPUs know nothing of autocast's type, in which layers run again.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(device.torch_device)  # tensors that the user's code makes of nothing
        stack.enter_context(saved_tensors_hooks(run.note_saved, lambda tensor: tensor))
        stack.enter_context(_Cut(run))
        stack.callback(run.restore_generators)
        loss = step(twin, batch)
        run.leave(loss if isinstance(loss, torch.Tensor) and loss.requires_grad else None)
    return run.visits


def _interpose(module: nn.Module, name: str, run: "_Run") -> Callable[[], None]:
    had = "forward" in vars(module)
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if run.is_inside:
            return original(*args, **kwargs)
        return run.call(name, module, args, kwargs)

    module.forward = forward

    def restore() -> None:
        if had:
            module.forward = original
        else:
            del module.forward

    return restore


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device)
    return tensor.detach().to(device)


class _Cut(TorchFunctionMode):
    """Graphs of glue begin at the last layer: of what is older, only the value is used. What glue takes from the host, such
    as weights and buffers outside layers, comes to the device."""

    def __init__(self, run: "_Run") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    @override
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        kwargs = kwargs or {}
        run, name = self._run, getattr(func, "__name__", "")
        if isinstance(generator := kwargs.get("generator"), torch.Generator):
            run.generators.setdefault(generator, generator.get_state())
        if run.is_inside or name == "__get__":
            return func(*args, **kwargs)
        is_in_place = name.startswith("__i") or name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__")
        with torch._C.DisableTorchFunction():
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: run.cut(t, is_in_place), (args, kwargs))
        return func(*args, **kwargs)


class _Made(torch.autograd.Function):
    """A result of a layer: no leaf and no view, so that the user's code may write it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, shape: _Shape, device: torch.device) -> torch.Tensor:  # type: ignore[override]
        return _empty(shape, device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:  # type: ignore[override]
        return (None,) * 3


class _Older(torch.autograd.Function):
    """A tensor from in front of the last layer."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return source.view_as(source)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:  # type: ignore[override]
        return (None,) * 2


class _Run:
    def __init__(self, device: Device, stopwatch: Stopwatch, cache: CallCache) -> None:
        self.visits: list[Visit] = []
        self.is_inside = False
        self._device, self._stopwatch, self._cache = device, stopwatch, cache
        self._anchor = torch.zeros((), requires_grad=True)
        self._edges: list[GradientEdge] = []
        """Where the graph of the running glue begins: at results of the last layer, and at what is older."""
        self._older: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By identity: older tensors that the running glue uses, and what stands for them."""
        self.generators: dict[torch.Generator, torch.Tensor] = {}
        """The user's own, which may be nobody's copy, and the state in which they were found."""
        self._start = 0
        self._glue = Glue()
        self._begin_glue()

    def restore_generators(self) -> None:
        for generator, state in self.generators.items():
            generator.set_state(state)

    def note_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.is_inside and not isinstance(tensor, nn.Parameter):
            self._glue.saved[memory_key(tensor)] = nbytes_of([tensor])
        return tensor.detach()  # an operation that saves its own result would hold itself alive for ever

    def cut(self, tensor: torch.Tensor, is_written: bool = False) -> torch.Tensor:
        if tensor.device != self._device.torch_device and (tensor.dim() or tensor.is_meta or is_written):
            return self._bring(tensor)
        node = tensor.grad_fn
        if node is None or node._sequence_nr() >= self._start or not torch.is_grad_enabled():  # type: ignore[attr-defined]
            return tensor
        held = self._older.get(id(tensor))
        if held is None:
            if is_written:
                shape = _Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype, True)
                alias = _Made.apply(self._anchor, shape, tensor.device)  # type: ignore[no-untyped-call]
            else:
                alias = _Older.apply(self._anchor, tensor.detach())  # type: ignore[no-untyped-call]
            self._edges.append(get_gradient_edge(alias))
            held = self._older[id(tensor)] = (tensor, alias)
        return held[1]

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        held = self._older.get(id(tensor))
        if held is None:
            brought = _on(tensor, self._device.torch_device)
            if tensor.requires_grad:
                self._edges.append(get_gradient_edge(brought.requires_grad_()))
            held = self._older[id(tensor)] = (tensor, brought)
        return held[1]

    def _begin_glue(self) -> None:
        self._mark = self._stopwatch.mark()
        self._held = self._device.allocated_bytes()
        self._device.reset_peak()

    def _differentiate(self, tensors: Sequence[torch.Tensor]) -> None:
        """The backward of the glue that made these."""
        roots = [t for t in tensors if t.grad_fn is not None and t.grad_fn._sequence_nr() >= self._start]  # type: ignore[attr-defined]
        own = {edge.node for edge in self._edges}
        roots = [root for root in roots if root.grad_fn not in own]
        if not roots or not self._edges:
            return
        self._device.reset_peak()
        mark, held = self._stopwatch.mark(), self._device.allocated_bytes()
        was_inside, self.is_inside = self.is_inside, True
        seeds = [torch.empty_like(root) for root in roots]
        torch.autograd.grad(roots, self._edges, seeds, allow_unused=True)
        self.is_inside = was_inside
        self._glue.backward_seconds += self._stopwatch.seconds(mark, self._stopwatch.mark())
        self._glue.backward_bytes = max(self._glue.backward_bytes, self._device.peak_bytes() - held)

    def leave(self, loss: torch.Tensor | None, inputs: Sequence[torch.Tensor] = ()) -> None:
        """The glue ends: at a layer with these inputs, or with the loss."""
        self._glue.forward_seconds += self._stopwatch.seconds(self._mark, self._stopwatch.mark())
        self._glue.forward_bytes = max(self._glue.forward_bytes, self._device.peak_bytes() - self._held)
        if loss is None:
            self._differentiate(inputs)
        else:
            # The loss is differentiated at once; what its glue saved is still there then.
            kept = self._device.allocated_bytes() - self._held
            self._differentiate([loss])
            self._glue.backward_bytes += max(0, kept)
        self._edges.clear()
        self._older.clear()

    def call(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.is_inside = True
        try:
            self.leave(None, tensors)
            cost, shapes = self._cost(module, args, kwargs)
            visit = Visit(name, cost, nbytes_of(tensors))
            if not self.visits:
                visit.glue = self._glue  # what comes before the first layer counts with it
            self.visits.append(visit)
            self._glue = visit.glue
            self._start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
            result = pytree.tree_map_only(_Shape, self._make_up, shapes)
        finally:
            self.is_inside = False
        self._begin_glue()
        return result

    def _cost(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[CallCost, Any]:
        key = (self._cache.structure(module), _describe_arguments(args, kwargs), _autocast())
        if None not in key and key in self._cache.known:
            return self._cache.known[key]
        device = self._device.torch_device
        weights = {}
        for name, parameter in module.named_parameters():
            weights[name] = _on(parameter, device).requires_grad_(parameter.requires_grad)
        buffers = {name: _on(buffer, device) for name, buffer in module.named_buffers()}
        is_cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.enable_grad():
                result, cost = run_call(
                    self._device, self._stopwatch, module, {**weights, **buffers}, *_on_device(args, kwargs, device)
                )
        finally:
            torch.set_autocast_cache_enabled(is_cached)
        has_gradient = cost.backward_seconds > 0
        shapes = pytree.tree_map_only(torch.Tensor, lambda t: _shape(t, has_gradient), result)
        self._cache.known[key] = cost, shapes
        return cost, shapes

    def _make_up(self, shape: _Shape) -> torch.Tensor:
        device = self._device.torch_device
        if not shape.has_gradient:
            made = _empty(shape, device)
            return made if shape.dtype.is_floating_point else made.zero_()
        made = cast(torch.Tensor, _Made.apply(self._anchor, shape, device))  # type: ignore[no-untyped-call]
        if made.requires_grad:
            self._edges.append(get_gradient_edge(made))
        return made


def _empty(shape: _Shape, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device=device)


def _shape(tensor: torch.Tensor, has_gradient: bool) -> _Shape:
    return _Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype, has_gradient and tensor.dtype.is_floating_point)


def _on_device(args: Any, kwargs: Any, device: torch.device) -> tuple[Any, Any]:
    moved: tuple[Any, Any] = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    return moved


def _describe_arguments(args: Any, kwargs: Any) -> str | None:
    """None if something in there is not known to mean the same the next time."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    parts = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts.append(f"{tuple(leaf.shape)}{leaf.stride()}{leaf.dtype}{leaf.requires_grad}")
        elif leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype):
            parts.append(repr(leaf))
        else:
            return None
    return "\n".join(parts)


def _autocast() -> str:
    kinds = ("cpu", "cuda")
    return str([(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds])
