"""The standard library's own source text, byte by byte, as training and validation windows."""

import lightning as L
import torch
from sources import source_files
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset[Tensor]):
    """Non-overlapping windows of `length` byte tokens from one long text."""

    def __init__(self, text: bytes, length: int) -> None:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._windows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[index].long()


class PythonSources(L.LightningDataModule):
    """Every `holdout`-th file is for validation, so that no validation text has been seen in training.

    Args:
        length: tokens the model sees at once; a window has one more, the last target.
        megabytes: of text, at most.
        num_val_windows: validation windows, taken evenly from the held-out files.
        val_batch_size: of validation, which is not cut into microbatches.
    """

    def __init__(
        self,
        length: int = 128,
        batch_size: int = 32,
        megabytes: float = 4.0,
        holdout: int = 10,
        num_val_windows: int = 128,
        val_batch_size: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        h = self.hparams
        parts: dict[bool, list[bytes]] = {True: [], False: []}
        nbytes = 0
        for number, path in enumerate(source_files()):
            if nbytes >= h.megabytes * 1e6:
                break
            text = path.read_bytes()
            nbytes += len(text)
            parts[number % h.holdout == 0].append(text)
        self.train = Windows(b"".join(parts[False]), h.length + 1)
        held_out = Windows(b"".join(parts[True]), h.length + 1)
        chosen = range(0, len(held_out), max(1, len(held_out) // h.num_val_windows))[: h.num_val_windows]
        self.val = torch.utils.data.Subset(held_out, chosen)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.val, batch_size=self.hparams.val_batch_size)
