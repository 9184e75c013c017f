"""Modules that look at their trainer are searched for; none of them reaches it from the run aside."""

import logging
import re
import types

import lightning as L
import pytest
import torch
from chain import Chain, loader, same_weights, trainer
from torch import nn

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.strategy.trainer_aside import step_aside


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path / "cache"))


class Recorder(L.pytorch.loggers.logger.DummyLogger):
    """A logger that counts what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    @property
    def experiment(self):
        return types.SimpleNamespace(add_scalar=lambda *args: self.told.append(args))

    def log_metrics(self, *args, **kwargs): ...


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.scale, self.weights, self.table = 2.0, torch.ones(3), {"words": 7}

    @property
    def vocabulary(self):
        raise AssertionError("nobody asks for this")

    def train_dataloader(self):
        return loader(16, 64)


LOOKED_AT: list[str] = []
"""Types of trainers that steps have looked at; a list that no copy of a module has for itself."""


class Looking(Chain):
    """Does something with its trainer in each step."""

    def __init__(self, look):
        super().__init__(depth=6)
        self.look, self.seen = look, []

    def training_step(self, batch, batch_idx):
        LOOKED_AT.append(type(self.trainer).__name__)
        self.seen.append(self.look(self))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]


def fit(look, told=None, plan="packs", **options):
    torch.manual_seed(0)
    module = Looking(look)
    LOOKED_AT.clear()
    strategy = HarmonyStrategy(plan=plan, cluster=EmulatedCluster(2, "160KiB", preset="3090"), microbatch_size=4)
    run = trainer(strategy, max_steps=3, **{"logger": Recorder(), "log_every_n_steps": 1, **options})
    run.fit(module, datamodule=Data())
    return module, run


def values(module):
    run = module.trainer
    return (
        (module.current_epoch, run.current_epoch, run.max_steps, run.num_training_batches, run.is_global_zero),
        (
            run.world_size,
            run.training,
            run.sanity_checking,
            run.estimated_stepping_batches,
            run.accumulate_grad_batches,
        ),
        (run.state.stage.value, run.fit_loop.epoch_loop.max_steps, len(run.train_dataloader), run.fast_dev_run),
        (run.datamodule.scale, run.datamodule.table["words"], run.datamodule.weights.sum().item(), len(run.loggers)),
        (module.optimizers().param_groups[0]["lr"], module.lr_schedulers().get_last_lr(), run.precision),
        (run.fit_loop.epoch_loop.batch_progress.current.ready, run.global_step, module.global_step),
    )


def tells(module):
    module.log("more", 1.0)
    module.log_dict({"one": 1.0, "two": torch.zeros(())}, prog_bar=True)
    module.print("something")
    module.logger.experiment.add_scalar("name", 1.0, module.global_step)
    with module.trainer.profiler.profile("part"):
        return float(module.all_gather(torch.ones(())))


def sets(module):
    for group in module.optimizers().param_groups:
        group["lr"] = 0.5 / (1 + module.global_step)
    module.trainer.own = module.trainer.current_epoch
    return module.trainer.own


@pytest.mark.parametrize("look", [values, tells, sets])
def test_a_step_that_looks_at_its_trainer_is_searched_for_and_leaves_no_trace(look, caplog, capsys):
    caplog.set_level(logging.INFO, "harmony_lightning")
    plain, run = fit(look, plan="sizes")
    printed = capsys.readouterr().out.count("something")
    assert set(LOOKED_AT) == {"Trainer"}
    module, again = fit(look)
    assert "predicted" in caplog.text, caplog.text
    assert set(LOOKED_AT) == {"Trainer", "_Trainer"}  # so the run aside got that far
    assert module.seen == plain.seen and same_weights(module, plain)
    assert again.logger.told == run.logger.told and capsys.readouterr().out.count("something") == printed
    assert module.optimizers().param_groups[0]["lr"] == plain.optimizers().param_groups[0]["lr"]
    assert again.callback_metrics == run.callback_metrics


def stops(module):
    if type(module.trainer) is not L.Trainer:
        module.trainer.should_stop = True


def saves(module):
    if type(module.trainer) is not L.Trainer:
        module.trainer.save_checkpoint("file")


def catches(module):
    try:
        saves(module)
    except Exception:
        return


ACTS = {
    "self.trainer.save_checkpoint": saves,
    "self.trainer.save_checkpoint,": catches,
    "self.trainer.strategy.backward": lambda module: module.trainer.strategy.backward(torch.ones(())),
    "please disable automatic optimization": lambda module: module.manual_backward(torch.ones((), requires_grad=True)),
    "more than the groups of self.optimizers()": lambda module: module.optimizers().step(),
    "self.lr_schedulers().step": lambda module: module.lr_schedulers().step(),
    "self.trainer.log_dir": lambda module: module.trainer.log_dir,
    "self.trainer.callback_metrics": lambda module: module.trainer.callback_metrics["loss"],
    "self.trainer.datamodule.vocabulary": lambda module: module.trainer.datamodule.vocabulary,
    "self.trainer.datamodule.setup": lambda module: module.trainer.datamodule.setup("fit"),
    "self.logger.name": lambda module: f"{module.logger.name}/file",
    "self.trainer.train_dataloader": lambda module: next(iter(module.trainer.train_dataloader)),
    "no attribute 'nothing'": lambda module: module.trainer.nothing,
}


@pytest.fixture(scope="module")
def run():
    run = trainer("auto", max_steps=1, logger=Recorder())
    run.fit(Looking(lambda module: None), datamodule=Data())
    return run


@pytest.mark.parametrize("named", ACTS)
def test_what_would_act_does_not_and_is_named(named, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = Looking(ACTS[named])
    with pytest.raises(Exception, match=re.escape(named)):
        step_aside(lambda module, batch: module.look(module), run)(copy, None)
    assert copy._trainer is None and not list(tmp_path.glob("*"))


def test_a_step_that_would_act_is_not_searched_for(caplog):
    caplog.set_level(logging.INFO, "harmony_lightning")
    fit(catches)
    (told,) = (message for message in caplog.messages if "the plan made from sizes stays" in message)
    assert "training_step uses self.trainer.save_checkpoint" in told


def test_what_a_step_sets_in_the_trainer_is_forgotten(caplog):
    caplog.set_level(logging.INFO, "harmony_lightning")
    _, run = fit(stops)
    assert "predicted" in caplog.text and not run.should_stop and run.global_step == 3


def test_modules_within_see_the_same(caplog):
    caplog.set_level(logging.INFO, "harmony_lightning")

    class Inner(L.LightningModule):
        def forward(self, x):
            return x * (1 + self.current_epoch)

    class Outer(Looking):
        def __init__(self):
            super().__init__(lambda module: None)
            self.inner = Inner()

        def step(self, batch):
            return nn.functional.mse_loss(self.inner(self.head(self.net(batch[0]))).squeeze(1), batch[1])

    strategy = HarmonyStrategy(cluster=EmulatedCluster(2, "160KiB", preset="3090"), microbatch_size=4)
    run = trainer(strategy, max_steps=2)
    module = Outer()
    run.fit(module, loader(16, 32))
    assert "predicted" in caplog.text and module.inner._trainer is run
