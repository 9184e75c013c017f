"""Every family can be profiled on shapes alone, or a line says why not."""

import pytest
from zoo import FAMILIES

from harmony_lightning import EmulatedCluster, UnsupportedError
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.profiler.measure import Measured, measure_profile
from harmony_lightning.runtime.checkpointing import transparent_checkpoints


def step(module, batch):
    with transparent_checkpoints(lambda: True):
        out = module.training_step(batch, 0)
    return out["loss"] if isinstance(out, dict) else out


def profile_of(module, batch_of):
    cluster = EmulatedCluster(1, "4GiB", preset="3090", fake=True)
    layers = decompose(module, 2**13)
    return measure_profile(
        module, layers, batch_of, step, cluster, smallest=2, largest=4, update_seconds=lambda n: n / 4e9
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_profiled_or_says_why_not(name):
    family = FAMILIES[name]
    module = family.build()
    batch = next(iter(family.batches(1)))

    def batch_of(size):
        if isinstance(batch, dict):
            return {key: value[:size] for key, value in batch.items()}
        return tuple(value[:size] for value in batch) if isinstance(batch, tuple | list) else batch[:size]

    if name in CANNOT_BE_PROFILED:
        with pytest.raises(UnsupportedError):
            profile_of(module, batch_of)
        return
    measured = profile_of(module, batch_of)
    profile = measured.profile
    assert profile.microbatch_sizes.forward == (2, 4)
    assert sum(kind.forward_seconds[-1] for kind in profile.layer_kinds) > 0
    assert sum(kind.backward_seconds[-1] for kind in profile.layer_kinds) > 0
    assert Measured.from_json(measured.to_json()) == measured


CANNOT_BE_PROFILED = {
    "mixtral",  # torch's grouped product knows the shapes of bfloat16 only
    "gru",  # the shapes of its backward are wrong in torch where the batch comes first
}
