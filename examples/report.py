"""What the examples share after training: what it took, and how that compares with what the plan needs at least."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from rich.console import Console
from rich.table import Table

from harmony_lightning.units import format_nbytes

_COUNTERS = {
    "swap_in_bytes": "swapped in",
    "swap_out_bytes": "swapped out",
    "p2p_bytes": "GPU to GPU",
    "stash_in_bytes": "stash in",
    "stash_out_bytes": "stash out",
}
Rows = Iterator[tuple[str, str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One training step: its time, its samples, how far it moved the strategy's counters, and how far its plan says."""

    seconds: float
    num_samples: int
    nbytes: Counter[str]
    planned: Counter[str]


class Meter(L.Callback):
    """Records every training step, apart from validation and planning, and a metric after every validation."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.steps: list[Step] = []
        self.curve: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._started, self._before = time.perf_counter(), _counters(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        moved = _counters(trainer)
        moved.subtract(self._before)
        seconds = time.perf_counter() - self._started
        plan = getattr(trainer.strategy, "plan", None)
        planned = Counter({counter: getattr(plan, f"{counter}_per_step", 0) for counter in _COUNTERS})
        self.steps.append(Step(seconds=seconds, num_samples=extract_batch_size(batch), nbytes=moved, planned=planned))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.curve.append((trainer.global_step, float(trainer.callback_metrics[self.metric])))

    @property
    def settled(self) -> list[Step]:
        """The steps after the first, which also pays for tracing the model, planning and first allocations."""
        return self.steps[1:] or self.steps

    def mean_nbytes(self, counter: str) -> float:
        return sum(step.nbytes[counter] for step in self.settled) / len(self.settled)

    def mean_planned(self, counter: str) -> float:
        """0 if plans say nothing of it."""
        return sum(step.planned[counter] for step in self.settled) / len(self.settled)


def print_report(trainer: L.Trainer, meter: Meter, gpu_nbytes: Sequence[int]) -> None:
    """The closing table; rows that the strategy in use knows nothing about are left out."""
    table = Table(title=f"{type(trainer.lightning_module).__name__} with {type(trainer.strategy).__name__}")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("compared")
    for section in (_sizes, _plan, _traffic, _progress):
        for row in section(trainer, meter, gpu_nbytes):
            table.add_row(*row)
        table.add_section()
    Console().print(table)


def training_state_nbytes(trainer: L.Trainer) -> int:
    """Weights, gradients (counted, as they come and go) and whatever the optimizers hold."""
    parameters = list(trainer.lightning_module.parameters())
    held = (value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values())
    return (
        sum(p.nbytes for p in parameters)
        + sum(p.nbytes for p in parameters if p.requires_grad)
        + sum(value.nbytes for value in held if isinstance(value, torch.Tensor))
    )


def _sizes(trainer: L.Trainer, meter: Meter, gpu_nbytes: Sequence[int]) -> Rows:
    parameters = list(trainer.lightning_module.parameters())
    state = training_state_nbytes(trainer)
    yield "parameters", f"{sum(p.numel() for p in parameters) / 1e6:.1f} M", ""
    yield "model", format_nbytes(sum(p.nbytes for p in parameters)), ""
    yield "training state", format_nbytes(state), "weights, gradients, optimizer"
    if gpu_nbytes:
        ratio = f"training state is {state / sum(gpu_nbytes):.1f} times that"
        yield "memory of each GPU", format_nbytes(max(gpu_nbytes)), ""
        yield f"memory of {len(gpu_nbytes)} GPUs", format_nbytes(sum(gpu_nbytes)), ratio


def _plan(trainer: L.Trainer, meter: Meter, gpu_nbytes: Sequence[int]) -> Rows:
    statistics, plan = _statistics(trainer), getattr(trainer.strategy, "plan", None)
    if statistics is None:
        return
    if plan is not None:
        yield "mode", plan.mode, f"{plan.num_devices} GPUs"
        largest = format_nbytes(max(pack.nbytes for pack in plan.packs))
        yield "packs", str(statistics.num_packs), f"the largest has {largest} of weights"
    yield "microbatches per step", str(statistics.num_microbatches), ""
    for number, nbytes in enumerate(statistics.peak_device_bytes):
        share = f"{nbytes / gpu_nbytes[number]:.0%} of its memory" if number < len(gpu_nbytes) else ""
        yield f"peak of GPU {number}", format_nbytes(nbytes), share


def _traffic(trainer: L.Trainer, meter: Meter, gpu_nbytes: Sequence[int]) -> Rows:
    if _statistics(trainer) is None or not meter.steps:
        return
    for counter, name in _COUNTERS.items():
        nbytes, minimum = meter.mean_nbytes(counter), meter.mean_planned(counter)
        compared = f"{nbytes / minimum:.3f} times the plan's minimum, {format_nbytes(minimum)}" if minimum else ""
        yield f"{name} per step", format_nbytes(nbytes), compared


def _progress(trainer: L.Trainer, meter: Meter, gpu_nbytes: Sequence[int]) -> Rows:
    seconds = sum(step.seconds for step in meter.settled)
    if meter.steps:
        rate = sum(step.num_samples for step in meter.settled) / seconds
        yield "samples per second", f"{rate:.1f}", f"{seconds / len(meter.settled):.2f} s per step"
    for step, value in meter.curve:
        yield f"{meter.metric} after {step} steps", f"{value:.3f}", ""


def _statistics(trainer: L.Trainer) -> Any | None:
    statistics: Callable[[], Any] | None = getattr(trainer.strategy, "statistics", None)
    return statistics() if statistics is not None else None


def _counters(trainer: L.Trainer) -> Counter[str]:
    statistics = _statistics(trainer)
    return Counter({name: getattr(statistics, name, 0) for name in _COUNTERS})
