"""The comparison itself: it finds what differs, and leaves the module as it was."""

import math
import random

import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from harmony_lightning import ConfigurationError, EmulatedCluster
from harmony_lightning.testing import Comparison, Run, Step, compare_with_one_device, plain_streams, sgd, train_plain

BATCHES = tuple((torch.arange(32.0).view(4, 8) / 32 + step, torch.ones(4, 8)) for step in range(2))


def mse(net, batch):
    return nn.functional.mse_loss(net(batch[0]), batch[1])


def make():
    return Step(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(4))), mse, sgd)


def run(**weights):
    return Run(losses=(1.0,), weights=weights, buffers={})


def test_dropout_comes_out_equal_to_the_bit():
    report = compare_with_one_device(make, BATCHES, 2, cluster=EmulatedCluster(2, "3KiB"))
    assert report.is_equal and report.max_relative_difference == 0
    assert str(report) == "equal to the bit"


def test_another_seed_is_found():
    report = Comparison(expected=train_plain(make, BATCHES, 2), actual=train_plain(make, BATCHES, 2, seed=5))
    assert not report.is_equal
    assert "differ, relatively" in str(report)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (torch.tensor([2.0, 4.0]), 0.0),
        (torch.tensor([2.0, 3.0]), 0.25),
        (torch.tensor([2.0, math.nan]), math.inf),
        (torch.tensor([2.0, 4.0], dtype=torch.float64), math.inf),
        (torch.tensor([[2.0, 4.0]]), math.inf),
        (None, math.inf),
    ],
)
def test_differences_are_relative_to_the_largest_value(other, difference):
    report = Comparison(expected=run(w=torch.tensor([2.0, 4.0])), actual=run(**({} if other is None else {"w": other})))
    assert report.max_relative_difference == difference
    assert report.is_equal == (difference == 0)


def test_zeros_and_nans_equal_themselves():
    odd = torch.tensor([0.0, math.nan, math.inf])
    assert Comparison(expected=run(w=odd, e=torch.empty(0)), actual=run(w=odd.clone(), e=torch.empty(0))).is_equal


def test_unequal_microbatches_are_refused():
    with pytest.raises(ConfigurationError, match="divides the minibatches"):
        train_plain(make, BATCHES, 3)


class Drawing(Step):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), mse)
        self.drawn = []

    def training_step(self, batch, batch_idx):
        self.drawn.append((float(torch.rand(())), random.random(), numpy.random.rand()))
        return super().training_step(batch, batch_idx)


def test_plain_streams_give_each_microbatch_its_own_numbers_and_take_one_per_minibatch():
    module = Drawing()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    batches = [(batch[0][:2], batch[1][:2]) for batch in BATCHES * 2]
    with plain_streams(module, 2):
        trainer = Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, **quiet)
        torch.manual_seed(3)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        after = torch.rand(())
    assert "training_step" not in vars(module)
    assert len(set(module.drawn)) == 4
    torch.manual_seed(3)
    for _ in range(1 + 2):  # the DataLoader's own seed, and one number per minibatch
        torch.empty((), dtype=torch.int64).random_()
    assert after == torch.rand(())


def test_plain_streams_restore_the_module_when_training_fails():
    module = make()
    with pytest.raises(ZeroDivisionError), plain_streams(module, 2):
        raise ZeroDivisionError
    assert "training_step" not in vars(module)
