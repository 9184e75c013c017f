"""The runtime's rules: the tasks of steps in the order in which the engine enqueues them.

What differs from what a schedule could ask for (`rules.own`): packs and microbatches are the same both ways; in pp a pack
is on the same device both ways; every layer recomputes by itself, but for the very last one, which keeps its activations;
each copy waits for what was enqueued on its device when it was asked for (`runtime.transfer`, `runtime.stash`).

The controller runs ahead of all devices, which is why "enqueued so far" is what orders things. It waits when the gradients
of too many packs are on the host, for the update of a pack that it is about to use, and at the end of a step for copies
between devices and host.
"""

import functools
from collections.abc import Iterator, Sequence
from functools import cache

from harmony_lightning.plan.graph import NUM_LANES, Kind, Lane, TaskGraph
from harmony_lightning.plan.schedule import Schedule, split
from harmony_lightning.scheduler.clock import Clock, Event, Listener, Recorder
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.fair import fair_times
from harmony_lightning.scheduler.runtime.lanes import RuntimeLanes
from harmony_lightning.scheduler.runtime.sized_plan import sized_plan
from harmony_lightning.scheduler.runtime.slots import GradientSlots, Point, WeightSlots
from harmony_lightning.scheduler.runtime.updates import RuntimeUpdates
from harmony_lightning.scheduler.runtime.visitors import Group, following_visits, groups_of, members

_INPUT_ACCESSES = 3
"""Of host memory, when a part of the minibatch is put where devices copy from."""
_NUM_STEPS = 4
"""The first steps are not in full flow."""


class RuntimeSteps:
    """Tells one step after another to a listener."""

    def __init__(self, schedule: Schedule, costs: Costs, listener: Listener) -> None:
        self.schedule, self.costs = schedule, costs
        plan = self.plan = sized_plan(schedule, costs)
        self.packs = schedule.packs_backward
        self.sizes = split(schedule.minibatch, schedule.microbatch_backward)
        count, num_devices = len(self.sizes), schedule.num_devices
        self.places = [
            tuple(plan.device(p, m) for m in range(count)) if plan.is_dealt(p) else (plan.device(p, 0),) * count
            for p in range(len(self.packs))
        ]
        """By pack and microbatch, the device."""
        self.visitors = [list(dict.fromkeys(places)) for places in self.places]
        self.goes_back = [costs.profile.glue_bytes > 0] * len(self.packs)
        """Whether gradients go through a pack."""
        for p, pack in enumerate(plan.packs):
            self.goes_back[p] |= pack.trainable_nbytes > 0 or (p > 0 and self.goes_back[p - 1])
        together = [schedule.microbatches_per_forward] * (len(self.packs) - 1) + [1]
        self._groups = list(map(groups_of, self.places, together))
        self._entering = [
            [sum(costs.input_bytes(self.sizes[m], self.packs[p][0]) for m in members(group)) for group in groups]
            for p, groups in enumerate(self._groups)
        ]
        """By pack and group, bytes."""
        self._joint = {
            (p, m) for p, of in enumerate(self._groups) for group in of for t in group.values() if len(t) > 1 for m in t
        }
        """Packs and microbatches that go through them in a joint call."""
        self._following = following_visits(self.visitors)
        self._followed = following_visits(self.visitors[::-1])
        active = {d for visitors in self.visitors for d in visitors}
        self.lanes = RuntimeLanes(schedule, costs, listener, len(active))
        self.weights = [
            WeightSlots(
                plan, d, functools.partial(self._swap_in, d), self._finish, functools.partial(self.lanes.now, d)
            )
            for d in range(num_devices)
        ]
        self.gradient_slots = [GradientSlots(plan, d) for d in range(num_devices)]
        self.updates = RuntimeUpdates(
            plan, self.packs, costs, self.lanes, self.visitors, self.weights, self.gradient_slots
        )
        self._kept = frozenset((*schedule.keep, schedule.num_layers - 1))
        self._backward_seconds = cache(self._sum_backward_seconds)
        self._enqueued_behind: list[Event] = [None] * len(self.packs)
        """By pack: the update that its last swap-in has waited for."""
        self.starts: list[Event] = []
        """First computation of each step."""

    def step(self) -> None:
        """Tell the next step."""
        last, count = len(self.packs) - 1, len(self.sizes)
        for d, weights in enumerate(self.weights):
            first = next((p for p, visitors in enumerate(self.visitors) if d in visitors), None)
            if first is not None:
                weights.prefetch(first)
        self._arrived: dict[int, Event] = {}
        """By microbatch, what it needs in the pack that it comes to next; gone when it is there."""
        self.outputs: list[Point] = [()] * count
        """By microbatch: its output is computed."""
        self.gradients: list[Event] = [None] * count
        """By microbatch: the gradient of the next pack's input has arrived."""
        self.stashed: dict[tuple[int, int], Event] = {}
        self._brought: dict[tuple[int, int, bool], Event] = {}
        """By pack and microbatch: the stash of the last layer is back, and those of the others."""
        for pack in range(last + 1):
            self._forward(pack)
        self.lanes.wait(*self.updates.updated)  # new weights that leave devices may still be on their way
        self.updates.send(last, self.costs.gradient_bytes(self.packs[last]))
        for d in self.visitors[last]:
            self.weights[d].release(last)
        self._look_ahead([(p, m) for p in range(last - 1, -1, -1) if self.goes_back[p] for m in range(count)])
        for pack in range(last - 1, -1, -1):
            if self.goes_back[pack]:
                self._backward(pack)
        for weights in self.weights:
            weights.end_step(lambda pack: self.plan.packs[pack].trainable_nbytes > 0)
        self.lanes.end_step()

    # Visits -----------------------------------------------------------------------------------------------------------

    def _forward(self, pack: int) -> None:
        is_fused = pack == len(self.packs) - 1
        self.lanes.turn += 1
        upcoming = dict(self._following[pack])
        stays = is_fused or self.schedule.stash == "device" or pack in self.schedule.stash_stays
        leaves = self.goes_back[pack] and not stays
        first, last = self.packs[pack]
        layers = [(layer, layer) for layer in range(first, last + 1)]
        for group in self._sending_ahead(pack):
            for m in members(group):
                self.lanes.begin_turn(self.places[pack][m])
                if pack == 0:
                    self._bring_input(self.places[pack][m], m)
            for d, together in group.items():
                waits = self._acquire(d, pack, upcoming), *(self._arrived.pop(m, None) for m in together)
                # Those that go together are given their turns anew for every layer.
                for span in layers if leaves and len(together) > 1 else [(first, last)]:
                    if span[0] > first:
                        self.lanes.begin_turn(d)
                    seconds = self._forward_seconds(together, span)
                    done = self.lanes.compute(d, seconds, Kind.FORWARD, together[0], *waits)
                    for m in together if leaves else ():
                        if m != together[0]:
                            self.lanes.begin_turn(d)
                        nbytes = self.costs.stash_bytes(self.sizes[m], span)
                        self.stashed[pack, m] = self.lanes.send_stash(d, m, nbytes, done)
                if pack == together[0] == 0:
                    self.starts.append(done)
                for m in together:
                    self.outputs[m] = self.lanes.now(d)
                    if is_fused:
                        self.lanes.begin_turn(d)
                        self._compute_backward(pack, m)
        self._leave(pack, self._following[pack])

    def _bring_input(self, d: int, m: int) -> None:
        """Of the minibatch: the controller puts it where a device can copy it from, and user code waits for that copy."""
        nbytes = self.costs.input_bytes(self.sizes[m], 0)
        self.lanes.wait(nbytes=_INPUT_ACCESSES * nbytes)
        self.lanes.compute(d, nbytes / self.lanes.host_share, Kind.INPUT_IN, m, nbytes=nbytes)

    def _forward_seconds(self, group: Sequence[int], span: tuple[int, int]) -> float:
        """A joint call may be larger than any that was profiled: as of several of those then. What it takes is put
        together, and what it returns is taken apart."""
        samples = sum(self.sizes[m] for m in group)
        if len(group) == 1:
            return self.costs.forward_seconds(samples, span)
        full, rest = divmod(samples, self.costs.profile.microbatch_sizes.forward[-1])
        sizes = [self.costs.profile.microbatch_sizes.forward[-1]] * full + [rest] * (rest > 0)
        copied = sum(2 * self.costs.input_bytes(samples, q) for q in range(span[0], span[1] + 1))
        copied += sum(2 * self.costs.input_bytes(samples, q + 1) for q in range(span[0], span[1] + 1))
        return sum(self.costs.forward_seconds(size, span) for size in sizes) + self.costs.device_seconds(copied)

    def _sending_ahead(self, pack: int) -> Iterator[Group]:
        """Groups, with what they need on its way: as `runtime.microbatch.sending_ahead`."""
        groups, entering, num_sent, travelling = self._groups[pack], self._entering[pack], 0, 0.0
        for index, group in enumerate(groups):
            while pack and num_sent < len(groups):
                nbytes = entering[num_sent]
                if num_sent > index + self.schedule.prefetch and travelling + nbytes > self.lanes.travelling_nbytes:
                    break
                for m in members(groups[num_sent]):
                    self._arrived[m] = self._send_output(pack, m)
                num_sent, travelling = num_sent + 1, travelling + nbytes
            travelling -= entering[index]
            yield group

    def _send_output(self, pack: int, m: int) -> Event:
        """Of the pack before, for this one; None if it is where it is needed."""
        source, target = self.places[pack - 1][m], self.places[pack][m]
        if source == target:
            return None
        nbytes = self.costs.input_bytes(self.sizes[m], self.packs[pack][0])
        return self.lanes.send(source, target, Kind.OUTPUT_PEER, m, nbytes, self.outputs[m])

    def _backward(self, pack: int) -> None:
        self.lanes.turn += 1
        back = len(self.packs) - 1 - pack
        following = {d: len(self.packs) - 1 - p for d, p in self._followed[back].items()}
        following = {d: p for d, p in following.items() if self.goes_back[p]}
        upcoming = dict(following)
        self.updates.bring_states(pack)
        for m in range(len(self.sizes)):
            d = self.places[pack][m]
            ahead = self._ahead.pop((pack, m), None)
            if ahead is not None:
                self._bring_back(ahead)
            elif not self.schedule.prefetch:
                self._bring_stash(pack, m, self.gradients[m], is_first=True)
            self.lanes.begin_turn(d)
            weights = self._acquire(d, pack, upcoming)
            self._compute_backward(pack, m, self.gradients[m], weights)
        self.updates.send(pack, self.costs.gradient_bytes(self.packs[pack]))
        self._leave(pack, following)

    def _compute_backward(self, pack: int, m: int, *after: Event) -> None:
        """And the gradient of its input goes to where that was computed."""
        d, (first, last), size = self.places[pack][m], self.packs[pack], self.sizes[m]
        is_joint = (pack, m) in self._joint
        seconds = self._backward_seconds(size, (first, last), is_joint)
        left: Point = ()
        if self.places[pack].index(d) == m:  # the first one here: its gradients are put where those of others are added
            left = self.gradient_slots[d].enter(pack)
            seconds = max(0.0, seconds - self.costs.device_seconds(self.costs.gradient_bytes((first, last))))
        if left or (first < last and (pack, m) in self.stashed):
            # The last layer waits for its own stash alone, and has made its gradients before they need others' place.
            begin = min(seconds, self._backward_seconds(size, (last, last), is_joint))
            self.lanes.compute(d, begin, Kind.BACKWARD, m, *after, self._brought.pop((pack, m, True), None))
            self._bring_stash(pack, m, is_first=False)
            seconds, after = seconds - begin, left
        else:
            after = (*after, self._brought.pop((pack, m, True), None))
        done = self.lanes.compute(d, seconds, Kind.BACKWARD, m, *after, self._brought.pop((pack, m, False), None))
        if pack == 0 or not self.goes_back[pack - 1]:
            return
        source, target = d, self.places[pack - 1][m]
        self.gradients[m] = done
        if source != target:
            nbytes, ready = self.costs.input_bytes(size, first), self.lanes.now(d)
            self.gradients[m] = self.lanes.send(source, target, Kind.GRADIENT_PEER, m, nbytes, ready)

    def _sum_backward_seconds(self, size: int, span: tuple[int, int], is_joint: bool) -> float:
        """Recompute included, but for layers that keep their activations."""
        seconds = self.costs.backward_seconds(size, span) + self.costs.forward_seconds(size, span)
        if is_joint:  # such a call leaves no graph, so that layers are run again as a whole
            seconds += self.costs.forward_seconds(size, span) - self.costs.recompute_seconds(size, span)
        kept = (layer for layer in range(span[0], span[1] + 1) if layer in self._kept)
        return max(0.0, seconds - sum(self.costs.recompute_seconds(size, (layer, layer)) for layer in kept))

    def _look_ahead(self, order: Sequence[tuple[int, int]]) -> None:
        """Of visits in backward: which others' stashes set out when they begin; those of the first ones do at once."""
        self._ahead: dict[tuple[int, int], tuple[int, int]] = {}
        latest: dict[int, tuple[int, int]] = {}
        for visit in order if self.schedule.prefetch else ():
            d = self.places[visit[0]][visit[1]]
            if d in latest:
                self._ahead[latest[d]] = visit
            else:
                self._bring_back(visit)
            latest[d] = visit

    # Weights and stashes ----------------------------------------------------------------------------------------------

    def _acquire(self, d: int, pack: int, upcoming: dict[int, int]) -> Event:
        weights = self.weights[d]
        arrived = weights.acquire(pack)
        following = upcoming.pop(d, None)
        if following is not None:
            weights.prefetch(following)
        return arrived

    def _leave(self, pack: int, following: dict[int, int]) -> None:
        for d in following:
            self.weights[d].release(pack)

    def _swap_in(self, d: int, pack: int, released: Point, trained_only: bool) -> Event:
        lanes, updates, sizes = self.lanes, self.updates, self.plan.packs[pack]
        nbytes = sizes.trained_nbytes if trained_only else sizes.nbytes
        self._enqueued_behind[pack] = updates.updated[pack]
        if pack in updates.weights_there:
            self._enqueued_behind[pack], newer = None, updates.find_there(pack)
            seconds, lane = updates.device_seconds(pack, 2), NUM_LANES * d + Lane.SWAP_IN
            arrived = lanes.run(lane, seconds, Kind.WEIGHTS_IN, lanes.turn, 0, 0, *released, lanes.controller, newer)
            nbytes -= sizes.trained_nbytes
            if not nbytes:
                return arrived
            released = (arrived,)
        waits = (*released, self._enqueued_behind[pack], lanes.controller)
        return lanes.copy(d, Lane.SWAP_IN, Kind.WEIGHTS_IN, 0, nbytes, *waits)

    def _finish(self, pack: int) -> None:
        """A swap-in must have been enqueued, which is done behind the last update of the weights on the host."""
        if self._enqueued_behind[pack] is not None:
            self.lanes.wait(self._enqueued_behind[pack])

    def _bring_back(self, visit: tuple[int, int]) -> None:
        """All that a microbatch has stashed in a pack."""
        self._bring_stash(*visit, is_first=True)
        self._bring_stash(*visit, is_first=False)

    def _bring_stash(self, pack: int, m: int, *after: Event, is_first: bool) -> None:
        """That of the last layer, which comes first, or those of the others."""
        stashed = self.stashed.get((pack, m))
        first, last = self.packs[pack]
        span = (last, last) if is_first else (first, last - 1)
        if stashed is None or span[0] > span[1] or (pack, m, is_first) in self._brought:
            return
        d = self.places[pack][m]
        nbytes = self.costs.stash_bytes(self.sizes[m], span)
        waits = (stashed, *after, *self.lanes.now(d), self.lanes.controller)
        self._brought[pack, m, is_first] = self.lanes.copy(d, Lane.STASH_IN, Kind.STASH_IN, m, nbytes, *waits)


def runtime_seconds(schedule: Schedule, costs: Costs, num_steps: int = _NUM_STEPS) -> float:
    """From the start of one step to that of the next, in full flow; each GPU has a fixed share of what they share."""
    clock = Clock(schedule.num_devices)
    steps = RuntimeSteps(schedule, costs, clock)
    for _ in range(num_steps):
        steps.step()
    seconds: float = steps.starts[-1] - steps.starts[-2]
    return seconds


def fair_seconds(schedule: Schedule, costs: Costs) -> float:
    """The same, links and host memory being shared by those that use them: slower to find out, and closer to the truth."""
    graph, steps = settled_steps(schedule, costs)
    ends = fair_times(graph, costs.machine, dict(steps.updates.jobs)).ends
    return ends[steps.starts[-1]] - ends[steps.starts[-2]]


def settled_steps(schedule: Schedule, costs: Costs) -> tuple[TaskGraph, RuntimeSteps]:
    """Some steps, the last of which are in full flow, and who told them."""
    recorder = Recorder(schedule.num_devices)
    steps = RuntimeSteps(schedule, costs, recorder)
    for _ in range(_NUM_STEPS):
        steps.step()
    return recorder.graph, steps
