"""The user's `torch.utils.checkpoint` around layers, made transparent.

Layers recompute by themselves, and the glue between them is cheap. A checkpoint of the user's around several layers
would recompute them all within the backward of one segment, on one device, though they belong to several. So while a
microbatch is cut into segments, checkpoints in glue run their function as it is.

Those within a layer work as always, but for one kind: a reentrant checkpoint refuses `torch.autograd.grad`, with which a
recomputed layer is differentiated. It becomes a non-reentrant one there, which gives the same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

_REENTRANT = "CheckpointFunction"
_NON_REENTRANT = "_checkpoint_without_reentrant_generator"


@contextmanager
def transparent_checkpoints(
    is_in_glue: Callable[[], bool], is_recomputing: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Within, `torch.utils.checkpoint.checkpoint` called where `is_in_glue` holds just calls its function; where
    `is_recomputing` holds it is never reentrant."""
    reentrant = getattr(torch_checkpoint, _REENTRANT)
    non_reentrant = getattr(torch_checkpoint, _NON_REENTRANT)

    class Transparent:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            if is_in_glue():
                return function(*args)
            # A reentrant checkpoint whose inputs need no gradient gives none to anything: that must stay so.
            if is_recomputing() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
                return torch_checkpoint.checkpoint(
                    function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
                )
            return reentrant.apply(function, preserve_rng_state, *args)

    def transparent(*args: Any, **kwargs: Any) -> Iterator[None]:
        # torch runs the checkpointed function between the two halves of this generator.
        if is_in_glue():
            yield
        else:
            yield from non_reentrant(*args, **kwargs)

    setattr(torch_checkpoint, _REENTRANT, Transparent)
    setattr(torch_checkpoint, _NON_REENTRANT, transparent)
    try:
        yield
    finally:
        setattr(torch_checkpoint, _REENTRANT, reentrant)
        setattr(torch_checkpoint, _NON_REENTRANT, non_reentrant)
