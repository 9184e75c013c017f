"""Weights where the host is the only device: nothing is swapped, and layers compute with the masters themselves."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from harmony_lightning.plan import Plan
from harmony_lightning.runtime.weights.weight_slot import Weights


class HostWeights:
    """The same face as `DeviceWeights`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: Plan) -> None:
        self._parameters = parameters
        self._views = [Weights() for _ in plan.packs]

    def acquire(self, pack: int, names: Iterable[str]) -> Weights:
        weights = self._views[pack]
        for name in names:
            parameter = self._parameters[name]
            if name not in weights or weights[name].data_ptr() != parameter.data_ptr():
                with torch.inference_mode(False), torch.no_grad():
                    weights[name] = parameter.detach()
        return weights

    def holds(self, tensor: torch.Tensor) -> bool:
        return False  # the user's own memory, which stays

    def last_read(self, pack: int) -> None: ...

    def prefetch(self, pack: int) -> None: ...

    def release(self, pack: int) -> None: ...

    def release_all(self) -> None: ...

    def find_slice(self, tensor: torch.Tensor) -> None: ...

    slots_nbytes = 0

    def allocate(self) -> None: ...

    def let_go_idle(self) -> bool:
        return False

    def change_slots(self, plan: Plan) -> None: ...
