"""What a schedule may look like at some amount of memory: what waits where, what stays, and who updates which packs.

A search asks for it at *rungs*, amounts that are always the same. What is found depends on the rung and on nothing else
that memory changes, and where there is less of it, less stays and devices update fewer packs: so floors only rise from rung
to rung downwards.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.residency import HEADROOM
from harmony_lightning.scheduler.runtime.levels import Levels
from harmony_lightning.scheduler.runtime.memory import device_peak_bytes, runtime_peak_bytes, visit_bytes
from harmony_lightning.scheduler.search.runtime_bounds import runtime_bound
from harmony_lightning.scheduler.search.runtime_family import Stash
from harmony_lightning.scheduler.search.update_places import UpdatePlaces

RUNG = 2 ** (1 / 8)
"""Each rung is so many times the one below."""

Movable = Callable[[Schedule], Sequence[int]]
"""Packs of a schedule that devices may update, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A schedule with all that is decided at a rung."""

    schedule: Schedule
    bound: float
    peak_bytes: float


class Variants:
    """Those of any schedule.

    Args:
        stay: bytes up to which things stay for each byte that a plan may fill; None if nothing will.
        moves_stash: stashes go to the host whatever is left.
        movable: packs for each of which there is a choice who updates it.
    """

    def __init__(
        self,
        costs: Costs,
        stashes: tuple[Stash, ...],
        stay: float | None = None,
        moves_stash: bool = False,
        movable: Movable = lambda schedule: (),
    ) -> None:
        self._costs, self._stashes, self._stay, self._movable = costs, stashes, stay, movable
        kinds = map(costs.profile.kind, range(costs.num_layers))
        self._keepable = tuple(layer for layer, kind in enumerate(kinds) if kind.kept_bytes)
        self.step = 1 if stay is None else 2
        """From one rung that is looked at to the next."""
        visits = cache(lambda schedule: tuple(visit_bytes(schedule, costs)))
        self._peak = cache(lambda schedule: runtime_peak_bytes(schedule, costs, visits(schedule)))
        self._levels = cache(lambda one: Levels(one, costs, moves_stash=moves_stash, visits=visits(one)))
        self._places = cache(
            lambda one: UpdatePlaces(one, costs, movable(one), device_peak_bytes(one, costs, visits(one)))
        )
        self._bound = cache(lambda schedule: runtime_bound(schedule, costs))
        self._least = cache(self.least_bytes)

    def floor(self, schedule: Schedule) -> float:
        """Nothing that there is of the schedule, at whatever rung, has a lower bound: all that may stay does."""
        ideal = replace(schedule, prefetch=1, stash=self._stashes[0])
        if self._stay is not None:
            packs = tuple(range(len(schedule.packs_backward)))
            ideal = replace(ideal, resident=packs, stash_stays=packs, keep=(*schedule.keep, *self._keepable))
        there = tuple(self._movable(schedule))
        return min(self._bound(ideal), self._bound(replace(ideal, updated_there=there, updates_stay=there)))

    def on_host(self, schedule: Schedule, rung: int) -> tuple[list[Variant], float]:
        """Those with all updates on the host that fit below the next rung, with what stays at this one, and may be fastest.
        And the *floor*: nothing that there is of the schedule at this rung or below has a lower bound."""
        usable = self._usable(schedule, rung)
        if not usable:
            return [], math.inf
        best = [use for use in usable if not any(self._is_better(other, use) for other in usable)]
        found = [self.settled(use, rung) for use in best]
        # All that is good about any of them: the one that takes least leaves most room.
        places, stays = self._places(usable[-1]), self.settled(usable[-1], rung).schedule
        ideal = replace(
            stays,
            prefetch=max(use.prefetch for use in usable),
            stash=min((use.stash for use in usable), key=self._stashes.index),
        )
        cases = places.best_cases(RUNG**rung, ideal)
        return found, min(self._bound(case) for case in (*(variant.schedule for variant in found), *cases))

    def on_devices(self, schedule: Schedule, rung: int) -> list[Variant]:
        """The same with updates on devices: with the best use of memory for each place where stashes may wait."""
        best: dict[Stash, Schedule] = {}
        for use in self._usable(schedule, rung):
            best.setdefault(use.stash, use)
        found = []
        for use in best.values():
            others = self._places(use).within(RUNG**rung, *self._beside(use, rung))
            found += [self.settled(other, rung) for other in others]
        return found

    def settled(self, schedule: Schedule, rung: int) -> Variant:
        """With what stays at a rung."""
        peak = self._peak(schedule)
        if self._stay is not None:
            schedule = self._levels(schedule).at(self._stay * RUNG**rung)
        return Variant(schedule=schedule, bound=self._bound(schedule), peak_bytes=peak)

    def fits_somehow(self, schedule: Schedule, memory_bytes: float) -> bool:
        """If nothing comes ahead, nor stays that need not."""
        choices = (replace(schedule, prefetch=0, stash=stash) for stash in reversed(self._stashes))
        return any(self._fits(choice, memory_bytes) for choice in choices)

    def _usable(self, schedule: Schedule, rung: int) -> list[Schedule]:
        """Ways to use memory that fit below the next rung, best first. Stashes that stay are on the device in any case."""
        limit = RUNG ** (rung + self.step)
        stashes = self._stashes if self._stay is None else self._stashes[-1:]
        uses = (replace(schedule, prefetch=prefetch, stash=stash) for prefetch in (1, 0) for stash in stashes)
        return [use for use in uses if self._fits(use, limit)]

    def _is_better(self, one: Schedule, other: Schedule) -> bool:
        """A slot more and stashes on the device never make a step slower; but with one slot less more may stay."""
        if self._stay is not None or one is other:
            return False
        return one.prefetch >= other.prefetch and self._stashes.index(one.stash) <= self._stashes.index(other.stash)

    def _beside(self, schedule: Schedule, rung: int) -> tuple[dict[int, float], float]:
        """By device what it holds with all that may stay, and up to where things stay."""
        if self._stay is None:
            return {}, 0.0
        return self._levels(schedule).full_bytes(), self._stay * RUNG**rung * (1 - HEADROOM)

    def _fits(self, schedule: Schedule, memory_bytes: float) -> bool:
        return self._least(schedule) <= memory_bytes and self._peak(schedule) <= memory_bytes

    def least_bytes(self, schedule: Schedule) -> float:
        """Slots, and stashes of packs in front of a device's last one: quickly told, and no more than the peak."""
        costs, packs = self._costs, schedule.packs_backward
        sizes = split(schedule.minibatch, schedule.microbatch_backward)[:: schedule.num_copies]
        step = schedule.depth
        most = 0.0
        for d in range(min(step, len(packs))):
            own = here = packs[d::step]
            if schedule.dealt:
                own = tuple(span for p, span in enumerate(here) if d + p * step not in schedule.dealt)
                here = tuple(span for p, span in enumerate(packs) if d in schedule.devices_of(p))
            pairs = list(pairwise(here)) if schedule.prefetch and len(here) > 1 else [(span,) for span in here]
            slots = max((sum(map(costs.weight_bytes, pair)) for pair in pairs), default=0.0)
            slots += max((sum(map(costs.gradient_bytes, pair)) for pair in pairs), default=0.0)
            if schedule.stash == "device":
                slots += sum(costs.stash_bytes(size, span) for span in own[:-1] for size in sizes)
            most = max(most, slots)
        return most
