"""Tensors within a transform of `torch.func`: it hands code wrappers, which show nothing of the graph that a tensor is part
of, so that its gradient would be lost. What `vmap` has wrapped is brought, and wrapped again. That does not do for `grad`
and its like, which differentiate with respect to the wrapper itself. What nobody has wrapped is brought as anywhere else,
while the transform looks away.
"""

from collections.abc import Callable

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from harmony_lightning.errors import UnsupportedError

_functorch = torch._C._functorch
_is_wrapped = _functorch.is_functorch_wrapped_tensor


def bring_in_transform(tensor: torch.Tensor, bring: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """What `bring` makes of the tensor within the wrappers, in wrappers of the same kind; None if there is no graph.

    Raises:
        UnsupportedError: there is, and something else than `vmap` has wrapped it.
    """
    batched, inner = [], tensor
    while _functorch.is_batchedtensor(inner):
        batched.append((_functorch.maybe_get_bdim(inner), _functorch.maybe_get_level(inner)))
        inner = _functorch.get_unwrapped(inner)
    is_differentiated = _is_wrapped(inner)
    while _is_wrapped(inner):
        inner = _functorch.get_unwrapped(inner)
    if not (inner.requires_grad and torch.is_grad_enabled()):
        return None
    with temporarily_clear_interpreter_stack():
        brought = bring(inner)
    if brought is inner:
        return tensor
    if is_differentiated:
        raise UnsupportedError(
            "a transform of torch.func that differentiates (grad, vjp, ...) was given a weight, or what a layer of another "
            "pack has made, whose own gradient would be lost; give it something that was computed from that here, such as "
            "x * 1, or x.detach() if it has no use for that gradient"
        )
    for dim, level in reversed(batched):
        brought = _functorch._add_batch_dim(brought, dim, level)
    return brought
