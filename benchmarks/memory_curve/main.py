"""Throughput against memory on the emulated clock; `README.md` tells how to read the picture."""

import argparse
import json
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harmony_lightning import CapacityError, EmulatedCluster, HarmonyStrategy
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.hardware.presets import gpu_model, host_model
from harmony_lightning.profiled import Question, find_plan, profile, step_of
from harmony_lightning.profiler.machine import preset_machine
from harmony_lightning.scheduler.runtime.translate import plan_of

NUM_STEPS = 5
FACTORS = (1, 2, 3, 4, 6, 8, 10, 12)
_UPDATE_BYTES = 28
"""That a step of Adam in float32 reads and writes per weight."""


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(L.LightningModule):
    def __init__(self, depth, width):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 4 * width)

    def training_step(self, batch, batch_idx):
        x, target = batch
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), target.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


def build(arguments):
    with torch.device("meta"):
        return Model(arguments.depth, arguments.width)


def batch_of(arguments, samples):
    shape = samples, arguments.length
    return torch.zeros(*shape, arguments.width), torch.zeros(shape, dtype=torch.long)


def cluster_of(arguments, memory):
    return EmulatedCluster(1, memory, preset=arguments.gpu, host=arguments.host, fake=True, check_races=False)


def everything_there(costs, gpu, minibatch):
    """Seconds and bytes of a GPU that holds all of it: weights, gradients, states, and activations of the minibatch.

    Activations count as what layers save for their backward, which is their peak less weights and gradients; nothing is
    recomputed, nothing copied, and the GPU updates.
    """
    size = costs.profile.microbatch_sizes.backward[-1]
    count = minibatch // size
    layers = range(costs.num_layers)
    seconds = count * sum(
        costs.forward_seconds(size, (q, q)) * 2
        + costs.backward_seconds(size, (q, q))
        - costs.recompute_seconds(size, (q, q))
        for q in layers
    )
    weights = costs.weight_bytes((0, costs.num_layers - 1))
    seconds += _UPDATE_BYTES / 4 * weights / gpu.memory_bytes_per_second
    kept = count * sum(costs.stash_bytes(size, (q, q)) for q in layers)
    return seconds, 4 * weights + kept


def measure(arguments):
    gpu, host = gpu_model(arguments.gpu), host_model(arguments.host)
    layers = decompose(build(arguments), 1, (Block, "head"))

    def costs_with(memory_bytes):
        machine = preset_machine(1, gpu, host, memory_bytes)
        measured, _ = profile(
            build(arguments), layers, lambda samples: batch_of(arguments, samples), step_of(),
            cluster_of(arguments, memory_bytes), machine, largest=arguments.minibatch, is_fresh=True,
        )  # fmt: skip
        return measured, machine

    from harmony_lightning.scheduler.costs import Costs

    whole, machine = costs_with(2**50)
    ideal, needed = everything_there(Costs(whole.profile, machine), gpu, arguments.minibatch)
    rows = []
    for factor in FACTORS:
        memory_bytes = int(needed / factor)
        try:
            measured, machine = costs_with(memory_bytes)
            question = Question(minibatch=arguments.minibatch, memory_bytes=memory_bytes)
            planned = find_plan(measured, machine, layers, question)
        except CapacityError as error:
            print(f"1/{factor}: {error}")
            continue
        taken, peak = train(arguments, planned, memory_bytes)
        rows.append({
            "factor": factor, "memory_bytes": memory_bytes, "predicted_seconds": planned.found.best.seconds,
            "seconds": taken, "peak_bytes": peak, "share": ideal / taken, "packs": len(planned.plan.packs),
            "microbatch_size": planned.plan.microbatch_size,
        })  # fmt: skip
        print(
            f"| {factor} | {memory_bytes / 2**20:.0f} MiB | {peak / 2**20:.0f} MiB | {len(planned.plan.packs)} x "
            f"{planned.plan.microbatch_size} | {1e3 * planned.found.best.seconds:.1f} ms | {1e3 * taken:.1f} ms | "
            f"{ideal / taken:.0%} |",
            flush=True,
        )
    return {"ideal_seconds": ideal, "needed_bytes": needed, "rows": rows}


def train(arguments, planned, memory_bytes):
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    schedule = planned.found.best.schedule
    plan = plan_of(schedule, planned.decomposition, memory_bytes)
    strategy = HarmonyStrategy(
        microbatch_size=plan.microbatch_size, cluster=cluster_of(arguments, memory_bytes), plan=plan,
        layers=(Block, "head"),
    )  # fmt: skip
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", max_steps=NUM_STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(*batch_of(arguments, arguments.minibatch * NUM_STEPS))
    trainer.fit(build(arguments).to_empty(device="cpu"), DataLoader(data, batch_size=arguments.minibatch))
    return strategy.timeline().step_seconds[-1], max(strategy.statistics().peak_device_bytes)


def draw(curves, path):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for curve in curves:
        rows = curve["rows"]
        axes.plot([row["factor"] for row in rows], [100 * row["share"] for row in rows], "o-", label=curve["label"])
    axes.axhspan(53, 99, color="tab:gray", alpha=0.15, label="SwapAdvisor's 53 to 99 % at 1/12")
    axes.set(
        xlabel="memory that training needs / memory of the GPU",
        ylabel="% of the throughput with all memory",
        ylim=(0, 105),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--minibatch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--gpu", default="3090")
    parser.add_argument("--host", default="server")
    parser.add_argument("--data", type=Path, help="write what was measured, or read it with --picture")
    parser.add_argument("--picture", type=Path, help="draw what --data holds; needs matplotlib")
    arguments = parser.parse_args()
    if arguments.picture is not None:
        draw(json.loads(arguments.data.read_text()), arguments.picture)
        return
    curves = []
    for minibatch in arguments.minibatch:
        print(f"{minibatch} samples per step\n")
        print("| memory is 1 / | of each GPU | peak | packs x samples | predicted | it takes | of all memory |")
        print("|---|---|---|---|---|---|---|")
        one = argparse.Namespace(**{**vars(arguments), "minibatch": minibatch})
        curves.append({**measure(one), "label": f"{minibatch * arguments.length} tokens per step"})
        print()
    if arguments.data is not None:
        arguments.data.write_text(json.dumps(curves, indent=1))


if __name__ == "__main__":
    main()
