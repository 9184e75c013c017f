"""Which hooks of Lightning the user has taken over, and what they then expect to find.

Flavour-free: the base classes to compare with come in through the Lightning package that is passed.
"""

from collections.abc import Sequence
from typing import Any

_BETWEEN_BACKWARD_AND_STEP = (
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "clip_gradients",
    "optimizer_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
)
_CALLBACKS_BETWEEN = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
_PRECISION_BETWEEN = (
    "backward",
    "post_backward",
    "optimizer_step",
    "clip_gradients",
    "clip_grad_by_value",
    "main_params",
)
_TRANSFERS = ("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer")
_BEHIND_STEP = ("on_train_batch_end",)
_COPIES_AT_SETUP = ("WeightAveraging", "StochasticWeightAveraging", "ModelPruning")
"""Lightning's callbacks that do."""


def observer_of_gradients(module: Any, precision_plugin: Any, pl: Any) -> str | None:
    """What may look at, or change, gradients between backward and step, and so must find all of them; None if nothing
    does. Clipping by value is no such thing: each gradient is clipped by itself."""
    trainer = module.trainer
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        return "gradients are clipped by their common norm"
    if getattr(precision_plugin, "scaler", None) is not None:
        return "the gradient scaler looks for infinities in all gradients"
    hook = hook_around_step(module, precision_plugin, pl)
    return None if hook is None else f"{hook} sees gradients"


def refuses_to_clip(optimizer: Any, module: Any, precision_plugin: Any, pl: Any) -> bool:
    """Whether Lightning raises an error when it is to clip gradients for the optimizer, one that can unscale them itself
    (`fused=True`), as it does in mixed precision whether there is a scaler or not. So it must be asked to."""
    is_clipped = isinstance(precision_plugin, pl.plugins.MixedPrecision) and bool(module.trainer.gradient_clip_val)
    return is_clipped and getattr(optimizer, "_step_supports_amp_scaling", False)


def hook_around_step(module: Any, precision_plugin: Any, pl: Any) -> str | None:
    """The first hook that runs between backward and step and is not Lightning's own; None if there is none."""
    for hook in _BETWEEN_BACKWARD_AND_STEP:
        if _is_overridden(module, hook, pl.LightningModule):
            return f"{type(module).__name__}.{hook}"
    for callback in module.trainer.callbacks:
        for hook in _CALLBACKS_BETWEEN:
            if _is_overridden(callback, hook, pl.Callback):
                return f"{type(callback).__name__}.{hook}"
    if not _is_of_package(type(precision_plugin), pl):
        for hook in _PRECISION_BETWEEN:
            if getattr(type(precision_plugin), hook, None) is not getattr(pl.plugins.Precision, hook, None):
                return f"{type(precision_plugin).__name__}.{hook}"
    return None


def runs_before_backward(module: Any, pl: Any) -> bool:
    """Whether code of the user's runs between training_step and backward."""
    hook = "on_before_backward"
    return _is_overridden(module, hook, pl.LightningModule) or any(
        _is_overridden(callback, hook, pl.Callback) for callback in module.trainer.callbacks
    )


def looks_back(module: Any, pl: Any) -> bool:
    """Whether the user's code may look at gradients when the step is over."""
    return any(_is_overridden(module, hook, pl.LightningModule) for hook in _BEHIND_STEP) or any(
        not _is_of_package(type(callback), pl) and _is_overridden(callback, hook, pl.Callback)
        for callback in module.trainer.callbacks
        for hook in _BEHIND_STEP
    )


def comes_between_steps(module: Any, loop: Any, stage: str, pl: Any) -> str | None:
    """What of the user's runs between two steps of an evaluation, and so may see, or change, what steps work with; None if
    nothing does. Lightning's own callbacks only look at progress and outputs.

    Args:
        loop: ready to ask for its first batch.
        stage: validation, test or predict.
    """
    if hasattr(loop._data_fetcher, "iterator_wrapper"):
        return "it asks for its batches itself (dataloader_iter)"
    hooks = (f"on_{stage}_batch_start", f"on_{stage}_batch_end")
    for hook in hooks:
        if _is_overridden(module, hook, pl.LightningModule):
            return f"{type(module).__name__}.{hook} runs between them"
        for callback in module.trainer.callbacks:
            definer = next((kind for kind in type(callback).__mro__ if hook in vars(kind)), type(callback))
            if hook in vars(callback) or not _is_of_package(definer, pl):
                return f"{type(callback).__name__}.{hook} runs between them"
    datamodule, hook = module.trainer.datamodule, "on_before_batch_transfer"
    if _is_overridden(module, hook, pl.LightningModule):
        return f"{type(module).__name__}.{hook} runs between them"
    if datamodule is not None and _is_overridden(datamodule, hook, pl.LightningDataModule):
        return f"{type(datamodule).__name__}.{hook} runs between them"
    return None


def copies_at_setup(callbacks: Sequence[Any], pl: Any) -> bool:
    """Whether a callback may copy the module before the strategy is set up."""
    known = tuple(getattr(pl.callbacks, name) for name in _COPIES_AT_SETUP if hasattr(pl.callbacks, name))
    return any(
        isinstance(callback, known)
        or (not _is_of_package(type(callback), pl) and _is_overridden(callback, "setup", pl.Callback))
        for callback in callbacks
    )


def expects_batch_on_device(module: Any, pl: Any) -> bool:
    """Whether the user's own hooks take part in bringing a batch to the device."""
    datamodule = getattr(getattr(module, "_trainer", None), "datamodule", None)
    return any(_is_overridden(module, hook, pl.LightningModule) for hook in _TRANSFERS) or (
        datamodule is not None and any(_is_overridden(datamodule, hook, pl.LightningDataModule) for hook in _TRANSFERS)
    )


def _is_overridden(owner: Any, hook: str, base: type) -> bool:
    return hook in vars(owner) or getattr(type(owner), hook, None) is not getattr(base, hook, None)


def _is_of_package(kind: type, pl: Any) -> bool:
    """Whether a class is the Lightning package's own."""
    package: str = pl.__name__
    return kind.__module__.partition(".")[0] == package.partition(".")[0]
