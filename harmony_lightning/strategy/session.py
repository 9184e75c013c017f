"""What lives from set-up to teardown, and is around every step of a run."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torchmetrics import Metric

from harmony_lightning.config import HarmonyConfig
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.cuda import CudaCluster
from harmony_lightning.hardware.device import Cluster
from harmony_lightning.hardware.emulated import EmulatedCluster
from harmony_lightning.hardware.host import HostCluster
from harmony_lightning.observability.device_stats import AllDeviceStats
from harmony_lightning.observability.statistics import Statistics
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.batch.outputs import map_tensors
from harmony_lightning.runtime.between import Between
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.strategy import overrides, precision
from harmony_lightning.strategy.automatic import AutomaticPlan
from harmony_lightning.strategy.compiled import refuse_scripts, uncompiled_step, what_runs_eagerly
from harmony_lightning.strategy.materialise import materialise, skipped_init
from harmony_lightning.strategy.merged_log import direct_log
from harmony_lightning.strategy.merged_metrics import Aside, Twins, merged_metrics
from harmony_lightning.strategy.merged_profile import name_as_on_one_device, name_as_usual
from harmony_lightning.strategy.planning import Planning
from harmony_lightning.strategy.shared_passes import SharedPasses
from harmony_lightning.strategy.updates import Updates

log = logging.getLogger(__name__)


class Session:
    """The run: its engine, its plan, and what it has told the user."""

    _pl: Any
    """The Lightning package that the concrete class belongs to."""
    _update_properties: Any
    """That package's way to tell a module its device without moving it."""
    # Of Lightning's own strategy:
    lightning_module: Any
    precision_plugin: Any
    accelerator: Any
    optimizers: Any
    model: Any
    setup_optimizers: Callable[[Any], None]
    setup_precision_plugin: Callable[[], None]

    def __init__(
        self, config: HarmonyConfig, plan: Plan | None, cluster: EmulatedCluster | None, **lightning: Any
    ) -> None:
        super().__init__(**lightning)
        self._config = config
        self._emulated = cluster
        self._given_plan = plan
        self.parallel_devices: list[torch.device] | None = None
        self._cluster_environment: Any = None
        self._engine: Engine | None = None
        self._between: Between | None = None
        self._last_plan: Plan | None = None
        self._kept_plan: Plan | None = None
        """The plan that was found, or given: what goes into checkpoints, also those that are saved behind the run."""
        self._planning: Planning | None = None
        self._twins = Twins()
        self._shared_passes = SharedPasses(self._config.evaluation_batches)
        self._root_loss: torch.Tensor | None = None
        self._updates = Updates()
        self._told: set[str] = set()
        self._last_statistics = Statistics(**dict.fromkeys(_COUNTS, 0), peak_device_bytes=())

    @property
    def root_device(self) -> torch.device:
        """Where the user's own new tensors go: the first GPU; the host where GPUs are emulated."""
        if self._emulated is None and self.parallel_devices:
            return self.parallel_devices[0]
        return torch.device("cpu")

    @property
    def plan(self) -> Plan | None:
        """The plan in use; None before set-up."""
        return self._engine.plan if self._engine is not None and self._engine.is_loaded else self._last_plan

    def statistics(self) -> Statistics:
        """Exact counts since the last `fit`, `validate`, `test` or `predict` was set up; readable after it too."""
        if self._engine is None:
            return self._last_statistics
        counters, plan = self._engine.counters, self.plan
        self._last_statistics = Statistics(
            steps=counters.steps,
            num_microbatches=plan.num_microbatches if plan is not None else 0,
            num_packs=len(plan.packs) if plan is not None else 0,
            swap_in_bytes=counters.swap_in_bytes,
            swap_out_bytes=counters.swap_out_bytes,
            p2p_bytes=counters.p2p_bytes,
            stash_in_bytes=counters.stash_in_bytes,
            stash_out_bytes=counters.stash_out_bytes,
            unplaced_stashes=counters.unplaced_stashes,
            input_bytes=counters.input_bytes,
            joint_forwards=counters.joint_forwards,
            out_of_turn=counters.out_of_turn,
            short_of_memory=counters.short_of_memory,
            updates_just_in_time=counters.updates_just_in_time,
            updates_whole=counters.updates_whole,
            updates_on_devices=counters.updates_on_devices,
            peak_device_bytes=tuple(device.peak_bytes() for device in self._engine.cluster.devices),
        )
        return self._last_statistics

    # Set-up and teardown --------------------------------------------------------------------------------------------

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Modules are built on the host, where their masters stay."""
        with self._host_as_root(), super().tensor_init_context(empty_init), skipped_init(bool(empty_init)):  # type: ignore[misc]
            yield

    @contextmanager
    def _host_as_root(self) -> Iterator[None]:
        devices, self.parallel_devices = self.parallel_devices, None
        try:
            yield
        finally:
            self.parallel_devices = devices

    def setup_environment(self) -> None:
        if self.root_device.type not in ("cpu", "cuda"):
            raise ConfigurationError(
                f"strategy='harmony' trains on CUDA GPUs, emulated GPUs or the host, not on {self.root_device}; pass "
                f"accelerator='cpu' or 'cuda'"
            )
        accelerators = self._pl.accelerators
        if self._emulated is not None and isinstance(
            self.accelerator, accelerators.CUDAAccelerator | accelerators.MPSAccelerator
        ):
            self._tell_once("GPUs are emulated in the host's memory; the accelerator that was found is left alone")
            self.accelerator = accelerators.CPUAccelerator()
            precision.move_to_host(self.precision_plugin)
        super().setup_environment()  # type: ignore[misc]
        module = self.lightning_module
        if overrides.copies_at_setup(module.trainer.callbacks, self._pl):
            materialise(module)  # though a checkpoint may bring other values: a copy of none stays without

    def setup(self, trainer: Any) -> None:
        """Layers and plan are made with the first batch, when its size is known; what can fail fails here."""
        self._close_engine()
        precision.check_plugin(self.precision_plugin)
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        materialise(self.model)
        self.model_to_device()
        cluster, module = self._cluster(), self.lightning_module
        trains = trainer.state.fn == "fit" and module.automatic_optimization
        refuse_scripts(self.model, on_host=cluster.host_is_device, trains=trains)
        self._engine = Engine(self.model, cluster)
        if not self._engine.cluster.host_is_device:
            accelerator: Any = self.accelerator
            accelerator.get_device_stats = AllDeviceStats(accelerator.get_device_stats, self._engine.cluster.devices)
        if (text := what_runs_eagerly(self.lightning_module, self._emulated is not None)) is not None:
            self._tell_once(text)
        for device in self._engine.cluster.devices:
            device.reset_peak()
        if not self._engine.cluster.host_is_device:
            self._between = Between(self._engine.cluster, self.root_device, self._engine.notice_between)
            self._between.enter()
        self._last_plan = self._kept_plan = None
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        precision.keep_scaler_on_host(getattr(self.precision_plugin, "scaler", None))
        with self._in_step():  # thousands of small operations, none of the user's
            if trainer.state.fn == "fit" and self.lightning_module.automatic_optimization:
                for optimizer in self.optimizers:
                    self._updates.probe(optimizer)
            automatic = self._automatic_plan(self._engine)
            self._planning = Planning(self._engine, self._config, self._given_plan, self._state_nbytes, automatic)
        name_as_on_one_device(trainer.profiler)

    def _state_nbytes(self) -> dict[str, tuple[int, ...]] | None:
        """By weight, what the optimizer will remember; None if devices are not to update any."""
        module = self.lightning_module
        if self._require_engine().cluster.host_is_device or module.trainer.state.fn != "fit":
            return None
        is_asked = self._config.update in ("device", "first")
        return self._updates.state_nbytes(self.optimizers, module, self.precision_plugin, self._pl, is_asked=is_asked)

    def _automatic_plan(self, engine: Engine) -> AutomaticPlan | None:
        if self._config.searches == "nothing" or engine.cluster.host_is_device:
            return None
        plugin = self.precision_plugin
        return AutomaticPlan(
            engine,
            self._config,
            plugin.train_step_context,
            str(plugin.precision),
            self._state_nbytes,
            lambda: self._updates.work_of_step(self.optimizers),
        )

    def _cluster(self) -> Cluster:
        if self._emulated is not None:
            return self._emulated
        if self.root_device.type == "cuda":
            assert self.parallel_devices is not None
            return CudaCluster(self.parallel_devices, self._config.memory_bytes)
        return HostCluster()

    def model_to_device(self) -> None:
        """Masters stay on the host; only what the module says about itself changes, and metrics move."""
        model = self.model
        if self.root_device.type != "cpu":
            self._update_properties(model, device=self.root_device)
            for module in model.modules():
                if isinstance(module, Metric):
                    module.to(self.root_device)

    def _require_engine(self) -> Engine:
        if self._engine is None:
            raise ConfigurationError("the strategy is not set up; that happens in fit, validate, test or predict")
        return self._engine

    def _metrics(self) -> list[Metric]:
        return self._planning.metrics if self._planning is not None else []

    def _in_step(self) -> AbstractContextManager[None]:
        return self._between.suspended() if self._between is not None else nullcontext()

    def _close_engine(self) -> None:
        if self._between is not None:
            self._between.leave()
            self._between = None
        if self._engine is not None:
            self.statistics()
            self._last_plan = self.plan
            self._engine.close()
            self._engine = None
            self._planning = None
            self._twins = Twins()
            self._shared_passes = SharedPasses(self._config.evaluation_batches)
            vars(self.accelerator).pop("get_device_stats", None)
            precision.restore_backward(self.precision_plugin)
        self._root_loss = None

    def on_exception(self, exception: BaseException) -> None:
        if self._engine is not None:
            self._engine.abort()
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> None:
        self._close_engine()
        module: Any = self.lightning_module
        if module is not None and module._trainer is not None:
            name_as_usual(module._trainer.profiler)
        if module is not None and any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            self._lightning_module = None  # set-up has failed; what has no values cannot be moved to the host
        try:
            super().teardown()  # type: ignore[misc]
        finally:
            self._lightning_module = module

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {
            **state,
            "_engine": None,
            "_between": None,
            "_root_loss": None,
            "_planning": None,
            "_twins": Twins(),
            "_shared_passes": SharedPasses(self._config.evaluation_batches),
            "_updates": Updates(),
        }

    # Around every step ------------------------------------------------------------------------------------------------

    def _bring(self, batch: Any, device: torch.device | None, dataloader_idx: int) -> Any:
        host = torch.device("cpu")
        if overrides.expects_batch_on_device(self.lightning_module, self._pl):
            host = device or self.root_device
        return super().batch_to_device(batch, host, dataloader_idx)  # type: ignore[misc]

    @contextmanager
    def _around_step(
        self,
        context: str,
        logging: AbstractContextManager[Any],
        num_microbatches: int = 1,
        aside: Aside | None = None,
    ) -> Iterator[Any]:
        """What is in force while the user's step runs. What is logged is replayed within the context of the precision, in
        which the user logged it. Metrics compute within `aside`."""
        twins = self._twins if num_microbatches > 1 else None
        with (
            self._in_step(),
            getattr(self.precision_plugin, context)(),
            logging as merged,
            uncompiled_step(self.lightning_module),
            merged_metrics(self._metrics(), aside or self._require_engine().aside, twins),
        ):
            yield merged

    def _run_in_one_piece(self, loop: Any, context: str, step: Callable[..., Any], *args: Any) -> Any:
        engine = self._engine
        if engine is None:  # called outside of a run: everything is on the host
            with getattr(self.precision_plugin, context)():
                return step(*args)
        log_context = direct_log(loop, self._to_root, engine.aside) if loop is not None else nullcontext()
        with self._around_step(context, log_context):
            return map_tensors(self._to_root, engine.run(lambda: step(*args), trains=context == "train_step_context"))

    def _to_root(self, tensor: torch.Tensor) -> torch.Tensor:
        """Results leave the step on the root device, wherever the plan has computed them."""
        engine = self._require_engine()
        if tensor.device == self.root_device or not engine.state.is_device(tensor.device):
            return tensor
        with torch._C.DisableTorchFunction():
            return engine.cluster.result(tensor, self.root_device)

    def _tell_once(self, text: str) -> None:
        without_sizes = re.sub(r"\d+", "", text)
        if without_sizes not in self._told:
            self._told.add(without_sizes)
            log.warning("harmony: %s", text)


_COUNTS = tuple(name for name in Statistics.__dataclass_fields__ if name != "peak_device_bytes")
