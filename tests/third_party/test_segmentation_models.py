"""A segmentation network with skip connections, in a LightningModule as the package's own examples write it."""

import pytest

pytest.importorskip("segmentation_models_pytorch", exc_type=(ImportError, RuntimeError))

import lightning as L
import segmentation_models_pytorch as smp
import torch
from beside_plain import run_both
from torch.utils.data import DataLoader

pytestmark = pytest.mark.third_party


class Segmenting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = smp.create_model("FPN", encoder_name="resnet18", encoder_weights=None, in_channels=3, classes=1)
        self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        loss = self.loss_fn(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        masks = (self(batch[0]).sigmoid() > 0.5).long()
        counts = smp.metrics.get_stats(masks, batch[1].long(), mode="binary")
        self.log("iou", smp.metrics.iou_score(*counts, reduction="micro"))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_features_that_several_layers_use_differ_by_rounding_only():
    """Their gradients are added up in another order; in double precision nothing but rounding is left."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 64, 64, generator=random)
    data = DataLoader(list(zip(images, (images[:, :1] > 0).float(), strict=True)), batch_size=4)
    options = {"validate": data, "predict": data, "precision": "64-true"}
    runs = run_both(Segmenting, data, memory=90_000_000, room=200_000_000, **options)
    assert max(runs.differences.values(), default=0) < 1e-9, runs.differences
