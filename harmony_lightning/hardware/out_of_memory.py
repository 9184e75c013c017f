"""Errors that mean that a device has no memory left.

Torch's allocator has a type for them. CUDA's libraries ask the driver for their handles and workspaces themselves, and the
driver itself needs some for the code of kernels that are launched for the first time; their errors have no type of their
own.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from harmony_lightning.errors import DeviceOutOfMemoryError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

OUT_OF_MEMORY = (DeviceOutOfMemoryError, torch.OutOfMemoryError)

_SIGNS = ("_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED", "CUDA error: out of memory")
"""A library whose handle finds no memory says that it is not initialised."""


def told_by_type(function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
    """What the function returns. Each of its errors that means out of memory is one of `OUT_OF_MEMORY`."""
    try:
        return function(*args, **kwargs)
    except OUT_OF_MEMORY:
        raise
    except RuntimeError as error:
        if any(sign in str(error) for sign in _SIGNS):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
