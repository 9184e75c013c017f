"""Bytes over the links in one step: other schedules by formula, ours as counted by the runtime.

Ours runs on emulated GPUs with fake data: every copy is counted, nothing is computed. `README.md` explains the columns.
"""

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from formulas import Moved, Setting, harmony_dp, harmony_pp, sharded_offload, virtual_memory

from harmony_lightning import EmulatedCluster, HarmonyStrategy, Plan, Statistics
from harmony_lightning.units import format_nbytes, parse_nbytes

sys.path.append(str(Path(__file__).resolve().parents[1] / "step_time"))
from models import MODELS, L, LanguageModel, Shape, tokens

SHAPES = {"small": Shape(8, 64, 4, 4, 256, 512, is_gated=False), **MODELS}
STEPS = 1
"""The first one, in which nothing stays on a GPU that need not: this is about schedules, not about memory to spare."""


@dataclass(frozen=True)
class Run:
    """What the runtime did."""

    plan: Plan
    statistics: Statistics

    @property
    def swapped(self) -> Moved:
        """Weights in and gradients out, per step."""
        counts = self.statistics
        return Moved(into_gpus=counts.swap_in_bytes // counts.steps, out_of_gpus=counts.swap_out_bytes // counts.steps)

    @property
    def everything(self) -> Moved:
        """Stashed inputs, minibatches and copies between GPUs too, which leave one GPU and enter another."""
        counts = self.statistics
        return Moved(
            into_gpus=self.swapped.into_gpus
            + (counts.stash_in_bytes + counts.input_bytes + counts.p2p_bytes) // counts.steps,
            out_of_gpus=self.swapped.out_of_gpus + (counts.stash_out_bytes + counts.p2p_bytes) // counts.steps,
        )


def run(shape: Shape, mode: str, num_gpus: int, num_microbatches: int, memory: str, length: int) -> Run:
    """A step of float32 training, of `num_microbatches` sequences on each GPU."""
    cluster = EmulatedCluster(num_gpus, memory, fake=True, check_races=False)
    strategy = HarmonyStrategy(mode=mode, microbatch_size=1, cluster=cluster)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with torch.device("meta"):
        module = LanguageModel(shape)
    module.to_empty(device="cpu")
    trainer.fit(module, tokens(num_microbatches * num_gpus, length, shape.vocabulary, STEPS))
    return Run(strategy.plan, strategy.statistics())


def rows(runs: dict[str, Run], num_gpus: int, num_microbatches: int, memory: str) -> list[tuple[str, Moved]]:
    """Schedules and what they move in one step; `runs` by mode."""
    plan = runs["pp"].plan
    nbytes = sum(pack.nbytes for pack in plan.packs)
    setting = Setting(
        weight_nbytes=nbytes,
        gradient_nbytes=sum(pack.trainable_nbytes for pack in plan.packs),
        num_gpus=num_gpus,
        num_microbatches=num_microbatches,
    )
    for mode, counted in runs.items():
        planned = counted.plan.swap_in_bytes_per_step, counted.plan.swap_out_bytes_per_step
        if (counted.swapped.into_gpus, counted.swapped.out_of_gpus) != planned:
            raise SystemExit(f"{mode} with {num_gpus} GPUs: the plan says {planned}, the runtime counts {counted}")
    packs = [(pack.nbytes, pack.trainable_nbytes) for pack in plan.packs]
    paged = virtual_memory(packs, setting, states=2, memory_bytes=parse_nbytes(memory))
    return [
        ("per-GPU virtual memory", paged),
        ("ZeRO-3 offload, FSDP2 CPU offload", sharded_offload(setting)),
        ("Harmony DP", harmony_dp(setting)),
        ("Harmony PP", harmony_pp(setting)),
        ("ours dp, measured", runs["dp"].swapped),
        ("ours pp, measured", runs["pp"].swapped),
        ("ours dp, measured, everything", runs["dp"].everything),
        ("ours pp, measured, everything", runs["pp"].everything),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small", choices=sorted(SHAPES))
    parser.add_argument("--memory", default="2MiB", help="of each GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="of each GPU")
    parser.add_argument("--length", type=int, default=16, help="tokens of a sequence; a microbatch is one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    shape = SHAPES[arguments.model]
    print("| model | GPUs | schedule |", " | ".join(f"m = {count}" for count in arguments.microbatches), "|")
    print("|" + "---|" * (3 + len(arguments.microbatches)))
    for num_gpus in arguments.gpus:
        cells: dict[str, list[str]] = {}
        for num_microbatches in arguments.microbatches:
            runs = {
                mode: run(shape, mode, num_gpus, num_microbatches, arguments.memory, arguments.length)
                for mode in ("dp", "pp")
            }
            table = rows(runs, num_gpus, num_microbatches, arguments.memory)
            ours = dict(table)["ours pp, measured"].total
            for name, moved in table:
                sizes = (format_nbytes(nbytes / num_gpus) for nbytes in (moved.into_gpus, moved.out_of_gpus))
                cells.setdefault(name, []).append(f"{' + '.join(sizes)} ({moved.total / ours:.2f})")
        for name, row in cells.items():
            print("|", " | ".join((arguments.model, str(num_gpus), name, *row)), "|", flush=True)


if __name__ == "__main__":
    main()
