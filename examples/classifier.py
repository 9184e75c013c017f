"""A model of the `transformers` library in an ordinary LightningModule: nothing here knows how it will be trained."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification


class Classifier(L.LightningModule):
    """BERT with a classification head, built from its configuration.

    Nothing is downloaded; for pretrained weights call `BertForSequenceClassification.from_pretrained` here instead.
    """

    def __init__(self, config: dict[str, Any], learning_rate: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = BertForSequenceClassification(BertConfig(**config))

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        output = self.model(**batch)
        accuracy = (output.logits.argmax(-1) == batch["labels"]).float().mean()
        self.log_dict({"val_loss": output.loss, "val_accuracy": accuracy}, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.01)
