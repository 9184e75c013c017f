"""What the GPUs compute, by class of operation: seconds of their compute lanes, launches included."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    import lightning as L
except ImportError:
    import pytorch_lightning as L

from harmony_lightning.hardware.emulated_machine import Machine
from harmony_lightning.hardware.virtual_clock import VirtualClock

CLASSES = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product"),
    "casts": ("_to_copy",),
    "normalisation": ("native_layer_norm", "_fused_rms_norm"),
    "loss": ("_log_softmax", "nll_loss"),
    "embedding": ("embedding",),
}
"""Beginnings of names of operations; all others are elementwise."""


class Breakdown(L.Callback):
    """Counts the last whole one of so many steps, of some minibatches each; those behind it only show when it ends."""

    def __init__(self, num_steps: int, num_minibatches: int = 1) -> None:
        self._last, self._num_minibatches = num_steps - 1, num_minibatches
        self.seconds: Counter[str] = Counter()
        self._is_counting = False

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._is_counting = batch_idx // self._num_minibatches == self._last

    @contextmanager
    def counting(self) -> Iterator[None]:
        use, kernel = Machine.use, VirtualClock.kernel
        running: list[Any] = [None, ()]

        def use_and_note(machine: Machine, device: int, func: Any, operands: Any) -> Any:
            operands = list(operands)
            running[:] = func, operands
            return use(machine, device, func, operands)

        def kernel_and_note(clock: VirtualClock, agent: Any, what: str, dtype: str, flops: int, nbytes: int) -> None:
            if self._is_counting and what.startswith(("forward", "backward")):
                took = max(flops / clock.gpu.flops(dtype), nbytes / clock.gpu.memory_bytes_per_second)
                self.seconds[_kind(*running)] += took + clock.gpu.launch_seconds
            kernel(clock, agent, what, dtype, flops, nbytes)

        Machine.use, VirtualClock.kernel = use_and_note, kernel_and_note  # type: ignore[method-assign]
        try:
            yield
        finally:
            Machine.use, VirtualClock.kernel = use, kernel  # type: ignore[method-assign]

    def table(self, num_gpus: int, step_seconds: float) -> str:
        """What is not computing is waiting."""
        parts = [(name, seconds / num_gpus) for name, seconds in self.seconds.most_common()]
        parts.append(("waiting", step_seconds - sum(seconds for _, seconds in parts)))
        rows = [f"| {name} | {seconds:.3f} s |" for name, seconds in parts]
        return "\n".join(["| operations | per step and GPU |", "|---|---|", *rows])


def _kind(func: Any, operands: Any) -> str:
    name = func._schema.name.removeprefix("aten::")
    if name in ("add_", "copy_") and len(operands) == 2 and operands[0][0].dtype is torch.float32:
        target = operands[0][0]
        if target.untyped_storage().nbytes() > target.nbytes or target.dtype is not operands[1][0].dtype:
            return "gradient sums"
    return next((kind for kind, names in CLASSES.items() if name.startswith(names)), f"elementwise: {name}")
