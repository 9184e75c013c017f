"""What this GPU, its link and its host do per second, measured."""

import time
from collections.abc import Callable

import torch
from bound import Rates

_LARGE = 8192
_COPY_NBYTES = 2**30
_UPDATE_SIZE = 2**27
"""Parameters; with gradient and both states 2 GiB, far beyond any cache."""


def measure(dtype: torch.dtype) -> Rates:
    """Takes a few seconds and 4 GiB of host memory; needs a CUDA GPU."""
    a, b = (torch.randn(_LARGE, _LARGE, device="cuda", dtype=dtype) for _ in range(2))
    on_host = torch.empty(_COPY_NBYTES, dtype=torch.uint8, pin_memory=True)
    on_gpu = torch.empty(_COPY_NBYTES, dtype=torch.uint8, device="cuda")
    weight = torch.nn.Parameter(torch.zeros(_UPDATE_SIZE))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return Rates(
        flops_per_second=2 * _LARGE**3 / _seconds(lambda: torch.mm(a, b), 20),
        in_bytes_per_second=_COPY_NBYTES / _seconds(lambda: on_gpu.copy_(on_host, non_blocking=True), 5),
        out_bytes_per_second=_COPY_NBYTES / _seconds(lambda: on_host.copy_(on_gpu, non_blocking=True), 5),
        updates_per_second=_UPDATE_SIZE / _seconds(optimizer.step, 5),
    )


def _seconds(work: Callable[[], object], times: int) -> float:
    """Of one call, once warm."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times
