"""Lightning's precision plugins: which cannot work with masters on the host, and what the others need.

Flavour-free: plugins are known by name, so that nothing of Lightning is imported.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from harmony_lightning.errors import ConfigurationError

_REFUSED = {
    "TransformerEnginePrecision": "its layers keep FP8 scales of each call, and recomputed layers would count twice",
    "BitsandbytesPrecision": "it quantises weights when they are moved to a GPU, and masters stay on the host",
    "DeepSpeedPrecision": "it drives DeepSpeed's engine",
    "FSDPPrecision": "it is made for sharded modules",
    "XLAPrecision": "it is made for XLA devices",
}


def check_plugin(plugin: Any) -> None:
    """Refuse plugins that would compute something else, or nothing.

    Raises:
        ConfigurationError: the plugin, or one that it derives from, is among them.
    """
    for kind in type(plugin).__mro__:
        if (reason := _REFUSED.get(kind.__name__)) is not None:
            raise ConfigurationError(
                f"strategy='harmony' cannot use {type(plugin).__name__}: {reason}; use precision='32-true', 'bf16-true', "
                f"'bf16-mixed', '16-mixed', '16-true' or '64-true'"
            )


def move_to_host(plugin: Any) -> None:
    """Let a plugin that was made for a GPU cast what the host computes."""
    if hasattr(plugin, "device"):
        plugin.device = "cpu"


def extend_backward(plugin: Any, extended: Callable[..., None]) -> None:
    """Until `restore_backward`, the plugin's `backward` is `extended`, which gets the plugin's own as first argument."""
    plugin.backward = functools.partial(extended, plugin.backward)


def restore_backward(plugin: Any) -> None:
    """May be called twice."""
    backward = vars(plugin).get("backward")
    if isinstance(backward, functools.partial):
        (own,) = backward.args
        del plugin.backward
        if own != plugin.backward:
            plugin.backward = own


def keep_scaler_on_host(scaler: Any) -> None:
    """Let a gradient scaler begin on the host, where gradients are.

    It puts its scale where the first loss is. From a GPU it would then be copied to the host without waiting, and gradients
    could be unscaled by a number that has not arrived.
    """
    if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
        if scaler._scale is not None and scaler._scale.device.type != "cpu":
            state = scaler.state_dict()
            scaler._scale = scaler._growth_tracker = None
            scaler.load_state_dict(state)
        if scaler._scale is None:
            scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))  # type: ignore[no-untyped-call]
