"""The weights of all devices: masters, the slots that hold copies of them, and the updates that are taken there.

`residency` knows one device; here is what concerns several, or the masters behind them all. Where the host is the only
device the masters serve directly, and most of this does nothing.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony_lightning.hardware.device import Cluster, Device, Event
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.updates.device_update import DeviceUpdates
from harmony_lightning.runtime.updates.gradients import GradientStore
from harmony_lightning.runtime.updates.update import JustInTimeUpdate
from harmony_lightning.runtime.weights.host_weights import HostWeights
from harmony_lightning.runtime.weights.masters import WeightStore
from harmony_lightning.runtime.weights.residency import DeviceWeights
from harmony_lightning.runtime.weights.weight_slot import Weights
from harmony_lightning.runtime.worker import HostWorker


class SwappedWeights:
    """Of one root module under one plan.

    Attributes:
        upcoming: by device, the pack to swap in behind the running one.
        slot_nbytes: bytes that slots for weights take now, by device.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        cluster: Cluster,
        counters: Counters,
        gradients: Callable[[Callable[[Iterable[str]], list[Event]]], GradientStore],
    ) -> None:
        """`gradients` makes the store of gradients, given what tells the points behind the last swap-ins of weights."""
        self._parameters = parameters
        self._plan = plan
        self._packs_of: dict[str, list[int]] = {}
        for index, pack in enumerate(plan.packs):
            for name in pack.parameters:
                self._packs_of.setdefault(name, []).append(index)
        self.upcoming: dict[int, int] = {}
        self._store: WeightStore | None = None
        self._updates: DeviceUpdates | None = None
        self._loaders: list[HostWorker] = []
        """By device, who enqueues its swap-ins: they wait for updates, and the controller need not."""
        self._slots: list[DeviceWeights] | list[HostWeights] = []
        self.gradients = gradients(self._reads)
        if cluster.host_is_device:
            self._slots = [HostWeights(parameters, plan)]
            return
        store = self._store = WeightStore(parameters, plan, cluster)
        self._loaders = [HostWorker(cluster, f"swap-in-{device.index}") for device in cluster.devices]
        self.gradients.casts = store.narrow
        await_updates = self.gradients.await_updates
        slots = self._slots = [
            DeviceWeights(device, store, plan, counters, loader, await_updates, self._reads)
            for device, loader in zip(cluster.devices, self._loaders, strict=True)
        ]
        self._updates = self.gradients.updates = DeviceUpdates(
            parameters, plan, cluster, counters, store, slots, self._loaders, await_updates, self._reads
        )
        for device, one in enumerate(slots):
            one.find_newer = functools.partial(self._updates.slots.newer, device=device)

    def _reads(self, names: Iterable[str]) -> list[Event]:
        names = frozenset(names)
        if self._store is not None:
            self._store.narrow.await_casts(names)
        packs = sorted({pack for name in names for pack in self._packs_of.get(name, ())})
        reads = (slots.last_read(pack) for slots in self._slots for pack in packs)
        return [read for read in reads if read is not None]

    # On devices -------------------------------------------------------------------------------------------------------

    def of_site(self, site: Site, device: Device, trained: Sequence[str]) -> Weights:
        """Device-resident weights of a layer; those in `trained` require a gradient."""
        if site.pack is None:
            return Weights()
        weights = self._slots[device.index].acquire(site.pack, site.weight_names)
        upcoming = self.upcoming.pop(device.index, None)
        if upcoming is not None:
            self._slots[device.index].prefetch(upcoming)
        for name in site.weight_names:
            weight, trains = weights[name], name in trained
            if weight.requires_grad is not trains:
                weight.requires_grad_(trains)
        return weights

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in slot memory, and so will be overwritten."""
        for slots in self._slots:  # noqa: SIM110  # a generator takes twice as long
            if slots.holds(tensor):
                return True
        return False

    def off_the_arena(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or a copy if it lies in slot memory."""
        return tensor.clone() if self.holds(tensor) else tensor

    def refer(self, device: Device, tensor: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """What finds a tensor in slot memory again when the slot holds another pack; None for others."""
        slots = self._slots[device.index]
        if isinstance(slots, HostWeights) or (found := slots.find_slice(tensor)) is None:
            return None
        return functools.partial(slots.restore, *found)

    def prefetch_first(self) -> None:
        """A step begins: on each device, bring in the pack that comes first there."""
        for device in range(len(self._slots)):
            packs = range(len(self._plan.packs))
            first = next((p for p in packs if device in self._plan.visitors(p)), None)
            if first is not None:
                self._slots[device].prefetch(first)

    def release(self, pack: int, device: int) -> None:
        """A pack's weights are not needed on a device for now."""
        self._slots[device].release(pack)

    def release_all(self) -> None:
        """No weights are needed on any device for now."""
        for slots in self._slots:
            slots.release_all()

    def allocate(self, device: Device) -> None:
        """Make the device's slots for weights now, not when they are first needed."""
        self._slots[device.index].allocate()

    def slot_nbytes(self) -> list[int]:
        """Bytes that slots for weights take now, by device."""
        return [slots.slots_nbytes for slots in self._slots]

    def let_go_idle(self, device: Device) -> bool:
        """Free slots that a device can do without. Returns whether there were any."""
        return self._slots[device.index].let_go_idle()

    def take_up(self, plan: Plan) -> None:
        """Go on under another plan for the same packs."""
        if plan.resident != self._plan.resident:
            for slots in self._slots:
                slots.change_slots(plan)
        self._plan = plan

    # Masters ----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A step begins."""
        store = self._store
        if store is None or not store.has_leaked:
            return
        store.expect_writes()
        if any(arena.numel() for arena in store.narrow.arenas):
            for read in self._reads(self._parameters):  # of the last step, perhaps, of narrow weights
                read.synchronize()
            store.narrow.forget()

    def expect_writes(self, *, trained_only: bool = False) -> None:
        """Masters are written, or are going to be: device copies are no good any more."""
        if self._store is not None:
            self._store.expect_writes(trained_only=trained_only)

    def notice_look(self, arguments: Iterable[Any], *, leaks: bool) -> None:
        """User code between steps is about to work with these, and may write masters behind any view of them."""
        store = self._store
        if store is None or not (store.is_copied or leaks):
            return
        if seen := [leaf for leaf in arguments if isinstance(leaf, torch.Tensor) and store.holds(leaf)]:
            store.has_leaked |= leaks
            store.expect_writes_of(seen)

    @property
    def has_leaked(self) -> bool:
        """Whether somebody may write masters without torch."""
        return self._store is not None and self._store.has_leaked

    def is_master_memory(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the host lies in the memory of masters."""
        in_arena = self._store is not None and self._store.holds(tensor)
        return in_arena or tensor.data_ptr() in {p.data_ptr() for p in self._parameters.values()}

    def forget_casts(self, updated: Collection[str] | None = None) -> None:
        """Masters may have been written, all or those that were `updated` in the last step, and by nobody else: narrow
        weights have to be cast again before they travel, unless they have been, behind their update."""
        if self._store is None:
            return
        if updated is None:
            self._store.narrow.forget()
        else:
            self._store.narrow.forget_updated(updated)

    # Updates ----------------------------------------------------------------------------------------------------------

    def begin_updates(self, update: JustInTimeUpdate | None) -> None:
        """A backward begins; `update` is to be taken on devices for the packs of which the plan says so."""
        if self._updates is not None:
            self._updates.begin(update)

    def prefetch_states(self, pack: int) -> None:
        """The backward of a pack begins, and its update will come behind."""
        if self._updates is not None:
            self._updates.prefetch(pack)

    def end_updates(self) -> None:
        """No gradient will be complete on a device any more."""
        if self._updates is not None:
            self._updates.end()

    @property
    def is_behind(self) -> bool:
        """Whether devices have newer weights, or states of the optimizer, than the host."""
        return self._updates is not None and self._updates.slots.is_behind()

    def bring_home(self, names: Iterable[str] | None = None) -> None:
        """Return when the host has the newest weights and states: of all, or of these weights at least."""
        if self._updates is not None:
            self._updates.slots.bring_home(names)

    def await_masters(self, names: Iterable[str]) -> None:
        """Return when the host has the newest of these weights, updates that are on their way included."""
        self.gradients.await_updates(names)
        self.bring_home(names)

    # Threads ----------------------------------------------------------------------------------------------------------

    def finish_enqueuing(self) -> None:
        """Return when all swap-ins that were asked for are in their lanes."""
        for loader in self._loaders:
            loader.wait()

    def wait(self) -> None:
        """The same, and when all casts are done."""
        self.finish_enqueuing()
        if self._store is not None:
            self._store.narrow.worker.wait()

    def drain(self) -> None:
        """The same; raise what has gone wrong there."""
        for loader in self._loaders:
            loader.drain()
        if self._store is not None:
            self._store.narrow.worker.drain()

    def close(self) -> None:
        """Let go of threads and of device memory: nobody else would end the circle of those who wait for weights."""
        for loader in self._loaders:
            loader.close()
        if self._store is not None:
            self._store.narrow.worker.close()
        self._slots, self._store = [], None
        if self._updates is not None:
            self._updates.slots.close()
        self._updates = self.gradients.updates = None
        self.gradients.close()
