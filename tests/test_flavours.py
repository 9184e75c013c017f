"""Both copies of Lightning are served, by name and by class, in one process."""

import os
import subprocess
import sys

import pytest

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
    done = run(
        """
import torch, lightning.pytorch as first
assert "harmony" not in first.strategies.StrategyRegistry
import harmony_lightning
import pytorch_lightning as second
for pl in first, second:
    print(type(pl.Trainer(strategy="harmony", accelerator="cpu", logger=False).strategy).__module__)
""",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["harmony_lightning.lightning", "harmony_lightning.pytorch_lightning"]


def test_lightning_s_own_error_is_left_where_the_hook_is_disabled_and_nothing_is_imported():
    done = run(
        """
import lightning.pytorch as pl
try:
    pl.Trainer(strategy="harmony", accelerator="cpu")
except ValueError as error:
    print("told", error)
""",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.returncode == 0, done.stderr
    assert "told" in done.stdout
