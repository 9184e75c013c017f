"""One training run twice: plain Lightning on one device, and harmony; and what differs between the two.

The plain run accumulates over the very microbatches that harmony cuts, on the same random streams, so most modules come
out equal to the bit. Where the order of additions differs (tied weights, dp), the largest relative difference is told.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.emulated import EmulatedCluster
from harmony_lightning.lightning import HarmonyStrategy
from harmony_lightning.observability.statistics import Statistics
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.batch.minibatch import split_minibatch
from harmony_lightning.testing.streams import plain_streams, seed_host, wrapped_training_step

MakeModule = Callable[[], LightningModule]
"""Called once per run, on the same random streams each time."""


SMALLEST_SCALE = 1e-3
"""Smaller tensors differ relative to this: a bias whose gradient is zero but for rounding holds nothing but rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one training run left behind."""

    losses: tuple[float, ...]
    """Of each `training_step`, in the order in which they began: microbatch after microbatch."""
    weights: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    statistics: Statistics | None = None
    """None for a plain run."""
    plan: Plan | None = None
    """None for a plain run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs of the same module."""

    expected: Run
    actual: Run

    @property
    def differences(self) -> dict[str, float]:
        """Relative difference of each loss, weight and buffer that is not equal to the bit, largest first.

        A tensor's is its largest absolute difference over its largest absolute value (`SMALLEST_SCALE` at least);
        infinite where only one run has the tensor, or where shapes, types or non-finite values differ.
        """
        expected, actual = _tensors(self.expected), _tensors(self.actual)
        found = {
            name: relative_difference(expected.get(name), actual.get(name))
            for name in dict.fromkeys((*expected, *actual))
        }
        return dict(sorted(((n, d) for n, d in found.items() if d > 0), key=lambda item: (-item[1], item[0])))

    @property
    def max_relative_difference(self) -> float:
        return max(self.differences.values(), default=0.0)

    @property
    def is_equal(self) -> bool:
        """To the bit."""
        return not self.differences

    def __str__(self) -> str:
        if self.is_equal:
            return "equal to the bit"
        worst = list(self.differences.items())
        named = ", ".join(f"{name} by {difference:.2g}" for name, difference in worst[:6])
        return f"{len(worst)} of {len(_tensors(self.expected))} differ, relatively: {named}"


def compare_with_one_device(
    make_module: MakeModule,
    batches: Sequence[Any],
    microbatch_size: int,
    *,
    cluster: EmulatedCluster,
    mode: Literal["pp", "dp", "mixed"] = "pp",
    seed: int = 0,
    precision: str = "32-true",
    **strategy: Any,
) -> Comparison:
    """Train on each of these minibatches once, plainly and under harmony.

    Args:
        make_module: builds the module.
        batches: one minibatch per step.
        microbatch_size: samples; must divide the minibatches, as accumulation counts microbatches alike.
        cluster: emulated GPUs for harmony.
        mode: deal packs, microbatches, or both (`HarmonyConfig.mode`).
        seed: of both runs.
        precision: of both Trainers.
        strategy: further arguments of `HarmonyStrategy`.
    """
    return Comparison(
        expected=train_plain(make_module, batches, microbatch_size, seed=seed, precision=precision),
        actual=train_harmony(
            make_module,
            batches,
            microbatch_size,
            cluster=cluster,
            mode=mode,
            seed=seed,
            precision=precision,
            **strategy,
        ),
    )


def train_plain(
    make_module: MakeModule,
    batches: Sequence[Any],
    microbatch_size: int,
    *,
    seed: int = 0,
    precision: str = "32-true",
) -> Run:
    """Plain Lightning on the host, accumulating over the microbatches of each minibatch.

    Raises:
        ConfigurationError: minibatches have different numbers of microbatches, or microbatches unequal sizes.
    """
    parts = [split_minibatch(batch, microbatch_size) for batch in batches]
    sizes = {part.num_samples for part in parts}
    if len({len(counts) for counts in sizes}) != 1 or any(len(set(counts)) != 1 for counts in sizes):
        raise ConfigurationError(
            f"plain Lightning accumulates over equally many microbatches of equal size, got {sorted(sizes)} samples; "
            f"choose a microbatch_size that divides the minibatches"
        )
    num_microbatches = len(parts[0].batches)
    module = _make(make_module, seed)
    with plain_streams(module, num_microbatches):
        microbatches = [batch for part in parts for batch in part.batches]
        return _fit(module, microbatches, accumulate_grad_batches=num_microbatches, precision=precision)


def train_harmony(
    make_module: MakeModule,
    batches: Sequence[Any],
    microbatch_size: int,
    *,
    cluster: EmulatedCluster,
    mode: Literal["pp", "dp", "mixed"] = "pp",
    seed: int = 0,
    precision: str = "32-true",
    **strategy: Any,
) -> Run:
    """Lightning with `HarmonyStrategy` on emulated GPUs. Arguments as in `compare_with_one_device`."""
    module = _make(make_module, seed)
    harmony = HarmonyStrategy(cluster=cluster, mode=mode, microbatch_size=microbatch_size, **strategy)
    run = _fit(module, batches, strategy=harmony, precision=precision)
    return replace(run, statistics=harmony.statistics(), plan=harmony.plan)


def relative_difference(expected: torch.Tensor | None, actual: torch.Tensor | None) -> float:
    """See `Comparison.differences`; 0 if and only if both have the same type, shape and values (NaN equals NaN)."""
    if expected is None or actual is None or (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
        return math.inf
    expected, actual = expected.to_dense(), actual.to_dense()  # of those that are sparse
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(wide), actual.to(wide)
    if torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)) and torch.equal(a.isnan(), b.isnan()):
        return 0.0
    difference = float((a - b).abs().max() / a.abs().max().clamp(min=SMALLEST_SCALE))  # NaN where a value is not finite
    return difference if difference == difference else math.inf


def _make(make_module: MakeModule, seed: int) -> LightningModule:
    """Build the module, and leave the streams where training starts, however much building has drawn."""
    seed_host(seed)
    module = make_module()
    seed_host(seed + 1)
    return module


def _fit(module: LightningModule, batches: Sequence[Any], **arguments: Any) -> Run:
    """Train on each of the batches once, with these arguments of the Trainer."""
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    with _recorded_losses(module) as losses:
        trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=_as_it_is))  # type: ignore[arg-type]
    return Run(
        losses=tuple(losses), weights=_copies(module.named_parameters()), buffers=_copies(module.named_buffers())
    )


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _recorded_losses(module: LightningModule) -> Iterator[list[float]]:
    """Losses that `training_step` returns, each at the place of its beginning: microbatches may overtake each other."""
    losses: list[float] = []

    def recorded(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            place = len(losses)
            losses.append(math.nan)
            result = step(*args, **kwargs)
            loss = result["loss"] if isinstance(result, Mapping) else result
            losses[place] = float(loss.detach())
            return result

        return training_step

    with wrapped_training_step(module, recorded):
        yield losses


def _copies(named: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    losses = {f"loss {index}": torch.tensor(loss, dtype=torch.float64) for index, loss in enumerate(run.losses)}
    return {**losses, **run.weights, **run.buffers}
