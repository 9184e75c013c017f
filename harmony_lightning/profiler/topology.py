"""What the machine at hand offers: GPUs, links, host memory, the rate of updates on the host.

What NVML and the system know is asked for; what they do not know is measured in a second or two: copies between the host
and one GPU, all GPUs at once (which shows a shared uplink), from GPU to GPU, and within one; copies within host memory;
steps of a fused Adam on the host.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.profiler.cache import cached, fingerprint
from harmony_lightning.profiler.machine import Machine

_COPIED_BYTES = 256 * 2**20
_NUM_COPIES = 8
_NUM_UPDATED = 2**22
_NUM_RUNS = 3

Progress = Callable[[str], None]


def machine_at_hand(
    devices: Sequence[torch.device] | None = None,
    *,
    is_fresh: bool = False,
    progress: Progress = lambda what: None,
) -> tuple[Machine, bool]:
    """The machine that this process runs on, measured once; and whether it was known already.

    Args:
        devices: the GPUs that are meant; None for all. Others, which may be somebody else's, are not touched.

    Raises:
        ConfigurationError: there is no GPU, or they are not equal.
    """
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "this machine has no GPU that torch can use; name the GPUs to plan for, such as --gpus 4x3090"
        )
    if devices is None:
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if is_fresh:
        return _measure(devices, progress), False
    gpus = [torch.cuda.get_device_properties(device) for device in devices]
    names = [f"{gpu.name} {gpu.uuid}" for gpu in gpus]
    key = fingerprint("machine 2", platform.node(), str(os.cpu_count()), torch.__version__, *names)
    return cached(Machine, key, lambda: _measure(devices, progress))


def host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def host_copy_bytes_per_second() -> float:
    """Bytes that are copied within host memory per second, on all cores."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return _COPIED_BYTES / _least_seconds(lambda: target.copy_(source))


def host_update_parameters_per_second() -> float:
    """Parameters in float32 that a fused Adam steps per second, on all cores."""
    weight = torch.nn.Parameter(torch.zeros(_NUM_UPDATED))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return _NUM_UPDATED / _least_seconds(optimizer.step)


def _least_seconds(run: Callable[[], Any], wait: Callable[[], Any] = lambda: None) -> float:
    """Of several runs, the first of which only warms up."""
    taken = []
    for _ in range(1 + _NUM_RUNS):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - begin)
    return max(min(taken[1:]), 1e-9)


def _measure(devices: Sequence[torch.device], progress: Progress) -> Machine:
    names = [torch.cuda.get_device_name(device) for device in devices]
    if len(set(names)) > 1:
        raise ConfigurationError(
            f"plans are searched for equal GPUs, these are {', '.join(names)}; choose equal ones with devices= or "
            f"CUDA_VISIBLE_DEVICES, or train under a plan that is not searched, with plan='sizes'"
        )
    progress("host memory")
    copy_rate = host_copy_bytes_per_second()
    progress("updates on the host")
    update_rate = host_update_parameters_per_second()
    progress("host links")
    alone, together = _link_rate(devices[:1]), _link_rate(devices)
    # Rates fall together where an uplink is shared; the rest is noise.
    is_shared = together < 0.85 * len(devices) * alone
    progress("links between GPUs")
    peer = _peer_rate(devices[0], devices[1]) if len(devices) > 1 else alone
    progress("memory of the GPUs")
    memory_rate = min(gpu_memory_bytes_per_second(device) for device in devices)
    torch._C._host_emptyCache()  # what was pinned here would stay so for good
    return Machine(
        name=platform.node(),
        gpus=len(devices),
        memory_bytes=min(torch.cuda.mem_get_info(device)[1] for device in devices),
        host_link_bytes_per_second=together if is_shared else alone,
        host_link_shared_by=len(devices) if is_shared else 1,
        link_bytes_per_second=alone,
        peer_bytes_per_second=peer,
        peers_by_host=len(devices) > 1 and not torch.cuda.can_device_access_peer(devices[0], devices[1]),
        host_message_bytes_per_second=copy_rate,
        release_seconds=0.0,
        update_parameters_per_second=update_rate,
        host_memory_bytes=host_memory_bytes(),
        gpu=names[0],
        gpu_memory_bytes_per_second=memory_rate,
        note=f"measured with torch {torch.__version__}",
    )


def _link_rate(devices: Sequence[torch.device]) -> float:
    """Bytes per second and direction from the host to these GPUs, all at once and together."""
    hosts = [torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True) for _ in devices]
    targets = [torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device) for device in devices]

    def copy() -> None:
        for host, target in zip(hosts, targets, strict=True):
            target.copy_(host, non_blocking=True)

    return len(devices) * _COPIED_BYTES / _least_seconds(copy, lambda: _wait(devices))


def _peer_rate(source: torch.device, target: torch.device) -> float:
    block = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=source)
    other = torch.empty_like(block, device=target)
    return _COPIED_BYTES / _least_seconds(
        lambda: other.copy_(block, non_blocking=True), lambda: _wait([source, target])
    )


def gpu_memory_bytes_per_second(device: torch.device, wait: Callable[[], Any] | None = None) -> float:
    """Bytes that a device reads and writes of its own memory per second: a copy does both. Several follow each other, as
    one takes little longer than its launch."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(_NUM_COPIES):
            target.copy_(source)

    seconds = _least_seconds(copy, wait or (lambda: _wait([device])))
    return 2 * _NUM_COPIES * _COPIED_BYTES / seconds


def _wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)
