"""Memory of all GPUs for `DeviceStatsMonitor`, which asks the accelerator about one device: the strategy's root."""

from collections.abc import Callable, Sequence
from typing import Any

GetDeviceStats = Callable[[Any], dict[str, Any]]
"""Of a Lightning accelerator: device -> values by name."""


class AllDeviceStats:
    """The accelerator's values of the device that is asked about, under their own names, and of every GPU of the cluster
    as `gpu1.allocated_bytes` and `gpu1.peak_bytes`; a real one's further values as `gpu1.<name>`.

    A Trainer may be copied or pickled during a run; devices are not, so a copy has the accelerator's values alone.
    """

    def __init__(self, get_device_stats: GetDeviceStats, devices: Sequence[Any]) -> None:
        self._get_device_stats = get_device_stats
        self._devices = devices

    def __call__(self, device: Any) -> dict[str, Any]:
        found = dict(self._get_device_stats(device))
        for one in self._devices:
            if one.torch_device.type != "cpu" and one.torch_device != device:
                found |= {
                    f"{one.name}.{name}": value for name, value in self._get_device_stats(one.torch_device).items()
                }
            found[f"{one.name}.allocated_bytes"] = one.allocated_bytes()
            found[f"{one.name}.peak_bytes"] = one.peak_bytes()
        return found

    def __reduce__(self) -> tuple[type["AllDeviceStats"], tuple[GetDeviceStats, tuple[()]]]:
        return type(self), (self._get_device_stats, ())
