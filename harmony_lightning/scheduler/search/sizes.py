"""Which microbatch sizes a search tries."""

from typing import Literal

import numpy as np

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.scheduler.costs import Costs

MAX_SIZES = 8
"""Microbatch sizes that are tried per direction."""
MAX_MICROBATCHES = 1_000
"""Of a minibatch that is planned for: what a search takes grows with them, and so does what lies between two packs."""


def choose_sizes(costs: Costs, direction: Literal["forward", "backward"], samples: int) -> list[int]:
    """Microbatch sizes to try, ascending: those that cut the samples evenly, or all if no large one does.

    Raises:
        ConfigurationError: there are no samples, or far too many.
    """
    if samples < 1:
        raise ConfigurationError(f"the minibatch must have at least one sample, got {samples}")
    sizes_of = costs.profile.microbatch_sizes
    measured = getattr(sizes_of, direction)
    # Backward recomputes forward, which must have been profiled at that size too.
    most = min(measured[-1], sizes_of.forward[-1], samples)
    least = min(measured[0], most)
    if samples > MAX_MICROBATCHES * most:
        raise ConfigurationError(
            f"a minibatch of {samples} samples would be at least {-(-samples // most)} microbatches of up to {most}, and "
            f"what lies between packs grows with them; plan for at most {MAX_MICROBATCHES * most} samples, and "
            f"accumulate minibatches"
        )
    sizes = [size for size in range(least, most + 1) if samples % size == 0]
    if not sizes or 2 * sizes[-1] < most:
        sizes = list(range(least, most + 1))
    if len(sizes) <= MAX_SIZES:
        return sizes
    # The best one is mostly among the largest, of which none is left out.
    small, large = sizes[: -MAX_SIZES // 2], sizes[-MAX_SIZES // 2 :]
    wanted = np.geomspace(small[0], small[-1], MAX_SIZES // 2)
    return sorted({min(small, key=lambda size: (abs(np.log(size / one)), size)) for one in wanted}) + large
