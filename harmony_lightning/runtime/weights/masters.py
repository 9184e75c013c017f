"""The masters: weights on the host, one arena per pack, and how device copies of them grow old."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    trained_first,
)
from harmony_lightning.runtime.weights.casts import Casts


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What of a pack is written at one time, and so grows old at one time: the weights that train, or the frozen ones."""

    names: tuple[str, ...]
    trains: bool
    runs: tuple[tuple[torch.Tensor, int], ...]
    """Pieces of host memory that travel as they are, and where each begins in a slot, bytes."""
    borrowed: tuple[str, ...]
    """Weights that lie in the arenas of other packs, and travel one by one."""
    nbytes: int
    """Of the weights as they travel."""


class WeightStore:
    """The masters on the host, one arena per pack. A tied weight lies in the arena of the first pack that has it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan, cluster: Cluster) -> None:
        self.parameters = parameters
        self.arenas: list[HostArena] = []
        self.layouts: list[Layout] = []
        """By pack, of a slot on a device."""
        self.parts: list[tuple[Part, ...]] = []
        """By pack, at least one."""
        self.narrow = Casts(parameters, plan, cluster)
        self.is_copied = False
        """Whether copies were asked for since all masters may have been written."""
        self.has_leaked = False
        """Whether somebody may write masters without torch."""
        self._parts_of: dict[int, list[Part]] = {}
        """By piece of memory in which a master lies: those that have it."""
        self._num_writes = self._num_updates = 0
        """How often masters were written, or are going to be: all of them, and those that train."""
        self._num_looks: Counter[Part] = Counter()
        """How often one of the part may have been written."""
        owned: set[str] = set()
        for index, pack in enumerate(plan.packs):
            wide = [name for name in pack.parameters if name not in owned and name not in pack.narrow]
            wide, narrow = trained_first(parameters, wide), trained_first(parameters, pack.narrow)
            borrowed = [n for n in pack.parameters if n in owned and n not in pack.narrow]
            self.arenas.append(HostArena(parameters, [*wide, *(n for n in narrow if n not in owned)], cluster))
            # Own weights first, then the narrow ones, in the order of the host's arenas: each part arrives in two copies.
            layout = lay_out(parameters, (*wide, *narrow, *borrowed), narrow_types(plan, pack.narrow))
            self.layouts.append(layout)
            owned.update(wide, narrow)
            wide_nbytes = layout_nbytes(lay_out(parameters, wide))
            sources = (wide, self.arenas[-1].bytes, 0), (narrow, self.narrow.arenas[index], wide_nbytes)
            parts = (self._part(layout, sources, borrowed, trains=trains) for trains in (True, False))
            self.parts.append(tuple(part for part in parts if part.names or not (part.trains or pack.parameters)))
            return_freed_memory()  # pack by pack: else the host would hold the weights twice for a moment

    def _part(
        self,
        layout: Layout,
        sources: Sequence[tuple[Sequence[str], torch.Tensor, int]],
        borrowed: Sequence[str],
        *,
        trains: bool,
    ) -> Part:
        """`sources`: names, the host memory in which these lie one behind the other, and where that begins in a slot."""
        names = tuple(name for name in layout if self.parameters[name].requires_grad is trains)
        found, runs = frozenset(names), []
        for inside, memory, offset in sources:
            regions = [layout[name] for name in inside if name in found]
            if regions and regions[0].start < regions[-1].stop:
                start, stop = regions[0].start, regions[-1].stop
                runs.append((memory[start - offset : stop - offset], start))
        return Part(
            names=names,
            trains=trains,
            runs=tuple(runs),
            borrowed=tuple(name for name in borrowed if name in found),
            nbytes=sum(layout[name].nbytes for name in names),
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of masters."""
        if not self._parts_of:
            for part in (part for parts in self.parts for part in parts):
                for name in part.names:
                    self._parts_of.setdefault(storage_key(self.parameters[name]), []).append(part)
        return storage_key(tensor) in self._parts_of

    def expect_writes_of(self, tensors: Sequence[torch.Tensor]) -> None:
        """Somebody may write these, which lie in the memory of masters."""
        self._num_looks.update({part for tensor in tensors for part in self._parts_of[storage_key(tensor)]})

    def move_in(self, pack: int) -> None:
        """Take in weights that user code has given other memory."""
        self.arenas[pack].move_in()
        self._parts_of.clear()

    def expect_writes(self, *, trained_only: bool = False) -> None:
        """Somebody writes masters, or is going to: copies that were asked for until now are no good afterwards."""
        self.is_copied &= trained_only
        self._num_updates += 1
        self._num_writes += not trained_only

    def generation(self, part: Part) -> int:
        """Grows whenever masters of the part are written, or are going to be: copies of an earlier one are no good."""
        return (self._num_updates if part.trains else self._num_writes) + self._num_looks[part]

    def version(self, part: Part) -> int:
        """Grows whenever torch sees a master of the part written, by whomever."""
        return sum(self.parameters[name]._version for name in part.names)
