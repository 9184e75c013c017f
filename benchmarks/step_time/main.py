"""Step time on emulated GPUs against what the machine allows; `README.md` tells how to read the table."""

import argparse
import logging
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from bound import Bound, bound, starts
from breakdown import Breakdown
from models import MODELS, LanguageModel, batches
from own import num_sums, own_kernels
from plans import LAYERS, first_on_devices, travelling

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.hardware.presets import gpu_model, host_model
from harmony_lightning.observability.trace import chrome_trace
from harmony_lightning.plan import Plan

NUM_STEPS = 5
"""In the first ones it shows what travels in bfloat16, and what may stay. A plan that says both needs fewer."""
NUM_STEPS_OF_PLAN = 3
"""In the first one the optimizer makes its states, and nothing goes on behind it."""
HEADER = (
    "| model | GPUs | tokens per step | microbatches | weights | step | bound | ratio | without sums | to products alone | "
    "of which | peak per GPU | this took |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Measured:
    """A row of the table."""

    seconds: float
    least: Bound
    microbatches: str
    weights: str
    updated_there: int
    """Packs that are updated on GPUs."""
    peak_bytes: int
    took: float
    breakdown: str

    def __str__(self) -> str:
        return (
            f"{self.microbatches} | {self.weights} | {_times(self.seconds, self.least)} | "
            f"{self.peak_bytes / 2**30:.1f} GiB | {self.took:.0f} s |"
        )


def measure(arguments: argparse.Namespace, num_tokens: int) -> Measured:
    """Raises HarmonyError if GPUs have not the memory."""
    shape, num_gpus, gpu = MODELS[arguments.model], arguments.num_gpus, gpu_model(arguments.gpu)
    cluster = EmulatedCluster(num_gpus, preset=gpu, host=arguments.host, fake=True, check_races=False)
    num_sequences = max(1, num_tokens // arguments.length // arguments.accumulate)
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
        plan = first_on_devices(plan, module) if arguments.update == "first" else plan
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
        callbacks=[breakdown := Breakdown(num_steps, arguments.accumulate)],
        max_steps=num_steps + 1,
        accumulate_grad_batches=arguments.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.perf_counter()
    with breakdown.counting() if arguments.breakdown else nullcontext():
        # The last step only shows when it can begin, for which one microbatch will do.
        sizes = [num_sequences] * (num_steps * arguments.accumulate) + [microbatch_size]
        trainer.fit(module, batches(sizes, arguments.length, shape.vocabulary))
    timeline, statistics = strategy.timeline(), strategy.statistics()
    took = time.perf_counter() - begin
    if arguments.trace is not None:
        arguments.trace.write_text(chrome_trace(timeline))
    one = own_kernels(shape, (microbatch_size, arguments.length + 1), gpu, arguments.precision)
    recomputed = [f"blocks.{i}" for i in range(shape.depth) if f"blocks.{i}" not in strategy.plan.keep]
    begun = starts(timeline)
    first, second = begun[-1 - arguments.accumulate], begun[-1]
    least = bound(
        timeline,
        first,
        second,
        num_gpus=num_gpus,
        num_parameters=sum(module.get_parameter(n).numel() for n in _updated_on_host(strategy.plan)),
        kernel_seconds=arguments.accumulate * one.per_step(num_microbatches, recomputed),
        sum_seconds=arguments.accumulate * one.sums_per_step(num_sums(strategy.plan)),
        gpu=gpu,
        host=host_model(arguments.host),
        dtype="float32" if arguments.precision == "32-true" else "bfloat16",
    )
    stays = f"{len(strategy.plan.resident)} of {statistics.num_packs} packs stay"
    return Measured(
        seconds=second - first,
        least=least,
        microbatches=("" if arguments.accumulate == 1 else f"{arguments.accumulate} x ")
        + f"{num_microbatches} of {microbatch_size}",
        weights="travel" if arguments.travelling else stays,
        updated_there=sum(pack.update == "device" for pack in strategy.plan.packs),
        peak_bytes=max(statistics.peak_device_bytes),
        took=took,
        breakdown=breakdown.table(num_gpus, second - first) if arguments.breakdown else "",
    )


def _updated_on_host(plan: Plan) -> set[str]:
    there = {name for pack in plan.packs if pack.update == "device" for name in pack.parameters}
    return {name for pack in plan.packs for name in pack.parameters} - there


def _times(seconds: float, least: Bound) -> str:
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in vars(least).items())
    return (
        f"{seconds:.3f} s | {least.seconds:.3f} s ({least.resource.replace('_', ' ')}) | {seconds / least.seconds:.3f} | "
        f"{seconds / least.seconds_without_sums:.3f} | {seconds / least.seconds_of_products:.3f} | {parts}"
    )


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2-xl", choices=sorted(MODELS))
    parser.add_argument("--gpu", default="3090", help="a preset of harmony_lightning.hardware.presets")
    parser.add_argument("--num-gpus", type=int, default=4)
    parser.add_argument("--host", default="server", help="a preset, too")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384], help="per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--microbatches", type=int, default=16, help="as far as there are sequences")
    parser.add_argument(
        "--accumulate", type=int, default=1, help="minibatches per step, as Trainer(accumulate_grad_batches)"
    )
    parser.add_argument("--mode", default="mixed", choices=("pp", "mixed"))
    parser.add_argument("--update", default="host", choices=("host", "first"), help="first: that of each GPU there")
    parser.add_argument("--travelling", action="store_true", help="no weights stay, all blocks are computed twice")
    parser.add_argument(
        "--stash", default="device", choices=("device", "host"), help="where inputs wait if weights travel"
    )
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--breakdown", action="store_true", help="tell what the GPUs compute, by class of operation")
    parser.add_argument("--trace", type=Path, help="write the last run's timeline, for https://ui.perfetto.dev")
    return parser


def be_quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main() -> None:
    arguments = argument_parser().parse_args()
    be_quiet()
    print(HEADER)
    for num_tokens in arguments.tokens:
        row = measure(arguments, num_tokens)
        print(f"| {arguments.model} | {arguments.num_gpus}x {arguments.gpu} | {num_tokens} | {row}", flush=True)
        if arguments.breakdown:
            print(f"\n{row.breakdown}\n", flush=True)


if __name__ == "__main__":
    main()
