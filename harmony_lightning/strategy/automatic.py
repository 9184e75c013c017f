"""Profile and search: a plan that is faster than the one made from sizes alone, where one is found.

The user's step is run on a copy of the module (`profiler`), with its random numbers and warnings aside, so nothing of the
run is touched, whatever comes of it. Where the speed of devices is not known, where there is nothing to choose, or where
the step cannot be run aside, the plan made from sizes stays.
"""

import logging
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import _disable_current_modes

from harmony_lightning.config import HarmonyConfig
from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import ConfigurationError, in_one_line
from harmony_lightning.plan import Plan
from harmony_lightning.profiled import Planned, Question, find_plan, machine_of, profile, step_of
from harmony_lightning.profiler import Machine
from harmony_lightning.profiler.visits import Step
from harmony_lightning.runtime.batch.minibatch import split_minibatch
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.randomness import HostState
from harmony_lightning.strategy.trainer_aside import step_aside

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a plan is to be found for."""

    samples: int
    """In the minibatch; 0 if it cannot be cut."""
    min_samples: int
    """That a microbatch must have."""
    decomposition: Decomposition
    """What is known of the layers."""
    in_use: Plan
    """The plan made from sizes."""
    keeps_microbatches: bool
    """Mode and microbatch size are those of `in_use`."""
    keeps_places: bool
    """And so is where packs are updated, and whether one is dealt."""


class AutomaticPlan:
    """Finds plans for one run.

    Args:
        context: what is in force around the user's step.
        precision: its name.
        state_nbytes: as that of `Planning`.
        work_of_step: operations by which the optimizer steps a weight, and how often they access its bytes.
    """

    def __init__(
        self,
        engine: Engine,
        config: HarmonyConfig,
        context: Callable[[], AbstractContextManager[Any]],
        precision: str,
        state_nbytes: Callable[[], Mapping[str, tuple[int, ...]] | None] = lambda: None,
        work_of_step: Callable[[], tuple[float, float]] = lambda: (1.0, 0.0),
    ) -> None:
        self._engine = engine
        self._config = config
        self._context = context
        self._precision = precision
        self._state_nbytes, self._work_of_step = state_nbytes, work_of_step
        self._found: dict[Request, Planned | None] = {}
        self._has_warned = False

    @property
    def chooses_all(self) -> bool:
        """Microbatch size and mode, too."""
        return self._config.searches == "all"

    def find(self, request: Request, batch: Any, arguments: tuple[Any, ...]) -> Planned | None:
        """The plan for minibatches like this one; None, with a line in the log, where none can be found: a warning if that
        can be mended. The same request is answered once: a module may change to and fro with every step.

        Args:
            arguments: that follow the batch in `training_step`.
        """
        if request not in self._found:
            self._found[request] = self._find_aside(request, batch, arguments)
        return self._found[request]

    def _find_aside(self, request: Request, batch: Any, arguments: tuple[Any, ...]) -> Planned | None:
        reason, level = self._reason_against(request), logging.INFO
        try:
            machine = machine_of(self._engine.cluster) if reason is None else None
            if machine is not None:
                if self._config.update == "auto" and not request.keeps_places:
                    request = replace(request, decomposition=self._with_states(request.decomposition))
                step = step_aside(step_of(self._context, arguments), vars(self._engine.root).get("_trainer"))
                with self._aside():
                    return self._find(request, batch, step, machine)
            reason = reason or "nobody knows how fast these devices are"
        except (Exception, SystemExit) as error:  # whatever has gone wrong aside, the run goes on without it
            reason = in_one_line(error)
            if isinstance(error, ConfigurationError) and not self._has_warned:
                self._has_warned, level = True, logging.WARNING
        finally:
            self._engine.cluster.trim_device_memory()
        log.log(level, "harmony: the plan made from sizes stays: %s", reason)
        return None

    def _with_states(self, decomposition: Decomposition) -> Decomposition:
        """As it is, if devices must not update weights."""
        self._engine.settle()  # this looks at the optimizer's states
        states = self._state_nbytes()
        return decomposition if states is None else decomposition.with_states(states)

    def _reason_against(self, request: Request) -> str | None:
        if not request.samples:
            return "the minibatch cannot be cut"
        if not isinstance(vars(self._engine.root).get("training_step"), types.MethodType | None):
            return "training_step is a function that was put into the module, of which a copy knows nothing"
        if self._config.one_layer_per_pack or len(request.decomposition.layers) < 2:
            return "there is one layer in each pack"
        return None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Random numbers that are drawn within, what is warned of, and what modes would see, are nobody's business: an
        optimizer's step is around this, in which emulated GPUs watch all arithmetic, and the user may count it. Nor has
        the module itself a trainer meanwhile, to which functions that hold on to it could log."""
        devices = self._engine.cluster.devices
        trainers = [
            (inner, vars(inner)["_trainer"]) for inner in self._engine.root.modules() if "_trainer" in vars(inner)
        ]
        on_host, on_devices = HostState.capture(), [device.random_state() for device in devices]
        try:
            with (
                warnings.catch_warnings(),
                _disable_current_modes(),
                torch.autograd.set_detect_anomaly(False),
                self._engine.refusing(),
            ):
                warnings.simplefilter("ignore")
                for inner, _ in trainers:
                    vars(inner)["_trainer"] = None
                yield
        finally:
            for inner, trainer in trainers:
                vars(inner)["_trainer"] = trainer
            on_host.restore()
            for device, state in zip(devices, on_devices, strict=True):
                if state is not None:
                    device.set_random_state(state)

    def _find(self, request: Request, batch: Any, step: Step, machine: Machine) -> Planned:
        engine, config, in_use = self._engine, self._config, request.in_use
        samples, smallest = request.samples, min(request.min_samples, request.samples)
        size = config.microbatch_size if isinstance(config.microbatch_size, int) else None
        if request.keeps_microbatches:
            size = smallest = in_use.microbatch_size

        def batch_of(size: int) -> Any:
            return split_minibatch(batch, size, min_samples=smallest, split=config.split_batch).batches[0]

        measured, was_cached = profile(
            engine.root,
            request.decomposition,
            batch_of,
            step,
            engine.cluster,
            machine,
            largest=min(samples, size or samples),
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
        update = _update(config, request)
        is_open = not request.keeps_microbatches or (in_use.mode == "pp" and not request.keeps_places)
        operations, accesses = self._work_of_step() if update == "auto" else (1.0, 0.0)
        question = Question(
            minibatch=samples,
            memory_bytes=in_use.memory_bytes,
            mode=config.mode if is_open else in_use.mode,
            pipelines=in_use.pipelines if request.keeps_microbatches or config.pipelines != "auto" else None,
            deals=None if is_open else bool(in_use.dealt),
            microbatch_size=min(size, samples) if size else None,
            stashes=self._stashes(in_use),
            moves_stash=config.stash == "host",
            stays=True,
            update=update,
            update_operations=operations,
            update_accesses=accesses,
            microbatches_per_forward=in_use.microbatches_per_forward,
            planner=config.planner,
        )
        return find_plan(measured, machine, request.decomposition, question, in_use)

    def _stashes(self, in_use: Plan) -> tuple[Literal["device", "host"], ...]:
        if self.chooses_all and self._config.stash == "auto":
            return ("device", "host")
        return (in_use.stash,)


def _update(config: HarmonyConfig, request: Request) -> Literal["auto", "host", "first", "device"]:
    """As the user asked for it, where there was room and the optimizer may be moved."""
    if config.update == "auto":
        return "auto" if request.decomposition.knows_states and not request.keeps_places else "host"
    is_on_host = all(pack.update == "host" for pack in request.in_use.packs)
    return "host" if is_on_host else config.update
