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

from harmony_lightning.hardware.device import Device
from harmony_lightning.runtime.randomness import drawing_anew


class GlueBackward(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In force while a segment with glue is differentiated, but for the layers in it.

    Args:
        device: the segment's.
        with_room: calls a function that needs memory of a device.
    """

    supports_higher_order_operators = True

    def __init__(self, device: Device, with_room: Callable[[Device, Callable[[], Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._with_room = with_room

    @classmethod
    @override
    def is_infra_mode(cls) -> bool:
        return True  # operations do what they did: compiled ones need not be taken apart for it

    @override
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunction():

            def run() -> Any:
                return func(*args, **(kwargs or {}))

            draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
            return self._with_room(self._device, drawing_anew(run, self._device) if draws else run)
