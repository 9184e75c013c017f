"""The gradient of a minibatch's loss is told without looking at it, which would wait for all that GPUs still have to do."""

import copy

import lightning as L
import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer

from harmony_lightning.strategy import training
from harmony_lightning.strategy.root_loss import foreseen_gradient


def root_of(value=3.0, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "scale",
    [
        lambda root: root * 1,
        lambda root: root * 1 / 3,
        lambda root: root / 7 * 0.3,
        lambda root: 1024 * (root / 3),
        lambda root: root * torch.tensor(65536.0),
    ],
)
def test_products_and_quotients_are_told_to_the_bit(scale, dtype):
    root = root_of(dtype=dtype)
    loss = scale(root)
    foreseen = foreseen_gradient(loss, root)
    if loss.dtype != dtype:
        assert foreseen is None
        return
    loss.backward()
    assert foreseen.dtype == dtype
    assert torch.equal(foreseen, root.grad)


def hooked(root):
    loss = root / 2
    loss.register_hook(lambda gradient: 3 * gradient)
    return loss


@pytest.mark.parametrize(
    "make",
    [
        lambda root: root + 1,
        lambda root: root.square(),
        lambda root: root * root,
        lambda root: root * root_of(2.0),
        lambda root: 1 / root,
        lambda root: root_of() * 2,
        lambda root: (root * torch.ones(2)).sum(),
        hooked,
    ],
)
def test_anything_else_is_looked_at(make):
    root = root_of()
    assert foreseen_gradient(make(root), root) is None


class Doubled(Chain):
    def backward(self, loss):
        (2 * loss).backward()


class DoubledByHook(L.Callback):
    def on_before_backward(self, trainer, module, loss):
        loss.register_hook(lambda gradient: 2 * gradient)


@pytest.mark.parametrize("case", ["plain", "accumulated", "hooked", "overridden"])
def test_runs_look_only_where_they_must_and_come_out_the_same(case, monkeypatch):
    torch.manual_seed(0)
    ours = Doubled() if case == "overridden" else Chain()
    looking = copy.deepcopy(ours)
    told = []

    def train(module, foresee):
        monkeypatch.setattr(training, "foreseen_gradient", foresee)
        options = {"callbacks": [DoubledByHook()]} if case == "hooked" else {}
        trainer(harmony(), accumulate_grad_batches=3 if case == "accumulated" else 1, **options).fit(module, loader(8))

    train(looking, lambda *args: None)
    train(ours, lambda *args: told.append(foreseen_gradient(*args)) or told[-1])
    assert same_weights(ours, looking)
    assert len(told) == (0 if case == "overridden" else 5)
    assert all((gradient is None) == (case == "hooked") for gradient in told)
