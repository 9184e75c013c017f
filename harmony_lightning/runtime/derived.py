"""Weights that a hook derives from others before each call: pruning, and the old weight and spectral normalisation.

Such a hook leaves its result as a plain attribute of the module. Derived from device-resident weights, it would stay on
the device: one more copy of every weight. So a call takes it back with the weights it was made of (`site`), and at the
end of a pass it is derived once on the host, where code outside of the pass finds it as after plain training: made of
the weights that the forward has used. Parametrisations of torch leave nothing behind and need nothing of this.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@dataclass(frozen=True, slots=True)
class Derived:
    """One such attribute."""

    owner: nn.Module
    attribute: str
    derive: Callable[[], torch.Tensor]
    """From what hangs in the owner now, without side effects."""


def find_derived(root: nn.Module) -> Iterator[Derived]:
    """The derived weights of `root` and all modules within."""
    for owner in root.modules():
        for hook in owner._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                yield Derived(owner, hook._tensor_name, partial(hook.apply_mask, owner))
            elif isinstance(hook, WeightNorm):
                yield Derived(owner, hook.name, partial(hook.compute_weight, owner))
            elif isinstance(hook, SpectralNorm):
                yield Derived(owner, hook.name, partial(hook.compute_weight, owner, do_power_iteration=False))


@torch.inference_mode(False)
@torch.no_grad()
def derive_on_host(derived: list[Derived]) -> None:
    """Renew the attributes from the masters."""
    for one in derived:
        one.owner.__dict__[one.attribute] = one.derive()
