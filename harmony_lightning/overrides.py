"""Which hooks of Lightning the user has taken over, and what they then expect to find.

Flavour-free: the base classes to compare with come in through the Lightning package that is passed.
"""

from typing import Any

_BETWEEN_BACKWARD_AND_STEP = (
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
)
_CALLBACKS_BETWEEN = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
_TRANSFERS = ("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer")


def sees_gradients(module: Any, pl: Any) -> bool:
    """Whether anything may look at, or change, gradients between backward and step: it must find all of them."""
    trainer = module.trainer
    return (
        bool(trainer.gradient_clip_val)
        or any(_is_overridden(module, hook, pl.LightningModule) for hook in _BETWEEN_BACKWARD_AND_STEP)
        or any(
            _is_overridden(callback, hook, pl.Callback) for callback in trainer.callbacks for hook in _CALLBACKS_BETWEEN
        )
    )


def expects_batch_on_device(module: Any, pl: Any) -> bool:
    """Whether the user's own hooks take part in bringing a batch to the device."""
    datamodule = getattr(getattr(module, "_trainer", None), "datamodule", None)
    return any(_is_overridden(module, hook, pl.LightningModule) for hook in _TRANSFERS) or (
        datamodule is not None and any(_is_overridden(datamodule, hook, pl.LightningDataModule) for hook in _TRANSFERS)
    )


def _is_overridden(owner: Any, hook: str, base: type) -> bool:
    return hook in vars(owner) or getattr(type(owner), hook, None) is not getattr(base, hook, None)
