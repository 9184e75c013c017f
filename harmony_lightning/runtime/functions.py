"""Autograd functions of the user's own: `MyFunction.apply(x)` is no torch function, so no function mode sees it.

Their arguments are looked at here, so that glue may use them on tensors of older segments and on weights, and layers on
tensors within objects.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PACKAGE = __name__.partition(".")[0] + "."


def apply_own(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` for functions of ours, without what that does for others: watching them, default arguments,
    and transforms of `torch.func`, which are refused in front of layers and go the long way in glue."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


@contextmanager
def watched_functions(bring: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, on this thread, `bring` sees each tensor that such a function is applied to, and says what it gets."""
    thread = threading.get_ident()
    descriptor = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and not cls.__module__.startswith(_PACKAGE):
            args = tuple(bring(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
        return descriptor.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = descriptor  # type: ignore[method-assign]
