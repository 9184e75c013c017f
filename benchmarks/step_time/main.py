"""Step time on emulated GPUs against what the machine allows: `README.md` tells how to read the table."""

import argparse
import json
import time
import warnings
from dataclasses import dataclass

import lightning as L
import torch
from bound import Bound, Step
from models import MODELS, LanguageModel, tokens

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.hardware.presets import gpu_model, host_model
from harmony_lightning.plan.timeline import Timeline


@dataclass(frozen=True)
class Result:
    seconds: float
    bound: Bound
    peak_nbytes: int
    swap_in_nbytes: int
    wall_seconds: float


class LastStep(L.Callback):
    """When the steps began and ended on the virtual clock, from the counts of what had been done by then."""


def measure(
    model: str, preset: str, num_gpus: int, num_tokens: int, arguments: argparse.Namespace
) -> tuple[Timeline, dict]:
    shape = MODELS[model]
    cluster = EmulatedCluster(num_gpus, preset=preset, host=arguments.host, fake=True, check_races=False)
    num_sequences = max(1, num_tokens // arguments.length)
    strategy = HarmonyStrategy(
        mode="pp", microbatch_size=max(1, -(-num_sequences // arguments.microbatches)), cluster=cluster
    )
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        precision=arguments.precision,
        max_steps=arguments.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with torch.device("meta"):
        module = LanguageModel(shape)
    module.to_empty(device="cpu")
    begin = time.perf_counter()
    trainer.fit(module, tokens(num_sequences, arguments.length, shape.vocabulary, arguments.steps))
    return strategy, time.perf_counter() - begin, sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2-xl", choices=sorted(MODELS))
    parser.add_argument("--gpu", default="3090")
    parser.add_argument("--num-gpus", type=int, default=4)
    parser.add_argument("--host", default="server")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trace")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    strategy, wall, num_parameters = measure(
        arguments.model, arguments.gpu, arguments.num_gpus, arguments.tokens, arguments
    )
    timeline = strategy.timeline()
    print(strategy.statistics(), "wall", wall, "params", num_parameters)
    print("packs", len(strategy.plan.packs), "prefetch", strategy.plan.prefetch)
    total = timeline.seconds
    print("total", total, "per step", total / arguments.steps)
    lanes = sorted({(s.device, s.lane) for s in timeline.spans})
    for device, lane in lanes:
        print(device, lane, round(timeline.busy_seconds(device, lane), 3))
    if arguments.trace:
        from harmony_lightning.observability.trace import chrome_trace

        open(arguments.trace, "w").write(chrome_trace(timeline))


if __name__ == "__main__":
    main()
