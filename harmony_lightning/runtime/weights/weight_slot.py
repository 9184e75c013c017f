"""A slot for the weights of a pack on a device, and the leaves over it that layers compute with."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from harmony_lightning.hardware.device import Event
from harmony_lightning.runtime.weights.masters import Part
from harmony_lightning.runtime.worker import Ticket


class Weights(dict[str, torch.Tensor]):
    """Device-resident weights by name: leaves over slot memory, valid until the slot is released."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._edges: dict[str, tuple[torch.Tensor, GradientEdge]] = {}

    def edges(self, names: Iterable[str]) -> list[GradientEdge]:
        """Where gradients of weights that require one end. Torch makes a view of each leaf to find out."""
        found = []
        for name in names:
            weight, entry = self[name], self._edges.get(name)
            if entry is None or entry[0] is not weight:
                entry = self._edges[name] = weight, get_gradient_edge(weight)
            found.append(entry[1])
        return found


@dataclass(slots=True, eq=False)
class WeightSlot:
    """What is in it, whether that is good, and who works with it: `residency` moves it from state to state."""

    pack: int
    memory: torch.Tensor
    """The piece that it lies in: of its own, or that of all packs that are not resident."""
    start: int
    bytes: torch.Tensor
    """From there on; it counts its own versions."""
    weights: Weights
    """Leaves over it."""
    released: Event | None
    """Behind the last compute on its content, or on what the memory was before; None once a swap-in has waited for that."""
    is_free: bool = True
    """Whether nobody needs the pack here now."""
    generations: dict[Part, int] = field(default_factory=dict)
    """By part of the pack: of the masters that it is a copy of. Empty: of none, another slot has had the memory."""
    versions: dict[Part, int] = field(default_factory=dict)
    """Of those masters, behind the part's last swap-in."""
    version: int = -1
    """Of the copy, behind the last swap-in."""
    loading: Ticket | None = None
    """Of the job that enqueues the swap-in of the present content; None once compute waits for that."""
    ready: Event | None = None
    """Behind that swap-in."""

    @property
    def stop(self) -> int:
        return self.start + self.bytes.numel()

    def overlaps(self, memory: torch.Tensor, start: int, stop: int) -> bool:
        return self.memory is memory and max(self.start, start) < min(self.stop, stop)
