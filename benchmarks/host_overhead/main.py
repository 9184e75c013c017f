"""What does the layer-major runtime cost where there is nothing to swap?

Trains the same 100M-parameter transformer on the host twice, in turns within one process: with strategy="harmony", and
with Lightning's default strategy and `torch.utils.checkpoint` around every block, over the same microbatches. Both
recompute each block once. Prints seconds per step and their ratio.
"""

import argparse
import itertools
import platform
import statistics
import time

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from harmony_lightning import HarmonyStrategy


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.transpose(1, 3).unbind(2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(L.LightningModule):
    def __init__(self, vocabulary: int, width: int, num_layers: int, is_checkpointed: bool) -> None:
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(num_layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        logits = self.head(x)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class StepEnds(L.Callback):
    """When each optimizer step was over, by the wall clock and in CPU time of the process."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self._last = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step > self._last:
            self._last = trainer.global_step
            self.ends.append((time.perf_counter(), time.process_time()))


def seconds_per_step(strategy: object, options: argparse.Namespace) -> tuple[float, float]:
    """Wall seconds and CPU seconds of a step, after the first."""
    is_plain = strategy == "auto"
    torch.manual_seed(0)
    module = Transformer(options.vocabulary, options.width, options.layers, is_checkpointed=is_plain)
    num_microbatches = options.minibatch // options.microbatch
    tokens = torch.randint(0, options.vocabulary, (options.minibatch * (options.steps + 1), options.length))
    batch_size = options.microbatch if is_plain else options.minibatch
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        accumulate_grad_batches=num_microbatches if is_plain else 1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[times := StepEnds()],
    )
    trainer.fit(module, DataLoader(tokens, batch_size=batch_size))
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(times.ends)]
    return statistics.median(wall for wall, _ in steps), statistics.median(cpu for _, cpu in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {
        "vocabulary": 16384,
        "width": 768,
        "layers": 12,
        "length": 128,
        "minibatch": 4,
        "microbatch": 2,
        "steps": 4,
        "rounds": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    plain, ours = [], []
    for _ in range(options.rounds):
        plain.append(seconds_per_step("auto", options))
        ours.append(seconds_per_step(HarmonyStrategy(microbatch_size=options.microbatch), options))
    print(
        f"torch {torch.__version__}, lightning {L.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    for clock, name in enumerate(("wall", "CPU")):
        ratios = [mine[clock] / theirs[clock] for mine, theirs in zip(ours, plain, strict=True)]
        print(
            f"{name} seconds per step: plain with checkpoints {statistics.median(t[clock] for t in plain):.3f}, "
            f"harmony {statistics.median(t[clock] for t in ours):.3f}, "
            f"ratio {statistics.median(ratios):.3f} (rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)})"
        )


if __name__ == "__main__":
    main()
