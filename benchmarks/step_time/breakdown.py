"""What the GPUs compute, by class of operation: seconds of their compute lanes, launches included."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harmony_lightning.hardware.emulated_machine import Machine
from harmony_lightning.hardware.virtual_clock import VirtualClock

CLASSES = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_scaled_dot_product"),
    "casts": ("_to_copy",),
    "copies": ("copy_", "clone", "cat", "_foreach_copy_"),
    "normalisation": ("native_layer_norm", "_fused_rms_norm", "native_batch_norm"),
    "loss": ("_log_softmax", "nll_loss"),
    "embedding": ("embedding", "embedding_dense_backward"),
}
"""Beginnings of names of operations; all others are elementwise."""


def kind(func: Any, nbytes: int, flops: int) -> str:
    name = func._schema.name.removeprefix("aten::")
    return next((kind for kind, names in CLASSES.items() if name.startswith(names)), f"elementwise {name}")


@contextmanager
def breakdown() -> Iterator[Counter[str]]:
    """Counts while it is in force."""
    seconds: Counter[str] = Counter()
    use, kernel = Machine.use, VirtualClock.kernel
    running: list[Any] = [None]

    def use_and_note(machine: Machine, device: int, func: Any, operands: Any) -> Any:
        running[0] = func
        return use(machine, device, func, operands)

    def kernel_and_note(clock: VirtualClock, agent: Any, what: str, dtype: str, flops: int, nbytes: int) -> None:
        took = max(flops / clock.gpu.flops(dtype), nbytes / clock.gpu.memory_bytes_per_second)
        lane = "" if what.startswith(("forward", "backward")) else f" ({what.split(' of ')[0]})"
        seconds[kind(running[0], nbytes, flops) + lane] += took + clock.gpu.launch_seconds
        kernel(clock, agent, what, dtype, flops, nbytes)

    Machine.use, VirtualClock.kernel = use_and_note, kernel_and_note  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Machine.use, VirtualClock.kernel = use, kernel  # type: ignore[method-assign]
