"""What may stay on the devices, learned step by step.

A step whose batch is larger than all before it, in whatever dimension, runs under the plan by which nothing stays that need
not, and is measured. Steps of batches no larger than a measured one run under a plan that fills the memory which that one
has left. So a batch of unknown size never finds less room than it would have had without.

Steps of one size may differ in what they call, as with blocks that are skipped at times. Where a plan takes more than half
of the memory, nothing stays from the first call on that goes beyond those of the measured steps; else all does. Such calls
are looked for in the steps behind, for a while: these are measured, too, and what they have taken counts together.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
_MOST_SEARCHES = 16
"""How many steps of a run are measured because others called layers that no measured one did."""


@dataclass(slots=True)
class _Measured:
    """A step that was measured."""

    extent: Extent
    calls: Counter[str]
    """Of layers, in training: of each, the most in any step that is part of this."""
    estimate: Usage
    usage: Usage
    """The estimate, corrected by what was seen to stay."""
    num_corrections: int = 0
    is_complete: bool = False
    """Whether all that stays by the last plan was seen."""
    plan: Plan | None = None
    """The last one made for such steps, when `grown` bytes were taken by others."""
    grown: tuple[int, ...] = ()
    sought: Counter[str] = field(default_factory=Counter)
    """Calls of a step that had more of them: such a step is to be measured, too."""


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
        self._num_searches = 0
        self._take_note: Callable[[], None] = lambda: None
        """What the step that was run last has shown."""

    def before(self, kind: str, batches: Sequence[Any]) -> None:
        """A step of these batches comes."""
        self._take_note()
        self._take_note = lambda: None
        extent = extent_of(batches)
        if self._engine.state.memory.has_given_way:
            self._engine.state.memory.has_given_way = False
            self._known.clear()
            self._num_failures += 1
            log.warning(
                "harmony: memory was short, and what was to stay on GPUs had to go; %s",
                "steps are measured anew" if self._num_failures < _MOST_FAILURES else "nothing stays any more",
            )
        if self._num_failures == _MOST_FAILURES:
            self.let_go()
            return
        known = self._known.setdefault((kind, len(batches)), [])
        measured = min((one for one in known if covers(one.extent, extent)), key=_size, default=None)
        if measured is None or measured.sought:
            self.let_go()
            if kind == "training" and self._is_to_come():
                return
            self._num_searches += measured is not None
            self._engine.measuring.measure(trains=kind == "training")
            self._take_note = functools.partial(self._note_usage, known, extent, measured)
            return
        plan = self._plan_for(measured)
        if kind != "training":
            self._engine.take_up(plan)
            return
        self._engine.take_up(plan, None if _is_ample(plan) else measured.calls)
        holding = None
        if measured.extent == extent and not measured.is_complete:
            holding = self._engine.measuring.watch(self._engine.plan)
        self._take_note = functools.partial(self._note_step, measured, plan, holding)

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

    def _note_usage(self, known: list[_Measured], extent: Extent, former: _Measured | None) -> None:
        """Of a step that was measured, `former` in mind, which knows less than is to be known."""
        measuring, calls = self._engine.measuring, self._engine.calls
        usage, measuring.usage = measuring.usage, None
        if usage is None:
            return
        sought = Counter[str]()
        if former is not None:
            known.remove(former)
            usage, calls = usage.including(former.estimate), calls | former.calls
            sought = former.sought if self._num_searches < _MOST_SEARCHES else sought
        known.insert(0, _Measured(extent, calls, usage, usage, sought=sought - calls))
        del known[_MOST_EXTENTS:]

    def _note_step(self, measured: _Measured, plan: Plan, holding: Holding | None) -> None:
        """Of a step in which this was to stay."""
        calls = self._engine.calls
        beyond = calls - measured.calls
        if _is_ample(plan):  # more calls of a layer have room, but of an unknown one nothing is kept
            beyond = Counter(name for name in beyond if name not in measured.calls)
        if beyond and self._num_searches < _MOST_SEARCHES:
            measured.sought = beyond
            log.info(
                "harmony: a step called layers more often than the measured ones, such as %s; the next steps are measured, "
                "too",
                next(iter(beyond)),
            )
        elif holding is not None and calls == measured.calls:
            self._note_holding(measured, holding)
        elif holding is not None:  # less may have stayed than in the measured steps
            measured.num_corrections += 1
            measured.is_complete = measured.num_corrections == _MOST_CORRECTIONS

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


def _is_ample(plan: Plan) -> bool:
    """Whether calls that were not measured find as much room as all that were."""
    return all(2 * nbytes <= plan.memory_bytes for nbytes in plan.peak_bytes)


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
