"""The masters: weights on the host, one arena per pack, and how device copies of them grow old."""

from collections.abc import Mapping

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.weights.arena import (
    HostArena,
    Layout,
    lay_out,
    layout_nbytes,
    narrow_types,
    return_freed_memory,
)
from harmony_lightning.runtime.weights.casts import Casts


class WeightStore:
    """The masters on the host, one arena per pack. A tied weight lies in the arena of the first pack that has it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan, cluster: Cluster) -> None:
        self.parameters = parameters
        self.arenas: list[HostArena] = []
        self.layouts: list[Layout] = []
        """By pack, of a slot on a device."""
        self.wide_nbytes: list[int] = []
        """By pack: so much of the beginning of its arena travels as it is."""
        self.narrow = Casts(parameters, plan, cluster)
        self.borrowed: list[tuple[str, ...]] = []
        self.generations = [0] * len(plan.packs)
        """By pack: how often its masters were written, or are going to be; copies of an earlier generation are no good."""
        self.is_copied = False
        """Whether copies were asked for since then."""
        self.has_leaked = False
        """Whether somebody may write masters without torch."""
        self._memory: set[int] = set()
        self._trains = [any(parameters[name].requires_grad for name in pack.parameters) for pack in plan.packs]
        owned: set[str] = set()
        for pack in plan.packs:
            wide = [name for name in pack.parameters if name not in owned and name not in pack.narrow]
            names = [*wide, *(name for name in pack.narrow if name not in owned)]
            self.borrowed.append(tuple(n for n in pack.parameters if n in owned and n not in pack.narrow))
            owned.update(names)
            self.arenas.append(HostArena(parameters, names, cluster))
            self.wide_nbytes.append(layout_nbytes(lay_out(parameters, wide)))
            # Own weights first, then the narrow ones, in the order of the host's arenas: each part arrives in one copy.
            types = narrow_types(plan, pack.narrow)
            self.layouts.append(lay_out(parameters, (*wide, *pack.narrow, *self.borrowed[-1]), types))
            return_freed_memory()  # pack by pack: else the host would hold the weights twice for a moment

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of masters."""
        if not self._memory:
            self._memory = {storage_key(self.parameters[name]) for layout in self.layouts for name in layout}
        return storage_key(tensor) in self._memory

    def move_in(self, pack: int) -> None:
        """Take in weights that user code has given other memory."""
        self.arenas[pack].move_in()
        self._memory.clear()

    def expect_writes(self, *, trained_only: bool = False) -> None:
        """Somebody writes masters, or is going to: copies that were asked for until now are no good afterwards."""
        self.is_copied &= trained_only
        for pack, trains in enumerate(self._trains):
            self.generations[pack] += trains or not trained_only

    def versions(self, pack: int) -> int:
        """Grows whenever torch sees a master written, by whomever."""
        return sum(self.parameters[name]._version for name in self.layouts[pack])
