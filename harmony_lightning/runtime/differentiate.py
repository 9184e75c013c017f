"""Autograd's engine, without what `torch.autograd.grad` and `backward` do in front of it to find out what they were given.
Of a small layer's backward that was a tenth, and the function mode over user code was called for each of its checks."""

from collections.abc import Sequence

import torch
from torch.autograd.graph import GradientEdge, _engine_run_backward

from harmony_lightning.hardware.out_of_memory import told_by_type


def edge_of(tensor: torch.Tensor) -> GradientEdge:
    """Where the gradient of a tensor is computed whose graph somebody else keeps. (Torch's own function makes one more node
    to keep it.)"""
    return GradientEdge(tensor.grad_fn, tensor.output_nr)  # type: ignore[arg-type]


def gradients_of(
    edges: Sequence[GradientEdge],
    gradients: Sequence[torch.Tensor],
    targets: Sequence[GradientEdge],
    *,
    keeps_graph: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `targets`, given those of `edges`; None for what is not reached."""
    return told_by_type(
        _engine_run_backward,
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
    _engine_run_backward(tuple(edges), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True)


def keeps_graph() -> bool:
    """Whether the running backward leaves the graph to others."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())  # type: ignore[attr-defined]
