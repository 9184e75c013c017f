"""`HarmonyStrategy`: each hook of Lightning's Strategy is one call into a room.

The code is free of Lightning imports: `lightning` and `pytorch_lightning` are two packages with separate classes, and
`harmony_lightning.lightning` and `harmony_lightning.pytorch_lightning` each derive this mixin with their own
`SingleDeviceStrategy`. That base makes one process with world size 1; all GPUs reach it through `parallel_devices`.
"""

import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torchmetrics import Metric

from harmony_lightning.config import Environment, HarmonyConfig, LossWeight, SplitBatch
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.cuda import CudaCluster
from harmony_lightning.hardware.device import Cluster
from harmony_lightning.hardware.emulated import EmulatedCluster
from harmony_lightning.hardware.host import HostCluster
from harmony_lightning.observability.device_stats import AllDeviceStats
from harmony_lightning.observability.statistics import Statistics
from harmony_lightning.plan import Plan
from harmony_lightning.plan.timeline import Span, Timeline
from harmony_lightning.runtime.between import Between
from harmony_lightning.runtime.derivatives import Uncuttable
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.minibatch import Microbatches, loss_shares, scale_without
from harmony_lightning.runtime.outputs import loss_of, map_tensors, merge_outputs, with_loss
from harmony_lightning.strategy import overrides, precision
from harmony_lightning.strategy.compiled import uncompiled_step, what_runs_eagerly
from harmony_lightning.strategy.materialise import materialise, skipped_init
from harmony_lightning.strategy.merged_log import Losses, direct_log, held_log, merged_log, unlogged
from harmony_lightning.strategy.merged_metrics import Aside, Twins, merged_metrics
from harmony_lightning.strategy.merged_profile import merged_profile, name_as_on_one_device, name_as_usual
from harmony_lightning.strategy.microbatch_check import compare_losses, losses_of_pieces, untouched
from harmony_lightning.strategy.one_task import check_one_task
from harmony_lightning.strategy.planning import Planning
from harmony_lightning.strategy.shared_passes import SharedPasses
from harmony_lightning.strategy.updates import Updates

log = logging.getLogger(__name__)


class HarmonyMixin:
    """Trains a module whose weights, gradients, optimizer states and activations exceed the memory of all GPUs.

    Results equal those of one device that accumulates over the same microbatches.
    """

    _pl: Any
    """The Lightning package that the concrete class belongs to."""
    _update_properties: Any
    """That package's way to tell a module its device without moving it."""

    def __init__(
        self,
        *,
        mode: Literal["auto", "pp", "dp"] | None = None,
        microbatch_size: int | Literal["auto"] | None = None,
        memory: str | int | None = None,
        stash: Literal["auto", "device", "host"] | None = None,
        one_layer_per_pack: bool | None = None,
        layers: Sequence[str | type] = (),
        split_batch: SplitBatch | None = None,
        loss_weight: LossWeight = "mean",
        check_microbatches: bool | None = None,
        evaluation_batches: int | None = None,
        plan: Plan | str | Path | None = None,
        cluster: EmulatedCluster | None = None,
        **lightning: Any,
    ) -> None:
        """Arguments are the fields of `HarmonyConfig`, and:

        Args:
            plan: a plan, or a file that holds one in JSON; None makes one.
            cluster: emulated GPUs to train on instead of the Trainer's devices.
            lightning: for Lightning's own `SingleDeviceStrategy`: accelerator, checkpoint_io, precision_plugin.

        Raises:
            ConfigurationError: a knob has an impossible value.
        """
        super().__init__(**lightning)
        environment = Environment.read()
        if environment.log_level is not None:
            _log_to_stderr(environment.log_level)
        given = {
            "mode": mode,
            "microbatch_size": microbatch_size,
            "memory": memory,
            "stash": stash,
            "one_layer_per_pack": one_layer_per_pack,
            "check_microbatches": check_microbatches,
            "evaluation_batches": evaluation_batches,
        }
        knobs = environment.knobs() | {name: value for name, value in given.items() if value is not None}
        self._config = HarmonyConfig(
            **knobs, layers=tuple(_as_sequence(layers)), split_batch=split_batch, loss_weight=loss_weight
        )
        if cluster is None and environment.emulated_gpus is not None:
            cluster = EmulatedCluster(environment.emulated_gpus, self._config.memory_bytes or "64MiB")
        if cluster is not None and not isinstance(cluster, EmulatedCluster):
            raise ConfigurationError(f"cluster must be an EmulatedCluster, got {cluster!r}")
        self._emulated = cluster
        self._given_plan = plan if plan is None or isinstance(plan, Plan) else Plan.from_json(Path(plan).read_text())
        self.parallel_devices: list[torch.device] | None = None
        self._cluster_environment: Any = None
        self._engine: Engine | None = None
        self._between: Between | None = None
        self._last_plan: Plan | None = None
        self._planning: Planning | None = None
        self._is_uncuttable = False
        """Whether user code was seen to take derivatives across layers."""
        self._twins = Twins()
        self._shared_passes = SharedPasses(self._config.evaluation_batches)
        self._is_checked = False
        """Whether the losses of a minibatch and of its microbatches were compared."""
        self._loss_scale = 1.0
        """What the loss counts more because microbatches returned none."""
        self._root_loss: torch.Tensor | None = None
        self._updates = Updates()
        self._told: set[str] = set()
        self._last_statistics = Statistics(**dict.fromkeys(_COUNTS, 0), peak_device_bytes=())

    # What Lightning and users read --------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        """Where the user's own new tensors go: the first GPU; the host where GPUs are emulated."""
        if self._emulated is None and self.parallel_devices:
            return self.parallel_devices[0]
        return torch.device("cpu")

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
            input_bytes=counters.input_bytes,
            updates_just_in_time=counters.updates_just_in_time,
            updates_whole=counters.updates_whole,
            updates_on_devices=counters.updates_on_devices,
            peak_device_bytes=tuple(device.peak_bytes() for device in self._engine.cluster.devices),
        )
        return self._last_statistics

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
        super().setup_environment()  # type: ignore[misc]
        module = self.lightning_module  # type: ignore[attr-defined]
        if overrides.copies_at_setup(module.trainer.callbacks, self._pl):
            materialise(module)  # though a checkpoint may bring other values: a copy of none stays without

    def setup(self, trainer: Any) -> None:
        """Layers and plan are made with the first batch, when its size is known; what can fail fails here."""
        self._close_engine()
        precision.check_plugin(self.precision_plugin)  # type: ignore[attr-defined]
        self.accelerator.setup(trainer)  # type: ignore[attr-defined]
        self.model = self.precision_plugin.convert_module(self.model)  # type: ignore[attr-defined,has-type]
        materialise(self.model)
        self.model_to_device()
        self._engine = Engine(self.model, self._cluster())
        if not self._engine.cluster.host_is_device:
            accelerator: Any = self.accelerator  # type: ignore[attr-defined]
            accelerator.get_device_stats = AllDeviceStats(accelerator.get_device_stats, self._engine.cluster.devices)
        if (text := what_runs_eagerly(self.lightning_module, self._emulated is not None)) is not None:  # type: ignore[attr-defined]
            self._tell_once(text)
        for device in self._engine.cluster.devices:
            device.reset_peak()
        if not self._engine.cluster.host_is_device:
            self._between = Between(self._engine.cluster, self.root_device, self._engine.notice)
            self._between.enter()
        self._last_plan = None
        self._is_uncuttable = False
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)  # type: ignore[attr-defined]
            if self.lightning_module.automatic_optimization:  # type: ignore[attr-defined]
                for optimizer in self.optimizers:  # type: ignore[attr-defined]
                    self._updates.probe(optimizer)
        self.setup_precision_plugin()  # type: ignore[attr-defined]
        precision.keep_scaler_on_host(getattr(self.precision_plugin, "scaler", None))  # type: ignore[attr-defined]
        self._planning = Planning(self._engine, self._config, self._given_plan)
        precision.extend_backward(self.precision_plugin, self._backward)  # type: ignore[attr-defined]
        name_as_on_one_device(trainer.profiler)

    def _cluster(self) -> Cluster:
        if self._emulated is not None:
            return self._emulated
        if self.root_device.type == "cuda":
            assert self.parallel_devices is not None
            return CudaCluster(self.parallel_devices, self._config.memory_bytes)
        return HostCluster()

    def model_to_device(self) -> None:
        """Masters stay on the host; only what the module says about itself changes, and metrics move."""
        model = self.model  # type: ignore[has-type]
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
            vars(self.accelerator).pop("get_device_stats", None)  # type: ignore[attr-defined]
            precision.restore_backward(self.precision_plugin)  # type: ignore[attr-defined]
        self._root_loss = None

    def on_exception(self, exception: BaseException) -> None:
        if self._engine is not None:
            self._engine.abort()
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> None:
        self._close_engine()
        module: Any = self.lightning_module  # type: ignore[attr-defined]
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

    # Batches and steps ------------------------------------------------------------------------------------------------

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """The minibatch stays on the host, from where each microbatch takes its part to the GPU that needs it, unless
        the user's own transfer hooks expect to see it on a GPU."""
        return self._shared_passes.brought(lambda: self._bring(batch, device, dataloader_idx))

    def _bring(self, batch: Any, device: torch.device | None, dataloader_idx: int) -> Any:
        host = torch.device("cpu")
        if overrides.expects_batch_on_device(self.lightning_module, self._pl):  # type: ignore[attr-defined]
            host = device or self.root_device
        return super().batch_to_device(batch, host, dataloader_idx)  # type: ignore[misc]

    def training_step(self, batch: Any, *args: Any) -> Any:
        module = self.lightning_module  # type: ignore[attr-defined]
        step = module.training_step
        self._root_loss = None
        if not module.automatic_optimization:
            self._tell_once("manual optimization: each minibatch runs as one microbatch, packs are swapped as called")
            return self._run_in_one_piece(module.trainer.fit_loop.epoch_loop, "train_step_context", step, batch, *args)
        engine = self._engine
        if engine is None:
            return self._run_in_one_piece(None, "train_step_context", step, batch, *args)
        assert self._planning is not None
        parts = self._planning.split(batch)
        if parts.reason is not None:
            self._tell_once(f"the minibatch runs as one microbatch: {parts.reason}; split_batch=fn can cut it")
        self._planning.bring_up_to_date(parts)
        shares = loss_shares(self._config.loss_weight, parts)
        if self._config.check_microbatches and not self._is_checked and len(parts.batches) > 1:
            self._check(batch, args, parts, shares)
        functions = [functools.partial(_call_step, step, part, *args) for part in parts.batches]
        try:
            output = self._run_microbatches(functions, parts, shares)
        except Uncuttable:
            self._is_uncuttable = True
            self._tell_once(
                "training_step takes derivatives across layers itself (torch.autograd.grad, backward): each microbatch "
                "runs in one piece, and packs are swapped for every microbatch; this minibatch began once before"
            )
            output = self._run_microbatches(functions, parts, shares)
        loss = loss_of(output)
        if loss is None or not engine.has_loss:
            return output
        # Whatever is done to the result, this leaf's gradient will say how much the minibatch's loss counts.
        self._root_loss = loss.detach().requires_grad_()
        return with_loss(output, self._root_loss * 1)

    def _run_microbatches(
        self, functions: Sequence[Callable[[], Any]], parts: Microbatches, shares: Sequence[float]
    ) -> Any:
        """The output for the minibatch, its loss detached."""
        engine, module = self._require_engine(), self.lightning_module  # type: ignore[attr-defined]
        differentiable = []

        def settle(result: Any) -> tuple[torch.Tensor | None, Any]:
            loss = loss_of(result)
            if loss is None or not loss.requires_grad:
                return None, result
            differentiable.append(loss)
            return differentiable.pop(), with_loss(result, loss.detach())

        loop = module.trainer.fit_loop.epoch_loop
        logging_merged: AbstractContextManager[Any] = (
            merged_log(
                loop,
                lambda: (engine.running_microbatch, parts.num_samples[engine.running_microbatch]),
                self._to_root,
                engine.aside,
            )
            if len(functions) > 1
            else direct_log(loop, self._to_root, engine.aside)
        )
        with (
            self._around_step("train_step_context", logging_merged, len(functions)) as merged,
            merged_profile(module.trainer.profiler),
        ):
            outputs = engine.forward(functions, shares, settle, self._expected_factor(), is_cut=not self._is_uncuttable)
            outputs = [map_tensors(self._to_root, output) for output in outputs]
            self._loss_scale = scale_without(shares, [loss_of(output) is None for output in outputs])
            shares = [share * self._loss_scale for share in shares]
            output = merge_outputs(outputs, parts.num_samples, shares)
            if len(outputs) > 1 and self._config.loss_weight != "mean" and (total := loss_of(output)) is not None:
                losses = {m: loss for m, output in enumerate(outputs) if (loss := loss_of(output)) is not None}
                merged.know_losses(Losses(parts=losses, total=total))
            return output

    def _check(self, batch: Any, args: tuple[Any, ...], parts: Microbatches, shares: Sequence[float]) -> None:
        """Compare the loss of the minibatch in one piece with that of its microbatches, once."""
        self._is_checked = True
        engine, module = self._require_engine(), self.lightning_module  # type: ignore[attr-defined]
        loop = module.trainer.fit_loop.epoch_loop
        with (
            self._around_step("train_step_context", unlogged(loop)),
            untouched(module, engine.cluster.devices),
        ):
            losses = losses_of_pieces(engine, lambda piece: module.training_step(piece, *args), (batch, *parts.batches))
        if isinstance(losses, str):
            self._tell_once(f"check of microbatches left out: {losses}")
            return
        is_exact = self.precision_plugin.precision in ("32-true", "64-true")  # type: ignore[attr-defined]
        compare_losses(losses[0], losses[1:], shares, parts.num_samples, 1e-3 if is_exact else 2e-2)
        log.info("harmony: check of microbatches passed: loss %.6g", losses[0])

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
            getattr(self.precision_plugin, context)(),  # type: ignore[attr-defined]
            logging as merged,
            uncompiled_step(self.lightning_module),  # type: ignore[attr-defined]
            merged_metrics(self._metrics(), aside or self._require_engine().aside, twins),
        ):
            yield merged

    def on_validation_start(self) -> None:
        super().on_validation_start()  # type: ignore[misc]
        self._begin_evaluation(self.lightning_module.trainer._evaluation_loop, "validation")  # type: ignore[attr-defined]

    def on_test_start(self) -> None:
        super().on_test_start()  # type: ignore[misc]
        self._begin_evaluation(self.lightning_module.trainer._evaluation_loop, "test")  # type: ignore[attr-defined]

    def on_predict_start(self) -> None:
        super().on_predict_start()  # type: ignore[misc]
        self._begin_evaluation(self.lightning_module.trainer.predict_loop, "predict")  # type: ignore[attr-defined]

    def _begin_evaluation(self, loop: Any, stage: str) -> None:
        if self._config.evaluation_batches == 1 or self._require_engine().cluster.host_is_device:
            return
        obstacle = overrides.comes_between_steps(self.lightning_module, loop, stage, self._pl)  # type: ignore[attr-defined]
        self._tell_obstacle(stage, obstacle)
        self._shared_passes.begin(loop, f"{stage}_step", is_alone=obstacle is not None)

    def _tell_obstacle(self, stage: str, obstacle: str | None) -> None:
        if obstacle is not None:
            self._tell_once(f"evaluation_batches is left out for {stage}_step: {obstacle}")

    def validation_step(self, *args: Any) -> Any:
        return self._evaluate("validation", "val_step_context", *args)

    def test_step(self, *args: Any) -> Any:
        return self._evaluate("test", "test_step_context", *args)

    def predict_step(self, *args: Any) -> Any:
        return self._evaluate("predict", "predict_step_context", *args)

    def _evaluate(self, stage: str, context: str, *args: Any) -> Any:
        """The output of one batch, which may have run together with those before it."""
        module, shared = self.lightning_module, self._shared_passes  # type: ignore[attr-defined]
        step = getattr(module, f"{stage}_step")
        loop = module.trainer.predict_loop if stage == "predict" else module.trainer._evaluation_loop
        if shared.is_on and not shared.has_kept and not any(inner.training for inner in module.modules()):
            self._run_group(loop, stage, context, step, args)
        if not shared.has_kept:
            return self._run_in_one_piece(None if stage == "predict" else loop, context, step, *args)
        with self._in_step(), getattr(self.precision_plugin, context)():  # type: ignore[attr-defined]
            return shared.give()

    def _run_group(self, loop: Any, stage: str, context: str, step: Callable[..., Any], args: tuple[Any, ...]) -> None:
        engine, module = self._require_engine(), self.lightning_module  # type: ignore[attr-defined]

        def bring(batch: Any, dataloader_idx: int) -> Any:
            batch = self.precision_plugin.convert_input(batch)  # type: ignore[attr-defined]
            return self._bring(batch, None, dataloader_idx)

        group = self._shared_passes.arguments_of_group(loop, args, bring)
        has_log = stage != "predict"
        log_context = held_log(loop, lambda: (engine.running_microbatch, 1), self._to_root)
        with (
            self._around_step(context, log_context if has_log else nullcontext(), aside=engine.aside_in_turn) as held,
            merged_profile(module.trainer.profiler),
        ):
            together = engine.run_together([functools.partial(step, *arguments) for arguments in group])
            outcomes = [map_tensors(self._to_root, outcome) for outcome in together.outcomes]
        self._tell_obstacle(stage, together.obstacle)
        self._shared_passes.keep(outcomes, held if has_log else None, is_last=together.obstacle is not None)

    def _run_in_one_piece(self, loop: Any, context: str, step: Callable[..., Any], *args: Any) -> Any:
        engine = self._engine
        if engine is None:  # called outside of a run: everything is on the host
            with getattr(self.precision_plugin, context)():  # type: ignore[attr-defined]
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

    # Backward and update ----------------------------------------------------------------------------------------------

    def _expected_factor(self) -> float:
        """The gradient that the minibatch's loss will most likely get, so that nothing has to be scaled later."""
        scaler = getattr(self.precision_plugin, "scaler", None)  # type: ignore[attr-defined]
        scale: float = scaler.get_scale() if scaler is not None else 1.0
        return scale / self.lightning_module.trainer.accumulate_grad_batches  # type: ignore[attr-defined,no-any-return]

    def _backward(
        self,
        lightnings: Callable[..., None],
        loss: torch.Tensor,
        module: Any,
        optimizer: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """What the precision plugin's `backward` is during a run: Lightning's own goes to the root of the loss, and what is
        left goes through the packs, before any hook sees gradients. The strategy's own `backward` is not touched: it is
        what others watch."""
        try:
            lightnings(loss, module, optimizer, *args, **kwargs)
        except RuntimeError as error:
            if self._root_loss is not None:
                error.add_note(
                    "harmony: the loss that backward is given stands for those of all microbatches and has no graph of "
                    "its own; call loss.backward(), or use torch.autograd.grad inside training_step"
                )
            raise
        root, self._root_loss = self._root_loss, None
        if root is None or self._engine is None:
            return  # manual optimization, or no run: that was the whole backward
        engine = self._engine
        if root.grad is None:
            engine.abort()
            self._tell_once(
                "backward() left the loss that training_step returned without a gradient, so there are no gradients in "
                "this step; an overridden backward must differentiate that loss (loss.backward(...)), or use manual "
                "optimization"
            )
            return
        on_complete = self._updates.on_complete(engine, module, self.precision_plugin, self._pl)  # type: ignore[attr-defined]
        on_device = self._updates.on_device(engine)
        engine.backward(self._factor(root.grad) * self._loss_scale, on_complete, on_device)
        if self._updates.may_go_on(engine):
            engine.is_updated = self._updates.watch(optimizer, engine.state.parameters.values())
        else:
            engine.settle()

    def _factor(self, gradient: torch.Tensor) -> float:
        """What the loss counts; the expected number where the loss's type can only hold it rounded."""
        expected = self._expected_factor()
        return expected if bool(gradient == gradient.new_tensor(expected)) else float(gradient)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        trainer = self.lightning_module.trainer  # type: ignore[attr-defined]
        engine = self._engine
        if engine is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]
        with (
            self._in_step(),
            self._updates.stepping(optimizer, closure, engine, trainer) as closure,
            engine.cluster.activate(continues=True),  # the optimizer may write masters and read gradients itself
        ):
            return super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """In the order of the parameters, though packs were first updated from the last to the first."""
        if self._engine is not None:
            self._engine.settle()
        state: dict[str, Any] = super().optimizer_state(optimizer)  # type: ignore[misc]
        if isinstance(state.get("state"), dict):
            positions = [parameter for group in state.get("param_groups", ()) for parameter in group["params"]]
            entries = state["state"]
            ordered = {key: entries[key] for key in positions if key in entries}
            state["state"] = ordered | entries
        return state

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """What the checkpoint brings needs no other values first."""
        materialise(self.lightning_module, frozenset(checkpoint["state_dict"]))  # type: ignore[attr-defined]
        super().load_model_state_dict(checkpoint, strict=strict)  # type: ignore[misc]

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Optimizer states live on the host, beside the masters."""
        with self._host_as_root():
            super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]

    def _tell_once(self, text: str) -> None:
        without_sizes = re.sub(r"\d+", "", text)
        if without_sizes not in self._told:
            self._told.add(without_sizes)
            log.warning("harmony: %s", text)


_COUNTS = tuple(name for name in Statistics.__dataclass_fields__ if name != "peak_device_bytes")


def _call_step(step: Callable[..., Any], *args: Any) -> Any:
    """A weight that is the loss itself is made one that the loss is computed from."""
    output = step(*args)
    loss = loss_of(output)
    return with_loss(output, loss * 1) if isinstance(loss, torch.nn.Parameter) else output


def _log_to_stderr(level: str) -> None:
    """The package's own messages from this level up, once each, whatever the program does with its own."""
    package = logging.getLogger("harmony_lightning")
    package.setLevel(level)
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
        package.propagate = False


def _as_sequence(layers: Any) -> Sequence[Any]:
    """A single name or class may stand alone."""
    return layers if not isinstance(layers, str | type) else (layers,)
