"""Weights that a layer writes in its own forward, such as an `Embedding(max_norm=...)`, which shrinks the rows it looks up.

On a device it has written a copy, so the value goes on to the master. Other copies of it are then out of date, and are
loaded anew.
"""

from collections.abc import Mapping

import torch

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.runtime.segment import Segment
from harmony_lightning.runtime.site import Site


def versions_of_weights(site: Site, weights: Mapping[str, torch.Tensor]) -> list[int]:
    """In front of a call; weights of one slot count together."""
    return [weights[name]._version for name in site.weight_names]


@torch.inference_mode(False)
@torch.no_grad()
def hand_on_written(site: Site, segment: Segment, weights: Mapping[str, torch.Tensor], before: list[int]) -> None:
    """Behind the call.

    Raises:
        UnsupportedError: several devices have copies, of which each would be written differently, or the copy has fewer
            digits than the master.
    """
    state = segment.state
    if versions_of_weights(site, weights) == before or state.cluster.host_is_device:
        return
    for name in site.weight_names:
        master, value = state.parameters[name], weights[name].detach().to("cpu")
        if value.dtype is not master.dtype or torch.equal(value, master):
            continue
        if site.pack is None or len(state.plan.devices_of(site.pack)) > 1:
            raise UnsupportedError(
                f"layer {site.name} writes its weight {name} in its forward, and several GPUs have copies of it, so that "
                'they would differ; use mode="pp", or one GPU, or write the weight in on_train_batch_start'
            )
        site.joins = False
        state.before_write(master)
        master.data.copy_(value)
        state.notice_write(master)
