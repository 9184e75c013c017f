"""What others watch: calls of the strategy and the optimizer, values that are read within a step, steps after the run."""

import copy
import pickle
from unittest import mock

import lightning as L
import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer, twins
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchmetrics import MeanSquaredError

WHOLE = 40
"""As many samples as there are: one microbatch for each minibatch."""


@pytest.mark.parametrize("microbatch_size", [WHOLE, 2])
def test_an_optimizer_that_records_its_steps_takes_one_for_each_minibatch(microbatch_size):
    calls = []

    class Recording(torch.optim.AdamW):
        def step(self, closure=None):
            calls.append(closure is not None)
            return super().step(closure)

    fit = trainer(harmony(microbatch_size=microbatch_size))
    fit.fit(Chain(optimizer=Recording), loader(10))
    assert calls == [True] * 4
    assert fit.strategy.statistics().updates_whole == 4


@pytest.mark.parametrize("microbatch_size", [WHOLE, 2])
def test_the_strategy_s_backward_is_called_once_for_each_minibatch(microbatch_size):
    plain, ours = twins()
    trainer(accumulate_grad_batches=1).fit(plain, loader(10))
    fit = trainer(harmony(microbatch_size=microbatch_size))
    with mock.patch.object(Strategy, "backward", wraps=fit.strategy.backward) as backward:
        fit.fit(ours, loader(10))
    assert backward.call_count == 4
    assert microbatch_size < WHOLE or same_weights(plain, ours)


class WatchedPrecision(Precision):
    def __init__(self):
        self.calls = []

    def pre_backward(self, tensor, module):
        self.calls.append("pre")
        return super().pre_backward(tensor, module)

    def backward(self, tensor, model, optimizer, *args, **kwargs):
        self.calls.append("backward")
        super().backward(tensor, model, optimizer, *args, **kwargs)

    def post_backward(self, tensor, module):
        assert all(parameter.grad is not None for parameter in module.parameters())
        self.calls.append("post")
        return super().post_backward(tensor, module)


def test_a_precision_plugin_finds_all_gradients_behind_its_own_backward():
    plugin = WatchedPrecision()
    fit = trainer(harmony(), plugins=[plugin])
    fit.fit(Chain(), loader(20))
    assert plugin.calls == ["pre", "backward", "post"] * 2
    assert fit.precision_plugin is plugin and set(vars(plugin)) == {"calls"}

    plugin.backward = own = mock.Mock(side_effect=plugin.backward)
    fit.fit_loop.max_epochs = 2
    fit.fit(Chain(), loader(20))
    assert plugin.backward is own and own.call_count == 2


def test_a_backward_that_does_nothing_leaves_no_gradients(caplog):
    class Idle(Chain):
        def backward(self, loss):
            assert loss.requires_grad

        def on_after_backward(self):
            assert all(parameter.grad is None for parameter in self.parameters())

    torch.manual_seed(0)
    module = Idle()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(harmony()).fit(module, loader(20))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert sum("without a gradient" in record.message for record in caplog.records) == 1
    assert "loss.backward" in caplog.text


class Reads(Chain):
    """Reads in a step what it has logged there, and has Lightning refuse what cannot be logged."""

    is_refused_at_once = True

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("number", float(batch_idx), on_step=True, on_epoch=True)
        assert self.trainer.callback_metrics["number"] == batch_idx
        assert self.trainer.fit_loop._results["training_step.number"].value == 10 * sum(range(batch_idx + 1))
        if self.is_refused_at_once:
            with pytest.raises(MisconfigurationException, match="twice"):
                self.log("number", 0.0, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        assert "validation_step.val_loss" in self.trainer._evaluation_loop._results


@pytest.mark.parametrize("microbatch_size", [WHOLE, 2])
def test_what_a_step_logs_it_can_read(microbatch_size):
    logged = []
    for strategy in ("auto", harmony(microbatch_size=microbatch_size)):
        torch.manual_seed(0)
        module = Reads()
        module.is_refused_at_once = microbatch_size == WHOLE
        fit = trainer(strategy)
        fit.fit(module, loader(10), loader(10))
        logged.append({name: value.item() for name, value in fit.callback_metrics.items()})
        assert "log" not in vars(fit.fit_loop.epoch_loop._results)
    assert logged[0] == pytest.approx(logged[1]) and logged[1]["number_epoch"] == 1.5
    assert microbatch_size < WHOLE or logged[0] == logged[1]


class Differentiates(Chain):
    """Logs, and then cannot be cut."""

    def training_step(self, batch, batch_idx):
        self.log("total", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        inputs = batch[0].clone().requires_grad_()
        self.log("late", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        (slope,) = torch.autograd.grad(self.net(inputs).sum(), inputs)
        assert slope.shape == inputs.shape
        return super().training_step(batch, batch_idx)


def test_a_step_that_begins_again_has_logged_once():
    fit = trainer(harmony(microbatch_size=WHOLE))
    fit.fit(Differentiates(), loader(10))
    assert fit.callback_metrics["total"] == fit.callback_metrics["late"] == 4


class WithMockedMetric(Chain):
    def __init__(self):
        super().__init__()
        self.metric = MeanSquaredError()
        self.metric.reset = mock.Mock(side_effect=self.metric.reset)

    def training_step(self, batch, batch_idx):
        self.metric(torch.ones(2), torch.zeros(2))
        self.metric.reset.reset_mock()
        self.log("metric", self.metric)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("microbatch_size", [WHOLE, 2])
def test_a_metric_s_methods_may_be_somebody_s_own(microbatch_size):
    module = WithMockedMetric()
    trainer(harmony(microbatch_size=microbatch_size)).fit(module, loader(10))
    assert isinstance(module.metric.reset, mock.Mock)
    module.metric.reset.assert_called_once()


def test_steps_after_the_run_are_lightning_s_own_on_the_host():
    batch = next(iter(loader(10)))
    after = []
    for module, strategy in zip(twins(), ("auto", harmony(microbatch_size=WHOLE)), strict=True):
        fit = trainer(strategy)
        fit.fit(module, loader(WHOLE))
        fit.state.stage = L.pytorch.trainer.states.RunningStage.TRAINING
        loop = fit.fit_loop.epoch_loop.automatic_optimization
        output = loop.run(fit.optimizers[0], 0, {"batch": batch, "batch_idx": 0})
        after.append((output["loss"].item(), fit.strategy.predict_step(batch, 0).sum().item()))
    assert after[0] == after[1]


def test_losses_kept_from_two_runs_can_be_compared():
    class Keeps(Chain):
        def training_step(self, batch, batch_idx):
            self.kept = super().training_step(batch, batch_idx)
            return self.kept

    kept = []
    for _ in range(2):
        torch.manual_seed(0)
        module = Keeps()
        trainer(harmony(microbatch_size=WHOLE)).fit(module, loader(10))
        kept.append(module.kept)
    assert abs(kept[0] - kept[1]) == 0


def test_a_trainer_can_be_pickled_before_and_after():
    fit = trainer(harmony())
    pickle.dumps(fit)
    fit.fit(Chain(), loader(WHOLE))
    again = pickle.loads(pickle.dumps(fit))
    again.fit_loop.max_epochs = 2
    again.fit(Chain(), loader(WHOLE))
    assert again.strategy.statistics().updates_just_in_time == 1


def repickled(fit):
    return pickle.loads(pickle.dumps(fit))


class CopiedAtStart(L.Callback):
    def __init__(self, duplicate):
        self.duplicate = duplicate

    def on_train_start(self, fit, module):
        self.copied = self.duplicate(fit)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, repickled])
def test_a_trainer_that_is_copied_in_a_hook_trains_as_the_original(duplicate):
    plain, ours = twins()
    trainer().fit(plain, loader(WHOLE))
    callback = CopiedAtStart(duplicate)
    trainer(harmony(microbatch_size=WHOLE), callbacks=[callback]).fit(Chain(), loader(WHOLE))
    callback.copied.fit(ours, loader(WHOLE))
    assert same_weights(plain, ours)
    assert callback.copied.strategy.statistics().updates_just_in_time == 1
    assert "get_device_stats" not in vars(callback.copied.accelerator)


def test_slurm_may_be_named_where_it_has_started_nothing(monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    trainer(harmony(), plugins=[SLURMEnvironment()]).fit(Chain(), loader(WHOLE))
