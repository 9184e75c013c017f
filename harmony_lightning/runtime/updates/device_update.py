"""Updates on the device: gradients stay where they were computed, and what the optimizer remembers comes to them.

    SWAP_IN    | states of p |.
    COMPUTE    | backward of p |'-> a copy of p's weights | step |.
    UPDATE_OUT                                                    '-> weights, states of p |

The step works on a copy of the weights, beside the states, so that the weights' own slot is free for the next pack at once,
while new weights and states leave from here. Each goes to its place on the host in one piece, into the masters and the
tensors in `optimizer.state`; until it is there, the weights count as being updated, like those that the host works on
(`gradients`), and whoever looks at them waits (`engine.settle`). Packs that stay leave when somebody looks:
`update_slots`.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster, Event, Lane
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.updates.optimizer_states import StateArena, find_states, region_name
from harmony_lightning.runtime.updates.update import JustInTimeUpdate, StandIn
from harmony_lightning.runtime.updates.update_slots import UpdateSlot, UpdateSlots
from harmony_lightning.runtime.weights.arena import Layout, lay_out
from harmony_lightning.runtime.weights.masters import WeightStore
from harmony_lightning.runtime.weights.residency import DeviceWeights
from harmony_lightning.runtime.worker import HostWorker

log = logging.getLogger(__name__)


class DeviceUpdates:
    """The packs that the plan wants to be updated on devices."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        cluster: Cluster,
        counters: Counters,
        store: WeightStore,
        weights: Sequence[DeviceWeights],
        loaders: Sequence[HostWorker],
        await_updates: Callable[[Iterable[str]], None],
        reads: Callable[[Iterable[str]], Iterable[Event]],
    ) -> None:
        """`loaders`, `await_updates` and `reads` are those of `UpdateSlots`."""
        self._parameters = parameters
        self._plan = plan
        self._cluster = cluster
        self._counters = counters
        self._store = store
        self._weights = weights
        self._await_updates = await_updates
        self._reads = reads
        self._update: JustInTimeUpdate | None = None
        """Of the running backward; None if its updates are none of ours."""
        self._states: dict[int, StateArena] = {}
        self._read: list[tuple[Event, list[torch.Tensor]]] = []
        """Gradients of minibatches before, on the host, and the point from which on nobody reads them."""
        self._told: set[str] = set()
        uses = Counter(name for pack in plan.packs for name in pack.parameters)
        self._layouts: dict[int, Layout] = {
            index: lay_out(parameters, (n for n in pack.parameters if parameters[n].requires_grad and uses[n] == 1))
            for index, pack in enumerate(plan.packs)
            if pack.update == "device"
        }
        """Of the weights that may be updated on a device; a tied one has gradients in several places."""
        self.slots = UpdateSlots(
            parameters, self._layouts, plan, cluster, counters, store, loaders, await_updates, reads
        )

    def begin(self, update: JustInTimeUpdate | None) -> None:
        """A backward begins, in which this update, if any, may be taken on devices."""
        self._update = update
        while self._read:
            event, gradients = self._read.pop()
            event.synchronize()
            gradients.clear()

    def end(self) -> None:
        """It ends, or is given up."""
        self._update = None
        self.slots.end()

    def prefetch(self, pack: int) -> None:
        """The backward of a pack begins: bring in what its update will need."""
        states = self._arena(pack)
        if states is not None:
            self.slots.load(pack, self._plan.update_device(pack), states)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self, pack: int, device: int, gradients: Mapping[str, torch.Tensor]
    ) -> tuple[frozenset[str], Event | None]:
        """Update a pack's weights on the device that has their gradients, all of them complete.

        Returns:
            The names of those that are updated, which may be fewer, and the point from which on the host has them, and
            nobody reads its memory; None if they stay.
        """
        stepped = frozenset(gradients).intersection(self._names(pack))
        states = self._arena(pack) if stepped else None
        if states is None or self._update is None:
            return frozenset(), None
        slot = self.slots.load(pack, device, states)
        here = self._cluster.devices[device]
        for event in (self.slots.arrived(slot, device), *self._reads(stepped)):
            here.wait(Lane.COMPUTE, event)  # what stays here may be being read from here
        earlier: list[torch.Tensor] = []
        with torch._C.DisableTorchFunction(), here.lane(Lane.COMPUTE, f"update of pack {pack}"):
            complete = {name: gradient for name, gradient in gradients.items() if name in stepped}
            stand_ins = self._stand_ins(slot, pack, device, complete, earlier)
            self._update.step_there(stand_ins)
            for name, stand_in in stand_ins.items():
                self._take_over(slot, name, stand_in)
        torch.autograd.graph.increment_version([self._parameters[name] for name in stepped])
        self._counters.updates_on_devices += 1
        arrival = self.slots.keep_or_leave(slot, pack, device, stepped)
        if earlier:
            read = here.record(Lane.COMPUTE)
            self._read.append((read, earlier))
            arrival = arrival or read
        return stepped, arrival

    def _names(self, pack: int) -> list[str]:
        """Weights that may be updated on a device in this step."""
        update = self._update
        if update is None or pack not in self._layouts or self._store.arenas[pack].is_out_of_date():
            return []
        # The first step of a weight, in which the optimizer makes its states, is the host's: then is known what they take.
        return [name for name in self._layouts[pack] if name in update.stepped and update.options(name) is not None]

    def _arena(self, pack: int) -> StateArena | None:
        """The states of a pack where they can move from; None if they cannot, or need not."""
        names = self._names(pack)
        if not names or self._update is None:
            return None
        found = find_states(self._update, names)
        if isinstance(found, str):
            self._tell_once(f"a pack is updated on the host, though the plan says on the device: {found}")
            return None
        states = self._states.get(pack)
        if states is None or not states.is_of(found):
            self._await_updates(names)
            self.slots.bring_home(names)
            states = self._states[pack] = StateArena(found, self._cluster)
        return states

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            log.warning("harmony: %s", text)

    # What is stepped --------------------------------------------------------------------------------------------------

    def _stand_ins(
        self,
        slot: UpdateSlot,
        pack: int,
        device: int,
        gradients: Mapping[str, torch.Tensor],
        earlier: list[torch.Tensor],
    ) -> dict[str, StandIn]:
        """`earlier` is given gradients of minibatches before, which are being read until they are added."""
        assert self._update is not None and slot.states is not None
        layout, weights = self._layouts[pack], self._weights[device].acquire(pack, gradients)
        copies = {name: layout[name].view(slot.bytes) for name in gradients}
        wide = [name for name in copies if name not in self._plan.packs[pack].narrow]  # masters of others are there
        if wide:
            torch._foreach_copy_([copies[name] for name in wide], [weights[name] for name in wide])
        self._weights[device].release(pack)  # the next pack need not wait for the step
        stand_ins: dict[str, StandIn] = {}
        for name, gradient in gradients.items():
            parameter, master = nn.Parameter(copies[name]), self._parameters[name]
            if master.grad is not None:
                self._counters.swap_in_bytes += master.grad.nbytes
                gradient.add_(master.grad.to(gradient.device, non_blocking=True))
                earlier.append(master.grad)
                master.grad = None
            parameter.grad = gradient
            stand_ins[name] = StandIn(parameter, dict(self._update.remembered(name)))
        for weight, key in slot.states.keys:
            if weight in stand_ins:
                stand_ins[weight].state[key] = slot.views[region_name(weight, key)]
        return stand_ins

    def _take_over(self, slot: UpdateSlot, name: str, stand_in: StandIn) -> None:
        """What the optimizer remembers now. Tensors that lie in the slot leave with it."""
        assert self._update is not None
        remembered = self._update.remembered(name)
        if not remembered and stand_in.state:
            self._update.remember(name, remembered)
        for key in remembered.keys() - stand_in.state.keys():
            del remembered[key]
        for key, value in stand_in.state.items():
            view = slot.views.get(region_name(name, key))
            if view is None:
                remembered[key] = value.cpu() if isinstance(value, torch.Tensor) else value
            elif value is not view:
                self._replace(remembered, key, value, view)

    @staticmethod
    def _replace(remembered: dict[str, Any], key: str, value: Any, view: torch.Tensor) -> None:
        """The optimizer has made a new tensor where others write the old one."""
        if isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (view.shape, view.dtype):
            view.copy_(value)
        else:
            remembered[key] = value.cpu() if isinstance(value, torch.Tensor) else value
