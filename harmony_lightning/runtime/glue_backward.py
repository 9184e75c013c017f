"""What the backward of code between layers ("glue") meets where memory is short.

A layer is differentiated by its node, which can begin anew. Nodes of glue are autograd's own, and those of a segment that
have run have handed on their gradients: a segment's backward that has failed cannot begin again. So it is each operation
that is called again, when there is room.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override


class GlueBackward(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In force while a segment with glue is differentiated, but for the layers in it.

    Args:
        with_room: calls a function that needs memory of the segment's device.
    """

    supports_higher_order_operators = True

    def __init__(self, with_room: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._with_room = with_room

    @classmethod
    @override
    def is_infra_mode(cls) -> bool:
        return True  # operations do what they did: compiled ones need not be taken apart for it

    @override
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunction():
            return self._with_room(lambda: func(*args, **(kwargs or {})))
