"""Transformers of x-transformers; generation passes a cache of data classes from step to step."""

import pytest

pytest.importorskip("x_transformers", exc_type=(ImportError, RuntimeError))

import lightning as L
import torch
from beside_plain import run_both
from torch.utils.data import DataLoader
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, XTransformer

from harmony_lightning import EmulatedCluster
from harmony_lightning.testing import compare_with_one_device

pytestmark = pytest.mark.third_party


def tokens():
    return DataLoader(torch.randint(60, (16, 33), generator=torch.Generator().manual_seed(0)), batch_size=8)


class Generating(L.LightningModule):
    def __init__(self):
        super().__init__()
        decoder = Decoder(dim=64, depth=4, heads=4, rotary_pos_emb=True, ff_glu=True, attn_dropout=0.1)
        self.net = AutoregressiveWrapper(TransformerWrapper(num_tokens=60, max_seq_len=64, attn_layers=decoder))

    def training_step(self, batch, batch_idx):
        return self.net(batch)

    def predict_step(self, batch, batch_idx):
        return self.net.generate(batch[:, :5], 8, temperature=0.0)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_a_decoder_trains_and_generates():
    memory = 2_800_000
    assert run_both(Generating, tokens(), memory=memory, room=3 * memory, predict=tokens()).differences == {}
    cut = compare_with_one_device(Generating, list(tokens()), 2, cluster=EmulatedCluster(2, 4 * memory), memory=memory)
    assert cut.is_equal, cut


class Translating(Generating):
    def __init__(self):
        super().__init__()
        sizes = {"num_tokens": 60, "depth": 3, "heads": 4, "max_seq_len": 64}
        parts = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in sizes.items()}
        self.net = XTransformer(dim=64, tie_token_emb=True, **parts)

    def training_step(self, batch, batch_idx):
        return self.net(batch, batch[:, :20])


def test_an_encoder_is_used_by_every_layer_of_the_decoder():
    """So its gradient is a sum in another order; in double precision nothing but rounding is left."""
    runs = run_both(Translating, tokens(), memory=9_600_000, room=9_600_000, precision="64-true")
    assert max(runs.differences.values(), default=0) < 1e-9, runs.differences
