"""Lightning's callbacks and tuners on GPUs smaller than the model: each does what it does on one device.

One microbatch per minibatch, so that everything is equal to the bit.
"""

import copy
import gc
from datetime import timedelta

import lightning as L
import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer
from lightning.pytorch import callbacks
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import swa_utils

BATCH = 8


def fresh(kind=Chain, **options):
    torch.manual_seed(0)
    return kind(**options)


def one_piece(num_gpus=2, **options):
    return harmony(num_gpus, microbatch_size=BATCH, **options)


def fit_both(make_callbacks, make_module=fresh, memory="120KiB", **options):
    """The same run plainly and under harmony; returns both (module, trainer, callbacks)."""
    runs = []
    for strategy in ("auto", one_piece(memory=memory)):
        module, own = make_module(), make_callbacks()
        fitted = trainer(strategy, **{"max_epochs": 3, "callbacks": own, **options})
        fitted.fit(module, loader(BATCH, 24), loader(BATCH, 16))
        runs.append((module, fitted, own))
    return runs


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt"))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


CHECKPOINTS = {
    "best two": {"monitor": "val_loss", "save_top_k": 2, "filename": "{epoch}-{val_loss:.4f}"},
    "worst": {"monitor": "loss_epoch", "mode": "max", "filename": "{epoch}-{step}"},
    "all and last": {"save_top_k": -1, "save_last": True},
    "every two steps": {"save_top_k": -1, "every_n_train_steps": 2},
    "every second epoch": {"save_top_k": -1, "every_n_epochs": 2, "save_on_train_epoch_end": True},
    "time": {"save_top_k": -1, "train_time_interval": timedelta(seconds=0)},
    "weights": {"save_weights_only": True, "save_last": True},
}


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_model_checkpoint_writes_the_same_files(tmp_path, options):
    """Same names (they hold metrics), same contents: weights, optimizer states, loops, the callback's own state."""
    written = {}
    for name, strategy in (("plain", "auto"), ("ours", one_piece())):
        saving = callbacks.ModelCheckpoint(dirpath=tmp_path / name, **options)
        run = trainer(strategy, max_epochs=3, enable_checkpointing=True, callbacks=[saving])
        run.fit(fresh(), loader(BATCH, 24), loader(BATCH, 16))
        written[name] = files(tmp_path / name)
    assert written["plain"] == written["ours"] != []
    for name in written["ours"]:
        ours, plain = (torch.load(tmp_path / which / name, weights_only=False) for which in ("ours", "plain"))
        assert list(ours) == list(plain)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"):
            assert equal(ours.get(key), plain.get(key)), key


@pytest.mark.parametrize("kind", ["model checkpoint", "on exception"])
def test_a_checkpoint_of_the_moment_of_an_error_continues_the_run(tmp_path, kind):
    class Failing(Chain):
        def on_train_batch_start(self, batch, batch_idx):
            if self.fails and batch_idx == 3:
                raise RuntimeError("cut off")

        fails = True

    if kind == "on exception":
        saving = callbacks.OnExceptionCheckpoint(tmp_path, "broken")
    else:
        saving = callbacks.ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=10)
    module, reference = fresh(Failing), fresh(Failing)
    with pytest.raises(RuntimeError, match="cut off"):
        trainer(one_piece(), callbacks=[saving], enable_checkpointing=True).fit(module, loader(BATCH))
    reference.fails = False
    trainer(limit_train_batches=3).fit(reference, loader(BATCH))
    (path,) = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=False)
    assert saved["global_step"] == 3
    assert equal(saved["state_dict"], dict(reference.state_dict()))


class Testable(Chain):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.step(batch))


def test_the_best_checkpoint_is_evaluated_and_training_goes_on(tmp_path):
    runs = []
    for name, strategy in (("plain", "auto"), ("ours", one_piece())):
        module = fresh(Testable)
        saving = callbacks.ModelCheckpoint(tmp_path / name, monitor="val_loss")
        run = trainer(strategy, max_epochs=3, enable_checkpointing=True, callbacks=[saving])
        run.fit(module, loader(BATCH, 24), loader(BATCH, 16))
        scores = run.test(ckpt_path="best", dataloaders=loader(BATCH), verbose=False)
        scores += run.validate(module, loader(BATCH), ckpt_path="best", verbose=False)
        predictions = run.predict(module, loader(BATCH), ckpt_path="best")
        run.fit_loop.max_epochs = 5
        run.fit(module, loader(BATCH, 24), loader(BATCH, 16))
        runs.append((module, scores, predictions))
    (reference, *expected), (ours, *found) = runs
    assert equal(found, expected)
    assert same_weights(ours, reference)


def continue_from(path, strategies, make_module=fresh, make_callbacks=list, **options):
    """Three runs: up to step 3, to the end of the second epoch, to the end; each from the checkpoint before."""
    limits = ({"max_steps": 3}, {"max_epochs": 2}, {"max_epochs": 4})
    for index, (strategy, limit) in enumerate(zip(strategies, limits, strict=True)):
        module = make_module()
        run = trainer(strategy, callbacks=make_callbacks(), **{"max_epochs": 4, **limit}, **options)
        run.fit(module, loader(BATCH), ckpt_path=path / f"{index}.ckpt" if index else None)
        run.save_checkpoint(path / f"{index + 1}.ckpt")
    return module, run.global_step


@pytest.mark.parametrize(
    "options",
    [{}, {"make_callbacks": lambda: [callbacks.EMAWeightAveraging(decay=0.9)]}],
    ids=["plain", "averaging"],
)
def test_resuming_in_the_middle_and_at_the_end_of_an_epoch(tmp_path, options):
    """Against plain runs that are cut off and resumed at the same places, as Lightning does not skip what was seen."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "plain").mkdir()
    ours = continue_from(tmp_path / "ours", (one_piece(1), one_piece(4), one_piece(2)), **options)
    plain = continue_from(tmp_path / "plain", ("auto", "auto", "auto"), **options)
    assert same_weights(ours[0], plain[0])
    assert ours[1] == plain[1] > 15


@pytest.mark.parametrize("device", [None, "cpu"])
def test_stochastic_weight_averaging(device):
    def averaging():
        return [callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1, device=device)]

    (reference, *_), (ours, *_) = fit_both(averaging, max_epochs=4)
    assert same_weights(ours, reference)


def test_stochastic_weight_averaging_renews_batch_statistics():
    """A further epoch of forward passes without backward, in training mode."""

    class Normed(Chain):
        def __init__(self):
            super().__init__()
            self.net[3] = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())

    def averaging():
        return [callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]

    (reference, *_), (ours, *_) = fit_both(averaging, lambda: fresh(Normed), max_epochs=4)
    assert same_weights(ours, reference)


@pytest.mark.parametrize(
    "make",
    [
        lambda: callbacks.EMAWeightAveraging(decay=0.9, update_every_n_steps=2),
        lambda: callbacks.WeightAveraging(use_buffers=True),
    ],
    ids=["ema", "mean"],
)
def test_weight_averaging(make):
    (reference, plain, _), (ours, fitted, _) = fit_both(lambda: [make()])
    assert same_weights(ours, reference)
    assert fitted.callback_metrics["val_loss"] == plain.callback_metrics["val_loss"]


class Averaged(Chain):
    """torch's own average of a part of the module, with batch statistics, at each place where users keep it."""

    def __init__(self, where, average):
        super().__init__()
        self.net[3] = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.where = where
        self.average = swa_utils.AveragedModel(self.net, **average).requires_grad_(False)

    def configure_optimizers(self):
        return self.optimizer([*self.net.parameters(), *self.head.parameters()], **self.options)

    def update(self, where):
        if where == self.where:
            self.average.update_parameters(self.net)

    def training_step(self, batch, batch_idx):
        self.update("in front")
        loss = super().training_step(batch, batch_idx)
        self.update("behind")
        with torch.no_grad():
            self.log("distance", nn.functional.mse_loss(self.average(batch[0]), self.net(batch[0])))
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.update("optimizer_step")

    def on_train_batch_end(self, *args):
        self.update("on_train_batch_end")

    def on_train_end(self):
        swa_utils.update_bn(loader(BATCH), self.average)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.head(self.average(batch[0])).square().mean())


AVERAGES = {
    "mean": {},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    "ema of all at once": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("where", ["in front", "behind", "optimizer_step", "on_train_batch_end"])
def test_averages_that_users_keep(where, average):
    def make_module():
        return fresh(Averaged, where=where, average=average)

    (reference, plain, _), (ours, fitted, _) = fit_both(list, make_module, memory="180KiB", max_epochs=2)
    assert same_weights(ours, reference)
    for name in ("val_loss", "distance"):
        assert fitted.callback_metrics[name] == plain.callback_metrics[name]


class Thawing(callbacks.BaseFinetuning):
    """Blocks 0-3 join at epoch 1, blocks 4-5 at epoch 2."""

    def freeze_before_training(self, module):
        self.freeze(module.net[:6])

    def finetune_function(self, module, epoch, optimizer):
        for begin, blocks in ((1, module.net[:4]), (2, module.net[4:6])):
            if epoch == begin:
                self.unfreeze_and_add_param_group(blocks, optimizer, lr=1e-3)


class OnlyTrainable(Chain):
    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], **self.options)


def test_finetuning_thaws_layers_in_the_middle_of_training():
    (reference, plain, _), (ours, fitted, _) = fit_both(lambda: [Thawing()], lambda: fresh(OnlyTrainable), max_epochs=4)
    assert same_weights(ours, reference)
    assert len(fitted.optimizers[0].param_groups) == len(plain.optimizers[0].param_groups) == 3


def test_finetuning_is_resumed(tmp_path):
    options = {"make_module": lambda: fresh(OnlyTrainable), "make_callbacks": lambda: [Thawing()]}
    (tmp_path / "ours").mkdir()
    (tmp_path / "plain").mkdir()
    ours, _ = continue_from(tmp_path / "ours", (one_piece(1), one_piece(4), one_piece(2)), **options)
    plain, _ = continue_from(tmp_path / "plain", ("auto", "auto", "auto"), **options)
    assert same_weights(ours, plain)


def test_backbone_finetuning():
    class Backbone(OnlyTrainable):
        @property
        def backbone(self):
            return self.net

    def thawing():
        return [callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5)]

    (reference, *_), (ours, *_) = fit_both(thawing, lambda: fresh(Backbone))
    assert same_weights(ours, reference)


def test_pruning():
    """A pruned layer has a mask beside each weight, and makes the product."""

    def pruning():
        return [callbacks.ModelPruning("l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=False)]

    (reference, *_), (ours, *_) = fit_both(pruning, lambda: fresh(depth=24), memory="300KiB", max_epochs=2)
    assert same_weights(ours, reference)
    assert (ours.net[0][0].weight == 0).float().mean() > 0.3


class PruningOnGpu(callbacks.ModelPruning):
    """What `ModelPruning` comes to where the module is on a GPU and the initial values, copied before, are on the host:
    they are copied again each time. Where both are on the host the weights share their memory, and so train them too."""

    @staticmethod
    def _copy_param(new, old, name):
        initial = copy.deepcopy(old)
        callbacks.ModelPruning._copy_param(new, initial, name)


@pytest.mark.parametrize(
    "options",
    [{}, {"resample_parameters": True}, {"use_global_unstructured": False}, {"make_pruning_permanent": False}],
    ids=str,
)
def test_lottery_tickets_go_back_to_the_initial_weights_as_on_a_gpu(options):
    runs = []
    for kind, strategy in ((PruningOnGpu, "auto"), (callbacks.ModelPruning, one_piece(memory="300KiB"))):
        module = fresh(depth=24)
        run = trainer(strategy, max_epochs=3, callbacks=[kind("l1_unstructured", amount=0.3, **options)])
        run.fit(module, loader(BATCH, 24), loader(BATCH, 16))
        runs.append(module)
    assert same_weights(*runs)
    assert runs[1].state_dict().keys() == runs[0].state_dict().keys()


def test_lambda_callback_and_hooks_that_collect_garbage():
    seen = []

    def watching():
        return [
            callbacks.LambdaCallback(
                on_train_batch_end=lambda trainer, module, outputs, batch, batch_idx: (
                    gc.collect(),
                    seen.append(float(outputs["loss"])),
                ),
                on_before_optimizer_step=lambda trainer, module, optimizer: seen.append(
                    float(sum(p.grad.norm() for p in module.parameters()))
                ),
            )
        ]

    fit_both(watching, max_epochs=1)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert len(seen) == 2 * 2 * 3


def test_early_stopping_and_learning_rate_monitor(tmp_path):
    class Scheduled(Chain):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    def watching():
        return [callbacks.EarlyStopping("val_loss", min_delta=10, patience=1), callbacks.LearningRateMonitor()]

    from lightning.pytorch.loggers import CSVLogger

    runs = []
    for strategy in ("auto", one_piece()):
        module = fresh(Scheduled)
        fitted = trainer(strategy, max_epochs=8, callbacks=watching(), logger=CSVLogger(tmp_path))
        fitted.logger.log_metrics = lambda metrics, step: None
        fitted.logger.save = lambda: None
        fitted.fit(module, loader(BATCH, 24), loader(BATCH, 16))
        runs.append((module, fitted))
    (reference, plain), (ours, fitted) = runs
    assert same_weights(ours, reference)
    assert fitted.current_epoch == plain.current_epoch < 8
    assert fitted.callbacks[1].lrs == plain.callbacks[1].lrs != {}


def test_timer_ends_the_run():
    timer = callbacks.Timer(duration=timedelta(hours=1), interval="step")

    def let_time_pass(run, *args):
        if run.global_step == 3:
            timer._offset = 3600

    passing = callbacks.LambdaCallback(on_train_batch_start=let_time_pass)
    fitted = trainer(one_piece(), max_epochs=3, callbacks=[passing, timer])
    fitted.fit(fresh(), loader(BATCH))
    assert fitted.global_step == 4


class WithExample(Chain):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(2, 64)

    def forward(self, inputs):
        return self.head(self.net(inputs))


@pytest.mark.parametrize("depth", [1, -1])
@pytest.mark.parametrize("kind", [callbacks.ModelSummary, callbacks.RichModelSummary])
def test_model_summary_with_an_example(depth, kind, capsys):
    texts = []

    class Keeping(kind):
        def summarize(self, summary_data, *args, **kwargs):
            texts.append([(name, list(column)) for name, column in summary_data])

    (reference, *_), (ours, *_) = fit_both(
        lambda: [Keeping(max_depth=depth)], lambda: fresh(WithExample), enable_model_summary=True
    )
    assert texts[0] == texts[1]
    assert any("Out sizes" in name for name, _ in texts[1])
    assert same_weights(ours, reference)


def test_rich_progress_bar_and_stats(capsys):
    fit_both(lambda: [callbacks.RichProgressBar()], enable_progress_bar=True, max_epochs=1)


def test_barebones():
    runs = []
    for strategy in ("auto", one_piece()):
        module = fresh()
        run = L.Trainer(barebones=True, strategy=strategy, accelerator="cpu", max_epochs=1)
        run.fit(module, loader(BATCH, 24), loader(BATCH, 16))
        runs.append(module)
    assert same_weights(*runs)


def test_detect_anomaly_names_the_error():
    class Infinite(Chain):
        def step(self, batch):
            loss = super().step(batch)
            return loss if self.global_step < 2 else (loss * 0).sqrt() * 0

    with pytest.raises(RuntimeError, match="nan values"):
        trainer(one_piece(), detect_anomaly=True).fit(fresh(Infinite), loader(BATCH))


def test_detect_anomaly_changes_no_number():
    (reference, *_), (ours, *_) = fit_both(lambda: [], detect_anomaly=True)
    assert same_weights(ours, reference)


# Tuners -----------------------------------------------------------------------------------------------------------------


class Tuned(Chain):
    """Reads what tuners set."""

    def __init__(self, lr=1e-2):
        super().__init__()
        self.lr = lr
        self.batch_size = BATCH

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return loader(self.batch_size)

    def val_dataloader(self):
        return loader(self.batch_size)


def test_learning_rate_finder(tmp_path):
    runs = []
    for strategy in ("auto", one_piece()):
        module = fresh(Tuned)
        before = copy.deepcopy(module)
        tuned = trainer(strategy, max_epochs=2, default_root_dir=tmp_path)
        found = Tuner(tuned).lr_find(module, num_training=20)
        assert same_weights(module, before)
        suggestion = module.lr
        tuned.fit(module)
        runs.append((module, suggestion, found.results))
    assert runs[0][1:] == runs[1][1:]
    assert same_weights(runs[0][0], runs[1][0])


def test_learning_rate_finder_as_a_callback(tmp_path):
    runs = []
    for strategy in ("auto", one_piece()):
        module = fresh(Tuned)
        finder = callbacks.LearningRateFinder(num_training_steps=20)
        tuned = trainer(strategy, max_epochs=2, callbacks=[finder], default_root_dir=tmp_path)
        tuned.fit(module)
        runs.append((module, finder.optimal_lr.results, module.lr))
    assert runs[0][1:] == runs[1][1:]
    assert same_weights(runs[0][0], runs[1][0])


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_batch_size_finder_ends_and_restores(tmp_path, mode):
    """Microbatches keep their size, so that no batch is too large: only the data set, or max_val, ends the search."""
    module = fresh(Tuned)
    before = copy.deepcopy(module)
    module.batch_size = 2
    tuned = trainer(harmony(2), default_root_dir=tmp_path)
    found = Tuner(tuned).scale_batch_size(module, mode=mode, init_val=2, steps_per_trial=2, max_trials=6)
    assert same_weights(module, before)
    assert found == module.batch_size >= 16
    assert all(inner._compiled_call_impl is None for inner in module.modules())
    tuned.fit(module)


def test_batch_size_finder_hears_of_too_little_memory(tmp_path):
    """One microbatch, however large: activations do not fit at some size, and the one before is taken."""

    class Large(Tuned):
        def train_dataloader(self):
            return loader(self.batch_size, num_samples=4096)

    module = fresh(Large)
    before = copy.deepcopy(module)
    tuned = trainer(harmony(2, microbatch_size=4096), default_root_dir=tmp_path)
    found = Tuner(tuned).scale_batch_size(module, init_val=12, steps_per_trial=1, max_trials=10)
    assert same_weights(module, before)
    assert 12 <= found < 2048
    tuned.fit(module)
    assert tuned.global_step > 0


def test_batch_size_finder_for_validation(tmp_path):
    module = fresh(Tuned)
    before = copy.deepcopy(module)
    tuned = trainer(harmony(2), default_root_dir=tmp_path)
    found = Tuner(tuned).scale_batch_size(module, method="validate", init_val=2, steps_per_trial=1, max_trials=4)
    assert same_weights(module, before)
    assert found == module.batch_size >= 8


def test_batch_size_finder_as_a_callback(tmp_path):
    module = fresh(Tuned)
    module.batch_size = 2
    tuned = trainer(
        harmony(2),
        default_root_dir=tmp_path,
        callbacks=[callbacks.BatchSizeFinder(init_val=2, steps_per_trial=1, max_trials=3)],
    )
    tuned.fit(module)
    assert module.batch_size >= 8
    assert tuned.global_step == -(-40 // module.batch_size)
