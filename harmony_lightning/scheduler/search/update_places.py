"""Where packs are updated: what a search tries for one schedule at one amount of memory.

A device that updates a pack and keeps it has a second copy of its weights, and what the optimizer remembers of them. Then
no gradient, state or weight of the pack crosses a link, and the host has nothing to update. As that takes memory, it is
tried for

    first     the first pack of each device, whose gradients are the last to be complete and whose weights the first to be
              needed
    early     as many as fit in front of all else that may stay
    late      as many as fit beside all else that may stay
    all       all of them, where the host is slower than the link: of those that do not fit the states come with each
              update, and leave behind it

always the first packs of each device. With less memory there are fewer, or the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.packing import STEP_TEMPORARIES

Packs = frozenset[int]


class UpdatePlaces:
    """The choices for one schedule all of whose packs the host updates.

    Args:
        movable: packs that devices may update, ascending.
        peaks: by device, bytes that it needs under the schedule if nothing stays that need not.
    """

    def __init__(self, schedule: Schedule, costs: Costs, movable: Sequence[int], peaks: Mapping[int, float]) -> None:
        self._schedule, self._peaks = schedule, peaks
        self._all = frozenset(movable)
        count = schedule.depth  # of several pipelines the first one adds up what all have
        self._here = {d: [p for p in movable if p % count == d] for d in range(count)}
        spans = schedule.packs_backward
        self._nbytes = {
            p: round(costs.gradient_bytes(spans[p])) + round(costs.optimizer_bytes(spans[p])) for p in movable
        }
        layers = (layer for p in movable for layer in range(spans[p][0], spans[p][1] + 1))
        states = sum(self._nbytes.values()) / costs.machine.host_share(count) / count
        self._may_travel = sum(costs.update_seconds(spans[p]) for p in movable) > states
        self._temporaries = STEP_TEMPORARIES * max(map(costs.largest_weight_bytes, layers), default=0.0)

    def within(self, memory_bytes: float, beside: Mapping[int, float], stay_bytes: float) -> Iterator[Schedule]:
        """The schedule with other places, where a plan may fill so much of each device.

        Args:
            beside: by device, bytes that it needs with all that may stay, where anything does.
            stay_bytes: up to which things stay.
        """
        early = self._staying(self._peaks, memory_bytes)
        first = frozenset(p for here in self._here.values() for p in here[:1]) & early
        late = self._staying(beside, stay_bytes) & early if beside else early
        travelling = self._travelling(memory_bytes)
        tried = [(early, early), (first, first), (late, late), *([travelling] if travelling is not None else [])]
        return (_updated(self._schedule, there, stay) for there, stay in dict.fromkeys(tried) if there)

    def best_cases(self, memory_bytes: float, settled: Schedule) -> list[Schedule]:
        """No choice at this memory, or less, takes as little as the best of these, which need not fit: `settled` is the
        schedule with what stays if the host updates all."""
        early, travelling = self._staying(self._peaks, memory_bytes), self._travelling(memory_bytes)
        found = [_updated(settled, early, early)] if early else []
        return found if travelling is None else [*found, _updated(settled, self._all, early)]

    def _staying(self, taken: Mapping[int, float], memory_bytes: float) -> Packs:
        """Of each device the first packs for which there is room beside what is taken."""
        found: list[int] = []
        for device, here in self._here.items():
            room = memory_bytes - self._temporaries - taken.get(device, 0.0)
            for p in here:
                room -= self._nbytes[p]
                if room < 0:
                    break
                found.append(p)
        return frozenset(found)

    def _travelling(self, memory_bytes: float) -> tuple[Packs, Packs] | None:
        """All packs, and those that stay beside slots for the others; None where there is no room for such slots."""
        slots = 1 + self._schedule.prefetch
        shared = {d: slots * max((self._nbytes[p] for p in here), default=0) for d, here in self._here.items()}
        taken = {d: self._peaks.get(d, 0.0) + nbytes for d, nbytes in shared.items()}
        if not self._may_travel or any(nbytes + self._temporaries > memory_bytes for nbytes in taken.values()):
            return None
        return self._all, self._staying(taken, memory_bytes)


def _updated(schedule: Schedule, there: Packs, stay: Packs) -> Schedule:
    return replace(schedule, updated_there=tuple(sorted(there)), updates_stay=tuple(sorted(stay)))
