"""Slots of packs of unlike sizes: at planned offsets, and elsewhere when user code asks for packs out of turn."""

import copy
import itertools
import random

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn

HIDDEN = (96, 8, 48, 8, 112, 16, 32, 64)
"""Of each block: its weights take 0.5 KB times that."""


class Uneven(Chain):
    def __init__(self, order=None):
        super().__init__()
        self.net = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH)) for hidden in HIDDEN
        )
        self.order = order

    def step(self, batch):
        inputs, targets = batch
        blocks = list(self.net)
        if self.order is not None:
            self.order.shuffle(blocks)
        for block in blocks:
            inputs = inputs + block(inputs)
        return nn.functional.mse_loss(self.head(inputs).squeeze(1), targets)


def fitted(num_gpus=1, mode="pp", order=None, **options):
    """Strategy, module, and the same trained without it."""
    torch.manual_seed(0)
    ours = Uneven(order)
    reference = copy.deepcopy(ours)
    trainer(accumulate_grad_batches=4).fit(reference, loader(2, 16))
    strategy = harmony(num_gpus, memory="1MiB", mode=mode, one_layer_per_pack=True, **options)
    trainer(strategy).fit(ours, loader(8, 16))
    return strategy, ours, reference


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_two_packs_that_follow_each_other_share_what_they_need(num_gpus):
    strategy, ours, reference = fitted(num_gpus)
    assert same_weights(ours, reference)
    plan, statistics = strategy.plan, strategy.statistics()
    for device in range(num_gpus):
        sizes = [plan.packs[index].slot_nbytes for index in plan.packs_on(device)]
        together = max(one + other for one, other in itertools.pairwise(sizes))
        assert plan.slots_nbytes(device) == together < 2 * max(sizes)
    assert statistics.out_of_turn == 0
    steps = statistics.steps
    assert statistics.swap_in_bytes == plan.swap_in_bytes(is_first=True) + (steps - 1) * plan.swap_in_bytes_per_step


class _Same(random.Random):
    """One order for all microbatches of a step, another in the next one."""

    def __init__(self):
        super().__init__(0)
        self.calls = 0

    def shuffle(self, items):
        random.Random(self.calls // 4).shuffle(items)
        self.calls += 1

    def __deepcopy__(self, memo):
        return _Same()


@pytest.mark.usefixtures("nothing_stays")
def test_packs_that_are_called_in_any_order_find_room():
    strategy, ours, reference = fitted(order=_Same())
    assert same_weights(ours, reference)
    assert strategy.statistics().swap_in_bytes > strategy.statistics().steps * strategy.plan.packs[0].nbytes


class OneByOne(Chain):
    """All layers for one sample, then for the next one, as in code for inputs of many lengths."""

    def step(self, batch):
        inputs, targets = batch
        outputs = [self.head(self.net(sample[None] * index)) for index, sample in enumerate(inputs)]
        return nn.functional.mse_loss(torch.stack(outputs).flatten(), targets)


@pytest.mark.parametrize("memory", ["160KiB", "300KiB", "2MiB"])
def test_a_loop_over_all_layers_of_a_model_that_is_larger_than_a_gpu(memory):
    """Its layers belong together, but not where a pack of all would not fit."""
    fits = []
    for strategy in ("auto", harmony(2, memory, microbatch_size=8)):
        torch.manual_seed(0)
        fits.append(OneByOne())
        trainer(strategy, limit_train_batches=3).fit(fits[-1], loader(8))
    assert same_weights(*fits)
    assert (len(strategy.plan.packs) == 1) == (memory == "2MiB")
