"""What gives way where a device runs out of memory.

The plan leaves room for what it knows of. Tensors of code between layers, larger batches and allocators that lose some take
what it does not; then goes, in this order, what the device can do without: slots that nobody uses, activations that layers
keep, stashes, memory that waits for what comes from other devices, and copies of what has left.
"""

import logging
import weakref
from collections.abc import Callable
from typing import TypeVar

from harmony_lightning.hardware.device import Device
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY, told_by_type
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.activations import Activations
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.swapped_weights import SwappedWeights
from harmony_lightning.runtime.transfer import Departures, Landings

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class DeviceMemory:
    """The memory of all devices, when it is short.

    Attributes:
        kept: by device, what layers keep from forward to backward.
        num_together: microbatches in one call of a layer, at most.
        has_given_way: something has gone that was to stay, as there was no room for it.
        has_lacked_memory: the step could not have gone on otherwise.
        spill: lets stashes leave a device; returns whether there were any.
    """

    def __init__(
        self,
        plan: Plan,
        counters: Counters,
        weights: SwappedWeights,
        departures: Departures,
        landings: Landings,
        is_backward: Callable[[], bool],
        trim: Callable[[], None],
    ) -> None:
        """
        Args:
            is_backward: whether what asks for memory belongs to a backward.
            trim: gives memory that is free back to the driver, where CUDA's libraries look for some.
        """
        self.kept: list[weakref.WeakSet[Activations]] = [weakref.WeakSet() for _ in range(plan.num_devices)]
        self.num_together = plan.microbatches_per_forward
        self.has_given_way = False
        self.has_lacked_memory = False
        self.spill: Callable[[Device], bool] = lambda device: False
        self._counters = counters
        self._weights = weights
        self._departures, self._landings = departures, landings
        self._is_backward = is_backward
        self._trim = trim

    def with_room(self, device: Device, function: Callable[[], Result]) -> Result:
        """What the function returns, which needs memory of the device: if there is none, it is called again when what was
        to stay there has gone, and in backward once more when sums of gradients have, too."""
        for _ in range(2):
            try:
                return told_by_type(function)
            except OUT_OF_MEMORY:
                if not self.make_room(device):
                    raise
        return told_by_type(function)

    def make_room(self, device: Device) -> bool:
        """The device has run out of memory: let go of what it can do without. Returns whether there was anything."""
        gives_way = self.let_go(device)
        self.has_given_way |= gives_way
        # A forward begins again, in smaller packs.
        found = gives_way or (self._is_backward() and self._weights.gradients.leave(device))
        if found:
            self._trim()
        self._counters.short_of_memory += found and not self.has_lacked_memory
        self.has_lacked_memory |= found
        return found

    def let_go(self, device: Device) -> bool:
        """Keep nothing on the device that it can do without. Returns whether there was anything."""
        found = self._weights.let_go_idle(device)
        for activations in list(self.kept[device.index]):
            found |= activations.drop()
        found |= self.spill(device)
        found |= self._landings.give_back(device)
        found |= self._departures.release(device)
        return found

    def let_go_idle(self, device: Device) -> bool:
        """The device has no room for what need not be: let go of slots alone that nobody uses yet, or any more. Returns
        whether there were any."""
        found = self._weights.let_go_idle(device)
        self.has_given_way |= found
        return found

    def join_fewer(self, device: Device) -> None:
        """There is no room for so many microbatches in one call of a layer."""
        before, self.num_together = self.num_together, max(1, self.num_together // 2)
        log.warning(
            "harmony: %s has no room for %d microbatches in one call of a layer: from here on at most %d go together; "
            "lower microbatches_per_forward or the microbatch size to begin with what fits",
            device.name,
            before,
            self.num_together,
        )
