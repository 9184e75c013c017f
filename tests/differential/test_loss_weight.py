"""Losses that are no means over samples: `loss_weight`, the check that finds them, microbatches without a loss."""

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from harmony_lightning import ConfigurationError, DeviceOutOfMemoryError, HarmonyConfig, HarmonyStrategy
from harmony_lightning.config import Environment
from harmony_lightning.strategy.microbatch_check import compare_losses


class Losing(Chain):
    """Its loss is what `reduce` makes of the squared errors; a target of 0 does not count under "tokens"."""

    def __init__(self, reduce="mean", **options):
        super().__init__(optimizer=torch.optim.SGD, **{"lr": 1e-3, **options})
        self.reduce = reduce
        self.outputs = []

    def step(self, batch):
        inputs, targets = batch
        errors = (self.head(self.net(inputs)).squeeze(1) - targets).square()
        match self.reduce:
            case "mean":
                return errors.mean()
            case "sum":
                return errors.sum()
            case "tokens":
                return (errors * counts(targets)).sum() / counts(targets).sum()
            case "coupled":
                return errors.mean() / errors.detach().max()

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.losses.append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", batch[1].mean(), on_step=True)
        return {"loss": loss, "targets": batch[1]}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if outputs:
            self.outputs.append(outputs["loss"].item())


def counts(targets):
    return (targets > 0).float()


def fit(reduce, strategy="auto", **options):
    torch.manual_seed(0)
    module = Losing(reduce)
    fitted = trainer(strategy, **options)
    fitted.fit(module, loader(8))
    return module, fitted


def tokens(batch):
    return counts(batch[1]).sum()


@pytest.mark.parametrize(("reduce", "loss_weight"), [("mean", "mean"), ("sum", "sum"), ("tokens", tokens)])
@pytest.mark.parametrize("microbatch_size", [2, 3])
def test_weighted_losses_train_as_the_minibatch_does(reduce, loss_weight, microbatch_size):
    plain, reference = fit(reduce)
    strategy = harmony(microbatch_size=microbatch_size, loss_weight=loss_weight, check_microbatches=True)
    ours, fitted = fit(reduce, strategy)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(ours.outputs), torch.tensor(plain.outputs))
    assert list(fitted.callback_metrics) == list(reference.callback_metrics)
    for name, value in reference.callback_metrics.items():
        torch.testing.assert_close(fitted.callback_metrics[name], value, msg=name)


@pytest.mark.parametrize(
    ("reduce", "advice"), [("sum", "loss_weight='sum' gives that loss"), ("coupled", "microbatch_size=8")]
)
def test_the_check_finds_losses_that_microbatches_change(reduce, advice):
    with pytest.raises(ConfigurationError, match=rf"first minibatch of 8 samples .* 4 microbatches .*{advice}"):
        fit(reduce, harmony(check_microbatches=True))
    fit(reduce, harmony())


class TimeFirst(Chain):
    def __init__(self):
        super().__init__(depth=2)
        self.rnn = nn.GRU(WIDTH, WIDTH)

    def step(self, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(self.rnn(self.net(inputs))[0], targets)


def fit_time_first(strategy="auto", **options):
    torch.manual_seed(0)
    module, batches = TimeFirst(), torch.randn(3, 2, 12, 8, WIDTH)
    trainer(strategy, **options).fit(module, DataLoader(batches, batch_size=None, collate_fn=tuple))
    return module


def test_a_batch_whose_first_dimension_is_time_is_cut_by_the_users_own_function():
    """What a rule cannot see: it would be cut through time, which the check finds."""
    with pytest.raises(ConfigurationError, match="but time is, give split_batch=fn"):
        fit_time_first(harmony(2, "400KiB", check_microbatches=True))

    def by_samples(batch, num_microbatches):
        return list(zip(*(part.chunk(num_microbatches, 1) for part in batch), strict=True))

    ours = fit_time_first(harmony(2, "400KiB", split_batch=by_samples, check_microbatches=True))
    for mine, theirs in zip(ours.parameters(), fit_time_first().parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_check_knows_when_mean_was_right():
    with pytest.raises(ConfigurationError, match="loss_weight='mean' gives that loss"):
        fit("mean", harmony(check_microbatches=True, loss_weight="sum"))


def test_the_check_leaves_no_trace():
    class Touchy(Losing):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.metric = MeanMetric()

        def step(self, batch):
            loss = super().step((torch.nn.functional.dropout(self.norm(batch[0]), 0.3, self.training), batch[1]))
            self.metric(loss)
            self.log("metric", self.metric, on_step=True, on_epoch=True)
            return loss

    def run(**options):
        torch.manual_seed(0)
        module = Touchy()
        fitted = trainer(harmony(**options), max_epochs=2)
        fitted.fit(module, loader(8, 24))
        return module, fitted

    expected, reference = run()
    ours, fitted = run(check_microbatches=True)
    assert same_weights(ours, expected)
    assert ours.training == expected.training
    assert dict(fitted.callback_metrics) == dict(reference.callback_metrics)
    assert len(ours.losses) == len(expected.losses) + 5  # one whole minibatch and four microbatches
    assert ours.losses[5:] == expected.losses


def test_a_minibatch_that_fits_no_gpu_cannot_be_checked(caplog, monkeypatch):
    from harmony_lightning.runtime.engine import Engine

    def refuse(*args, **kwargs):
        raise DeviceOutOfMemoryError("gpu0 out of memory")

    monkeypatch.setattr(Engine, "run", refuse)
    fit("sum", harmony(check_microbatches=True))
    assert sum("check of microbatches left out" in record.message for record in caplog.records) == 1


def test_nan_equals_nan_and_rounding_passes():
    compare_losses(float("nan"), [float("nan"), 1.0], [0.5, 0.5], [1, 1], 1e-3)
    compare_losses(1.0, [1.0001, 1.0], [0.5, 0.5], [1, 1], 1e-3)


@pytest.mark.parametrize("weights", [[float("nan")] * 4, [-1.0] * 4])
def test_weights_must_be_numbers(weights):
    given = iter(weights)
    with pytest.raises(ConfigurationError, match="loss_weight must give finite numbers of at least 0"):
        fit("mean", harmony(loss_weight=lambda batch: next(given)))


def test_knobs_are_checked_and_read():
    with pytest.raises(ConfigurationError, match="loss_weight must be 'mean', 'sum' or a function"):
        HarmonyConfig(loss_weight="total")
    assert Environment.read({"HARMONY_CHECK": "1"}).knobs() == {"check_microbatches": True}
    with pytest.raises(ConfigurationError, match="HARMONY_CHECK must be 0 or 1"):
        Environment.read({"HARMONY_CHECK": "yes"})


def test_the_environment_switches_the_check_on(monkeypatch):
    monkeypatch.setenv("HARMONY_CHECK", "1")
    with pytest.raises(ConfigurationError, match="check of microbatches"):
        fit("sum", harmony())
    fit("sum", harmony(check_microbatches=False))


def test_microbatches_without_a_loss_make_the_others_count_more():
    """As if the minibatch had only the samples that gave a loss."""

    class Choosy(Losing):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch[1][0] > 0 else None

    def kept(batch):
        parts = [part for part in zip(batch[0].split(2), batch[1].split(2), strict=True) if part[1][0] > 0]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    torch.manual_seed(0)
    ours = Choosy()
    trainer(harmony(microbatch_size=2)).fit(ours, loader(8))
    torch.manual_seed(0)
    reference = Losing()
    batches = [kept(batch) for batch in loader(8) if (batch[1][::2] > 0).any()]
    assert len({len(batch[0]) for batch in batches}) > 1
    trainer().fit(reference, torch.utils.data.DataLoader(batches, batch_size=None))
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(ours.outputs), torch.tensor(reference.outputs))


def test_options_survive_where_one_microbatch_is_all():
    plain, _ = fit("sum")
    ours, _ = fit("sum", HarmonyStrategy(loss_weight="sum", check_microbatches=True))
    assert same_weights(ours, plain)
    assert isinstance(ours, L.LightningModule)


@pytest.mark.parametrize("least", [0, 1])
def test_where_nothing_counts_the_loss_is_what_the_code_makes_of_nothing(least):
    """As on one device: 0 / 0 if it divides by nothing, else what it adds, a mean over samples."""

    class Adding(Losing):
        def step(self, batch):
            inputs, targets = batch
            errors = (self.head(self.net(inputs)).squeeze(1) - targets).square()
            of_tokens = (errors * counts(targets)).sum() / counts(targets).sum().clamp(min=least)
            return of_tokens + 0.1 * errors.mean()

    modules = []
    for strategy in ("auto", harmony(microbatch_size=3, loss_weight=tokens)):
        torch.manual_seed(0)
        modules.append(Adding())
        batches = [(inputs, -targets.abs()) for inputs, targets in loader(8)]
        trainer(strategy).fit(modules[-1], torch.utils.data.DataLoader(batches, batch_size=None))
    plain, ours = modules
    torch.testing.assert_close(torch.tensor(ours.outputs), torch.tensor(plain.outputs), equal_nan=True)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert torch.tensor(ours.outputs).isnan().all() == (least == 0)
