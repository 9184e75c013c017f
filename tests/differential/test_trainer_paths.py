"""Every way into the Trainer: evaluation alone and after training, prediction, resuming, callbacks that watch, loggers."""

import csv
import itertools

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC


class Watched(Chain):
    """Logs in every step, learns by a schedule, and keeps what evaluation saw."""

    def __init__(self, **options):
        super().__init__(depth=6, **options)
        self.seen = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.step(batch)
        self.log("val_loss", loss, prog_bar=True)
        self.seen.append((self.trainer.state.fn.value, self.trainer.sanity_checking, dataloader_idx, loss.item()))
        return {"loss": loss}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.step(batch)
        self.log("test_loss", loss, add_dataloader_idx=True, on_step=True, on_epoch=True)
        return loss

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return super().predict_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8), "interval": "step"}]


def make(**options):
    torch.manual_seed(0)
    return Watched(**options)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("after_fit", [False, True])
@pytest.mark.parametrize("num_gpus", [1, 3])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_evaluation_and_prediction(after_fit, num_gpus, inference_mode):
    """One trainer goes through all of them, on a model larger than its GPUs, and back to training."""
    found = []
    for strategy in ("auto", harmony(num_gpus, "80KiB", microbatch_size=8)):
        module = make()
        fitted = trainer(strategy, inference_mode=inference_mode, limit_predict_batches=3)
        loaders = [loader(8, 16), loader(4, 8)]
        results = []
        if after_fit:
            fitted.fit(module, loader(8, 16), loaders)
        results += [fitted.validate(module, loaders, verbose=False), fitted.test(module, loader(8, 20), verbose=False)]
        results += [fitted.test(module, loaders, verbose=False), fitted.predict(module, loader(8))]
        results += [fitted.predict(module, loaders), fitted.predict(module, loader(8), return_predictions=False)]
        fitted.fit(module, loader(8, 16), loaders)
        results += [fitted.validate(module, loader(8, 16), verbose=False)]
        found.append((results, module.seen, list(module.parameters())))
        if strategy != "auto":
            assert fitted.strategy.statistics().num_packs >= 4
    assert len(found[0][1]) > 5
    assert equal(found[0], found[1])
    assert {inner._compiled_call_impl for inner in module.modules()} == {None}


class Adding(nn.Module):
    """Leaves its result in its argument."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x += self.linear(x * 1)


class Added(Chain):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Adding() for _ in range(3))

    def step(self, batch):
        hidden = self.net(batch[0])
        for layer in self.layers:
            layer(hidden)
        return nn.functional.mse_loss(self.head(hidden).squeeze(1), batch[1])


@pytest.mark.parametrize("inference_mode", [False, True])
def test_layers_on_other_gpus_write_their_arguments_in_evaluation_too(inference_mode):
    found = []
    for strategy in ("auto", harmony(3, one_layer_per_pack=True, layers=[Adding])):
        torch.manual_seed(0)
        fitted = trainer(strategy, inference_mode=inference_mode)
        found.append(fitted.validate(Added(), loader(8), verbose=False))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2},
        {"val_check_interval": 0.4, "num_sanity_val_steps": 0},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2, "num_sanity_val_steps": -1},
        {"limit_val_batches": 1, "limit_train_batches": 0.6, "num_sanity_val_steps": 3},
        {"limit_val_batches": 0},
        {"overfit_batches": 0.5},
        {"fast_dev_run": True},
        {"max_steps": 3},
        {"max_time": {"hours": 1}, "min_epochs": 1},
        {"detect_anomaly": True},
        {"accumulate_grad_batches": 7},
    ],
    ids=str,
)
def test_loop_options(options):
    found = []
    for strategy in ("auto", harmony(2, microbatch_size=8)):
        module = make()
        fitted = trainer(strategy, **{"max_epochs": 3, **options})
        fitted.fit(module, loader(8), loader(8, 16))
        found.append((module.seen, module.losses, fitted.global_step, fitted.current_epoch, list(module.parameters())))
    assert equal(*found)


class Order(L.Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, trainer.global_step))


class Stateful:
    """A loader that goes on where its checkpoint was made, with batches in an order of its own."""

    def __init__(self):
        self.batches = list(loader(8))[::-1]
        self.start = self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.start = self.start, 0
        for position in range(start, len(self)):
            self.position = position + 1
            yield self.batches[position]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.start = state["position"]


def saving(path):
    return ModelCheckpoint(path, every_n_train_steps=3, save_top_k=-1, filename="{step}")


@pytest.mark.parametrize(
    "plans", [((2, "120KiB", "pp"), (3, "90KiB", "pp")), ((1, "120KiB", "pp"), (4, "500KiB", "pp"))]
)
def test_resuming_in_the_middle_of_an_epoch_under_another_plan(tmp_path, plans):
    """To the bit: weights, optimizer, schedule and place in the epoch."""
    (num_gpus, memory, mode), (other_gpus, other_memory, other_mode) = plans
    whole = make()
    first = trainer(
        harmony(num_gpus, memory, mode=mode), max_epochs=2, callbacks=[saving(tmp_path)], enable_checkpointing=True
    )
    first.fit(whole, Stateful())
    resumed, order = make(), Order()
    second = trainer(harmony(other_gpus, other_memory, mode=other_mode), max_epochs=2, callbacks=[order])
    second.fit(resumed, Stateful(), ckpt_path=tmp_path / "step=3.ckpt")
    assert len(first.strategy.plan.packs) != len(second.strategy.plan.packs)
    assert same_weights(resumed, whole)
    assert order.batches[0] == (0, 3, 3)
    assert len(order.batches) == 7
    states = [one.strategy.optimizer_state(one.optimizers[0]) for one in (first, second)]
    assert equal(*states)


def test_saved_checkpoints_are_those_of_one_device(tmp_path):
    for name, strategy in (("plain", "auto"), ("ours", harmony(2, microbatch_size=8))):
        fitted = trainer(strategy, max_epochs=2, callbacks=[saving(tmp_path / name)], enable_checkpointing=True)
        fitted.fit(make(), loader(8))
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir()) and len(names) == 3
    for name in names:
        plain, ours = (torch.load(tmp_path / kind / name, weights_only=False) for kind in ("plain", "ours"))
        assert list(plain) == list(ours)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"):
            assert equal(plain[key], ours[key]), key


def test_callbacks_that_watch_what_is_logged(tmp_path):
    found = []
    for name, strategy in (("plain", "auto"), ("ours", harmony(2, microbatch_size=2))):
        stopping = EarlyStopping("loss_epoch", min_delta=0.3, patience=1)
        logger = CSVLogger(tmp_path, name=name, version=0)
        best = ModelCheckpoint(tmp_path / name / "best", monitor="val_loss", filename="{epoch}")
        fitted = trainer(
            strategy,
            max_epochs=30,
            logger=logger,
            log_every_n_steps=2,
            enable_checkpointing=True,
            callbacks=[stopping, LearningRateMonitor(), best],
        )
        fitted.fit(make(), loader(8), loader(8, 16))
        rows = list(csv.DictReader(open(logger.experiment.metrics_file_path)))  # noqa: SIM115
        found.append((fitted.current_epoch, stopping.stopped_epoch, best.best_model_path.split("/")[-1], rows))
    plain, ours = found
    assert plain[:3] == ours[:3]
    assert 1 < plain[0] < 30
    assert "lr-AdamW" in plain[3][0] and len(plain[3]) == len(ours[3]) > 4
    for one, other in zip(plain[3], ours[3], strict=True):
        assert list(one) == list(other)
        for key in one:
            assert one[key] == other[key] or float(one[key]) == pytest.approx(float(other[key]), rel=1e-4), key


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_progress_bars_show_the_minibatch(bar):
    shown = []

    class Watching(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module))

    class Shown(Watched):
        def training_step(self, batch, batch_idx):
            loss = self.step(batch)
            self.log("shown", loss, prog_bar=True)
            return loss

    for strategy in ("auto", harmony(2, microbatch_size=2)):
        torch.manual_seed(0)
        callbacks = [getattr(L.pytorch.callbacks, bar)(), Watching()]
        trainer(strategy, enable_progress_bar=True, callbacks=callbacks).fit(Shown(), loader(8), loader(8, 16))
    plain, ours = shown[:5], shown[5:]
    assert [list(one) for one in plain] == [list(one) for one in ours]
    assert [one["shown"] for one in ours] == pytest.approx([one["shown"] for one in plain], rel=1e-4)


def test_tensorboard_gets_the_same_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for name, strategy in (("plain", "auto"), ("ours", harmony(2, microbatch_size=8))):
        logger = TensorBoardLogger(tmp_path, name=name, version=0)
        trainer(strategy, logger=logger, log_every_n_steps=1).fit(make(), loader(8), loader(8, 16))
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        found.append(
            {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])}
        )
    assert found[0] == found[1] and len(found[0]) >= 3


def test_a_step_that_takes_the_iterator_runs_in_one_piece():
    class Iterating(Chain):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.step(batch)

    found = []
    for strategy in ("auto", harmony(2, microbatch_size=2)):
        torch.manual_seed(0)
        module = Iterating()
        trainer(strategy, limit_train_batches=3).fit(module, loader(8))
        found.append(list(module.parameters()))
    assert equal(*found)


METRICS = {
    "accuracy": BinaryAccuracy,
    "auroc": BinaryAUROC,  # keeps lists
    "mean": MeanMetric,
    "composed": lambda: SumMetric() + 1,
    "collection": lambda: MetricCollection({"a": BinaryAccuracy(), "s": BinaryAUROC()}),
    "cat": CatMetric,
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_show_the_value_of_the_minibatch(name):
    """Called or updated in interleaved microbatches, and their states stay where other code expects them."""
    is_binary = name in ("accuracy", "auroc", "collection")
    is_logged = name != "cat"

    class Measured(Chain):
        def __init__(self):
            super().__init__()
            self.metric, self.values = METRICS[name](), []

        def training_step(self, batch, batch_idx):
            outputs = self.head(self.net(batch[0])).squeeze(1)
            given = (outputs.sigmoid(), (batch[1] > 0).long()) if is_binary else (outputs,)
            self.metric(*given)
            if name == "collection":
                self.log_dict(self.metric, on_step=True, on_epoch=True)
            elif is_logged:
                self.log("metric", self.metric, on_step=True, on_epoch=True)
            return torch.nn.functional.mse_loss(outputs, batch[1])

        def on_train_batch_end(self, *args):
            metrics = self.trainer.callback_metrics
            self.values.append({key: float(value) for key, value in metrics.items()})

        def on_train_epoch_end(self):
            if not is_logged:
                self.values.append({"epoch": self.metric.compute()})

    found = []
    for strategy in ("auto", harmony(2, microbatch_size=3)):
        torch.manual_seed(0)
        module = Measured()
        fitted = trainer(strategy, max_epochs=2)
        fitted.fit(module, loader(8))
        found.append(module.values)
        states = itertools.chain.from_iterable(
            value if isinstance(value, list) else [value]
            for metric in module.modules()
            if isinstance(metric, torch.nn.Module) and hasattr(metric, "_defaults")
            for value in (getattr(metric, state) for state in metric._defaults)
        )
        assert {type(state) for state in states} <= {torch.Tensor}
        assert "forward" not in vars(module.metric) and "reset" not in vars(module.metric)
    for plain, ours in zip(*found, strict=True):
        assert list(plain) == list(ours)
        for key, value in plain.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)


def test_what_a_step_keeps_of_metrics_is_its_own():
    """A metric of the user's survives an exception in the step with its own methods."""

    class Failing(Chain):
        def __init__(self):
            super().__init__()
            self.metric = MeanMetric()

        def training_step(self, batch, batch_idx):
            self.metric(batch[0].mean())
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(harmony(2)).fit(module, loader(8))
    assert "forward" not in vars(module.metric)
    assert module.metric(torch.ones(2)) == 1


def test_outputs_of_evaluation_reach_callbacks_on_the_root_device():
    given = []

    class Watching(L.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            given.append(outputs["loss"])

        def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            given.append(outputs)

    fitted = trainer(harmony(2), callbacks=[Watching()])
    fitted.validate(make(), loader(8), verbose=False)
    fitted.predict(make(), loader(8))
    assert len(given) == 10
    assert {(type(value), value.device.type) for value in given} == {(torch.Tensor, "cpu")}
    assert given[-1].shape == (8, 1) and WIDTH
