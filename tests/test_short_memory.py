"""Memory that others take amid a step: what stays gives way, and the step goes on to the same result."""

import copy

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn

from harmony_lightning import DeviceOutOfMemoryError

LAYERS = ["net.*", "head"]
NUM_STEPS = 5
TAKEN_IN = 3
"""The step, counted from 1, in which memory is taken: by then much stays."""


class Odd(Chain):
    """Dropout, batch norm and a branch, so that a layer that is run once more must draw and count as before."""

    def __init__(self):
        super().__init__(depth=0)
        blocks = (
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.GELU()) for _ in range(8)
        )
        self.net = nn.Sequential(*blocks)


class Taking(L.Callback):
    """Others take all that is free but some bytes of it as a backward begins, and give it back with the step."""

    def __init__(self, left):
        self.left, self.taken, self.num_backwards, self.plans = left, [], 0, []

    def on_before_backward(self, trainer, module, loss):
        self.num_backwards += 1
        engine = trainer.strategy._engine
        if self.num_backwards == TAKEN_IN:
            with engine.cluster.activate(continues=True):
                for device in engine.cluster.devices:
                    nbytes = max(0, device.memory_bytes - device.allocated_bytes() - self.left)
                    self.taken.append(torch.zeros(nbytes, dtype=torch.uint8, device=device.torch_device))

    def on_train_batch_end(self, trainer, *args):
        self.taken.clear()
        self.plans.append(trainer.strategy.plan)


def fit(module, taking, num_gpus, **options):
    strategy = harmony(num_gpus, "300KiB", layers=LAYERS, **options)
    torch.manual_seed(1)
    trainer(strategy, callbacks=[taking], limit_train_batches=NUM_STEPS).fit(module, loader(8))
    return strategy


@pytest.mark.parametrize(
    ("num_gpus", "left", "options"),
    [
        (1, 1 << 10, {}),
        (2, 8 << 10, {}),
        (2, 12 << 10, {"mode": "dp", "one_layer_per_pack": True}),
        (2, 8 << 10, {"stash": "device"}),
        (1, 4 << 10, {"stash": "host"}),
    ],
)
def test_backward_goes_on_when_others_take_memory(num_gpus, left, options, caplog):
    torch.manual_seed(0)
    module = Odd()
    undisturbed = copy.deepcopy(module)
    taking = Taking(left)
    fit(module, taking, num_gpus, **options)
    assert "what was to stay on GPUs had to go" in caplog.text
    fit(undisturbed, Taking(1 << 30), num_gpus, **options)
    assert same_weights(module, undisturbed)
    # It stays again behind the next step, which is measured.
    assert taking.plans[TAKEN_IN].resident == () and taking.plans[-1].resident != ()


def test_memory_that_no_giving_way_makes_is_an_error(caplog):
    module = Odd()
    with pytest.raises(DeviceOutOfMemoryError, match="out of memory") as caught:
        fit(module, Taking(0), 2, mode="dp", one_layer_per_pack=True, stash="host")
    assert any(note.startswith("harmony: ") for note in caught.value.__notes__)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
