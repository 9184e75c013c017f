"""Training steps: a minibatch in microbatches, one backward for all of them, and the optimizer's step."""

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.runtime.batch.minibatch import Microbatches, loss_shares, scale_without
from harmony_lightning.runtime.batch.outputs import loss_of, map_tensors, merge_outputs, with_loss
from harmony_lightning.runtime.derivatives import Uncuttable
from harmony_lightning.runtime.thread_state import Autocast
from harmony_lightning.strategy import precision
from harmony_lightning.strategy.merged_log import Losses, direct_log, merged_log, unlogged
from harmony_lightning.strategy.merged_profile import merged_profile
from harmony_lightning.strategy.microbatch_check import compare_losses, losses_of_pieces, untouched
from harmony_lightning.strategy.overrides import observer_of_gradients
from harmony_lightning.strategy.root_loss import foreseen_gradient
from harmony_lightning.strategy.session import Session

log = logging.getLogger(__name__)

PLAN_FILE = "harmony_plan.json"
PLAN_KEY = "harmony_plan"
"""In a run's log folder, and in its checkpoints: `HarmonyStrategy(plan=...)` takes up the file."""


class Training(Session):
    """The hooks of Lightning's Strategy that training calls."""

    def __init__(self, *args: Any, **lightning: Any) -> None:
        super().__init__(*args, **lightning)
        self._is_uncuttable = False
        """Whether user code was seen to take derivatives across layers."""
        self._is_checked = False
        """Whether the losses of a minibatch and of its microbatches were compared."""
        self._loss_scale = 1.0
        """What the loss counts more because microbatches returned none."""

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        self._is_uncuttable = False
        precision.extend_backward(self.precision_plugin, self._backward)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """The minibatch stays on the host, from where each microbatch takes its part to the GPU that needs it, unless
        the user's own transfer hooks expect to see it on a GPU."""
        return self._shared_passes.brought(lambda: self._bring(batch, device, dataloader_idx))

    def training_step(self, batch: Any, *args: Any) -> Any:
        module = self.lightning_module
        step = module.training_step
        self._root_loss = None
        if not module.automatic_optimization:
            self._tell_once("manual optimization: each minibatch runs as one microbatch, packs are swapped as called")
            if self._planning is not None:
                self._planning.before_manual()
            return self._run_in_one_piece(module.trainer.fit_loop.epoch_loop, "train_step_context", step, batch, *args)
        engine = self._engine
        if engine is None:
            return self._run_in_one_piece(None, "train_step_context", step, batch, *args)
        assert self._planning is not None
        found = self._planning.searched
        with self._in_step():
            self._planning.search(batch, *args)
        parts = self._planning.split(batch)
        if parts.reason is not None:
            self._tell_once(f"the minibatch runs as one microbatch: {parts.reason}; split_batch=fn can cut it")
        with self._in_step():
            parts = self._planning.bring_up_to_date(batch, parts, *args)
        if self._planning.searched is not found or (self._given_plan is not None and self._kept_plan is None):
            self._keep_plan()
        shares = loss_shares(self._config.loss_weight, parts)
        if self._config.check_microbatches and not self._is_checked and len(parts.batches) > 1:
            self._check(batch, args, parts, shares)
        functions = [functools.partial(_call_step, step, part, *args) for part in parts.batches]
        is_too_large = False
        try:
            output = self._run_microbatches(functions, parts, shares)
        except OUT_OF_MEMORY as error:
            if not self._planning.may_shrink:
                raise
            log.warning("harmony: the plan does not fit: %s", str(error).splitlines()[0])
            output = None
            is_too_large = True
        except Uncuttable:
            self._is_uncuttable = True
            self._planning.stop_searching()
            self._tell_once(
                "training_step takes derivatives across layers itself (torch.autograd.grad, backward): each microbatch "
                "runs in one piece, and packs are swapped for every microbatch; this minibatch began once before"
            )
            output = self._run_microbatches(functions, parts, shares)
        if is_too_large:  # the error, and what it held on the devices, is gone by now
            self._shrink_plan(batch, *args)
            return self.training_step(batch, *args)
        self._planning.check_order()
        loss = loss_of(output)
        if loss is None or not engine.has_loss:
            return output
        # Whatever is done to the result, this leaf's gradient will say how much the minibatch's loss counts.
        self._root_loss = loss.detach().requires_grad_()
        return with_loss(output, self._root_loss * 1)

    def _shrink_plan(self, batch: Any, *args: Any) -> None:
        """The plan does not fit after all: take another one, for less memory."""
        assert self._planning is not None
        found = self._planning.searched
        with self._in_step():
            self._planning.shrink(batch, *args)
        if self._planning.searched is not found:
            self._keep_plan()

    def _keep_plan(self) -> None:
        """The plan that the search has found, or the user has given, goes where the run's logs go."""
        self._kept_plan = self.plan
        trainer = self.lightning_module.trainer
        folder = trainer.log_dir if trainer.logger is not None else None
        plan = self.plan
        if folder is None or plan is None or "://" in str(folder):  # loggers may write to where there are no files
            return
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / PLAN_FILE).write_text(plan.to_json())
        except OSError as error:
            log.warning("harmony: the plan is not kept in the log folder: %s", error)

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """A plan that was found by search, or given, is kept beside the states."""
        if self._kept_plan is not None:
            checkpoint = {**checkpoint, PLAN_KEY: self._kept_plan.to_json()}
        super().save_checkpoint(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _run_microbatches(
        self, functions: Sequence[Callable[[], Any]], parts: Microbatches, shares: Sequence[float]
    ) -> Any:
        """The output for the minibatch, its loss detached."""
        engine, module = self._require_engine(), self.lightning_module
        is_cut, outside = not self._is_uncuttable, Autocast.capture()
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
            outputs = engine.forward(functions, shares, settle, self._expected_factor(), is_cut=is_cut, outside=outside)
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
        engine, module = self._require_engine(), self.lightning_module
        loop = module.trainer.fit_loop.epoch_loop
        with (
            self._around_step("train_step_context", unlogged(loop)),
            untouched(module, engine.cluster.devices),
        ):
            losses = losses_of_pieces(engine, lambda piece: module.training_step(piece, *args), (batch, *parts.batches))
        if isinstance(losses, str):
            self._tell_once(f"check of microbatches left out: {losses}")
            return
        is_exact = self.precision_plugin.precision in ("32-true", "64-true")
        compare_losses(losses[0], losses[1:], shares, parts.num_samples, 1e-3 if is_exact else 2e-2)
        log.info("harmony: check of microbatches passed: loss %.6g", losses[0])

    # Backward and update ----------------------------------------------------------------------------------------------

    def _expected_factor(self) -> float:
        """The gradient that the minibatch's loss will most likely get, so that nothing has to be scaled later."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        scale: float = scaler.get_scale() if scaler is not None else 1.0
        num_batches: int = self.lightning_module.trainer.accumulate_grad_batches
        return scale / num_batches

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
        foreseen = self._foreseen(loss, module) if self._root_loss is not None else None
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
        on_complete = self._updates.on_complete(engine, module, self.precision_plugin, self._pl)
        on_device = self._updates.on_device(engine)
        with self._in_step():  # while gradients are accumulated, no optimizer's step is around it
            factor = self._factor(root.grad if foreseen is None else foreseen)
            engine.backward(factor * self._loss_scale, on_complete, on_device)
        may_go_on = self._updates.may_go_on(engine)
        if may_go_on or engine.state.weights.is_behind:
            engine.rest.is_updated = self._updates.watch(optimizer, engine.state.parameters.values())
        if not may_go_on:
            engine.settle()

    def on_train_end(self) -> None:
        """What the last update has raised is raised here; nobody else might look."""
        super().on_train_end()  # type: ignore[misc]
        if self._engine is not None:
            self._engine.settle()

    def _foreseen(self, loss: torch.Tensor, module: Any) -> torch.Tensor | None:
        """The gradient of the root, where nobody but Lightning has a hand in this backward."""
        assert self._root_loss is not None
        if observer_of_gradients(module, self.precision_plugin, self._pl) is not None:
            return None
        return foreseen_gradient(loss, self._root_loss)

    def _factor(self, gradient: torch.Tensor) -> float:
        """What the loss counts; the expected number where the loss's type can only hold it rounded."""
        expected = self._expected_factor()
        return expected if bool(gradient == gradient.new_tensor(expected)) else float(gradient)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        trainer = self.lightning_module.trainer
        engine = self._engine
        if engine is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]
        with (
            self._in_step(),
            self._updates.stepping(optimizer, closure, engine, trainer) as closure,
            engine.cluster.activate(continues=True),  # the optimizer may write masters and read gradients itself
            self._watching(optimizer),
        ):
            return super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]

    def _watching(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Around the optimizer's step: what hooks there write is noticed as between steps, where frozen weights are some of
        it, which would not come again."""
        module, plugin = self.lightning_module, self.precision_plugin
        if self._between is None or not self._updates.may_write_frozen(optimizer, module, plugin, self._pl):
            return nullcontext()
        return self._between.resumed()


def _call_step(step: Callable[..., Any], *args: Any) -> Any:
    """A weight that is the loss itself is made one that the loss is computed from."""
    output = step(*args)
    loss = loss_of(output)
    return with_loss(output, loss * 1) if isinstance(loss, torch.nn.Parameter) else output
