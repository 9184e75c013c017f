"""Step time on emulated GPUs against what the machine allows; `README.md` tells how to read the table."""

import argparse
import logging
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch
from bound import Bound, bound, starts
from breakdown import Breakdown
from models import MODELS, LanguageModel, tokens
from own import num_sums, own_kernels
from plans import LAYERS, first_on_devices, travelling

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.hardware.presets import gpu_model, host_model
from harmony_lightning.observability.trace import chrome_trace

NUM_STEPS = 5
"""In the first ones it shows what travels in bfloat16, and what may stay. A plan that says both needs fewer."""
NUM_STEPS_OF_PLAN = 3
"""In the first one the optimizer makes its states, and nothing goes on behind it; those that stay come in in the second."""
HEADER = (
    "| model | GPUs | tokens per step | microbatches | weights | step | bound | ratio | without sums | to products alone | "
    "of which | peak per GPU | this took |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def measure(arguments: argparse.Namespace, num_tokens: int) -> str:
    """One row of the table."""
    shape, num_gpus, gpu = MODELS[arguments.model], arguments.num_gpus, gpu_model(arguments.gpu)
    cluster = EmulatedCluster(num_gpus, preset=gpu, host=arguments.host, fake=True, check_races=False)
    num_sequences = max(1, num_tokens // arguments.length)
    microbatch_size = max(1, num_sequences // arguments.microbatches)
    num_microbatches = -(-num_sequences // microbatch_size)
    with torch.device("meta"):
        module = LanguageModel(shape)
    module.to_empty(device="cpu")
    if arguments.travelling:
        plan = travelling(
            module,
            mode=arguments.mode,
            num_gpus=num_gpus,
            memory_bytes=gpu.memory_bytes,
            microbatch_size=microbatch_size,
            num_microbatches=num_microbatches,
            stash=arguments.stash,
        )
        plan = first_on_devices(plan, module, arguments.update_first)
        strategy = HarmonyStrategy(plan=plan, layers=LAYERS, cluster=cluster)
    else:
        strategy = HarmonyStrategy(
            mode=arguments.mode,
            update=arguments.update,
            microbatch_size=microbatch_size,
            one_layer_per_pack=True,
            cluster=cluster,
        )
    num_steps = NUM_STEPS_OF_PLAN if arguments.travelling else NUM_STEPS
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        precision=arguments.precision,
        callbacks=[breakdown := Breakdown(num_steps)],
        max_steps=num_steps + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.perf_counter()
    with breakdown.counting() if arguments.breakdown else nullcontext():
        # The last step only shows when it can begin, for which one microbatch will do.
        trainer.fit(module, tokens(num_sequences, arguments.length, shape.vocabulary, num_steps, microbatch_size))
    timeline, statistics = strategy.timeline(), strategy.statistics()
    took = time.perf_counter() - begin
    if arguments.trace is not None:
        arguments.trace.write_text(chrome_trace(timeline))
    one = own_kernels(shape, (microbatch_size, arguments.length + 1), gpu, arguments.precision)
    recomputed = [f"blocks.{i}" for i in range(shape.depth) if f"blocks.{i}" not in strategy.plan.keep]
    first, second = starts(timeline)[-2:]
    least = bound(
        timeline,
        first,
        second,
        num_gpus=num_gpus,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        kernel_seconds=one.per_step(num_microbatches, recomputed),
        sum_seconds=one.sums_per_step(num_sums(strategy.plan)),
        gpu=gpu,
        host=host_model(arguments.host),
        dtype="float32" if arguments.precision == "32-true" else "bfloat16",
    )
    stays = f"{len(strategy.plan.resident)} of {statistics.num_packs} packs stay"
    if arguments.travelling:
        stays = "travel"
    row = (
        f"| {arguments.model} | {num_gpus}x {arguments.gpu} | {num_sequences * arguments.length} | "
        f"{num_microbatches} of {microbatch_size} | {stays} | "
        f"{_times(second - first, least)} | "
        f"{max(statistics.peak_device_bytes) / 2**30:.1f} GiB | {took:.0f} s |"
    )
    return f"{row}\n\n{breakdown.table(num_gpus, second - first)}\n" if arguments.breakdown else row


def _times(seconds: float, least: Bound) -> str:
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in vars(least).items())
    return (
        f"{seconds:.3f} s | {least.seconds:.3f} s ({least.resource.replace('_', ' ')}) | {seconds / least.seconds:.3f} | "
        f"{seconds / least.seconds_without_sums:.3f} | {seconds / least.seconds_of_products:.3f} | {parts}"
    )


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
    parser.add_argument("--update", default="host", choices=("host", "first"))
    parser.add_argument("--travelling", action="store_true", help="no weights stay, all blocks are computed twice")
    parser.add_argument(
        "--update-first", type=int, default=0, help="so many first packs are updated on GPUs if weights travel"
    )
    parser.add_argument(
        "--stash", default="device", choices=("device", "host"), help="where inputs wait if weights travel"
    )
    parser.add_argument("--precision", default="bf16-mixed")
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
