"""What may stay on the devices, learned step by step.

A step whose batch is larger than all before it, in whatever dimension, runs under the plan by which nothing stays that need
not, and is measured. Steps of batches no larger than a measured one run under a plan that fills the memory which that one
has left. So a batch of unknown size never finds less room than it would have had without.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmony_lightning.plan import Plan, Usage
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.structure import is_opaque, place_tensors
from harmony_lightning.scheduler import let_stay
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

Extent = tuple[torch.Size, ...]
"""Shapes of a batch's tensors; of several batches, the larger in each dimension."""

_MOST_EXTENTS = 16
"""How many measured steps of a kind are remembered."""


class Residency:
    """The plans of one engine that differ in what stays."""

    def __init__(self, engine: Engine, *, moves_stash: bool) -> None:
        """`moves_stash`: the user wants stashes on the host."""
        self._engine = engine
        self._moves_stash = moves_stash
        self._base: Plan | None = None
        """Nothing stays that need not."""
        self._known: dict[tuple[str, int], list[tuple[Extent, Usage]]] = {}
        """Measured steps by kind and number of batches."""
        self._measured: tuple[tuple[str, int], Extent] | None = None
        """The step that was to be measured."""
        self._plans: dict[tuple[Usage, tuple[int, ...]], Plan] = {}

    def before(self, kind: str, batches: Sequence[Any]) -> None:
        """A step of these batches comes."""
        self._note()
        key, extent = (kind, len(batches)), extent_of(batches)
        usage = next((usage for known, usage in self._known.get(key, ()) if covers(known, extent)), None)
        if usage is None:
            self.let_go()
            self._engine.measure(trains=kind == "training")
            self._measured = key, extent
        else:
            self._engine.take_up(self._plan_for(usage))

    def forget(self) -> None:
        """The plan is about to be another one."""
        self.let_go()
        self._base, self._measured = None, None
        self._known.clear()
        self._plans.clear()

    def let_go(self) -> None:
        """Nothing is known of the next step."""
        self._base = self._base or self._engine.plan
        self._engine.take_up(self._base)

    def _note(self) -> None:
        measured, self._measured = self._measured, None
        usage, self._engine.usage = self._engine.usage, None
        if measured is not None and usage is not None:
            known = self._known.setdefault(measured[0], [])
            known.insert(0, (measured[1], usage))
            del known[_MOST_EXTENTS:]

    def _plan_for(self, usage: Usage) -> Plan:
        """With as much left as there is now: the user's own code may have put something on the devices since."""
        assert self._base is not None
        state = self._engine.state
        in_use = [device.allocated_bytes() for device in self._engine.cluster.devices]
        beside = [total - slots for total, slots in zip(in_use, state.weight_slots_nbytes(), strict=True)]
        grown = tuple(max(0, now - then) for now, then in zip(beside, usage.resting, strict=True))
        plan = self._plans.get((usage, grown))
        if plan is None:
            plan = let_stay(self._base, usage, grown, moves_stash=self._moves_stash)
            self._plans = {**dict(list(self._plans.items())[-_MOST_EXTENTS:]), (usage, grown): plan}
            log.info(
                "harmony: weights of %d of %d packs, stashes of %d and activations of %d layers stay; %s at most",
                len(plan.resident),
                len(plan.packs),
                len(plan.stash_stays),
                len(plan.keep),
                ", ".join(map(format_nbytes, plan.peak_bytes)),
            )
        return plan


def extent_of(batches: Sequence[Any]) -> Extent:
    """Of all batches together."""
    found = [_shapes(batch) for batch in batches]
    if len({tuple(map(len, shapes)) for shapes in found}) > 1:
        return tuple(shape for shapes in found for shape in shapes)
    return tuple(torch.Size(map(max, *shapes)) if len(shapes) > 1 else shapes[0] for shapes in zip(*found, strict=True))


def covers(known: Extent, extent: Extent) -> bool:
    """Whether no dimension is larger than it was."""
    return [len(shape) for shape in known] == [len(shape) for shape in extent] and all(
        size <= most for shape, other in zip(extent, known, strict=True) for size, most in zip(shape, other, strict=True)
    )


def _shapes(batch: Any) -> list[torch.Size]:
    found: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.shape)
        return tensor

    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) or is_opaque(leaf):
            place_tensors(leaf, note)
    return found
