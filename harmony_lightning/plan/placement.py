"""Placement: which device a microbatch comes to for a pack.

    pp      packs go round the devices                             gpu0  gpu1  gpu2  gpu3
    dp      microbatches do, and each device runs every pack       m0    m1    m2    m3       each with all packs
    mixed   pp x dp: either several *pipelines* side by side,      m0: gpu0 -> gpu1   m1: gpu2 -> gpu3
            over which microbatches are dealt,
            or one in which those of single packs are (*dealt*)

Harmony (Li et al., VLDB 2022, section 4) has the first two. Several pipelines are shorter ones: less of a step goes by
while they fill, and packs that are few, or no multiple of the devices, leave fewer of these idle. In return each pack's
weights come to as many devices, and its gradients are added up over them.
"""

from typing import Literal

from harmony_lightning.errors import ConfigurationError


class Placement:
    """What plans and schedules have in common."""

    __slots__ = ()

    mode: Literal["pp", "dp"]
    num_devices: int
    pipelines: int
    dealt: tuple[int, ...]
    dealt_order: tuple[int, ...]

    @property
    def num_copies(self) -> int:
        """Devices that each pack visits, but for dealt ones, which may visit more."""
        return self.num_devices if self.mode == "dp" else self.pipelines

    @property
    def depth(self) -> int:
        """Devices of one pipeline, which packs go round; in dp each device is one by itself."""
        return self.num_devices // self.num_copies

    def device(self, pack: int, microbatch: int) -> int:
        """Index of the device on which this microbatch goes through this pack, forward and backward."""
        if pack not in self.dealt:
            copies = self.num_devices if self.mode == "dp" else self.pipelines  # for every call of a layer: no property
            depth = self.num_devices // copies
            return microbatch % copies * depth + pack % depth
        order = self.dealt_order
        return order[microbatch % len(order)] if order else (pack + microbatch) % self.num_devices

    def is_dealt(self, pack: int) -> bool:
        """Whether the microbatches of a pack go to different devices."""
        return self.num_copies > 1 or pack in self.dealt

    def devices_of(self, pack: int) -> tuple[int, ...]:
        """Devices that a pack may visit, ascending, however many microbatches there are."""
        if pack in self.dealt:
            return tuple(sorted(set(self.dealt_order or range(self.num_devices))))
        return tuple(range(pack % self.depth, self.num_devices, self.depth))

    def check_placement(self) -> None:
        """Raises ConfigurationError if packs would go nowhere."""
        if self.mode not in ("pp", "dp"):
            raise ConfigurationError(f"mode must be 'pp' or 'dp', got {self.mode!r}")
        if self.num_devices < 1:
            raise ConfigurationError(f"num_devices must be at least 1, got {self.num_devices}")
        if self.pipelines < 1 or self.num_devices % self.pipelines:
            raise ConfigurationError(
                f"pipelines must divide the {self.num_devices} devices, as each has as many of them, got {self.pipelines}"
            )
        if self.pipelines > 1 and (self.mode == "dp" or self.pipelines == self.num_devices):
            raise ConfigurationError(
                f"{self.pipelines} pipelines over {self.num_devices} devices in mode {self.mode!r}: in 'dp' each device is "
                f"a pipeline by itself; write mode 'dp' and leave pipelines at 1"
            )
        if self.dealt and self.num_copies > 1:
            raise ConfigurationError(
                f"dealt names pack {self.dealt[0]}, but with several pipelines, or in mode 'dp', the microbatches of all "
                f"packs are; leave it empty"
            )
        for device in self.dealt_order:
            if not 0 <= device < self.num_devices:
                raise ConfigurationError(
                    f"dealt_order names device {device}, but devices are 0 to {self.num_devices - 1}"
                )
