"""`plan="auto"`: profile and search when the first minibatch of training is there.

The user's step is run on a copy of the module without numbers (`profiler`), so nothing of the run is touched,
whatever comes of it. Where the speed of devices is not known, or the step cannot be run aside, the plan made from sizes
alone stays.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from harmony_lightning.config import HarmonyConfig
from harmony_lightning.errors import CapacityError, UnsupportedError
from harmony_lightning.prepare import layers_of
from harmony_lightning.profiled import Planned, Question, find_plan, machine_of, profile, step_of
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.minibatch import split_minibatch
from harmony_lightning.runtime.rows import num_samples
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

SMALLER_SHARE = 0.8
"""Of the memory planned with so far, when a plan turned out to be too large."""


class AutomaticPlan:
    """Finds the plan of one run, and a smaller one once.

    Args:
        context: what is in force around the user's step.
        precision: its name.
    """

    def __init__(
        self, engine: Engine, config: HarmonyConfig, context: Callable[[], AbstractContextManager[Any]], precision: str
    ) -> None:
        self._engine = engine
        self._config = config
        self._context = context
        self._precision = precision
        self._share = 1.0

    def find(self, batch: Any, min_samples: int) -> Planned | None:
        """The plan for minibatches like this one; None, with a line in the log, where none can be found."""
        samples = num_samples(batch)
        machine = machine_of(self._engine.cluster)
        if machine is None:
            log.info("harmony: plan='auto' leaves the plan as it is: nobody knows how fast these devices are")
            return None
        if not samples:
            log.info("harmony: plan='auto' leaves the plan as it is: the minibatch cannot be cut")
            return None
        try:
            return self._find(batch, samples, min(min_samples, samples))
        except (UnsupportedError, CapacityError) as error:
            log.warning("harmony: plan='auto' leaves the plan as it is: %s", error)
            return None

    def shrink(self) -> None:
        """Plan with less memory from now on."""
        self._share = SMALLER_SHARE

    @property
    def has_shrunk(self) -> bool:
        return self._share < 1

    def _find(self, batch: Any, samples: int, smallest: int) -> Planned:
        engine, config = self._engine, self._config
        machine = machine_of(engine.cluster)
        assert machine is not None
        decomposition, memory_bytes = layers_of(engine.root, engine.cluster, config)
        given = config.microbatch_size if isinstance(config.microbatch_size, int) else None

        def batch_of(size: int) -> Any:
            return split_minibatch(batch, size, min_samples=smallest, split=config.split_batch).batches[0]

        measured, was_cached = profile(
            engine.root,
            decomposition,
            batch_of,
            step_of(self._context),
            engine.cluster,
            machine,
            largest=min(samples, given or samples),
            smallest=smallest,
            precision=self._precision,
        )
        log.info(
            "harmony profile: %d layers of %d kinds, microbatches of up to %d samples%s",
            measured.profile.num_layers,
            len(measured.profile.layer_kinds),
            measured.profile.microbatch_sizes.backward[-1],
            " (from the cache)" if was_cached else "",
        )
        stashes: tuple[Literal["device", "host"], ...] = ("device", "host")
        question = Question(
            minibatch=samples,
            memory_bytes=int(self._share * memory_bytes),
            mode="pp" if config.mode == "mixed" else config.mode,
            microbatch_size=min(given, samples) if given else None,
            stashes=stashes if config.stash == "auto" else (config.stash,),
        )
        if self._share < 1:
            log.warning("harmony: planning again with %s per GPU", format_nbytes(question.memory_bytes))
        return find_plan(measured, machine, decomposition, question)
