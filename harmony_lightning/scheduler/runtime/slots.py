"""Slots of one device in a simulation: when a swap-in may begin, and what it finds there already.

The rules are the runtime's (`runtime.weights.residency`, `runtime.updates.gradient_slots`); what is left out is user code
that calls packs out of turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

from harmony_lightning.plan import Plan
from harmony_lightning.scheduler.clock import Event

Point = tuple[Event, ...]
"""Behind all of these."""


@dataclass(slots=True, eq=False)
class _Slot:
    pack: int
    start: int
    stop: int
    is_own: bool = False
    """It lies in memory that no other slot shares."""
    is_free: bool = True
    """Nobody needs the pack here now."""
    is_good: bool = False
    is_stale: bool = False
    """What trains has been written since: it has to come again, and nothing else."""
    is_awaited: bool = False
    """Somebody has waited for the swap-in to be enqueued."""
    released: Point = ()
    """Behind the last computation on its content; empty once a swap-in has waited for that."""

    def overlaps(self, other: "_Slot") -> bool:
        if self.is_own or other.is_own:
            return self is other
        return max(self.start, other.start) < min(self.stop, other.stop)


class WeightSlots:
    """Where packs come in on one device.

    Args:
        swap_in: brings a pack, or what trains of it alone, in behind a point; returns when it is there.
        finish: is called when a pack is first used and its swap-in must be enqueued.
        now: the point behind all that compute was given so far.
    """

    def __init__(
        self,
        plan: Plan,
        device: int,
        swap_in: Callable[[int, Point, bool], Event],
        finish: Callable[[int], None],
        now: Callable[[], Point],
    ) -> None:
        self._swap_in, self._finish, self._now = swap_in, finish, now
        self._homes = {
            pack: _Slot(pack, start, start + plan.packs[pack].slot_nbytes)
            for pack, start in plan.slot_offsets(device).items()
        }
        self._shared_nbytes = max((slot.stop for slot in self._homes.values()), default=0)
        for pack in plan.resident:
            self._homes[pack] = _Slot(pack, 0, plan.packs[pack].slot_nbytes, is_own=True)
        self._present: list[_Slot] = []
        """Those that hold something, or did until lately."""
        self._last: _Slot | None = None
        self._arrived: dict[int, Event] = {}

    def acquire(self, pack: int) -> Event:
        """Computations may use the pack's weights behind what is returned."""
        if self._last is None or self._last.pack != pack or self._last.is_free:
            self._last = self._load(pack)
            if not self._last.is_awaited:
                self._last.is_awaited = True
                self._finish(pack)
        return self._arrived[pack]

    def prefetch(self, pack: int) -> None:
        """Bring the pack in if there is room."""
        if self._find(pack) is not None or self._vacant(pack) is not None:
            self._load(pack)

    def release(self, pack: int) -> None:
        """The pack is not needed here for now."""
        for slot in self._present:
            if slot.pack == pack:
                self._release(slot)

    def end_step(self, is_updated: Callable[[int], bool]) -> None:
        """No pack is needed; what is updated of each has to come again."""
        for slot in self._present:
            self._release(slot)
            slot.is_stale |= is_updated(slot.pack)

    def _release(self, slot: _Slot) -> None:
        if not slot.is_free:
            slot.is_free, slot.released = True, self._now()

    def _find(self, pack: int) -> _Slot | None:
        return next((slot for slot in self._present if slot.pack == pack and slot.is_good), None)

    def _vacant(self, pack: int) -> _Slot | None:
        """A place where nothing is in the way: the pack's own, else at either end of the memory that is shared."""
        home = self._homes[pack]
        if self._is_vacant(home) or home.is_own:
            return home
        nbytes = home.stop - home.start
        others = (_Slot(pack, start, start + nbytes) for start in (0, self._shared_nbytes - nbytes))
        return next((slot for slot in others if self._is_vacant(slot)), None)

    def _is_vacant(self, slot: _Slot) -> bool:
        return all(one.is_free or one.pack == slot.pack for one in self._present if one.overlaps(slot))

    def _load(self, pack: int) -> _Slot:
        found = self._find(pack)
        if found is not None and not found.is_stale:
            found.is_free = False
            return found
        slot = found or self._vacant(pack) or self._homes[pack]
        before: Point = ()
        gone = [one for one in self._present if one is slot or one.overlaps(slot)]
        for one in gone:
            self._release(one)
            before += one.released
            one.released, one.is_good = (), False
        if self._last in gone:
            self._last = None
        self._present = [one for one in self._present if one not in gone]
        self._present.append(slot)
        slot.is_free, slot.is_good, slot.is_stale, slot.is_awaited = False, True, False, False
        self._arrived[pack] = self._swap_in(pack, before, found is not None)
        return slot


class GradientSlots:
    """Where gradients are added up on one device."""

    def __init__(self, plan: Plan, device: int) -> None:
        self._places = {
            pack: (start, start + plan.packs[pack].gradient_slot_nbytes)
            for pack, start in plan.gradient_offsets(device).items()
        }
        self._left: dict[int, Event] = {}
        """By pack: behind the copy of its gradients to the host, if nothing has waited for that."""

    def enter(self, pack: int) -> Point:
        """Behind this, the first gradient of the pack may be written."""
        if pack not in self._places:
            return ()
        start, stop = self._places[pack]
        inside = [p for p in self._left if self._places[p][0] < stop and start < self._places[p][1]]
        return tuple(self._left.pop(other) for other in inside)

    def leave(self, pack: int, left: Event) -> None:
        """The pack's gradients are on the host behind `left`."""
        self._left[pack] = left
