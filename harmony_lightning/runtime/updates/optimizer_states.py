"""What an optimizer remembers of a pack's weights: its tensors in one arena on the host, so that they move in one copy.

They stay the user's own: `optimizer.state[weight][key]` is the same tensor as before, and only its memory has moved, as
that of weights does (`arena`). Numbers, and tensors of one number, stay on the host; the optimizer's own step looks at
them there. But a fused step wants them on the device.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from harmony_lightning.hardware.device import Cluster
from harmony_lightning.runtime.updates.update import JustInTimeUpdate
from harmony_lightning.runtime.weights.arena import HostArena, Layout

Key = tuple[str, str]
"""The name of a weight, and of what is remembered of it."""


class StateArena:
    """The tensors that go to the device, as they were found."""

    def __init__(self, found: Mapping[Key, torch.Tensor], cluster: Cluster) -> None:
        self._tensors = dict(found)
        self._names = {key: "/".join(key) for key in found}
        self._arena = HostArena(
            {self._names[key]: tensor for key, tensor in found.items()}, self._names.values(), cluster
        )

    def is_of(self, found: Mapping[Key, torch.Tensor]) -> bool:
        """Whether these are the same tensors, where they were."""
        return (
            found.keys() == self._tensors.keys()
            and all(found[key] is tensor for key, tensor in self._tensors.items())
            and not self._arena.is_out_of_date()
        )

    @property
    def layout(self) -> Layout:
        return self._arena.layout

    @property
    def bytes(self) -> torch.Tensor:
        return self._arena.bytes

    @property
    def keys(self) -> Iterable[Key]:
        return self._tensors

    @property
    def nbytes(self) -> int:
        """Without what alignment adds."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def nbytes_of(self, weights: Collection[str]) -> int:
        """Of these weights alone."""
        return sum(tensor.nbytes for (weight, _), tensor in self._tensors.items() if weight in weights)


def region_name(weight: str, key: str) -> str:
    """Of a tensor in the layout of the arena."""
    return f"{weight}/{key}"


def find_states(update: JustInTimeUpdate, names: Iterable[str]) -> dict[Key, torch.Tensor] | str:
    """The tensors that must go along when these weights are stepped on a device; or why they cannot."""
    found: dict[Key, torch.Tensor] = {}
    memory: set[int] = set()
    for name in names:
        is_fused = bool((update.options(name) or {}).get("fused"))
        for key, value in update.remembered(name).items():
            if not isinstance(key, str) or not _can_move(value):
                return f"it remembers a {type(value).__name__} ({key!r}), which cannot be taken to a device"
            if not isinstance(value, torch.Tensor) or (value.dim() == 0 and not is_fused):
                continue
            if value.untyped_storage().data_ptr() in memory:
                return f"what it remembers ({key!r}) shares its memory"
            if value.nbytes:
                memory.add(value.untyped_storage().data_ptr())
            found[name, key] = value
    return found


def _can_move(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        return is_plain and value.device.type == "cpu" and not value.requires_grad
    return value is None or isinstance(value, bool | int | float | str)
