"""`HarmonyStrategy`: each hook of Lightning's Strategy is one call into a room.

The code is free of Lightning imports: `lightning` and `pytorch_lightning` are two packages with separate classes, and
`harmony_lightning.lightning` and `harmony_lightning.pytorch_lightning` each derive this mixin with their own
`SingleDeviceStrategy`. That base makes one process with world size 1; all GPUs reach it through `parallel_devices`.
"""

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from harmony_lightning.config import Environment, HarmonyConfig, LossWeight, SplitBatch
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.emulated import EmulatedCluster
from harmony_lightning.plan import Plan
from harmony_lightning.plan.timeline import Span, Timeline
from harmony_lightning.strategy.evaluation import Evaluation
from harmony_lightning.strategy.materialise import materialise
from harmony_lightning.strategy.one_task import check_one_task
from harmony_lightning.strategy.training import Training

log = logging.getLogger(__name__)

_SEARCHES: dict[str, Literal["packs", "all", "nothing"]] = {"auto": "all", "packs": "packs", "sizes": "nothing"}
"""By the argument `plan`; anything else is a plan."""


_OF_LIGHTNING = {"device", "accelerator", "checkpoint_io", "precision_plugin"}
"""Arguments of Lightning's `SingleDeviceStrategy`."""


class HarmonyMixin(Training, Evaluation):
    """Trains a module whose weights, gradients, optimizer states and activations exceed the memory of all GPUs.

    Results equal those of one device that accumulates over the same microbatches.
    """

    def __init__(
        self,
        *,
        mode: Literal["auto", "pp", "dp", "mixed"] | None = None,
        pipelines: int | Literal["auto"] | None = None,
        microbatch_size: int | Literal["auto"] | None = None,
        microbatches_per_forward: int | None = None,
        memory: str | int | None = None,
        stash: Literal["auto", "device", "host"] | None = None,
        update: Literal["auto", "host", "device", "first"] | None = None,
        one_layer_per_pack: bool | None = None,
        layers: Sequence[str | type] = (),
        split_batch: SplitBatch | None = None,
        loss_weight: LossWeight = "mean",
        check_microbatches: bool | None = None,
        evaluation_batches: int | None = None,
        gradient_wire: Literal["exact", "half"] | None = None,
        planner: Literal["bounds", "genetic"] | None = None,
        plan: Plan | str | Path | None = None,
        cluster: EmulatedCluster | None = None,
        **lightning: Any,
    ) -> None:
        """Arguments are the fields of `HarmonyConfig`, and:

        Args:
            plan: a plan, or a file that holds one in JSON. "auto", the default: before the first step the module is
                profiled, and the fastest plan searched: packs, and microbatch size, mode and pipelines where these are
                "auto". "packs":
                the first step runs under a plan made from sizes alone; then packs alone are searched, so that results are
                the same on GPUs of any speed and memory. "sizes": no search.
            cluster: emulated GPUs to train on instead of the Trainer's devices.
            lightning: for Lightning's own `SingleDeviceStrategy`: accelerator, checkpoint_io, precision_plugin.

        Raises:
            ConfigurationError: a knob has an impossible value.
        """
        if unknown := sorted(set(lightning) - _OF_LIGHTNING):
            known = [
                name
                for name in inspect.signature(HarmonyMixin.__init__).parameters
                if name not in ("self", "lightning")
            ]
            raise TypeError(f"HarmonyStrategy has no argument {unknown[0]!r}; it has {', '.join(known)}")
        environment = Environment.read()
        if environment.log_level is not None:
            _log_to_stderr(environment.log_level)
        given = {
            "mode": mode,
            "pipelines": pipelines,
            "microbatch_size": microbatch_size,
            "microbatches_per_forward": microbatches_per_forward,
            "memory": memory,
            "stash": stash,
            "update": update,
            "one_layer_per_pack": one_layer_per_pack,
            "check_microbatches": check_microbatches,
            "evaluation_batches": evaluation_batches,
            "gradient_wire": gradient_wire,
            "planner": planner,
        }
        knobs = environment.knobs() | {name: value for name, value in given.items() if value is not None}
        plan = plan if plan is not None else environment.plan or "auto"
        searches = _SEARCHES.get(plan) if isinstance(plan, str) else None
        config = HarmonyConfig(
            **knobs,
            layers=tuple(_as_sequence(layers)),
            split_batch=split_batch,
            searches=searches or "nothing",
            loss_weight=loss_weight,
        )
        if cluster is None and environment.emulated_gpus is not None:
            cluster = EmulatedCluster(environment.emulated_gpus, config.memory_bytes or "64MiB", strict=False)
        if cluster is not None and not isinstance(cluster, EmulatedCluster):
            raise ConfigurationError(f"cluster must be an EmulatedCluster, got {cluster!r}")
        given_plan = None
        if searches is None:
            given_plan = plan if isinstance(plan, Plan) else _read_plan(plan)
        super().__init__(config, given_plan, cluster, **lightning)

    # What Lightning and users read --------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        return 1

    @num_nodes.setter
    def num_nodes(self, value: int) -> None:
        if value != 1:
            raise ConfigurationError(f"strategy='harmony' trains on one server, got num_nodes={value}")

    @property
    def cluster_environment(self) -> Any:
        """Who started this process; Lightning sets it when the Trainer is made."""
        return self._cluster_environment

    @cluster_environment.setter
    def cluster_environment(self, environment: Any) -> None:
        check_one_task(environment)
        self._cluster_environment = environment

    def timeline(self) -> Timeline:
        """What every lane did and when, by the virtual clock of an emulated cluster.

        Raises:
            ConfigurationError: there is no emulated cluster, or it has no preset.
        """
        if self._emulated is None:
            raise ConfigurationError(
                "only emulated GPUs have a timeline: HarmonyStrategy(cluster=EmulatedCluster(...))"
            )
        return Timeline(spans=tuple(Span(**activity._asdict()) for activity in self._emulated.activities()))

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """In the order of the parameters, though packs were first updated from the last to the first."""
        if self._engine is not None:
            self._engine.settle()
            self._engine.rest.bring_home()
        state: dict[str, Any] = super().optimizer_state(optimizer)  # type: ignore[misc]
        if isinstance(state.get("state"), dict):
            positions = [parameter for group in state.get("param_groups", ()) for parameter in group["params"]]
            entries = state["state"]
            ordered = {key: entries[key] for key in positions if key in entries}
            state["state"] = ordered | entries
        return state

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """What the checkpoint brings needs no other values first."""
        materialise(self.lightning_module, frozenset(checkpoint["state_dict"]))
        super().load_model_state_dict(checkpoint, strict=strict)  # type: ignore[misc]

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Optimizer states live on the host, beside the masters."""
        with self._host_as_root():
            super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]


def _log_to_stderr(level: str) -> None:
    """The package's own messages from this level up, once each, whatever the program does with its own."""
    package = logging.getLogger("harmony_lightning")
    package.setLevel(level)
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
        package.propagate = False


def _read_plan(path: str | Path) -> Plan:
    must = "plan must be a Plan, 'auto', 'packs', 'sizes' or a file that holds one"
    if not isinstance(path, str | Path):
        raise ConfigurationError(f"{must}, got {path!r}")
    try:
        return Plan.from_json(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{must}: {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _as_sequence(layers: Any) -> Sequence[Any]:
    """A single name or class may stand alone."""
    return layers if not isinstance(layers, str | type) else (layers,)
