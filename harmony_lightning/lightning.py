"""`HarmonyStrategy` for modules and Trainers of `lightning.pytorch`."""

import lightning.pytorch as pl
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import SingleDeviceStrategy

from harmony_lightning.strategy.mixin import HarmonyMixin


class HarmonyStrategy(HarmonyMixin, SingleDeviceStrategy):  # type: ignore[misc]
    __doc__ = HarmonyMixin.__doc__
    strategy_name = "harmony"
    _pl = pl
    _update_properties = staticmethod(_update_properties)
