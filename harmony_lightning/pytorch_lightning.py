"""`HarmonyStrategy` for modules and Trainers of `pytorch_lightning`."""

import pytorch_lightning as pl
from lightning_fabric.utilities.device_dtype_mixin import _update_properties
from pytorch_lightning.strategies import SingleDeviceStrategy

from harmony_lightning.strategy.mixin import HarmonyMixin


class HarmonyStrategy(HarmonyMixin, SingleDeviceStrategy):  # type: ignore[misc]
    __doc__ = HarmonyMixin.__doc__
    strategy_name = "harmony"
    _pl = pl
    _update_properties = staticmethod(_update_properties)
