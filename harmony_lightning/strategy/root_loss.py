"""What gradient the root of a minibatch's loss will get, read off the graph that Lightning has made of it.

To look at the gradient itself is to wait for all that the GPUs have been given by then, the whole forward, before the first
pack of backward is enqueued: 2.6 % of a step of GPT-2 XL with 16384 tokens on four emulated 3090s.
"""

import torch

_HOST = torch.device("cpu")


def foreseen_gradient(loss: torch.Tensor, root: torch.Tensor) -> torch.Tensor | None:
    """A scalar on the host, equal to the bit to what `loss.backward()` will give `root`; None where the graph between them
    is more than products and quotients with numbers that the host knows, or somebody's hook may change the gradient."""
    if loss._backward_hooks or loss.shape != root.shape or loss.dtype != root.dtype or root.dim():  # type: ignore[attr-defined]
        return None
    gradient, node = torch.ones((), dtype=root.dtype, device=_HOST), loss.grad_fn
    while node is not None and node.name() in ("MulBackward0", "DivBackward0"):
        other, (inner, beside) = node._saved_other, node.next_functions  # type: ignore[attr-defined]
        if other is None or other.device != _HOST or other.dim() or beside[0] is not None:
            return None
        number = other.tolist()  # not `item`: dispatch modes are given the plain number, and cannot hand it on
        gradient = gradient * number if node.name() == "MulBackward0" else gradient / number
        node = inner[0]
    return gradient if getattr(node, "variable", None) is root else None
