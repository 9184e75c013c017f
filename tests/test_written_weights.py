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


class Shrinking(nn.Linear):
    def forward(self, inputs):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(inputs)


@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_what_is_written_anew_each_time_is_refused(microbatch_size):
    """Backward runs the layer again."""
    module = Chain(depth=4)
    module.net[1][0] = Shrinking(64, 64)
    with pytest.raises(UnsupportedError, match=r"writes its weight net.1.0.weight .* another value each time"):
        trainer(harmony(2, microbatch_size=microbatch_size)).fit(module, loader(8))


class BoundedLate(nn.Linear):
    """Writes, or looks at, its weight from the third step on; until then the weight is only multiplied with."""

    does: str | None = None

    def forward(self, inputs):
        with torch.no_grad():
            if self.does == "write":
                self.weight.clamp_(-0.05, 0.05)
            scale = self.weight.norm() if self.does == "look" else 1
        return super().forward(inputs) * scale


class FirstPacks(Chain):
    does = "write"
    late = 0

    def __init__(self, **options):
        super().__init__(depth=2, **options)
        self.front = nn.Sequential(*(BoundedLate(64, 64) for _ in range(3)))

    def step(self, batch):
        for layer in self.front:
            layer.does = self.does if self.trainer.global_step >= self.late else None
        return super().step((self.front(batch[0]), batch[1]))


class LateWrites(FirstPacks):
    late = 2


class LateLooks(LateWrites):
    does = "look"


@pytest.mark.parametrize("update", ["host", "first"])
@pytest.mark.parametrize(
    ("make", "precision"), [(FirstPacks, "32-true"), (LateWrites, "bf16-mixed"), (LateLooks, "bf16-mixed")]
)
def test_weights_that_stay_or_are_narrow(make, precision, update):
    fits = []
    for strategy, batch_size in (("auto", 4), (harmony(2, "400KiB", 4, update=update, one_layer_per_pack=True), 8)):
        torch.manual_seed(0)
        module = make()
        options = {"accumulate_grad_batches": 8 // batch_size, "limit_train_batches": 40 // batch_size}
        trainer(strategy, precision=precision, **options).fit(module, loader(batch_size))
        fits.append(module)
    assert same_weights(*fits)
    assert (strategy.statistics().updates_on_devices > 0) == (update == "first")
