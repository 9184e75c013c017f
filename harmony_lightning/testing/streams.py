"""The random numbers of microbatches, for a plain run: without them, dropout could not be compared.

Under harmony a minibatch of M > 1 microbatches takes one number from torch's host generator, and each microbatch starts
streams of its own from it (`harmony_lightning.runtime.randomness`). Here plain Lightning is made to do the same:

    with plain_streams(module, num_microbatches=4):
        Trainer(accumulate_grad_batches=4).fit(module, microbatches)
"""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from lightning.pytorch import LightningModule

from harmony_lightning.runtime.randomness import HostState, draw_step_seed, microbatch_seed


@contextmanager
def plain_streams(module: LightningModule, num_microbatches: int) -> Iterator[None]:
    """Within, each `training_step` of the module draws what that microbatch draws under harmony.

    Between calls of `training_step` the process's own streams go on, less the one number per minibatch. Every minibatch
    must have `num_microbatches` microbatches. With one microbatch nothing is changed, as under harmony.
    """
    num_calls = 0
    step_seed = 0

    def on_own_streams(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls, step_seed
            microbatch = num_calls % num_microbatches
            num_calls += 1
            if microbatch == 0:
                step_seed = draw_step_seed()
            state = HostState.capture()
            seed_host(microbatch_seed(step_seed, microbatch))
            try:
                return step(*args, **kwargs)
            finally:
                state.restore()

        return training_step

    if num_microbatches == 1:
        yield
    else:
        with wrapped_training_step(module, on_own_streams):
            yield


def seed_host(seed: int) -> None:
    """Start torch's, Python's and NumPy's host generators from `seed`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def wrapped_training_step(
    module: LightningModule, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within, `module.training_step` is `wrap(module.training_step)`."""
    before = vars(module).get("training_step")
    module.training_step = wrap(module.training_step)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.training_step
        else:
            module.training_step = before  # type: ignore[method-assign]
