"""The smallest LightningModule around any network."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

Loss = Callable[[Any, Any], torch.Tensor]
"""(net, batch) -> scalar."""
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with a large `eps`: with the usual one, a gradient that is zero but for rounding (that of a bias in front of a
    batch norm) would still move its weight by the learning rate, in a direction that rounding decides."""
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-2)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


class Step(LightningModule):
    """Trains `net` on `loss(net, batch)`."""

    def __init__(self, net: nn.Module, loss: Loss, optimizer: MakeOptimizer = adamw) -> None:
        super().__init__()
        self.net = net
        self._loss = loss
        self._make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._make_optimizer(self.parameters())
