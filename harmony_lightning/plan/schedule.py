"""A schedule: Harmony's four-tuple and what our runtime decides on top, in terms of a profile's layers.

Li et al., "Harmony", VLDB 2022, section 4.3: microbatch size and packs of forward, microbatch size and packs of backward.
The last backward pack computes the loss: its forward and backward run together, so the forward packs end before it. In *pp*
the forward packs go round the devices in order and the backward packs, from last to first, continue that round; in *dp*
every device runs every pack on its share of the minibatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan.placement import Placement
from harmony_lightning.record import Record

Span = tuple[int, int]
"""A pack as its first and last layer, both included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(Placement, Record):
    """What is computed where, in which portions and in which order."""

    mode: Literal["pp", "dp"]
    num_devices: int
    minibatch: int
    """Samples of one step, all devices together."""
    microbatch_forward: int
    packs_forward: tuple[tuple[int, int], ...]
    """[first layer, last layer] of each pack, both included; they end before the last backward pack."""
    microbatch_backward: int
    packs_backward: tuple[tuple[int, int], ...]
    """[first layer, last layer] of each pack; the last one runs forward and backward together."""
    prefetch: int = 0
    """Packs whose weights come in ahead of the running one, and whose gradients leave behind it, per device: 0 or 1."""
    boundary: Literal["device", "host"] = "device"
    """Where a pack's outputs, and gradients of its inputs, wait for the next pack on the same device (dp)."""
    stash: Literal["device", "host"] = "host"
    """Where inputs of layers wait from forward to backward; on the host under all rules but the runtime's."""
    resident: tuple[int, ...] = ()
    """Backward packs with slots of their own. This and what follows: under the runtime's rules only."""
    stash_stays: tuple[int, ...] = ()
    """Backward packs whose stash waits on the device."""
    keep: tuple[int, ...] = ()
    """Layers that keep their activations from forward to backward; the last one does in any case."""
    pipelines: int = 1
    """Of a schedule in pp, side by side, as in `Plan`."""
    dealt: tuple[int, ...] = ()
    """Backward packs of a schedule in pp whose microbatches go round the devices, as in `Plan.dealt`."""
    dealt_order: tuple[int, ...] = ()
    """Devices to which these microbatches go, as in `Plan`."""
    updated_there: tuple[int, ...] = ()
    """Backward packs that are updated on the device which has their gradients, not on the host."""
    updates_stay: tuple[int, ...] = ()
    """Those of them whose states, and weights, stay there, as in `Plan.updates_stay`."""
    microbatches_per_forward: int = 1
    """As in `Plan`."""

    def __post_init__(self) -> None:
        self.check_placement()
        for name in ("minibatch", "microbatch_forward", "microbatch_backward", "microbatches_per_forward"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.boundary not in ("device", "host"):
            raise ConfigurationError(f"boundary must be 'device' or 'host', got {self.boundary!r}")
        if self.stash not in ("device", "host"):
            raise ConfigurationError(f"stash must be 'device' or 'host', got {self.stash!r}")
        if self.prefetch not in (0, 1):
            raise ConfigurationError(f"prefetch must be 0 or 1, got {self.prefetch!r}")
        if not self.packs_backward:
            raise ConfigurationError("packs_backward needs at least one pack")
        for name in ("packs_forward", "packs_backward"):
            start = 0
            for index, (first, last) in enumerate(getattr(self, name)):
                if first != start or last < first:
                    raise ConfigurationError(
                        f"{name}[{index}] is layers {first} to {last}; it must begin with layer {start} and not be empty"
                    )
                start = last + 1
        fused = self.packs_backward[-1][0]
        end = self.packs_forward[-1][1] + 1 if self.packs_forward else 0
        if end != fused:
            raise ConfigurationError(
                f"packs_forward cover the layers before {end}, but the last backward pack, which runs forward too, "
                f"begins with layer {fused}"
            )

    @property
    def num_layers(self) -> int:
        return self.packs_backward[-1][1] + 1

    @property
    def samples(self) -> int:
        """Of one step on the device that has most: all of them in pp, the largest share in dp."""
        return -(-self.minibatch // self.num_devices) if self.mode == "dp" else self.minibatch

    @property
    def sizes_forward(self) -> tuple[int, ...]:
        """Samples of each forward microbatch of one device."""
        return split(self.samples, self.microbatch_forward)

    @property
    def sizes_backward(self) -> tuple[int, ...]:
        return split(self.samples, self.microbatch_backward)

    @property
    def num_active_devices(self) -> int:
        """Devices that get any work."""
        if self.mode == "dp":
            return min(self.num_devices, self.minibatch)
        return min(self.num_devices, len(self.packs_forward) + len(self.packs_backward))

    def device_forward(self, pack: int) -> int:
        """The device of a forward pack; in dp the one that stands for all."""
        return pack % self.num_devices if self.mode == "pp" else 0

    def device_backward(self, pack: int) -> int:
        turn = len(self.packs_forward) + len(self.packs_backward) - 1 - pack
        return turn % self.num_devices if self.mode == "pp" else 0

    def order_of_devices(self) -> tuple[int, ...]:
        """Device of each task in the order of execution: forward packs, then backward packs from last to first."""
        count = len(self.packs_forward) + len(self.packs_backward)
        return tuple(turn % self.num_devices if self.mode == "pp" else 0 for turn in range(count))


def split(samples: int, size: int) -> tuple[int, ...]:
    """Microbatches of a size; the last one may be smaller: (4, 4, 2)."""
    full, rest = divmod(samples, size)
    return (size,) * full + ((rest,) if rest else ())


def sources(sizes_from: Sequence[int], sizes_to: Sequence[int]) -> tuple[int, ...]:
    """Per microbatch of one cut of the samples, the one of another cut that completes it: 0, 0, 1 for 4, 2 and 2, 2, 2."""
    ends, result, end = [], [], 0
    for size in sizes_from:
        end += size
        ends.append(end)
    end = index = 0
    for size in sizes_to:
        end += size
        while ends[index] < end:
            index += 1
        result.append(index)
    return tuple(result)
