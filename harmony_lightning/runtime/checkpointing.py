"""The user's `torch.utils.checkpoint`, made transparent where the runtime recomputes by itself.

Layers recompute, and the glue between them is cheap. A checkpoint of the user's around several layers would recompute
them all within the backward of one segment, on one device, though they belong to several; one within a layer would
recompute with the masters on the host. So both run their function as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

_REENTRANT = "CheckpointFunction"
_NON_REENTRANT = "_checkpoint_without_reentrant_generator"


@contextmanager
def transparent_checkpoints(is_transparent: Callable[[], bool]) -> Iterator[None]:
    """Within, `torch.utils.checkpoint.checkpoint` called where `is_transparent()` holds just calls its function."""
    reentrant = getattr(torch_checkpoint, _REENTRANT)
    non_reentrant = getattr(torch_checkpoint, _NON_REENTRANT)

    class Transparent:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args) if is_transparent() else reentrant.apply(function, preserve_rng_state, *args)

    def transparent(*args: Any, **kwargs: Any) -> Iterator[None]:
        # torch runs the checkpointed function between the two halves of this generator.
        if is_transparent():
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
