"""Image networks of timm in a LightningModule."""

import pytest

pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))

import lightning as L
import timm
import torch
from beside_plain import run_both
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harmony_lightning import EmulatedCluster
from harmony_lightning.testing import compare_with_one_device

pytestmark = pytest.mark.third_party

SMALL = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 4, "drop_rate": 0.1, "drop_path_rate": 0.1},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 2, 1)},
}


class Classifier(L.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.net = timm.create_model(name, pretrained=False, num_classes=5, **SMALL[name])

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_image_networks_are_equal_to_the_bit(name):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    data = DataLoader(TensorDataset(images, torch.arange(8) % 5), batch_size=4)
    memory = int(1.2 * sum(parameter.nbytes for parameter in Classifier(name).parameters()))
    assert run_both(lambda: Classifier(name), data, memory=memory, room=memory, predict=data).differences == {}
    cut = compare_with_one_device(
        lambda: Classifier(name), list(data), 2, cluster=EmulatedCluster(2, 2 * memory), memory=memory
    )
    assert cut.is_equal, cut
