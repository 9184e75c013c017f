"""Derivatives that user code takes by itself, inside the step.

    torch.autograd.grad, backward()     cross the borders of segments: the minibatch runs again, in one piece (`Uncuttable`)
    ... with respect to weights         masters are no part of the graph: gradients of their copies are handed out instead
    second derivatives                  a layer's backward is no part of any graph: refused when it is asked for
    torch.func                          refuses saved-tensor hooks: ours step aside for it

Whatever one layer does within its own forward is not concerned: it is plain torch there.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import graph as autograd_graph

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.runtime.state import RuntimeState

_hooks = torch._C._autograd

DERIVATIVES = frozenset((torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward))


class Uncuttable(BaseException):
    """User code of a microbatch that is cut wants a derivative across the cuts. No `Exception`: user code must not catch
    it. The engine has given the step up; the same minibatch can run in one piece."""


def refuse_transforms(layer: str) -> None:
    """Called where a layer is.

    Raises:
        UnsupportedError: a transform of `torch.func` is being applied.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            f"layer {layer} was called inside a transform of torch.func (grad, vmap, jvp, ...), which cannot look into a "
            f"swapped layer. Put the transform and all layers that it goes through into the forward of one module, and "
            f"make that one layer: HarmonyStrategy(layers=[ThatModule]); for gradients, torch.autograd.grad works too"
        )


def crosses_cuts(outputs: Any) -> bool:
    """Whether a derivative of `outputs` may go through an end of a cut graph."""
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    waiting = [tensor.grad_fn for tensor in tensors if isinstance(tensor, torch.Tensor)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "ImportBackward" or getattr(node, "reaches_back", False):
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


class _Refusal(torch.autograd.Function):
    """Identity that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, gradient: torch.Tensor, layer: str) -> torch.Tensor:  # type: ignore[override]
        ctx.layer = layer
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            f"a second derivative through layer {ctx.layer} was asked for: a gradient that was computed with "
            f"create_graph=True is differentiated again. A swapped layer keeps no graph of its backward. Put the code "
            f"that takes the inner derivative, with all layers it goes through, into the forward of one module, and "
            f"make that one layer: HarmonyStrategy(layers=[ThatModule])"
        )


_ARGUMENTS = inspect.signature(torch.autograd.grad)


def inputs_of(func: Any, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
    """What a derivative is taken with respect to; empty for a backward to all leaves."""
    if func is torch.autograd.grad:
        inputs = _ARGUMENTS.bind(*args, **kwargs).arguments["inputs"]
    else:
        inputs = kwargs.get("inputs") or ()
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)


def differentiate_weights(state: RuntimeState, func: Any, args: Any, kwargs: Any) -> Any:
    """A derivative with respect to tensors of which some are masters."""
    inputs = inputs_of(func, args, kwargs)
    if func is not torch.autograd.grad:
        kwargs = {key: value for key, value in kwargs.items() if key != "inputs"}
        names = ("tensors", "grad_tensors") if func is torch.autograd.backward else ("tensors", "gradient")
        given = dict(zip((*names, "retain_graph", "create_graph"), args, strict=False)) | kwargs
        gradients = differentiate_weights(
            state,
            torch.autograd.grad,
            (given["tensors"], inputs, given.get(names[1])),
            {"retain_graph": given.get("retain_graph"), "allow_unused": True},
        )
        found = [(tensor, gradient) for tensor, gradient in zip(inputs, gradients, strict=True) if gradient is not None]
        torch.autograd.backward([tensor for tensor, _ in found], [gradient for _, gradient in found])
        if given.get("create_graph"):
            refuse_second_derivatives(state)
        return None
    given = _ARGUMENTS.bind(*args, **kwargs).arguments
    masters = [state.weight_name(tensor) for tensor in inputs]
    others = [tensor for tensor, name in zip(inputs, masters, strict=True) if name is None]
    options = {key: value for key, value in given.items() if key not in ("inputs", "allow_unused", "materialize_grads")}
    with state.capturing(frozenset(name for name in masters if name is not None)) as captured:
        # Reaching the anchor makes layers differentiate their weights too.
        *results, _ = torch.autograd.grad(inputs=(*others, state.anchor), allow_unused=True, **options)
    if given.get("create_graph"):
        captured = {name: _Refusal.apply(state.anchor, value, name) for name, value in captured.items()}  # type: ignore[no-untyped-call]
    by_order = iter(results)
    gradients = tuple(next(by_order) if name is None else captured.get(name) for name in masters)
    if given.get("materialize_grads"):
        return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True))
    if None in [gradient if gradient is None else True for gradient in gradients] and not given.get("allow_unused"):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if this "
            "is the desired behavior."
        )
    return gradients


def keeps_graph(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether gradients of a backward are to be differentiated themselves."""
    position = 3  # in (tensors, gradients, retain_graph, create_graph)
    given = args[position] if func is not torch.autograd.grad and len(args) > position else False
    return bool(kwargs.get("create_graph", given))


def refuse_second_derivatives(state: RuntimeState) -> None:
    """Behind a backward that should have kept a graph: gradients of masters may be looked at, not be differentiated."""
    for name, parameter in state.parameters.items():
        if parameter.requires_grad and parameter.grad is not None and not parameter.grad.requires_grad:
            parameter.grad = _Refusal.apply(state.anchor, parameter.grad, name)  # type: ignore[no-untyped-call]


def first_derivative_only(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """For the backward of a layer's node: its results may be looked at, but not be differentiated.

    torch's own `once_differentiable` is not enough: it lets results pass as constants where no incoming gradient requires
    one, though they depend on the weights, and a gradient penalty would silently have no effect.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        anchor, layer = ctx.call.segment.state.anchor, ctx.call.site.name
        return tuple(
            result if result is None else _Refusal.apply(anchor, result, layer)  # type: ignore[no-untyped-call]
            for result in results
        )

    return wrapper


@contextmanager
def yielding_hooks(is_ours: Callable[[Any], bool]) -> Iterator[None]:
    """Within, where torch switches saved-tensor hooks off, those for which `is_ours` holds are taken off the thread first.
    torch refuses to switch off what is in force; hooks of the user's own still meet that refusal."""
    switch_off = autograd_graph.disable_saved_tensors_hooks

    @contextmanager
    def without_ours(message: str) -> Iterator[None]:
        taken = []
        while (top := _hooks._top_saved_tensors_default_hooks(True)) is not None and is_ours(top[0]):
            taken.append(top)
            _hooks._pop_saved_tensors_default_hooks()
        try:
            with switch_off(message):
                yield
        finally:
            for pack, unpack in reversed(taken):
                _hooks._push_saved_tensors_default_hooks(pack, unpack)

    autograd_graph.disable_saved_tensors_hooks = without_ours  # type: ignore[assignment]
    try:
        yield
    finally:
        autograd_graph.disable_saved_tensors_hooks = switch_off
