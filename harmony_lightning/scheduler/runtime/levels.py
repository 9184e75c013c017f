"""How much of a schedule stays on the devices by how much memory there is: the rule of `residency`, carried out once for
any memory. A search asks for it at many.

On a device that has packs of its own each thing that may stay is taken in turn until one does not fit, so what stays at
some memory is as many of the first as have peaks below it. What waits for pack j is there during all visits to packs
behind j:

    peak = slots + max over packs i of (the most in use in i + all that waits for packs up to i)

A last pack that is dealt has its place on each of its devices, and stays if that is so on all of them.
"""

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Literal

from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.residency import HEADROOM
from harmony_lightning.scheduler.runtime.memory import VisitBytes, visit_bytes
from harmony_lightning.scheduler.runtime.sized_plan import named_plan
from harmony_lightning.scheduler.runtime.staying import with_what_stays

_What = Literal["resident", "stash_stays", "keep"]
_Candidate = tuple[_What, int, float]
"""A pack or a layer, and its bytes."""


class Levels:
    """What stays under one schedule."""

    def __init__(
        self,
        schedule: Schedule,
        costs: Costs,
        *,
        moves_stash: bool = False,
        visits: Iterable[VisitBytes] | None = None,
    ) -> None:
        """
        Args:
            moves_stash: stashes go to the host whatever is left.
            visits: those of `visit_bytes`, if at hand.
        """
        self._schedule, self._costs, self._moves_stash = schedule, costs, moves_stash
        self._chains: list[tuple[list[float], list[tuple[_What, int]]]] = []
        num_packs = len(schedule.packs_backward)
        self._last = num_packs - 1
        self._is_slow = schedule.dealt not in ((), (self._last,))
        if self._is_slow:
            return  # several dealt packs need not have the same devices
        groups: list[list[int]] = [[] for _ in range(schedule.depth)]
        for p in range(num_packs):
            for d in {d % schedule.depth for d in schedule.devices_of(p)}:
                groups[d].append(p)
        most: list[dict[int, float]] = [{} for _ in groups]
        for visit in visit_bytes(schedule, costs) if visits is None else visits:
            of_device = most[visit.device % schedule.depth]
            of_device[visit.pack] = max(visit.nbytes, of_device.get(visit.pack, 0.0))
        for packs, in_use in zip(groups, most, strict=True):
            candidates = list(_Chain(schedule, costs, packs, in_use, moves_stash).take()) if packs else []
            self._chains.append((list(accumulate((peak for peak, *_ in candidates), max)), [c[1:] for c in candidates]))

    def full_bytes(self) -> dict[int, float]:
        """By device, the most that it holds with all that may stay; nothing is known where several packs are dealt."""
        return {device: peaks[-1] if peaks else 0.0 for device, (peaks, _) in enumerate(self._chains)}

    def at(self, memory_bytes: float) -> Schedule:
        """The schedule with what stays where each device offers so much."""
        if self._is_slow:
            plan = named_plan(self._schedule, self._costs, int(memory_bytes))
            return with_what_stays(self._schedule, plan, self._costs, moves_stash=self._moves_stash)
        limit = int(memory_bytes * (1 - HEADROOM))
        found = [candidates[: bisect_right(peaks, limit)] for peaks, candidates in self._chains]
        stays: dict[str, set[int]] = {"resident": set(), "stash_stays": set(), "keep": {self._schedule.num_layers - 1}}
        for (what, index), count in Counter(chain.from_iterable(found)).items():
            if count == self._num_devices(what, index):
                stays[what].add(index)
        resident, stash_stays, keep = (tuple(sorted(indices)) for indices in stays.values())
        return replace(self._schedule, resident=resident, stash_stays=stash_stays, keep=keep)

    def _num_devices(self, what: _What, index: int) -> int:
        """On which it stays, if it does."""
        is_last = index == self._last if what != "keep" else index >= self._schedule.packs_backward[self._last][0]
        return len(self._schedule.devices_of(self._last)) if self._schedule.dealt and is_last else 1


@dataclass(slots=True)
class _Chain:
    """One device, or those of all pipelines that do the same."""

    schedule: Schedule
    costs: Costs
    packs: Sequence[int]
    visits: Mapping[int, float]
    """The most while microbatches are in a pack; those of a dealt pack need not come here."""
    moves_stash: bool
    in_use: list[float] = field(init=False)
    """The same of each pack, with what stays from then on."""

    def __post_init__(self) -> None:
        self.in_use = [self.visits.get(p, 0.0) for p in self.packs]

    def take(self) -> Iterator[tuple[float, _What, int]]:
        """What may stay in the order of `residency`, and the peak with it and all before."""
        schedule, costs = self.schedule, self.costs
        sizes = split(schedule.minibatch, schedule.microbatch_backward)
        sizes = sizes[:: schedule.num_copies]
        spans, last = schedule.packs_backward, len(schedule.packs_backward) - 1
        slots = _SharedSlots([round(costs.weight_bytes(spans[p])) for p in self.packs], schedule.prefetch)

        def kept(layer: int) -> list[float] | None:
            found = {size: costs.kept_bytes(size, layer) for size in dict.fromkeys(sizes)}
            known = {size: nbytes for size, nbytes in found.items() if nbytes is not None}
            return [known[size] for size in sizes] if len(known) == len(found) else None

        if self.packs[-1] == last:
            for layer in range(spans[last][0], spans[last][1]):
                if (each := kept(layer)) is not None:
                    self.in_use[-1] += max(each) if last in self.visits else 0.0
                    yield slots.nbytes + max(self.in_use), "keep", layer
        if schedule.stash == "host" and not self.moves_stash:
            yield from self._wait(
                slots, lambda p: [("stash_stays", p, sum(costs.stash_bytes(s, spans[p]) for s in sizes))]
            )
        for index in slots.order():
            slots.set_apart(index)
            yield slots.nbytes + max(self.in_use), "resident", self.packs[index]
        if not self.moves_stash and schedule.microbatches_per_forward == 1:
            yield from self._wait(
                slots,
                lambda p: [
                    ("keep", layer, sum(each))
                    for layer in range(spans[p][0], spans[p][1] + 1)
                    if (each := kept(layer)) is not None
                ],
            )

    def _wait(
        self, slots: "_SharedSlots", of_pack: Callable[[int], list[_Candidate]]
    ) -> Iterator[tuple[float, _What, int]]:
        """What waits from forward to backward, of the latest packs first."""
        before = list(accumulate(self.in_use, max, initial=0.0))
        last, behind, added = len(self.schedule.packs_backward) - 1, 0.0, [0.0] * len(self.packs)
        for index in range(len(self.packs) - 1, -1, -1):
            behind = max(behind, self.in_use[index])
            for what, number, nbytes in of_pack(self.packs[index]) if self.packs[index] != last else ():
                behind += nbytes
                added[index] += nbytes
                yield slots.nbytes + max(before[index], behind), what, number
        self.in_use = [sum(pair) for pair in zip(self.in_use, accumulate(added), strict=True)]


class _SharedSlots:
    """Bytes of all slots for weights while packs get slots of their own, one after the other."""

    def __init__(self, sizes: list[int], prefetch: int) -> None:
        self._sizes, self._prefetch, self._own = sizes, prefetch, 0
        self._next = [*range(1, len(sizes)), -1]
        self._former = [-1, *range(len(sizes) - 1)]
        self._rotates = [True] * len(sizes)
        self._pairs = [(-self._pair(index), index, self._next[index]) for index in range(len(sizes))]
        heapq.heapify(self._pairs)

    def order(self) -> list[int]:
        """Small ones first."""
        return sorted((i for i, nbytes in enumerate(self._sizes) if nbytes), key=lambda i: (self._sizes[i], i))

    @property
    def nbytes(self) -> int:
        while self._pairs:
            most, index, following = self._pairs[0]
            if self._rotates[index] and self._next[index] == following:
                return self._own - most
            heapq.heappop(self._pairs)
        return self._own

    def set_apart(self, index: int) -> None:
        self._own += self._sizes[index]
        self._rotates[index] = False
        former, following = self._former[index], self._next[index]
        if following >= 0:
            self._former[following] = former
        if former >= 0:
            self._next[former] = following
            heapq.heappush(self._pairs, (-self._pair(former), former, following))

    def _pair(self, index: int) -> int:
        """A pack and the one that is there beside it."""
        following = self._next[index]
        return self._sizes[index] + (self._sizes[following] if self._prefetch and following >= 0 else 0)
