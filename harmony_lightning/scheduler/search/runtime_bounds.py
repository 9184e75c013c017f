"""What no step under the runtime's rules can go below, without simulating it: a search need not simulate what is bounded
above the best that it knows, and looks first where the bound is lowest.

Of each device the longest chain of what it must do, and what must come before and after it:

    gpu0  | pack 0 |                                   | pack 0 | gradients out, update, weights in
    gpu1           | all that gpu1 computes   | pack 1 |
            head                                  tail

Beside that what links carry and what the host updates. What stays counts: layers that keep their activations are not
computed again, of resident packs only what trains comes in.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise

from harmony_lightning.plan.schedule import Schedule, Span, split
from harmony_lightning.scheduler.costs import Costs

_ROUNDING = 1 - 1e-6
"""Sums are rounded."""
_ADDITION_ACCESSES = 3
"""Of memory, when one gradient is added to another."""


def runtime_bound(schedule: Schedule, costs: Costs) -> float:
    """Seconds of a step in full flow are no less, however links are shared."""
    bound = _Bound(schedule, costs)
    return _ROUNDING * max(bound.compute(), bound.cycles(), bound.links(), bound.updates())


class _Bound:
    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        machine = self._machine = costs.machine
        self._schedule, self._costs = schedule, costs
        self._peer_rate = max(machine.peer_bytes_per_second, machine.host_share(1) if machine.peers_by_host else 0.0)
        self._packs = schedule.packs_backward
        self._last, self._gpus, self._depth = len(self._packs) - 1, schedule.num_devices, schedule.depth
        self._sizes = split(schedule.minibatch, schedule.microbatch_backward)
        self._pipeline_sizes = self._sizes[:: schedule.num_copies]
        """Of the first pipeline, which has most."""
        self._visitors = min(schedule.num_copies, len(self._sizes))
        self._weights = [costs.weight_bytes(span) for span in self._packs]
        self._trained = [costs.trained_bytes(span) for span in self._packs]
        self._gradients = [costs.gradient_bytes(span) for span in self._packs]
        self._there = frozenset(schedule.updated_there)
        trains = costs.profile.glue_bytes > 0
        self._goes_back = [trains := trains or nbytes > 0 for nbytes in self._gradients]
        """Whether gradients go through a pack."""
        keep = sorted({*schedule.keep, schedule.num_layers - 1})
        self._kept = [[layer for layer in keep if first <= layer <= last] for first, last in self._packs]
        self._seconds = [self._of_pack(p, self._pipeline_sizes) for p in range(len(self._packs))]
        """Of each pack's computations in the first pipeline."""
        self._dealt_seconds = [0.0] * min(self._depth, len(self._packs))
        """By device, of the last pack, where it is dealt. Where nothing trains, the first device waits for no other."""
        if self._last in schedule.dealt and any(self._gradients):
            here: list[list[int]] = [[] for _ in range(self._gpus)]
            for m, size in enumerate(self._sizes):
                here[schedule.device(self._last, m)].append(size)
            self._dealt_seconds = [self._of_pack(self._last, tuple(sizes)) for sizes in here]

    # Computations -----------------------------------------------------------------------------------------------------

    def compute(self) -> float:
        packs = range(len(self._packs))
        own = [dealt + sum(self._own(packs[d :: self._depth])) for d, dealt in enumerate(self._dealt_seconds)]
        trained = [p for p, nbytes in enumerate(self._gradients) if nbytes and p not in self._schedule.dealt]
        on_host = [p for p in trained if p not in self._there]
        # A pack's next forward waits for its backward; if its gradients leave, the next step as a whole does.
        return max(
            max(own),
            self._turn(own, trained[0], trained[0]) if trained else 0.0,
            self._turn(own, 0, on_host[0]) if on_host else 0.0,
        )

    def _own(self, packs: Sequence[int]) -> Iterator[float]:
        """What one device computes of packs that are there alone."""
        return (self._seconds[p] + self._sums((p,)) for p in packs if p not in self._schedule.dealt)

    def _turn(self, own: list[float], begin: int, first: int) -> float:
        """From the forward of a pack to its next one, or to that of `first` behind it: by the device that has most to do,
        or to wait for. Behind the last pack those that have but dealt ones."""
        head, tail, most = 0.0, self._sums((first,)) + self._update(begin), 0.0
        for d in range(begin, len(own)):
            if begin < d <= self._last:
                size = self._sizes[-1 if d in self._schedule.dealt else 0]
                head += self._costs.input_bytes(size, self._packs[d][0]) / self._peer_rate
            if d >= first:
                sums = self._sums((d,)) if d <= self._last else 0.0  # none waits for another pack's
                most = max(most, head + own[d] - sums + tail)
            if d >= self._last:
                continue
            if d >= first:
                tail += self._backward(d, self._pipeline_sizes[-1:])
                tail += self._costs.input_bytes(self._pipeline_sizes[-1], self._packs[d][1] + 1) / self._peer_rate
            head += self._forward(d, self._pipeline_sizes[: self._schedule.microbatches_per_forward])
        return most

    def _of_pack(self, pack: int, sizes: tuple[int, ...]) -> float:
        backward = self._backward(pack, sizes) if self._goes_back[pack] else 0.0
        return backward + self._forward(pack, sizes)

    def _forward(self, pack: int, sizes: tuple[int, ...]) -> float:
        span, group = self._packs[pack], self._schedule.microbatches_per_forward
        alone = self._sum(self._costs.forward_seconds, span, sizes)
        if group == 1 or pack == self._last:
            return alone
        largest = self._costs.profile.microbatch_sizes.forward[-1]
        joint = [split(sum(sizes[i : i + group]), largest) for i in range(0, len(sizes), group)]
        return min(alone, sum(self._sum(self._costs.forward_seconds, span, one) for one in joint))

    def _backward(self, pack: int, sizes: tuple[int, ...]) -> float:
        """Recompute included, as in `RuntimeSteps`."""
        span, costs, joint = self._packs[pack], self._costs, 0
        if pack != self._last and pack not in self._schedule.dealt:  # of those, any may go alone
            group = self._schedule.microbatches_per_forward
            joint = len(sizes) - (len(sizes) % group == 1) if group > 1 else 0

        def seconds(size: int, span: Span, is_joint: bool = False) -> float:
            taken = costs.backward_seconds(size, span) + costs.forward_seconds(size, span)
            if is_joint:
                taken += costs.forward_seconds(size, span) - costs.recompute_seconds(size, span)
            return max(0.0, taken - sum(costs.recompute_seconds(size, (layer, layer)) for layer in self._kept[pack]))

        total = self._sum(partial(seconds, is_joint=True), span, sizes[:joint]) + self._sum(
            seconds, span, sizes[joint:]
        )
        # The first one's gradients are not added to others.
        return max(0.0, total - costs.device_seconds(self._gradients[pack]))

    @staticmethod
    def _sum(seconds: Callable[[int, Span], float], span: Span, sizes: tuple[int, ...]) -> float:
        counted = _counted(sizes)
        if len(counted) == 1:  # mostly
            ((size, count),) = counted
            return count * seconds(size, span)
        return sum(count * seconds(size, span) for size, count in counted)

    def _sums(self, packs: Sequence[int]) -> float:
        """Where one device adds up what those of all pipelines have, to update it."""
        if self._visitors == 1 or not self._there:
            return 0.0
        total = sum(self._gradients[p] for p in packs if p in self._there)
        each = total / self._peer_rate + self._costs.device_seconds(_ADDITION_ACCESSES * total)
        return (self._visitors - 1) * each

    def _update(self, pack: int) -> float:
        """Between a pack's backward and its next forward: gradients are added up and leave, the host steps the weights,
        these come back, if the frozen ones beside them are still there."""
        if not self._gradients[pack] or pack in self._there:
            return 0.0
        copied = (self._gradients[pack] + self._trained[pack]) / self._machine.host_share(1)
        return copied + self._costs.update_seconds(self._packs[pack])

    def cycles(self) -> float:
        """From a pack's first forward all that its device computes up to its last backward, and its update."""
        most, step = 0.0, self._depth
        behind = list(self._dealt_seconds)
        for p in range(len(self._packs) - 1, -1, -1):
            if p in self._schedule.dealt:
                continue
            behind[p % step] += self._seconds[p] + self._sums((p,))
            if update := self._update(p):
                most = max(most, behind[p % step] + update)
        return most

    # Links and the host -----------------------------------------------------------------------------------------------

    def links(self) -> float:
        packs, schedule = range(len(self._packs)), self._schedule
        if schedule.dealt:
            active, groups = self._gpus, [list(packs)]
        else:
            groups = [list(packs[d :: self._depth]) for d in range(min(self._depth, len(packs)))]
            active = len(groups) * self._visitors
        entering = [self._entering(group) * self._visitors for group in groups]
        leaving = [sum(map(self._leaving, group)) for group in groups]
        together = active * self._machine.host_share(active)
        alone = self._machine.host_share(1) * active / len(groups)
        between = [sum(map(self._between, group)) for group in groups]
        ways = [[a + b for a, b in zip(way, between, strict=True)] for way in (entering, leaving)]
        links = max(max(sum(way) / together, max(way) / alone) for way in ways)
        return max(links, self._memory(sum(entering) + sum(leaving) + sum(between)))

    def _memory(self, copied: float) -> float:
        """That of the host, which is copied from and to, and where it steps weights."""
        on_host = sum(nbytes for p, nbytes in enumerate(self._gradients) if p not in self._there)
        return (copied + self._costs.update_accesses * on_host) / (2 * self._machine.host_message_bytes_per_second)

    def _entering(self, group: list[int]) -> float:
        """Of each pack that was updated on the host, what trains comes in for forward; of those that share slots the frozen
        rest, too, and all of it again for backward, unless it is still there; and stashes that left come back."""
        schedule = self._schedule
        rotating = [self._weights[p] for p in group if p not in schedule.resident]
        still_there = max(rotating, default=0.0)
        if schedule.dealt:  # each device has slots of its own, for other packs
            still_there *= self._gpus * (1 + schedule.prefetch)
        elif schedule.prefetch:
            still_there = max([still_there, *map(sum, pairwise(rotating))])
        on_host = [p for p in group if self._gradients[p] and p not in self._there]
        frozen = sum(self._weights[p] - self._trained[p] for p in on_host if p not in schedule.resident)
        # At most so much of it was left behind: no less where more is resident, so that the bound only falls with that.
        left = sum(sorted(self._weights[p] for p in group)[-1 - schedule.prefetch :])
        left *= self._gpus if schedule.dealt else 1
        forward = sum(self._trained[p] for p in on_host) + max(0.0, frozen - left)
        again = [p for p in group if p not in schedule.resident and self._goes_back[p] and p != self._last]
        if self._last in group and self._last not in schedule.resident:
            still_there = max(0.0, still_there - self._weights[self._last])
        backward = max(0.0, sum(self._weights[p] for p in again if p not in self._there) - still_there)
        stashes = sum(map(self._stash, group)) / self._visitors
        states = sum(map(self._states, group)) / self._visitors
        return forward + backward + stashes + states

    def _leaving(self, pack: int) -> float:
        if pack in self._there and pack in self._schedule.updates_stay:
            return self._stash(pack)
        return self._stash(pack) + self._gradients[pack] + self._states(pack)

    def _between(self, pack: int) -> float:
        """Of what devices send each other to add it up, where that goes by the host."""
        if pack in self._there or not self._machine.peers_by_host:
            return 0.0
        return (self._visitors - 1) * self._gradients[pack]

    def _states(self, pack: int) -> float:
        """Of an update on a device, what comes for it, and leaves with new weights."""
        if not self._gradients[pack] or pack not in self._there or pack in self._schedule.updates_stay:
            return 0.0
        return self._costs.optimizer_bytes(self._packs[pack])

    def _stash(self, pack: int) -> float:
        """Of all microbatches, where it goes to the host."""
        schedule = self._schedule
        if (
            schedule.stash == "device"
            or pack == self._last
            or pack in schedule.stash_stays
            or not self._goes_back[pack]
        ):
            return 0.0
        return self._sum(self._costs.stash_bytes, self._packs[pack], self._sizes)

    def updates(self) -> float:
        updated = (p for p, nbytes in enumerate(self._gradients) if nbytes and p not in self._there)
        return sum(self._costs.update_seconds(self._packs[p]) for p in updated)


@lru_cache(maxsize=1024)
def _counted(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(Counter(sizes).items())
