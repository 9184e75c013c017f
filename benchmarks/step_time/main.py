"""Step time on emulated GPUs against what the machine allows; `README.md` tells how to read the table."""

import argparse
import logging
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch
from bound import bound, starts
from breakdown import Breakdown
from models import MODELS, LanguageModel, tokens

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.hardware.presets import gpu_model, host_model
from harmony_lightning.observability.trace import chrome_trace

NUM_STEPS = 4
"""The first one is not yet in full flow; the time between the starts of the last two is told."""
HEADER = (
    "| model | GPUs | tokens per step | packs | step | bound | ratio | of which | peak per GPU | this took |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def measure(arguments: argparse.Namespace, num_tokens: int) -> str:
    """One row of the table."""
    shape, num_gpus = MODELS[arguments.model], arguments.num_gpus
    cluster = EmulatedCluster(num_gpus, preset=arguments.gpu, host=arguments.host, fake=True, check_races=False)
    num_sequences = max(1, num_tokens // arguments.length)
    microbatch_size = max(1, num_sequences // arguments.microbatches)
    strategy = HarmonyStrategy(
        mode=arguments.mode,
        microbatch_size=microbatch_size,
        one_layer_per_pack=arguments.one_layer_per_pack,
        cluster=cluster,
    )
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        precision=arguments.precision,
        callbacks=[breakdown := Breakdown()],
        max_steps=NUM_STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with torch.device("meta"):
        module = LanguageModel(shape)
    module.to_empty(device="cpu")
    begin = time.perf_counter()
    with breakdown.counting() if arguments.breakdown else nullcontext():
        trainer.fit(module, tokens(num_sequences, arguments.length, shape.vocabulary, NUM_STEPS))
    took = time.perf_counter() - begin
    timeline, statistics = strategy.timeline(), strategy.statistics()
    if arguments.trace is not None:
        arguments.trace.write_text(chrome_trace(timeline))
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    dtype = "float32" if arguments.precision == "32-true" else "bfloat16"
    least = bound(
        timeline, NUM_STEPS, num_gpus, num_parameters, gpu_model(arguments.gpu), host_model(arguments.host), dtype
    )
    first, second = starts(timeline)[-2:]
    seconds = second - first
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in vars(least).items())
    row = (
        f"| {arguments.model} | {num_gpus}x {arguments.gpu} | {num_sequences * arguments.length} | "
        f"{statistics.num_packs} | {seconds:.3f} s | {least.seconds:.3f} s ({least.resource.replace('_', ' ')}) | "
        f"{seconds / least.seconds:.3f} | {parts} | {max(statistics.peak_device_bytes) / 2**30:.1f} GiB | {took:.0f} s |"
    )
    return f"{row}\n\n{breakdown.table(num_gpus, seconds)}\n" if arguments.breakdown else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2-xl", choices=sorted(MODELS))
    parser.add_argument("--gpu", default="3090", help="a preset of harmony_lightning.hardware.presets")
    parser.add_argument("--num-gpus", type=int, default=4)
    parser.add_argument("--host", default="server", help="a preset, too")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384], help="per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--microbatches", type=int, default=16, help="as far as there are sequences")
    parser.add_argument("--mode", default="mixed", choices=("pp", "mixed"))
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--one-layer-per-pack", action="store_true")
    parser.add_argument("--breakdown", action="store_true", help="tell what the GPUs compute, by class of operation")
    parser.add_argument("--trace", type=Path, help="write the last run's timeline, for https://ui.perfetto.dev")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(HEADER)
    for num_tokens in arguments.tokens:
        print(measure(arguments, num_tokens), flush=True)


if __name__ == "__main__":
    main()
