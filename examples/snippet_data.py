"""Snippets of Python source, each labelled with the standard-library package that it comes from."""

import re
import zlib

import lightning as L
import torch
from sources import source_files
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Snippet = dict[str, Tensor]


class Snippets(Dataset[Snippet]):
    """Runs of `length` words, equally many of each package; the label is the index of the package."""

    def __init__(self, words: list[Tensor], length: int) -> None:
        num_runs = min(len(package) for package in words) // length
        self._words = torch.cat([package[: num_runs * length].view(num_runs, length) for package in words])
        self._labels = torch.arange(len(words)).repeat_interleave(num_runs)

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index: int) -> Snippet:
        return {"input_ids": self._words[index], "labels": self._labels[index]}


class PackageSnippets(L.LightningDataModule):
    """The last part, a share of `holdout`, of each package's text is for validation.

    Args:
        packages: of the standard library; one class each.
        vocabulary: a word's token is its checksum modulo this number, so that no vocabulary has to be built.
        length: words in a snippet.
        val_batch_size: of validation, which is not cut into microbatches.
    """

    def __init__(
        self,
        packages: list[str],
        vocabulary: int = 4096,
        length: int = 64,
        batch_size: int = 32,
        holdout: float = 0.25,
        num_val_snippets: int = 128,
        val_batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        h = self.hparams
        words = [self._tokens(package) for package in h.packages]
        borders = [int(len(package) * (1 - h.holdout)) for package in words]
        self.train = Snippets([package[:border] for package, border in zip(words, borders, strict=True)], h.length)
        held_out = Snippets([package[border:] for package, border in zip(words, borders, strict=True)], h.length)
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(len(held_out), generator=generator)[: h.num_val_snippets].tolist()
        self.val = torch.utils.data.Subset(held_out, some)

    def _tokens(self, package: str) -> Tensor:
        text = " ".join(path.read_text(encoding="utf-8", errors="replace") for path in source_files(package))
        words = re.findall(r"\w+|[^\w\s]", text)
        return torch.tensor([zlib.crc32(word.encode()) % self.hparams.vocabulary for word in words])

    def train_dataloader(self) -> DataLoader[Snippet]:
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Snippet]:
        return DataLoader(self.val, batch_size=self.hparams.val_batch_size)
