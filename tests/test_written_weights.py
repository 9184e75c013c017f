"""Layers that write their own weights in forward, as those do that bound norms."""

import pytest
import torch
from chain import Chain, assert_same_optimizers, harmony, loader, same_weights, trainer
from torch import nn

from harmony_lightning.errors import UnsupportedError


class Bounded(nn.Linear):
    def forward(self, inputs):
        with torch.no_grad():
            self.weight.clamp_(-0.05, 0.05)
        return super().forward(inputs)


class Writing(Chain):
    def __init__(self, **options):
        super().__init__(depth=4, **options)
        self.table = nn.Embedding(8, 16, max_norm=0.5)
        self.bounded = Bounded(64, 16)

    def step(self, batch):
        rows = self.table((batch[0][:, :3].abs() * 4).long() % 8).mean(1)
        return super().step(batch) + (rows * self.bounded(batch[0])).square().mean()


def fit(strategy, batch_size):
    torch.manual_seed(0)
    module = Writing()
    run = trainer(strategy, accumulate_grad_batches=8 // batch_size, limit_train_batches=24 // batch_size)
    run.fit(module, loader(batch_size), loader(8))
    return module, run


@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_what_a_layer_writes_into_its_weights_reaches_the_masters(microbatch_size):
    plain, ours = fit("auto", microbatch_size), fit(harmony(2, microbatch_size=microbatch_size), 8)
    assert same_weights(plain[0], ours[0])
    assert_same_optimizers(ours[1].optimizers, plain[1].optimizers)
    assert torch.equal(plain[1].callback_metrics["val_loss"], ours[1].callback_metrics["val_loss"])


def test_copies_on_several_devices_are_refused():
    with pytest.raises(UnsupportedError, match=r"writes its weight table.weight .* use mode=\"pp\""):
        fit(harmony(2, microbatch_size=2, mode="dp"), 8)
