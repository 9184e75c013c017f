"""Autograd's engine, without what `torch.autograd.grad` and `backward` do in front of it to find out what they were given.
Of a small layer's backward that was a tenth, and the function mode over user code was called for each of its checks."""

from collections.abc import Sequence

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from harmony_lightning.hardware.out_of_memory import told_by_type

_run_backward = torch.autograd.Variable._execution_engine.run_backward  # type: ignore[attr-defined]
"""Torch's own function around it keeps a context for the engine's threads; ours is the calling one (`UserCode.active`)."""


def edge_of(tensor: torch.Tensor) -> GradientEdge:
    """Where the gradient of a tensor is computed whose graph somebody else keeps. (Torch's own function makes one more node
    to keep it.)"""
    return GradientEdge(tensor.grad_fn, tensor.output_nr)  # type: ignore[arg-type]


def kept_edge_of(tensor: torch.Tensor) -> GradientEdge:
    """The same, and the graph is kept by it. A node in Python is kept by one behind it alone, so one is made."""
    node = tensor.grad_fn
    if not isinstance(node, torch._C._FunctionBase):
        return get_gradient_edge(tensor) if node is None else GradientEdge(node, tensor.output_nr)
    if not torch.is_grad_enabled():
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr, tensor.view_as(tensor).grad_fn)


def gradients_of(
    edges: Sequence[GradientEdge],
    gradients: Sequence[torch.Tensor],
    targets: Sequence[GradientEdge],
    *,
    keeps_graph: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `targets`, given those of `edges`; None for what is not reached."""
    return told_by_type(  # type: ignore[no-any-return]
        _run_backward,
        tuple(edges),
        tuple(gradients),
        keeps_graph,
        False,
        tuple(targets),
        True,
        accumulate_grad=False,
    )


def accumulate(edges: Sequence[GradientEdge], gradients: Sequence[torch.Tensor]) -> None:
    """Backward to all leaves, given the gradients of `edges`."""
    _run_backward(tuple(edges), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True)


def keeps_graph() -> bool:
    """Whether the running backward leaves the graph to others."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())  # type: ignore[attr-defined]
