"""Both copies of Lightning are served, by name and by class, in one process."""

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
