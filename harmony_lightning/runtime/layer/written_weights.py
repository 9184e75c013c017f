"""Weights that a layer writes in its own forward, such as an `Embedding(max_norm=...)`, which shrinks the rows it looks up.

On a device it has written a copy, so the value goes on to the master. Other copies of it are then out of date, and are
loaded anew. Of a narrow weight it has written a float32 version.
"""

from collections.abc import Mapping

import torch

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.runtime.segment import Segment
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.weights.narrow import was_written


def versions_of_weights(site: Site, weights: Mapping[str, torch.Tensor]) -> list[int]:
    """In front of a call; weights of one slot count together."""
    return [weights[name]._version for name in site.weight_names]


def hand_on_written(
    site: Site,
    segment: Segment,
    weights: Mapping[str, torch.Tensor],
    before: list[int],
    wide: Mapping[str, torch.Tensor],
) -> None:
    """Behind the call. `wide`: float32 versions of narrow weights that its code has asked for.

    Raises:
        UnsupportedError: several devices have copies, of which each would be written differently.
    """
    if segment.state.cluster.host_is_device:
        return
    changed = {name: version for name, version in wide.items() if was_written(version)}
    if versions_of_weights(site, weights) != before:
        changed = {name: changed.get(name, weights[name]) for name in site.weight_names}
    if changed:
        _hand_on(site, segment, changed)


@torch.inference_mode(False)
@torch.no_grad()
def _hand_on(site: Site, segment: Segment, changed: Mapping[str, torch.Tensor]) -> None:
    state = segment.state
    state.weights.await_masters(changed)  # they may be newer on the device, which would come over what is written here
    for name, copy in changed.items():
        master, value = state.parameters[name], copy.detach().to("cpu")
        if value.dtype is not master.dtype or torch.equal(value, master):
            continue
        if site.pack is None or len(state.plan.devices_of(site.pack)) > 1:
            raise UnsupportedError(
                f"layer {site.name} writes its weight {name} in its forward, and several GPUs have copies of it, so that "
                'they would differ; use mode="pp", or one GPU, or write the weight in on_train_batch_start'
            )
        site.joins, site.writes_weights = False, True
        state.before_write(master)
        master.data.copy_(value)
        state.notice_write(master)


@torch.no_grad()
def refuse_other_writes(site: Site, segment: Segment, weights: Mapping[str, torch.Tensor]) -> None:
    """Behind the second run of a layer that writes its weights, which are masters' values: backward is right only if it has
    written the same again.

    Raises:
        UnsupportedError: it has not.
    """
    for name in site.weight_names:
        master = segment.state.parameters[name]
        value = weights[name].detach().to("cpu")
        if value.dtype is master.dtype and not torch.equal(value, master):
            raise UnsupportedError(
                f"layer {site.name} writes its weight {name} in its forward, and another value each time that it runs, so "
                "that backward, which runs it again, would not be that of its forward; write the weight in "
                "on_train_batch_start, or make it a buffer"
            )
