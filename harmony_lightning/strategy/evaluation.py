"""Evaluation steps: each batch in one piece, or several in one pass over the packs."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from harmony_lightning.runtime.batch.outputs import map_tensors
from harmony_lightning.strategy import overrides
from harmony_lightning.strategy.merged_log import held_log
from harmony_lightning.strategy.merged_profile import merged_profile
from harmony_lightning.strategy.session import Session


class Evaluation(Session):
    """The hooks of Lightning's Strategy that validation, test and prediction call."""

    def on_validation_start(self) -> None:
        super().on_validation_start()  # type: ignore[misc]
        self._begin_evaluation(self.lightning_module.trainer._evaluation_loop, "validation")

    def on_test_start(self) -> None:
        super().on_test_start()  # type: ignore[misc]
        self._begin_evaluation(self.lightning_module.trainer._evaluation_loop, "test")

    def on_predict_start(self) -> None:
        super().on_predict_start()  # type: ignore[misc]
        self._begin_evaluation(self.lightning_module.trainer.predict_loop, "predict")

    def _begin_evaluation(self, loop: Any, stage: str) -> None:
        if self._config.evaluation_batches == 1 or self._require_engine().cluster.host_is_device:
            return
        obstacle = overrides.comes_between_steps(self.lightning_module, loop, stage, self._pl)
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
        module, shared = self.lightning_module, self._shared_passes
        step = getattr(module, f"{stage}_step")
        loop = module.trainer.predict_loop if stage == "predict" else module.trainer._evaluation_loop
        if shared.is_on and not shared.has_kept and not any(inner.training for inner in module.modules()):
            self._run_group(loop, stage, context, step, args)
        if not shared.has_kept:
            if self._planning is not None:
                self._planning.before_evaluation(stage, args[:1])
            return self._run_in_one_piece(None if stage == "predict" else loop, context, step, *args)
        with self._in_step(), getattr(self.precision_plugin, context)():
            return shared.give()

    def _run_group(self, loop: Any, stage: str, context: str, step: Callable[..., Any], args: tuple[Any, ...]) -> None:
        engine, module = self._require_engine(), self.lightning_module

        def bring(batch: Any, dataloader_idx: int) -> Any:
            batch = self.precision_plugin.convert_input(batch)
            return self._bring(batch, None, dataloader_idx)

        group = self._shared_passes.arguments_of_group(loop, args, bring)
        assert self._planning is not None
        self._planning.before_evaluation(stage, [arguments[0] for arguments in group])
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
