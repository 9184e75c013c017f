"""Every family can be profiled: on shapes alone, or, where torch does not know them, with numbers."""

import pytest
from zoo import FAMILIES

from harmony_lightning import EmulatedCluster, UnsupportedError
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.hardware.presets import gpu_model, host_model
from harmony_lightning.profiled import profile
from harmony_lightning.profiler.machine import preset_machine
from harmony_lightning.profiler.measure import Measured
from harmony_lightning.runtime.checkpointing import transparent_checkpoints

SERVER = host_model("server")


def step(module, batch):
    with transparent_checkpoints(lambda: True):
        out = module.training_step(batch, 0)
    return out["loss"] if isinstance(out, dict) else out


def profile_of(module, batch_of, **options):
    cluster, machine = (
        EmulatedCluster(1, "4GiB", preset="3090", **options),
        preset_machine(1, gpu_model("3090"), SERVER),
    )
    sizes = {"smallest": 2, "largest": 4, "is_fresh": True}
    return profile(module, decompose(module, 2**13), batch_of, step, cluster, machine, **sizes)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_profiled(name):
    family = FAMILIES[name]
    module = family.build()
    batch = next(iter(family.batches(1)))

    def batch_of(size):
        if isinstance(batch, dict):
            return {key: value[:size] for key, value in batch.items()}
        return tuple(value[:size] for value in batch) if isinstance(batch, tuple | list) else batch[:size]

    if name in NEEDS_NUMBERS:
        with pytest.raises(UnsupportedError):
            profile_of(module, batch_of, fake=True)
    measured = profile_of(module, batch_of, fake=name not in NEEDS_NUMBERS)
    kinds = measured.profile.layer_kinds
    assert measured.profile.microbatch_sizes.forward == (2, 4)
    assert sum(kind.forward_seconds[-1] for kind in kinds) > 0
    assert sum(kind.backward_seconds[-1] for kind in kinds) > 0
    assert Measured.from_json(measured.to_json()) == measured


NEEDS_NUMBERS = {
    "mixtral",  # torch's grouped product knows the shapes of bfloat16 only
    "gru",  # the shapes of its backward are wrong in torch where the batch comes first
}
