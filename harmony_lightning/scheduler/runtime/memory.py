"""How many bytes a schedule needs on each device when the runtime carries it out.

Slots for weights and gradients are there throughout. Beside them, while microbatch m of M is in a layer of a pack:

    working   what the layer needs beside its input, and the stashes of the layers of the pack up to it
    waiting   what the microbatches behind m have left for this pack, and those in front of it for the next one:
              inputs and outputs in forward, gradients in backward
    stash     those that stay; else one that is on its way out, or comes in ahead
    held      copies to other devices, for M microbatches while `_TRAVELLING` of the memory lasts (`transfer.Departures`),
              and the place where the next one from there arrives (`transfer.Landings`)

All of these change evenly from microbatch to microbatch, so the most is at the first one or at the last ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from harmony_lightning.plan.offsets import Lifetime, lay_at_offsets
from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.sized_plan import sized_plan

_TRAVELLING = 16
"""Of the memory, one in so many bytes may be in tensors that wait for their turn on other devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisitBytes:
    """The most in use on one device while microbatches are in a pack, slots for weights left out."""

    device: int
    pack: int
    is_backward: bool
    """The last pack's backward is part of its forward."""
    nbytes: float


def runtime_peak_bytes(schedule: Schedule, costs: Costs) -> float:
    """The most that any device holds if nothing stays that need not."""
    packs = schedule.packs_backward
    beside: dict[int, float] = {}
    for visit in visit_bytes(schedule, costs):
        beside[visit.device] = max(visit.nbytes, beside.get(visit.device, 0.0))

    def slots(device: int) -> float:
        here = [packs[p] for p in _packs_on(schedule, device)]
        return _in_turn(schedule, [costs.weight_bytes(span) for span in here])

    return max(slots(device) + nbytes for device, nbytes in beside.items()) + _update_bytes(schedule, costs)


def visit_bytes(schedule: Schedule, costs: Costs) -> Iterator[VisitBytes]:
    """In the order of the step, by device. In dp devices that do what another one does are left out."""
    num_devices, num_packs = schedule.num_devices, len(schedule.packs_backward)
    sizes = split(schedule.minibatch, schedule.microbatch_backward)
    if schedule.mode == "pp":
        devices = [
            _Device(schedule, costs, d, tuple(sizes))
            for d in range(num_devices if schedule.dealt else min(num_devices, num_packs))
        ]
    else:
        shares = [tuple(sizes[d::num_devices]) for d in range(min(num_devices, len(sizes)))]
        devices = [_Device(schedule, costs, d, share) for d, share in enumerate(shares) if share not in shares[:d]]
    for device in devices:
        yield from device.visits()


class _Device:
    """One device under one schedule, and the microbatches that come there."""

    def __init__(self, schedule: Schedule, costs: Costs, index: int, sizes: tuple[int, ...]) -> None:
        self._costs, self._index = costs, index
        self._packs, self._last = schedule.packs_backward, len(schedule.packs_backward) - 1
        self._is_dealt = schedule.mode == "dp" and schedule.num_devices > 1
        self._has_peers = schedule.mode == "pp" and schedule.num_devices > 1
        self._stride = schedule.num_devices if schedule.mode == "pp" else 1
        self._sizes, self._size, self._count = sizes, sizes[0], len(sizes)
        self._all = sum(sizes) / sizes[0]
        """Microbatches, the last one by its share where it is smaller."""
        self._leaves, self._is_ahead = schedule.stash == "host", schedule.prefetch > 0
        self._here = _packs_on(schedule, index)
        self._limit = costs.machine.memory_bytes // _TRAVELLING if self._is_ahead else 0
        self._moments = sorted({0, max(0, self._count - 2), self._count - 1})
        gradients = _in_turn(schedule, [costs.gradient_bytes(self._packs[p]) for p in self._here])
        self._fixed: float = gradients + 2 * costs.profile.glue_bytes
        joined = min(schedule.microbatches_per_forward, self._count) - 1
        self._fixed += joined * max(costs.working_bytes("forward", self._size, span) for span in self._packs)
        self._stashes = [costs.stash_bytes(self._size, span) for span in self._packs]

    def visits(self) -> Iterator[VisitBytes]:
        for pack in self._here:
            most = self._fused(pack) if pack == self._last else self._forward(pack)
            yield VisitBytes(device=self._index, pack=pack, is_backward=False, nbytes=self._fixed + most)
        for pack in reversed([pack for pack in self._here if pack != self._last]):
            yield VisitBytes(device=self._index, pack=pack, is_backward=True, nbytes=self._fixed + self._backward(pack))

    def _forward(self, pack: int) -> float:
        entering, leaving = self._boundary(pack), self._boundary(pack + 1)
        ahead = self._num_ahead(entering)

        def at(m: int) -> float:
            waiting = min(self._left(m), ahead - 1) * entering + m * leaving
            former = m * self._stashes[pack]
            if self._leaves:
                former = self._stashes[pack] if m else self._stash_before(pack)
            return self._in_layers(pack, m, backward=False) + waiting + former + self._sent_forward(pack, m)

        return self._kept(pack) + self._landing(entering) + max(map(at, self._moments))

    def _fused(self, pack: int) -> float:
        """A microbatch that ends goes back at once: its gradient takes the place of its input."""
        entering = self._boundary(pack)
        ahead = self._num_ahead(entering)

        def at(m: int) -> float:
            in_layers = max(self._in_layers(pack, m, backward=way) for way in (False, True))
            is_sent = self._has_peers and pack
            back = min(m, self._most_held(entering)) if is_sent else m
            waiting = min(self._left(m), ahead - 1) * entering + back * entering
            return in_layers + waiting + self._sent_forward(pack, m)

        former = self._stash_before(pack) if self._leaves else 0.0
        return former + self._kept(pack) + self._landing(entering) + max(map(at, self._moments))

    def _backward(self, pack: int) -> float:
        entering, leaving = self._boundary(pack), self._boundary(pack + 1)

        def at(m: int) -> float:
            left = self._left(m)
            waiting = self._in_layers(pack, m, backward=True) + left * leaving
            if not self._has_peers:
                waiting += m * entering
            elif pack:
                waiting += min(m, self._most_held(entering)) * entering
            waiting += self._sent_back(pack, m)
            if not self._leaves:
                return waiting + left * self._stashes[pack]
            following = self._stashes[pack] if left else self._stash_before(pack)
            return waiting + self._is_ahead * following + self._left_last(pack, m)

        most = max(map(at, self._moments))
        if self._is_dealt:  # sums of the other devices come to the first one weight by weight
            layers = range(self._packs[pack][0], self._packs[pack][1] + 1)
            most = max(most, self._all * entering + max(self._costs.gradient_bytes((i, i)) for i in layers))
        return most + self._kept(pack) + self._landing(leaving)

    def _left_last(self, pack: int, m: int) -> float:
        """The last stash that has left in forward is held until two more microbatches have sent something from here."""
        newest = max((p for p in self._here if p != self._last), default=pack)
        is_held = not self._has_peers or (pack == newest and self._here[-1] != self._last and (m == 0 or not pack))
        return self._stashes[newest] if is_held else 0.0

    def _left(self, m: int) -> float:
        """Microbatches behind this one."""
        return self._all - 1 - m if m < self._count - 1 else 0.0

    def _in_layers(self, pack: int, m: int, *, backward: bool) -> float:
        """Of one microbatch, in the layer that needs most."""
        first, last = self._packs[pack]
        costs, size, most = self._costs, self._sizes[m], 0.0
        way = "backward" if backward else "forward"
        comes_alone = backward and pack != self._last and self._leaves and not self._is_ahead
        for layer in range(first, last + 1):
            working = costs.working_bytes(way, size, (layer, layer))
            if backward and layer + 1 < costs.num_layers:
                working += costs.stash_bytes(size, (layer, layer))
            else:  # what the code behind a layer saves is part of what that works with
                working += costs.input_bytes(size, layer)
            if backward and layer < last:
                working += self._boundary(pack + 1)  # the gradient that the segment's backward was given
            if layer > first and not comes_alone:
                working += costs.stash_bytes(size, (first, layer - 1))
            most = max(most, working)
        return most

    def _boundary(self, pack: int) -> float:
        """Of one microbatch, as it enters the pack; the first pack's input comes from the host."""
        return self._costs.input_bytes(self._size, self._packs[pack][0]) if 0 < pack <= self._last else 0.0

    def _kept(self, pack: int) -> float:
        """Stashes of packs in front of this one that wait here."""
        return 0.0 if self._leaves else self._all * sum(self._stashes[p] for p in self._here if p < pack)

    def _stash_before(self, pack: int) -> float:
        """Of the pack that is visited here in front of this one."""
        return self._stashes[pack - self._stride] if pack - self._stride in self._here else 0.0

    # Copies between devices -------------------------------------------------------------------------------------------

    def _num_ahead(self, nbytes: float) -> int:
        """How many inputs are here at once: all if they are made here."""
        if not self._has_peers:
            return self._count
        return min(self._count, max(1 + self._is_ahead, int(self._limit // nbytes) if nbytes else self._count))

    def _landing(self, nbytes: float) -> float:
        return nbytes if self._has_peers and nbytes <= self._limit else 0.0

    def _most_held(self, nbytes: float) -> int:
        """Sources of copies, each of another microbatch, that are held at once."""
        return max(1, self._count - 1) if self._count * nbytes <= self._limit else 1

    def _sent_forward(self, pack: int, m: int) -> float:
        """Outputs of former packs, held as microbatch m comes."""
        if not self._has_peers or pack < self._stride:
            return 0.0
        newest = self._all * self._boundary(pack - self._stride + 1)
        if self._leaves:
            return newest if m == 0 or (newest <= self._limit and m < self._count - 1) else 0.0
        return newest + self._sent_long_ago(pack - self._stride, newest)

    def _sent_long_ago(self, pack: int, newest: float) -> float:
        """Where no stash leaves, no copy makes microbatches count, and what has been sent is held for as many packs."""
        total = newest
        for _ in range(self._count - 2):
            pack -= self._stride
            more = self._all * self._boundary(pack + 1) if pack >= 0 else 0.0
            if not more or total + more > self._limit:
                break
            total += more
        return total - newest

    def _sent_back(self, pack: int, m: int) -> float:
        """Outputs of forward and gradients of the pack behind, held as microbatch m comes back."""
        if not self._has_peers:
            return 0.0
        behind = pack + self._stride
        if behind <= self._last:
            gradients, outputs = self._boundary(behind), 0.0
        else:  # nothing has gone back from here
            gradients, outputs = 0.0, self._all * self._boundary(pack + 1)
            outputs += 0.0 if self._leaves else self._sent_long_ago(pack, outputs)
        if m == 0 and (self._count == 1 or self._count * gradients + outputs > self._limit):
            return gradients + outputs
        if self._count * gradients + outputs > self._limit:
            return 0.0
        is_held = m < self._count - 1 or not pack
        return self._left(m) * gradients + is_held * outputs


def _packs_on(schedule: Schedule, device: int) -> list[int]:
    """All microbatches of a dealt one are counted on each of its devices."""
    packs = range(len(schedule.packs_backward))
    if schedule.mode == "dp":
        return list(packs)
    takes_turns = device in schedule.dealt_order or not schedule.dealt_order
    return [p for p in packs if (takes_turns if p in schedule.dealt else p % schedule.num_devices == device)]


def _update_bytes(schedule: Schedule, costs: Costs) -> float:
    """Slots for updates on the device that has most, and tensors that steps make for a moment."""
    if not schedule.updated_there:
        return 0.0
    plan = sized_plan(schedule, costs)
    return plan.updates_nbytes + 2 * max(costs.gradient_bytes((q, q)) for q in range(costs.num_layers))


def _in_turn(schedule: Schedule, sizes: list[float]) -> int:
    """Bytes of slots for packs that come one after the other, as the plan lays them: `Plan.slot_offsets`, and
    `Plan.gradient_offsets`, which leaves out frozen packs."""
    present = (round(size) for size in sizes if size)
    lifetimes = tuple(Lifetime(turn, turn + 1 + schedule.prefetch, nbytes) for turn, nbytes in enumerate(present))
    ends = (offset + life.nbytes for offset, life in zip(lay_at_offsets(lifetimes), lifetimes, strict=True))
    return max(ends, default=0)
