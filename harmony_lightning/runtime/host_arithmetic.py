"""Arithmetic on masters that user code does by itself stays on the host.

In manual optimization users clip, scale and average gradients, or take both half-steps of an optimizer by hand, between
the layers' calls. Glue would compute all that on the segment's device, and what such code keeps (old weights, moments) is
as large as the model. So what is made of masters, of their gradients, and of what was made of these before, and of nothing
else, is computed where they are. Whatever takes part in an autograd graph is glue as ever.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.structure import tensors_in


class HostArithmetic:
    """Knows the relatives of masters: tensors on the host that were made of masters alone."""

    def __init__(self) -> None:
        self._relatives = WeakIdKeyDictionary()

    def concerns(self, state: RuntimeState, args: Any, kwargs: Any, *, is_write: bool) -> bool:
        """Whether a function of these arguments belongs on the host. What it writes there may be any host tensor, such as
        the state of an optimizer, and is related from then on."""
        is_related = False
        for tensor in tensors_in((args, kwargs)):
            if tensor.requires_grad and torch.is_grad_enabled():
                return False
            if self.descends(state, tensor):
                is_related = True
            elif tensor.device.type != "cpu" or (tensor.dim() and not is_write):
                return False
        return is_related

    def descends(self, state: RuntimeState, tensor: Any) -> bool:
        """Whether a tensor is a master or a relative of one."""
        return isinstance(tensor, torch.Tensor) and (state.weight_name(tensor) is not None or tensor in self._relatives)

    def run(self, state: RuntimeState, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the function as it is; what it returns on the host is related too."""
        before = [(tensor, tensor._version) for tensor in tensors_in(args) if not tensor.is_inference()]
        result = func(*args, **kwargs)
        for tensor, version in before:
            if tensor._version != version:
                state.notice_write(tensor)
                self.note(tensor)
        self.note(result)
        return result

    def note(self, result: Any) -> None:
        """These were read off a master or a relative: its gradient, its data."""
        for tensor in tensors_in(result):
            if tensor.device.type == "cpu":
                self._relatives[tensor] = None
