"""What becomes of a pack's gradients in a simulation of the runtime: they leave and the host steps the weights, or a device
does."""

from collections import deque
from collections.abc import Sequence

from harmony_lightning.plan import Plan, Urgency
from harmony_lightning.plan.graph import Kind, Lane
from harmony_lightning.plan.schedule import Span
from harmony_lightning.scheduler.clock import Event
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.lanes import RuntimeLanes
from harmony_lightning.scheduler.runtime.slots import GradientSlots, Point, WeightSlots


class RuntimeUpdates:
    """The updates of all packs.

    Attributes:
        updated: by pack, when the host has its newest weights; None if it has had them from the beginning.
        weights_there: by pack, when its newest weights are where it is updated, while they can be found there.
        jobs: of the host, with their priorities: of those that could go on, the lowest is first.
    """

    def __init__(
        self,
        plan: Plan,
        spans: Sequence[Span],
        costs: Costs,
        lanes: RuntimeLanes,
        visitors: Sequence[Sequence[int]],
        weights: Sequence[WeightSlots],
        gradients: Sequence[GradientSlots],
    ) -> None:
        """`spans` of layers and `visitors`, by pack; slots for `weights` and `gradients`, by device."""
        self.updated: list[Event] = [None] * len(plan.packs)
        self.weights_there: dict[int, Event] = {p: None for p in plan.updates_stay if plan.weights_stay(p)}
        self.jobs: list[tuple[Event, int]] = []
        self._plan, self._spans, self._costs, self._lanes, self._visitors = plan, spans, costs, lanes, visitors
        self._weights, self._gradients = weights, gradients
        self._states: dict[int, Event] = dict.fromkeys(plan.updates_stay)
        """By pack: what the optimizer remembers of it has come to the device that updates it. What stays has been there
        before, as steps in full flow are told."""
        self._slots = [deque[Point]([()] * plan.num_shared_update_slots(d)) for d in range(plan.num_devices)]
        """By device: when what was in each slot for updates that packs share has left; used least recently first."""
        self._num_buffers = plan.gradient_buffers
        self._on_host: dict[Urgency, deque[tuple[float, Event]]] = {urgency: deque() for urgency in self._num_buffers}
        """Host buffers that gradients have taken last, by urgency: their bytes, and the updates that free them."""
        self._dealt_with: list[tuple[float, Event]] = []
        """Those before."""

    def bring_states(self, pack: int) -> None:
        """An update on a device will come: what the optimizer remembers does, unless it is there."""
        if self._plan.packs[pack].update == "host" or pack in self._states:
            return
        d = self._visitors[pack][0]
        slot = () if pack in self._plan.updates_stay else self._slots[d].popleft()
        waits = (*slot, self.updated[pack], self._lanes.controller)
        nbytes = self._plan.packs[pack].state_nbytes + self._plan.packs[pack].master_nbytes
        self._states[pack] = self._lanes.copy(d, Lane.SWAP_IN, Kind.WEIGHTS_IN, 0, nbytes, *waits)

    def send(self, pack: int, nbytes: float) -> None:
        """Gradients of all microbatches are there."""
        if not nbytes:
            return
        lanes, visitors = self._lanes, self._visitors[pack]
        home, *others = visitors
        if self._plan.packs[pack].update == "device":
            for d in others:
                lanes.add_up_there(d, home, self._spans[pack])
            self._update_there(pack, home)
            return
        urgency = self._plan.urgency(pack)
        size = self._take_buffer(nbytes, urgency)
        if others:
            left = lanes.pass_on(visitors, nbytes)
        else:
            waits = (*lanes.now(home), lanes.controller)
            left = [lanes.copy(home, Lane.SWAP_OUT, Kind.WEIGHT_GRADIENTS_OUT, 0, nbytes, *waits)]
        for d, event in zip(visitors, left, strict=True):
            self._gradients[d].leave(pack, event)
        seconds, touched = self._costs.update_seconds(self._spans[pack]), self._costs.update_accesses * nbytes
        self.updated[pack] = lanes.run(int(Lane.HOST), seconds, Kind.UPDATE, lanes.turn, 0, touched, *left)
        self.jobs.append((self.updated[pack], self._plan.update_priority(pack)))
        self._on_host[urgency].append((size, self.updated[pack]))

    def _update_there(self, pack: int, d: int) -> None:
        """On a copy of the weights, so that their slot is free; new weights and states leave, or stay."""
        self.bring_states(pack)
        lanes, sizes = self._lanes, self._plan.packs[pack]
        lanes.compute(d, self.device_seconds(pack, 2), Kind.UPDATE, 0, self._states[pack])
        self._weights[d].release(pack)
        seconds = self.device_seconds(pack, self._costs.update_accesses) + self._costs.launch_seconds(self._spans[pack])
        done = lanes.compute(d, seconds, Kind.UPDATE, 0)
        if self._plan.weights_stay(pack):
            self.weights_there[pack], self.updated[pack] = done, None
            return
        stays = pack in self._plan.updates_stay
        nbytes = sizes.trainable_nbytes + (0 if stays else sizes.state_nbytes)
        left = lanes.copy(d, Lane.UPDATE_OUT, Kind.WEIGHT_GRADIENTS_OUT, 0, nbytes, done, lanes.controller)
        self.updated[pack] = left
        if not stays:
            del self._states[pack]
            self._slots[d].append((left,))
            if self._plan.is_left(pack):
                self.weights_there[pack] = done

    def find_there(self, pack: int) -> Event:
        """When a pack's newest weights are where it is updated, for a swap-in from there."""
        return self.weights_there[pack] if pack in self._plan.updates_stay else self.weights_there.pop(pack)

    def device_seconds(self, pack: int, accesses: float) -> float:
        """In which a device reads or writes the weights that train so many times."""
        return self._costs.device_seconds(accesses * self._plan.packs[pack].trainable_nbytes)

    def _take_buffer(self, nbytes: float, urgency: Urgency) -> float:
        """As `runtime.updates.host_buffers`: the controller waits for one that is used again."""
        on_host = self._on_host[urgency]
        if on_host and len(on_host) >= self._num_buffers[urgency]:
            self._dealt_with.append(on_host.popleft())
        for index, (size, free) in enumerate(self._dealt_with):
            if nbytes <= size <= 2 * nbytes:
                del self._dealt_with[index]
                self._lanes.wait(free)
                return size
        return nbytes
