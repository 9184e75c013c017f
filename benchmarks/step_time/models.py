"""Transformers of published shapes, as plain Lightning modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

try:
    import lightning as L
except ImportError:
    import pytorch_lightning as L


@dataclass(frozen=True)
class Shape:
    """Of a decoder-only transformer."""

    depth: int
    width: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    vocabulary: int
    is_gated: bool


MODELS = {
    "gpt2-xl": Shape(48, 1600, 25, 25, 6400, 50257, is_gated=False),
    "llama-8b": Shape(32, 4096, 32, 8, 14336, 128256, is_gated=True),
    "llama-30b": Shape(60, 6656, 52, 52, 17920, 32000, is_gated=True),
    "llama-70b": Shape(80, 8192, 64, 8, 28672, 128256, is_gated=True),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.width // shape.num_heads
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, self.size * shape.num_kv_heads, bias=False)
        self.value = nn.Linear(shape.width, self.size * shape.num_kv_heads, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if key.shape[1] < query.shape[1]:
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False) if shape.is_gated else None
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.is_gated else nn.LayerNorm
        self.norm1, self.attention = norm(shape.width), Attention(shape)
        self.norm2, self.feed_forward = norm(shape.width), FeedForward(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class LanguageModel(L.LightningModule):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        x = self.embedding(batch[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


class _Tokens(Dataset):
    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.rows = torch.randint(vocabulary, (count, length + 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def tokens(num_sequences: int, length: int, vocabulary: int, steps: int) -> DataLoader:
    """Batches of [num_sequences, length + 1] for so many steps."""
    return batches([num_sequences] * steps, length, vocabulary)


def batches(sizes: Sequence[int], length: int, vocabulary: int) -> DataLoader:
    """Batches of so many sequences each."""
    ends = list(accumulate(sizes))
    indices = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return DataLoader(_Tokens(ends[-1], length, vocabulary), batch_sampler=indices)


def gpt2_xl() -> LanguageModel:
    """For `harmony estimate models:gpt2_xl`; the same below."""
    return LanguageModel(MODELS["gpt2-xl"])


def llama_8b() -> LanguageModel:
    return LanguageModel(MODELS["llama-8b"])


def llama_70b() -> LanguageModel:
    return LanguageModel(MODELS["llama-70b"])
