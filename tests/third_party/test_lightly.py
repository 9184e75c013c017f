"""Self-supervised learning with lightly's building blocks, as its documentation writes the modules."""

import pytest

pytest.importorskip("lightly.models.modules", exc_type=(ImportError, RuntimeError))

import copy

import lightning as L
import torch
from beside_plain import run_both
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn
from torch.utils.data import DataLoader

pytestmark = pytest.mark.third_party


def backbone():
    layers = [layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    return nn.Sequential(*layers)


def pairs():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 16, 64, generator=generator)
    return DataLoader([([a, b], i, f"sample {i}") for i, (a, b) in enumerate(zip(one, other, strict=True))], 8)


class SelfSupervised(L.LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


class SimCLR(SelfSupervised):
    """With a memory bank, which the loss writes in every step."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = backbone(), SimCLRProjectionHead(64, 64, 32)
        self.criterion = NTXentLoss(memory_bank_size=(32, 32))

    def training_step(self, batch, batch_idx):
        one, other = batch[0]
        loss = self.criterion(self.head(self.backbone(one)), self.head(self.backbone(other)))
        self.log("loss", loss)
        return loss


class BYOL(SelfSupervised):
    """A second network follows the first; it is written inside the step, as a list."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = backbone(), BYOLProjectionHead(64, 64, 32)
        self.predictor = BYOLPredictionHead(32, 64, 32)
        self.slow_backbone, self.slow_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.slow_backbone)
        deactivate_requires_grad(self.slow_head)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch, batch_idx):
        update_momentum(self.backbone, self.slow_backbone, m=0.9)
        update_momentum(self.head, self.slow_head, m=0.9)
        one, other = batch[0]
        predicted = [self.predictor(self.head(self.backbone(x))) for x in (one, other)]
        targets = [self.slow_head(self.slow_backbone(x)).detach() for x in (other, one)]
        loss = sum(self.criterion(p, t) for p, t in zip(predicted, targets, strict=True)) / 2
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("kind", [SimCLR, BYOL])
def test_self_supervised_learning_is_equal_to_the_bit(kind):
    memory = 200_000
    assert run_both(kind, pairs(), memory=memory, room=4 * memory).differences == {}
