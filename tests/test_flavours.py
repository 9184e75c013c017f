"""Both copies of Lightning are served, by name and by class, in one process."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from harmony_lightning import EmulatedCluster

SCRIPT = """
import torch
import {package} as pl

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(6)))
    def training_step(self, batch, batch_idx):
        loss = self.net(batch).pow(2).mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(strategy="harmony", accelerator="cpu", max_epochs=1, **quiet)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=4))
print(type(trainer.strategy).__module__, trainer.strategy.statistics())
"""


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("lightning.pytorch", "harmony_lightning.lightning"),
        ("pytorch_lightning", "harmony_lightning.pytorch_lightning"),
    ],
)
def test_by_name_without_an_import_and_set_from_outside(package, home, monkeypatch):
    monkeypatch.setenv("HARMONY_EMULATED_GPUS", "2")
    monkeypatch.setenv("HARMONY_MEMORY", "8KiB")
    monkeypatch.setenv("HARMONY_MICROBATCH_SIZE", "2")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(package=package)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert home in done.stdout
    assert "steps=2, num_microbatches=2, num_packs=6" in done.stdout


def test_the_public_class_is_that_of_the_lightning_in_use():
    import lightning.pytorch as pl

    import harmony_lightning
    import harmony_lightning.pytorch_lightning

    assert issubclass(harmony_lightning.HarmonyStrategy, pl.strategies.SingleDeviceStrategy)
    assert harmony_lightning.pytorch_lightning.HarmonyStrategy is not harmony_lightning.HarmonyStrategy


def run(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


def test_a_broken_installation_of_ours_breaks_neither_torch_nor_lightning():
    """A dependency is missing: only who asks for the strategy hears of it."""
    done = run(
        """
import sys
sys.modules["greenlet"] = None
import torch, lightning.pytorch as first, pytorch_lightning as second
for pl in first, second:
    pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    try:
        pl.Trainer(strategy="harmony", accelerator="cpu")
    except ImportError as error:
        print("told", error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("told") == done.stdout.count("greenlet") == 2


def test_with_the_hook_disabled_one_import_is_enough_for_both():
    """Before it, Lightning's own error is left."""
    done = run(
        """
import torch, lightning.pytorch as first
try:
    first.Trainer(strategy="harmony", accelerator="cpu")
except ValueError as error:
    print("told")
import harmony_lightning
import pytorch_lightning as second
for pl in first, second:
    print(type(pl.Trainer(strategy="harmony", accelerator="cpu", logger=False).strategy).__module__)
""",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["told", "harmony_lightning.lightning", "harmony_lightning.pytorch_lightning"]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_callbacks_and_profilers_of_both(package, tmp_path):
    """The same run plainly and under harmony, with what reaches into the strategy from outside."""
    pl = importlib.import_module(package)
    callbacks = importlib.import_module(f"{package}.callbacks")
    profilers = importlib.import_module(f"{package}.profilers")
    home = importlib.import_module(f"harmony_lightning.{package.partition('.')[0]}")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(12)))
            self.lr = 0.1

        def training_step(self, batch, batch_idx):
            with self.trainer.profiler.profile("own"):
                loss = self.net(batch).pow(2).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    torch.manual_seed(1)
    data = torch.randn(24, 16)
    runs = []
    for strategy in ("auto", home.HarmonyStrategy(microbatch_size=2, cluster=EmulatedCluster(2, "8KiB"))):
        batch_size = 2 if strategy == "auto" else 8
        batches = torch.utils.data.DataLoader(data, batch_size=batch_size)
        torch.manual_seed(0)
        module = Module()
        folder = tmp_path / ("plain" if strategy == "auto" else "ours")
        run = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            max_epochs=2,
            accumulate_grad_batches=8 // batch_size,
            callbacks=[
                callbacks.EMAWeightAveraging(decay=0.5),
                callbacks.ModelCheckpoint(folder, monitor="loss", save_top_k=-1),
            ],
            profiler=profilers.SimpleProfiler(),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        run.fit(module, batches)
        assert sorted(path.name for path in folder.iterdir()) == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"]
        runs.append(module)
    reference, ours = runs
    assert type(run.strategy).__module__ == home.__name__
    assert run.strategy.statistics().num_packs > 4
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), reference.parameters(), strict=True))
    assert len(run.profiler.recorded_durations["own"]) == 6
