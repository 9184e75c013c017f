"""One competitor trains the model in this process, and reports each step as it ends.

All of them see the same sequences, cut into the same microbatches, recompute every block once in backward, and step with
AdamW. Each function trains until it is done; the parent process has a time limit and takes the steps reported until then.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1] / "step_time"))
from models import MODELS, L, LanguageModel, Shape, tokens

SMALL = Shape(4, 64, 4, 4, 256, 512, is_gated=False)
"""For dry runs."""


class Report:
    """A file of JSON lines: one for each step, from the second on, with its seconds and the peak so far."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._last: float | None = None

    def step_ended(self, loss: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, peak = time.perf_counter(), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        if self._last is not None:
            self.write(seconds=now - self._last, peak_nbytes=peak, loss=loss)
        self._last = time.perf_counter()

    def write(self, **values: object) -> None:
        self._file.write(json.dumps(values) + "\n")


class _StepEnds(L.Callback):
    """Reports the loss of the last microbatch, which Lightning has divided by their number; of all where it sees one.

    A step ends where the next one begins: who overrides `on_train_batch_end` may look at gradients there, so that harmony
    would keep them, wait for its updates and take none on the GPU.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._steps = 0
        self._loss = torch.zeros(())

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: torch.Tensor) -> None:
        self._loss = loss.detach()

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._report.step_ended(float(self._loss) * trainer.accumulate_grad_batches)


class _Checkpointed(LanguageModel):
    """Recomputes its blocks; `harmony` does that by itself."""

    is_reentrant = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        x = self.embedding(batch[:, :-1])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.is_reentrant)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())


def _fit(
    module: L.LightningModule, options: argparse.Namespace, report: Report, strategy: object, **trainer: object
) -> None:
    """Trains by Lightning; the strategies of others get microbatches from the loader and accumulate over them."""
    accumulates = trainer.pop("accumulates", True)
    batch_size = options.microbatch if accumulates else options.sequences
    L.Trainer(
        strategy=strategy,
        devices=1,
        max_steps=options.steps + 2,  # the first is not reported, and the last has none behind it
        accumulate_grad_batches=options.sequences // options.microbatch if accumulates else 1,
        callbacks=[_StepEnds(report)],
        use_distributed_sampler=False,  # it would deal the sequences in another order
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"precision": options.precision, "accelerator": options.accelerator, **trainer},
    ).fit(module, tokens(batch_size, options.length, options.shape.vocabulary, _num_batches(options, batch_size)))


def _num_batches(options: argparse.Namespace, batch_size: int) -> int:
    return (options.steps + 2) * options.sequences // batch_size


def train_plain(options: argparse.Namespace, report: Report) -> None:
    _fit(_Checkpointed(options.shape), options, report, "auto")


def train_harmony(options: argparse.Namespace, report: Report) -> None:
    if L.__name__ == "lightning":
        from harmony_lightning.lightning import HarmonyStrategy
    else:
        from harmony_lightning.pytorch_lightning import HarmonyStrategy

    strategy = HarmonyStrategy(
        microbatch_size=options.microbatch, memory=options.memory if options.accelerator == "gpu" else None
    )
    _fit(LanguageModel(options.shape), options, report, strategy, accumulates=False)
    report.write(statistics=str(strategy.statistics()))


def train_deepspeed(options: argparse.Namespace, report: Report) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class Module(_Checkpointed):
        is_reentrant = True
        """The other kind compares the shapes of weights between forward and recompute, and ZeRO-3 empties weights."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return DeepSpeedCPUAdam(self.parameters())

    _fit(Module(options.shape), options, report, "deepspeed_stage_3_offload")


def train_fsdp2(options: argparse.Namespace, report: Report) -> None:
    """Lightning's strategy moves the module to the GPU; weights offloaded by FSDP2 have to stay on the host."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if L.__name__ == "lightning":
        from lightning.pytorch.strategies import ModelParallelStrategy
    else:
        from pytorch_lightning.strategies import ModelParallelStrategy

    class Offloading(ModelParallelStrategy):
        def model_to_device(self) -> None: ...

    class Module(_Checkpointed):
        def configure_model(self) -> None:
            dtype = _compute_dtype(options.precision)
            knobs = {
                "mesh": self.device_mesh["data_parallel"],
                "mp_policy": MixedPrecisionPolicy(param_dtype=dtype) if dtype else MixedPrecisionPolicy(),
                "offload_policy": CPUOffloadPolicy(pin_memory=options.accelerator == "gpu"),
            }
            for layer in (self.embedding, *self.blocks, self.head):
                fully_shard(layer, **knobs)
            fully_shard(self, **knobs)

    strategy = Offloading(data_parallel_size=1, tensor_parallel_size=1)
    _fit(Module(options.shape), options, report, strategy, precision="32-true")


def train_roundpipe(options: argparse.Namespace, report: Report) -> None:
    _roundpipe(options, report, is_stale=False)


def train_roundpipe_stale(options: argparse.Namespace, report: Report) -> None:
    _roundpipe(options, report, is_stale=True)


def _roundpipe(options: argparse.Namespace, report: Report, *, is_stale: bool) -> None:
    """Its own loop: it has no Lightning strategy. With `is_stale` each step runs on weights of the step before the last."""
    import roundpipe

    # float32 masters for the optimizer; the weights that compute are half where the precision is.
    layers = LanguageModel(options.shape).to(_compute_dtype(options.precision) or torch.float32)
    model = roundpipe.RoundPipe(
        nn.Sequential(layers.embedding, *layers.blocks, layers.head),
        optim_dtype=torch.float32,
        name="model",
        pin_model="register",
    )
    optimizer = roundpipe.optim.Adam(model.optim_parameters(), lr=1e-3, weight_decay=1e-2, decoupled_weight_decay=True)
    num_microbatches = options.sequences // options.microbatch

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / num_microbatches

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    for batch in tokens(options.sequences, options.length, options.shape.vocabulary, options.steps + 1):
        # Its own planner looks at the whole GPU, not at what this process may use; 0.6 is its own share.
        plan = roundpipe.ModelExecutePlan.auto("fused", model, model_memory_limit=0.6 * options.memory / 2**30)
        loss = model.forward_backward(
            input_args=(batch[:, :-1].contiguous(),),
            label=batch[:, 1:].contiguous(),
            loss_fn=loss_of,
            run_config=roundpipe.RoundPipeRunConfig(num_microbatch=num_microbatches, execute_plan=plan),
        )
        model.step(update, is_async=is_stale)
        report.step_ended(float(loss))


def _compute_dtype(precision: str) -> torch.dtype | None:
    return torch.bfloat16 if precision.startswith("bf16") else None


__all__ = ["COMPETITORS", "MODELS", "SMALL", "Report", "sizes"]

COMPETITORS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "harmony": train_harmony,
    "plain": train_plain,
    "plain-uncapped": train_plain,
    "deepspeed": train_deepspeed,
    "fsdp2": train_fsdp2,
    "roundpipe": train_roundpipe,
    "roundpipe-stale": train_roundpipe_stale,
}


def sizes(shape: Shape) -> dict[str, int]:
    """Parameters by use, for `bound.Work`."""
    with torch.device("meta"):
        module = LanguageModel(shape)
    return {
        "block_parameters": sum(p.numel() for p in _matrices(module.blocks)),
        "head_parameters": module.head.weight.numel(),
        "num_parameters": sum(p.numel() for p in module.parameters()),
    }


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if parameter.dim() == 2)
