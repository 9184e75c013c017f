"""Code between layers that goes through all weights of a model larger than its GPUs: penalties and norms."""

import copy

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_numbers, same_weights, stays_within, trainer
from torch import nn

from harmony_lightning import DeviceOutOfMemoryError, UnsupportedError

pytestmark = pytest.mark.usefixtures("devices")

MEMORY = 256 * 1024
"""Weights are twice as much."""


def squares(module):
    return sum(p.pow(2).sum() for p in module.parameters())


def elastic_net(module):
    return squares(module) + sum(p.abs().sum() for p in module.parameters())


def norm_of_norms(module):
    return torch.stack([p.norm() for p in module.parameters()]).norm()


def orthogonality(module):
    return sum((p @ p.T - torch.eye(len(p))).pow(2).sum() for p in module.parameters() if p.dim() == 2)


def change(module):
    """What an operation saves here is no weight, but as large."""
    return sum((p - old).pow(2).sum() for p, old in zip(module.parameters(), module.old, strict=True))


def in_double(module):
    return sum(p.double().pow(2).sum() for p in module.parameters()).float()


def turned(module):
    return sum((p.t().exp() * p.t()).sum() for p in module.parameters())


class Penalised(Chain):
    def __init__(self, penalty, depth=32, manual=False, **options):
        super().__init__(depth, torch.optim.SGD, **options)
        self.penalty = penalty
        self.automatic_optimization = not manual
        self.old = [0.9 * p.detach() for p in self.parameters()]

    def step(self, batch):
        return super().step(batch) + 1e-4 * self.penalty(self)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None


def both(reference, microbatch_size=8, num_gpus=2, memory=MEMORY, **options):
    """Returns (ours, reference, statistics)."""
    ours = copy.deepcopy(reference)
    parts = 8 // microbatch_size
    plain = {"accumulate_grad_batches": parts} if parts > 1 else {}
    trainer(limit_train_batches=2 * parts, **plain).fit(reference, loader(microbatch_size))
    fitted = trainer(
        harmony(num_gpus, memory, microbatch_size, layers=["net.*", "head"], **options), limit_train_batches=2
    )
    fitted.fit(ours, loader(8))
    return ours, reference, fitted.strategy.statistics()


@pytest.mark.parametrize("stash", ["host", "device"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("penalty", [squares, elastic_net, norm_of_norms, orthogonality, change, in_double, turned])
def test_a_penalty_on_all_weights_trains_within_memory(penalty, manual, stash):
    torch.manual_seed(0)
    ours, reference, statistics = both(Penalised(penalty, manual=manual), stash=stash)
    assert sum(p.nbytes for p in ours.parameters()) > 2 * MEMORY
    assert stays_within(statistics, MEMORY)
    assert same_weights(ours, reference)
    assert same_numbers(ours.losses, reference.losses)


@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_with_several_microbatches_only_the_order_of_additions_differs(mode):
    """The penalty's gradients are added up apart from those of the layers, which are made in other visits."""
    torch.manual_seed(0)
    ours, reference, _ = both(Penalised(elastic_net), microbatch_size=2, mode=mode)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(ours.old, ours.parameters(), strict=True))


def test_a_norm_of_all_weights_can_be_logged():
    class Logging(Penalised):
        def step(self, batch):
            with torch.no_grad():
                self.losses.append(norm_of_norms(self).item())
            return super(Penalised, self).step(batch)

    torch.manual_seed(0)
    ours, reference, statistics = both(Logging(None), microbatch_size=2)
    assert stays_within(statistics, MEMORY)
    assert same_weights(ours, reference)
    assert sorted(set(ours.losses)) == sorted(set(reference.losses))


@pytest.mark.parametrize("manual", [False, True])
def test_all_weights_in_one_vector_do_not_fit_and_the_error_says_where(devices, manual):
    if devices == "cuda":
        pytest.skip("real GPUs have more memory than the plan was told")

    def vector(module):
        return nn.utils.parameters_to_vector(module.parameters()).norm()

    with pytest.raises(DeviceOutOfMemoryError, match="out of memory") as caught:
        trainer(harmony(2, MEMORY, 8), limit_train_batches=1).fit(Penalised(vector, manual=manual), loader(8))
    (note,) = [note for note in caught.value.__notes__ if note.startswith("harmony: ")]
    assert "in the user's code between layers, pack" in note


def test_the_gradient_of_a_weight_that_has_changed_is_refused():
    class Late(Penalised):
        def training_step(self, batch, batch_idx):
            loss, penalty = self.step(batch), self.penalty(self)
            self.manual_backward(loss)
            self.optimizers().step()
            self.manual_backward(penalty)

    with pytest.raises(UnsupportedError, match=r"weight \S+ was changed between its use outside of layers"):
        trainer(harmony(2, MEMORY, 8), limit_train_batches=1).fit(Late(squares, manual=True), loader(8))


@pytest.mark.parametrize("stash", ["host", "device"])
@pytest.mark.parametrize("write", ["in place", "data"])
def test_a_frozen_weight_may_be_written_by_other_microbatches_before_the_backward_of_its_use(stash, write):
    """A moving average that each microbatch updates and then uses, in front of the others' backward."""

    class Averaging(Chain):
        def __init__(self):
            super().__init__(optimizer=torch.optim.SGD)
            self.slow = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)

        def step(self, batch):
            inputs, targets = batch
            with torch.no_grad():
                if write == "data":
                    self.slow.data = self.slow.data * 0.9
                else:
                    self.slow.mul_(0.9)
            hidden = self.net[0](inputs) @ self.slow  # the first visit: no other microbatch writes in between
            return nn.functional.mse_loss(self.head(self.net[1:](hidden)).squeeze(1), targets)

    torch.manual_seed(0)
    ours, reference, _ = both(Averaging(), microbatch_size=2, num_gpus=1, memory="192KiB", stash=stash)
    assert same_weights(ours, reference)


def test_a_weight_of_no_layer_is_brought_once_for_a_visit():
    class Shifted(Chain):
        def __init__(self):
            super().__init__(depth=2)
            self.shift = nn.Parameter(torch.zeros(WIDTH, WIDTH))

        def step(self, batch):
            hidden = self.net(batch[0]) @ self.shift
            with torch.no_grad():
                norm_of_norms(self)
            return nn.functional.mse_loss(self.head(hidden + hidden @ self.shift).squeeze(1), batch[1])

    swapped = []
    for microbatch_size in (8, 2):
        *_, statistics = both(Shifted(), microbatch_size, num_gpus=1, memory="64MiB")
        swapped.append(statistics.swap_in_bytes)
    assert swapped[0] == swapped[1]
