"""Slots for gradients: memory on each device in which those of a pack's weights are added up over the microbatches.

Slots lie in one piece of memory, at offsets by which packs that are differentiated at the same time do not overlap
(`Plan.gradient_offsets`). Where user code visits packs in another order, the one in the way leaves with what it has so far:
`Counters.out_of_turn`. Where memory is so short that a layer cannot be differentiated, sums wait on the host until the next
gradient is added, to the bit the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony_lightning.hardware.device import Device, Event, Lane
from harmony_lightning.plan import Plan
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.weights.arena import Layout, lay_out, layout_nbytes


@dataclass(slots=True, eq=False)
class GradientSlot:
    """Room for the gradients of one pack on one device."""

    pack: int
    device: int
    layout: Layout
    """Where each gradient lies in `bytes`."""
    memory: torch.Tensor
    """The piece that the slot lies in, with others."""
    start: int
    bytes: torch.Tensor
    """From there on."""
    is_in_use: bool = False
    """Whether gradients of the pack are here, or come."""
    written: dict[str, torch.Tensor] = field(default_factory=dict)
    """Views of the gradients that hold data."""
    narrow: set[str] = field(default_factory=set)
    """Those that are one gradient of a narrow weight, and so have no more digits than its type."""
    left: Event | None = None
    """Behind the swap-out of the former content, unless compute has waited for that."""

    def add(self, name: str, gradient: torch.Tensor, *, is_narrow: bool) -> None:
        """Add to what is there. `is_narrow`: the gradient has no more digits than a narrow weight's type."""
        view = self.written.get(name)
        if view is None:
            self.written[name] = self.layout[name].view(self.bytes).copy_(gradient)
            if is_narrow:
                self.narrow.add(name)
        else:
            view.add_(gradient)
            self.narrow.discard(name)

    def scale(self, factor: float) -> None:
        """Multiply what is there."""
        self.narrow.clear()
        for view in self.written.values():
            view.mul_(factor)

    def overlaps(self, other: "GradientSlot") -> bool:
        """Whether both may not be in use at the same time."""
        start, stop = max(self.start, other.start), min(self.start + len(self.bytes), other.start + len(other.bytes))
        return self.memory is other.memory and start < stop

    def empty(self) -> None:
        """What it held has left."""
        self.is_in_use = False
        self.written.clear()
        self.narrow.clear()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What was in a slot, on the host."""

    pack: int
    sums: dict[str, torch.Tensor]
    narrow: set[str]


class GradientSlots:
    """Those of all devices, made when they are first needed.

    Attributes:
        layouts: by pack, where the gradient of each weight that trains lies in its slot.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        devices: Sequence[Device],
        counters: Counters,
        swap_out_part: Callable[[GradientSlot], None],
    ) -> None:
        """`swap_out_part` empties a slot whose pack gets more gradients later."""
        self.layouts: list[Layout] = [
            lay_out(parameters, (name for name in pack.parameters if parameters[name].requires_grad))
            for pack in plan.packs
        ]
        self._plan = plan
        self._devices = devices
        self._counters = counters
        self._swap_out_part = swap_out_part
        self._slots: list[list[GradientSlot]] = [[] for _ in devices]
        self._waiting: dict[int, list[_Waiting]] = {}
        """By device whose slots have left: what was in them."""

    def acquire(self, pack: int, device: int) -> GradientSlot:
        """The pack's slot; compute enqueued from now on may write it."""
        self.bring_back(device)
        slots = self._slots[device] = self._slots[device] or self._make(device)
        slot = _find(slots, pack)
        if slot is None:  # a pack that should be on other devices
            self._counters.out_of_turn += 1
            slot = self._make_own(pack, device)
            slots.append(slot)
        if not slot.is_in_use:
            for other in self._slots[device]:
                if other.overlaps(slot):
                    self._make_way(other)
            slot.is_in_use = True
        return slot

    def _make_way(self, slot: GradientSlot) -> None:
        if slot.is_in_use:  # packs are visited out of turn: what it has so far waits on the host
            self._counters.out_of_turn += 1
            self._swap_out_part(slot)
        if slot.left is not None:
            self._devices[slot.device].wait(Lane.COMPUTE, slot.left)
            slot.left = None

    @torch.no_grad()
    def leave(self, device: int) -> bool:
        """Memory of the device is short: its slots go, and what is in them waits on the host. Nobody may hold a slot.
        Returns whether there were any."""
        slots, self._slots[device] = self._slots[device], []
        if not slots:
            return False
        waiting = self._waiting[device] = []
        for slot in slots:
            if slot.left is not None:
                slot.left.synchronize()
            if slot.is_in_use:
                sums = {name: view.cpu() for name, view in slot.written.items()}
                self._counters.swap_out_bytes += sum(gradient.nbytes for gradient in sums.values())
                waiting.append(_Waiting(slot.pack, sums, slot.narrow))
        return True

    @torch.inference_mode(False)
    @torch.no_grad()
    def bring_back(self, device: int) -> None:
        """Make the slots again that have left, with what was in them."""
        if device not in self._waiting:
            return
        slots = self._make(device)
        for waiting in self._waiting[device]:
            slot = _find(slots, waiting.pack)
            if slot is None:
                slot = self._make_own(waiting.pack, device)
                slots.append(slot)
            slot.is_in_use = True
            for name, gradient in waiting.sums.items():
                slot.add(name, gradient, is_narrow=name in waiting.narrow)
                self._counters.swap_in_bytes += gradient.nbytes
        self._slots[device] = slots
        del self._waiting[device]

    @property
    def devices_without(self) -> list[int]:
        """Those whose slots have left. Nothing but `acquire` and `bring_back` knows what was in them."""
        return list(self._waiting)

    def holders(self, pack: int) -> list[GradientSlot]:
        """Slots with gradients of the pack, in the order in which its microbatches visit devices."""
        visitors = self._plan.visitors(pack)
        holders = [slot for slot in self._in_use() if slot.pack == pack]
        return sorted(holders, key=lambda s: visitors.index(s.device) if s.device in visitors else len(visitors))

    def packs(self) -> list[int]:
        """Those of which there are gradients."""
        return sorted({slot.pack for slot in self._in_use()})

    def names(self, beside: Sequence[GradientSlot] = ()) -> set[str]:
        """Weights of which there are gradients, in any slot `beside` some."""
        return {name for slots in self._slots for slot in slots if slot not in beside for name in slot.written}

    def scale(self, factor: float) -> None:
        """Multiply what is there."""
        for slots in self._slots:
            for slot in slots:
                slot.scale(factor)

    def discard(self) -> None:
        """Forget what is there."""
        for slots in self._slots:
            for slot in slots:
                slot.empty()
        self._waiting.clear()

    def close(self) -> None:
        """Free the memory."""
        self._slots = [[] for _ in self._slots]
        self._waiting.clear()

    def allocate(self) -> None:
        """Make the slots of all devices now."""
        for device, slots in enumerate(self._slots):
            if not slots and device not in self._waiting and self._plan.packs_on(device):
                self._slots[device] = self._make(device)

    def _in_use(self) -> list[GradientSlot]:
        return [slot for slots in self._slots for slot in slots if slot.is_in_use]

    def _make(self, device: int) -> list[GradientSlot]:
        """All slots of a device that the plan knows of."""
        if not (offsets := self._plan.gradient_offsets(device)):
            return []
        memory = self._make_memory(device, self._plan.gradient_slots_nbytes(device))
        return [self._make_slot(pack, device, memory, start) for pack, start in offsets.items()]

    def _make_own(self, pack: int, device: int) -> GradientSlot:
        return self._make_slot(pack, device, self._make_memory(device, layout_nbytes(self.layouts[pack])), 0)

    @torch.inference_mode(False)
    def _make_memory(self, device: int, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._devices[device].torch_device)

    @torch.inference_mode(False)
    def _make_slot(self, pack: int, device: int, memory: torch.Tensor, start: int) -> GradientSlot:
        layout = self.layouts[pack]
        return GradientSlot(pack, device, layout, memory, start, memory[start : start + layout_nbytes(layout)])


def _find(slots: Iterable[GradientSlot], pack: int) -> GradientSlot | None:
    return next((slot for slot in slots if slot.pack == pack), None)
