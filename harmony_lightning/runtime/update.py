"""Just-in-time updates: a pack's weights are stepped as soon as its gradients are complete.

The user's own optimizer does it, on the host worker, while other packs still compute. The step runs on a shadow of the
optimizer: the same class, the same state, the hyper-parameters of this moment, but only the weights at hand. For an
optimizer whose update is separable per parameter this is its ordinary step to the bit; `is_separable` knows which are.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_WHOLE_MODEL = (torch.optim.LBFGS,)


def is_separable(optimizer: Optimizer) -> bool:
    """Whether stepping parameters one after the other equals stepping them together.

    True for what torch ships except LBFGS, without step hooks; others are stepped as a whole, which is always right.
    """
    kind = type(optimizer)
    return (
        kind.__module__.startswith("torch.optim.")
        and not isinstance(optimizer, _WHOLE_MODEL)
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
    )


class JustInTimeUpdate:
    """One step's update, pack by pack. Made on the controller: it remembers the hyper-parameters of that moment."""

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._groups = [
            ({key: value for key, value in group.items() if key != "params"}, {id(p) for p in group["params"]})
            for group in optimizer.param_groups
        ]

    def __call__(self, names: Iterable[str]) -> None:
        """Step these weights and free their gradients. Weights that the optimizer does not know keep theirs."""
        weights = [self._parameters[name] for name in names]
        groups: list[dict[str, Any]] = []
        for knobs, members in self._groups:
            ours = [weight for weight in weights if id(weight) in members]
            if ours:
                groups.append({**knobs, "params": ours})
        if not groups:
            return
        shadow = object.__new__(type(self._optimizer))
        shadow.__dict__.update(self._optimizer.__dict__)
        shadow.__dict__.pop("step", None)  # schedulers wrap the instance's step to count calls
        shadow.param_groups = groups
        type(self._optimizer).step(shadow)
        for group in groups:
            for weight in group["params"]:
                weight.grad = None
