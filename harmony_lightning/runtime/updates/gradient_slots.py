"""Slots for gradients: memory on each device in which those of a pack's weights are added up over the microbatches.

Slots lie in one piece of memory, at offsets by which packs that are differentiated at the same time do not overlap
(`Plan.gradient_offsets`). Where user code visits packs in another order, the one in the way leaves with what it has so far:
`Counters.out_of_turn`.
"""

from collections.abc import Callable, Mapping, Sequence
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

    def acquire(self, pack: int, device: int) -> GradientSlot:
        """The pack's slot; compute enqueued from now on may write it."""
        self._allocate(device)
        slot = next((slot for slot in self._slots[device] if slot.pack == pack), None)
        if slot is None:  # a pack that should be on other devices
            self._counters.out_of_turn += 1
            slot = self._add_slot(pack, device, self._make_memory(device, layout_nbytes(self.layouts[pack])), 0)
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

    def holders(self, pack: int) -> list[GradientSlot]:
        """Slots with gradients of the pack, in the order in which its microbatches visit devices."""
        visitors = self._plan.visitors(pack)
        holders = [slot for slot in self._in_use() if slot.pack == pack]
        return sorted(holders, key=lambda s: visitors.index(s.device) if s.device in visitors else len(visitors))

    def packs(self) -> list[int]:
        """Those of which there are gradients."""
        return sorted({slot.pack for slot in self._in_use()})

    def names(self, beside: GradientSlot | None = None) -> set[str]:
        """Weights of which there are gradients, in any slot `beside` one."""
        return {name for slots in self._slots for slot in slots if slot is not beside for name in slot.written}

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

    def close(self) -> None:
        """Free the memory."""
        for slots in self._slots:
            slots.clear()

    def allocate(self) -> None:
        """Make the slots of all devices now."""
        for device in range(len(self._devices)):
            if self._plan.packs_on(device):
                self._allocate(device)

    def _in_use(self) -> list[GradientSlot]:
        return [slot for slots in self._slots for slot in slots if slot.is_in_use]

    def _allocate(self, device: int) -> None:
        if self._slots[device]:
            return
        if offsets := self._plan.gradient_offsets(device):
            memory = self._make_memory(device, self._plan.gradient_slots_nbytes(device))
            for pack, start in offsets.items():
                self._add_slot(pack, device, memory, start)

    @torch.inference_mode(False)
    def _make_memory(self, device: int, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._devices[device].torch_device)

    @torch.inference_mode(False)
    def _add_slot(self, pack: int, device: int, memory: torch.Tensor, start: int) -> GradientSlot:
        layout = self.layouts[pack]
        slot = GradientSlot(pack, device, layout, memory, start, memory[start : start + layout_nbytes(layout)])
        self._slots[device].append(slot)
        return slot
