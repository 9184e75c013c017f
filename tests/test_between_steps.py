"""User code between steps meets tensors from every device, and the host's, as if there were one."""

import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer, twins
from torch import nn
from torch.utils.checkpoint import checkpoint

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.runtime.between import Between


class Keeping(Chain):
    """The usual way to a metric over an epoch: keep what each step gave, and put it together at the end."""

    def __init__(self, **options):
        super().__init__(**options)
        self.kept = []

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        early = self.net[0](inputs).mean(1)
        late = self.head(self.net(inputs)).squeeze(1)
        self.kept.append((early, late, targets, late.mean()))

    def on_validation_epoch_end(self):
        early, late, targets, means = (list(column) for column in zip(*self.kept, strict=True))
        self.found = {
            "error": (torch.cat(late) - torch.cat(targets)).abs().mean(),
            "sum": torch.stack(means).sum() + torch.cat(early).sum(),
            "mixed": torch.stack([early[0].sum(), late[0].sum(), targets[0].sum()]),
        }
        self.kept.clear()
        self.log("error", self.found["error"])


def test_what_steps_left_can_be_put_together():
    found, logged = [], []
    for strategy in ("auto", harmony(2)):
        torch.manual_seed(0)
        module = Keeping()
        run = trainer(strategy)
        logged.append(run.validate(module, loader(8), verbose=False))
        found.append(module.found)
    assert logged[0] == logged[1]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name].cpu()), name


@pytest.mark.parametrize("strict", [False, True])
def test_what_steps_left_is_of_the_host_unless_the_cluster_is_strict(strict):
    class Looking(Keeping):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.within = self.kept[-1][1].device

        def on_validation_epoch_end(self):
            late = self.kept[-1][1]
            self.behind, self.is_close = late.device, _is_close(late, late.cpu())
            super().on_validation_epoch_end()

    module = Looking()
    cluster = EmulatedCluster(2, "1MiB", strict=strict)
    trainer(HarmonyStrategy(cluster=cluster)).validate(module, loader(8), verbose=False)
    assert module.within.index is not None  # CUDA would punish its use with host tensors
    assert module.behind == (module.within if strict else torch.device("cpu"))
    assert module.is_close is not strict


def _is_close(one, other):
    try:
        torch.testing.assert_close(one, other)
    except AssertionError:
        return False
    return True


def test_tensors_on_one_device_stay_there():
    cluster = EmulatedCluster(2, "1MiB")
    mode = Between(cluster, torch.device("cpu"), lambda tensors, **told: None)
    with cluster.activate():
        first, second = torch.ones(3, device="cpu:0"), torch.ones(3, device="cpu:1")
    mode.enter()
    try:
        assert (first + first).device == torch.device("cpu", 0)
        assert (first + second).device.index is None
        assert (first + torch.ones(3)).device.index is None
        second.add_(first)  # what is written stays where it is
        assert second.device == torch.device("cpu", 1) and second.tolist() == [2, 2, 2]
        host = torch.zeros(3)
        host += second
        host[0] = first[0]
        assert host.tolist() == [1, 2, 2]
        with mode.suspended(), cluster.activate(), pytest.raises(RuntimeError, match="same device"):
            first + second
        assert torch.stack([first.sum(), second.sum()]).tolist() == [3, 6]
    finally:
        mode.leave()
        mode.leave()


class Counting(Chain):
    """Keeps a sum on whichever GPU has computed it, and adds to it on another one."""

    def __init__(self, **options):
        super().__init__(**options)
        self.total = None

    def step(self, batch):
        inputs, targets = batch
        if self.total is None:
            self.total = self.net[0](inputs).detach().sum()
        loss = nn.functional.mse_loss(self.head(self.net(inputs)).squeeze(1), targets)
        self.total = self.total + loss.detach()
        return loss


def test_a_scalar_of_one_gpu_meets_tensors_of_another_within_a_step():
    totals = []
    for strategy in ("auto", harmony(2, microbatch_size=8)):
        torch.manual_seed(0)
        module = Counting()
        trainer(strategy).fit(module, loader(8))
        totals.append(module.total.item())
    assert totals[0] == totals[1]


class Block(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(lambda y: self.other(self.one(y).relu()), x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_within_a_layer_recomputes_on_the_weights_of_the_layer(use_reentrant):
    ours, reference = twins(depth=2)
    for module in (ours, reference):
        torch.manual_seed(1)
        module.net.extend(Block(use_reentrant) for _ in range(4))
    trainer().fit(reference, loader(8))
    strategy = harmony(2, "160KiB", microbatch_size=8, layers=[Block])
    trainer(strategy).fit(ours, loader(8))
    assert same_weights(ours, reference)


class Recurrent(Chain):
    """Two recurrent layers, each swapped by itself, over sequences of 1 to 3 items."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first = nn.LSTM(8, 16, batch_first=True, bidirectional=True, num_layers=2)
        self.second = nn.GRU(32, 8, batch_first=True)

    def recur(self, inputs):
        lengths = 1 + torch.arange(len(inputs)) % 3
        items = inputs[:, None, :8].expand(-1, 3, -1) * torch.arange(1, 4, device=inputs.device)[:, None]
        packed = nn.utils.rnn.pack_padded_sequence(items, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.second(self.first(packed)[0])[0], batch_first=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.recur(batch[0])[0].square().mean()

    def predict_step(self, batch, batch_idx):
        return self.recur(batch[0])


def test_recurrent_layers_take_packed_sequences():
    modules, predictions = [], []
    for strategy, batch_size in (("auto", 4), (harmony(2, "160KiB", microbatch_size=4), 8)):
        torch.manual_seed(0)
        modules.append(Recurrent())
        run = trainer(strategy, accumulate_grad_batches=8 // batch_size, limit_train_batches=16 // batch_size)
        run.fit(modules[-1], loader(batch_size))
        predictions.append(run.predict(modules[-1], loader(8)))
    assert same_weights(*modules)
    for (padded, lengths), (other, other_lengths) in zip(*predictions, strict=True):
        assert torch.equal(padded, other)
        assert torch.equal(lengths, other_lengths)


def test_what_sets_a_run_up_passes_by(monkeypatch):
    """A trial of the optimizer and a first plan are thousands of operations, none of them the user's code."""
    calls = []
    original = Between.__torch_function__

    def counted(self, func, *args, **kwargs):
        calls.append(func)
        return original(self, func, *args, **kwargs)

    monkeypatch.setattr(Between, "__torch_function__", counted)
    trainer(harmony(2), max_steps=1).fit(Chain(), loader(8))
    assert 0 < len(calls) < 300
