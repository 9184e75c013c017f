"""CUDA's libraries have no type of error for a device that is full; ours is told by what they say."""

import pytest
import torch

from harmony_lightning.errors import DeviceOutOfMemoryError
from harmony_lightning.hardware.out_of_memory import told_by_type


def fail(error):
    raise error


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    ],
)
def test_a_library_that_finds_no_memory_is_out_of_memory(text):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        told_by_type(fail, RuntimeError(text))
    assert str(caught.value) == text and type(caught.value.__cause__) is RuntimeError


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        ValueError("CUDNN_STATUS_ALLOC_FAILED"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        DeviceOutOfMemoryError("gpu0 out of memory"),
    ],
)
def test_others_are_what_they_were(error):
    with pytest.raises(type(error)) as caught:
        told_by_type(fail, error)
    assert caught.value is error and error.__cause__ is None


def test_what_the_function_returns_is_returned():
    assert told_by_type(divmod, 7, 2) == (3, 1)
