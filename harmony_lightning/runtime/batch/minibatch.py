"""Cuts a minibatch into microbatches; `rows` holds the rule, and says what can and cannot be cut.

Torch and numpy only: nothing here knows Lightning. Slices are views; they keep the minibatch's storage alive.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from harmony_lightning.config import LossWeight
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.runtime.batch.rows import Refusal, leading_sizes, num_samples, read_rows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Microbatches:
    """The parts of one minibatch, in order."""

    batches: tuple[Any, ...]
    num_samples: tuple[int, ...]
    """Rows of each microbatch; all 1 where the rows are unknown, which weighs the microbatches equally."""
    reason: str | None
    """Why there is a single microbatch although more were asked for."""


def loss_shares(loss_weight: LossWeight, parts: Microbatches) -> tuple[float, ...]:
    """What the loss of each microbatch counts in that of the minibatch; `HarmonyConfig.loss_weight` says by what.

    Raises:
        ConfigurationError: the user's function gives no usable numbers.
    """
    if loss_weight == "sum":
        return (1.0,) * len(parts.batches)
    if loss_weight == "mean":
        counts: list[float] = list(parts.num_samples)
    else:
        assert callable(loss_weight)
        counts = [float(loss_weight(batch)) for batch in parts.batches]
        if not all(0 <= count < math.inf for count in counts):
            raise ConfigurationError(f"loss_weight must give finite numbers of at least 0, got {counts}")
        if not any(counts):  # the loss is what the user's code makes of nothing, and what it adds to that
            counts = list(parts.num_samples)
    total = sum(counts)
    return tuple(count / total if total else 1 / len(counts) for count in counts)


def scale_without(shares: Sequence[float], is_missing: Sequence[bool]) -> float:
    """How much more the other losses count where some microbatches returned none: shares that add up to 1 still do."""
    kept = sum(share for share, missing in zip(shares, is_missing, strict=True) if not missing)
    is_sum = all(share == 1.0 for share in shares)
    return 1.0 if not any(is_missing) or not kept or is_sum else 1 / kept


def split_minibatch(
    batch: Any,
    microbatch_size: int,
    *,
    min_samples: int = 1,
    split: Callable[[Any, int], Sequence[Any]] | None = None,
) -> Microbatches:
    """Microbatches of `microbatch_size` rows; the last one holds the rest.

    Args:
        batch: what the dataloader gave, already on its device.
        microbatch_size: rows per microbatch.
        min_samples: the fewest rows a microbatch may have (batch norm needs 2). A shorter rest joins the microbatch before
            it, which is then larger than `microbatch_size`.
        split: the user's own `(batch, num_microbatches) -> microbatches`, used instead of the rules here. The number is a
            wish; where the rows of the batch are unknown it is guessed from the first tensor.

    Raises:
        ConfigurationError: a size below 1, or a `split` that returns no sequence of non-empty microbatches.
    """
    for knob, value in (("microbatch_size", microbatch_size), ("min_samples", min_samples)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{knob} must be a whole number of at least 1, got {value!r}")
    if batch is None:
        return Microbatches(batches=(batch,), num_samples=(1,), reason=None)
    microbatch_size = max(microbatch_size, min_samples)
    try:
        size, cut = read_rows(batch)
    except Refusal as refusal:
        if split is not None:
            guess = next(leading_sizes(batch), 2 * microbatch_size)
            return _split_by_user(batch, max(1, -(-guess // microbatch_size)), split)
        return Microbatches(batches=(batch,), num_samples=(1,), reason=str(refusal))
    if size <= 1 or microbatch_size >= size:
        return Microbatches(batches=(batch,), num_samples=(size,), reason=None)
    if split is not None:
        return _split_by_user(batch, -(-size // microbatch_size), split)

    counts = [microbatch_size] * (size // microbatch_size)
    if rest := size % microbatch_size:
        if rest < min_samples:
            counts[-1] += rest
        else:
            counts.append(rest)
    if len(counts) == 1:
        return Microbatches(batches=(batch,), num_samples=(size,), reason=None)
    starts = [sum(counts[:m]) for m in range(len(counts))]
    try:
        batches = tuple(cut(start, count) for start, count in zip(starts, counts, strict=True))
    except Exception as error:
        reason = f"a {type(batch).__name__} could not be cut: {type(error).__name__}: {error}"
        return Microbatches(batches=(batch,), num_samples=(size,), reason=reason)
    return Microbatches(batches=batches, num_samples=tuple(counts), reason=None)


def _split_by_user(batch: Any, num_microbatches: int, split: Callable[[Any, int], Sequence[Any]]) -> Microbatches:
    batches = split(batch, num_microbatches)
    if not isinstance(batches, Sequence) or isinstance(batches, str | bytes) or len(batches) == 0:
        found = "an empty one" if isinstance(batches, Sequence) and len(batches) == 0 else type(batches).__name__
        raise ConfigurationError(
            f"the user's split of a {type(batch).__name__} into {num_microbatches} must return a list or tuple of"
            f" microbatches, got {found}"
        )
    counts = [num_samples(part) for part in batches]
    if 0 in counts:
        raise ConfigurationError(
            f"the user's split gave an empty microbatch at position {counts.index(0)} (rows: {counts});"
            " return fewer microbatches instead"
        )
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        known = [1] * len(counts)
    return Microbatches(batches=tuple(batches), num_samples=tuple(known), reason=None)
