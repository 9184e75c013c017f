"""What may stay on the devices, learned step by step.

A step whose batch is larger than all before it, in whatever dimension, runs under the plan by which nothing stays that need
not, and is measured. Steps of batches no larger than a measured one run under a plan that fills the memory which that one
has left. So a batch of unknown size never finds less room than it would have had without.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmony_lightning.plan import Plan, Usage
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.meter import Holding
from harmony_lightning.runtime.structure import is_opaque, place_tensors
from harmony_lightning.scheduler import let_stay
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

Extent = tuple[torch.Size, ...]
"""Shapes of a batch's tensors; of several batches, the larger in each dimension."""

_MOST_EXTENTS = 16
"""How many measured steps of a kind are remembered."""
_MOST_FAILURES = 3
"""How often memory may be short though it was measured to suffice."""
_MOST_CORRECTIONS = 3
"""What is seen to stay leaves room for more, which must be seen in its turn."""


@dataclass(slots=True)
class _Measured:
    """A step that was measured."""

    extent: Extent
    calls: Counter[str]
    """Of layers, in training."""
    estimate: Usage
    usage: Usage
    """The estimate, corrected by what was seen to stay."""
    num_corrections: int = 0
    is_complete: bool = False
    """Whether all that stays by the last plan was seen."""
    plan: Plan | None = None
    """The last one made for such steps, when `grown` bytes were taken by others."""
    grown: tuple[int, ...] = ()


class Residency:
    """The plans of one engine that differ in what stays."""

    def __init__(self, engine: Engine, *, moves_stash: bool) -> None:
        """`moves_stash`: the user wants stashes on the host."""
        self._engine = engine
        self._moves_stash = moves_stash
        self._base: Plan | None = None
        """Nothing stays that need not."""
        self._known: dict[tuple[str, int], list[_Measured]] = {}
        """By kind of step and number of batches; the last one first."""
        self._num_failures = 0
        self._take_note: Callable[[], None] = lambda: None
        """What the step that was run last has shown."""

    def before(self, kind: str, batches: Sequence[Any]) -> None:
        """A step of these batches comes."""
        self._take_note()
        self._take_note = lambda: None
        extent = extent_of(batches)
        if self._engine.state.has_given_way:
            self._engine.state.has_given_way = False
            self._known.clear()  # a step was not like the measured one
            self._num_failures += 1
            log.warning(
                "harmony: a step was not like the measured one, and what was to stay on GPUs had to go; %s",
                "steps are measured anew" if self._num_failures < _MOST_FAILURES else "nothing stays any more",
            )
        if self._num_failures == _MOST_FAILURES:
            self.let_go()
            return
        known = self._known.setdefault((kind, len(batches)), [])
        measured = min((one for one in known if covers(one.extent, extent)), key=_size, default=None)
        if measured is None:
            self.let_go()
            if kind == "training" and self._is_to_come():
                return
            self._engine.measuring.measure(trains=kind == "training")
            self._take_note = functools.partial(self._note_usage, known, extent)
            return
        self._engine.take_up(self._plan_for(measured), measured.calls if kind == "training" else None)
        if kind == "training" and measured.extent == extent and not measured.is_complete:
            holding = self._engine.measuring.watch(self._engine.plan)
            self._take_note = functools.partial(self._note_holding, measured, holding)

    def _is_to_come(self) -> bool:
        """Whether devices will update weights, but have not begun: the first update of an optimizer is the host's."""
        return self._engine.counters.steps < 2 and any(pack.update == "device" for pack in self._engine.plan.packs)

    def let_go(self) -> None:
        """Nothing is known of the next step."""
        self._base = self._base or self._engine.plan
        self._engine.take_up(self._base)

    def forget(self) -> None:
        """The plan is about to be another one."""
        self.let_go()
        self._base, self._take_note = None, lambda: None
        self._known.clear()

    def _note_usage(self, known: list[_Measured], extent: Extent) -> None:
        measuring = self._engine.measuring
        usage, measuring.usage = measuring.usage, None
        if usage is not None:
            known.insert(0, _Measured(extent, self._engine.calls, usage, usage))
            del known[_MOST_EXTENTS:]

    def _note_holding(self, measured: _Measured, holding: Holding) -> None:
        if not holding.is_complete:
            return
        before = self._plan_for(measured)
        measured.usage, measured.plan = holding.correct(measured.estimate), None
        measured.num_corrections += 1
        after = self._plan_for(measured)
        is_same = after.stash_stays == before.stash_stays and set(after.keep) == set(before.keep)
        measured.is_complete = is_same or measured.num_corrections == _MOST_CORRECTIONS

    def _plan_for(self, measured: _Measured) -> Plan:
        """With as much left as there is now: the user's own code may have put something on the devices since."""
        assert self._base is not None
        state = self._engine.state
        in_use = [device.allocated_bytes() for device in self._engine.cluster.devices]
        beside = [total - slots for total, slots in zip(in_use, state.weights.slot_nbytes(), strict=True)]
        grown = tuple(max(0, now - then) for now, then in zip(beside, measured.usage.resting, strict=True))
        if measured.plan is None or measured.grown != grown:
            measured.plan = _plan(self._base, measured.usage, grown, self._moves_stash)
            measured.grown = grown
        return measured.plan


def _size(measured: _Measured) -> int:
    return sum(shape.numel() for shape in measured.extent)


def _plan(base: Plan, usage: Usage, grown: tuple[int, ...], moves_stash: bool) -> Plan:
    plan = let_stay(base, usage, grown, moves_stash=moves_stash)
    log.info(
        "harmony: weights of %d of %d packs, stashes of %d packs and activations of %d layers stay; %s at most",
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
        size <= most
        for shape, other in zip(extent, known, strict=True)
        for size, most in zip(shape, other, strict=True)
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
