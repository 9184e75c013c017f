"""Ten small models on ten machines, and what it takes to train one of them under a plan on the emulated clock."""

import logging
import warnings
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harmony_lightning import CapacityError, DeviceOutOfMemoryError, EmulatedCluster, HarmonyStrategy
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.hardware.presets import gpu_model, host_model
from harmony_lightning.plan import Schedule
from harmony_lightning.profiled import Question, find_plan, profile, step_of
from harmony_lightning.profiler.machine import preset_machine
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.steps import fair_seconds
from harmony_lightning.scheduler.runtime.translate import plan_of
from harmony_lightning.scheduler.search.runtime_family import Placed, placements

MARGIN = 1.06
"""Predictions are off by a few per cent; what is predicted to be slower by more cannot be the best."""
NUM_STEPS = 5
"""What the last but one takes is told."""


@dataclass(frozen=True)
class Case:
    name: str
    widths: tuple[int, ...]
    """Of the hidden layer of each block, in multiples of `width`."""
    num_gpus: int
    gpu: str
    host: str
    memory: str
    width: int = 1024
    length: int = 128
    minibatch: int = 8
    head: int = 4096


CASES = (
    Case("equal blocks", (2, 2, 2), 1, "3090", "server", "24GiB"),
    Case("equal blocks, little memory", (2, 2, 2), 1, "3090", "server", "120MiB"),
    Case("one wide block", (1, 6, 1), 2, "3090", "server", "24GiB"),
    Case("growing blocks", (1, 2, 4), 2, "1080ti", "server", "24GiB"),
    Case("shrinking blocks", (4, 2, 1), 2, "3090", "desktop", "24GiB"),
    Case("wide head", (1, 1, 1), 2, "h100", "server", "24GiB", head=16384),
    Case("long sequences", (2, 2, 2), 4, "3090", "server", "24GiB", length=512),
    Case("short sequences", (4, 4, 4), 4, "4090", "server", "24GiB", length=32),
    Case("large minibatch", (2, 1, 2), 4, "1080ti", "desktop", "24GiB", minibatch=16),
    Case("fast links, little memory", (2, 2, 2), 2, "a100-40", "server-ddr5", "200MiB"),
)


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(L.LightningModule):
    def __init__(self, case):
        super().__init__()
        self.blocks = nn.ModuleList(Block(case.width, width * case.width) for width in case.widths)
        self.head = nn.Linear(case.width, case.head)

    def training_step(self, batch, batch_idx):
        x, target = batch
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), target.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


def build(case):
    with torch.device("meta"):
        return Model(case)


def batch_of(case, samples):
    return torch.zeros(samples, case.length, case.width), torch.zeros(samples, case.length, dtype=torch.long)


def cluster_of(case, num_gpus):
    return EmulatedCluster(num_gpus, case.memory, preset=case.gpu, host=case.host, fake=True, check_races=False)


LAYERS = (Block, "head")


def layers_of(case):
    """With what a fused AdamW remembers of them."""
    layers = decompose(build(case), 1, LAYERS)
    return layers.with_states({weight.name: (weight.nbytes, weight.nbytes, 4) for weight in layers.weights})


def automatic(case):
    """What the search finds, and the layers in the order of calls."""
    layers, cluster = layers_of(case), cluster_of(case, case.num_gpus)
    memory_bytes = cluster.devices[0].memory_bytes
    machine = preset_machine(case.num_gpus, gpu_model(case.gpu), host_model(case.host), memory_bytes)
    measured, _ = profile(
        build(case), layers, lambda samples: batch_of(case, samples), step_of(), cluster, machine,
        largest=case.minibatch, is_fresh=True,
    )  # fmt: skip
    question = Question(minibatch=case.minibatch, memory_bytes=memory_bytes, update="auto")
    planned = find_plan(measured, machine, layers, question)
    return planned, planned.decomposition


def sweep(case, num_layers):
    """Every plan that the runtime can carry out, as far as microbatches cut the minibatch evenly, and packs that GPUs
    update are the first ones."""
    for schedule in sweep_on_host(case, num_layers):
        packs = [pack for pack in range(len(schedule.packs_backward)) if pack not in schedule.dealt]
        yield schedule
        yield replace(schedule, updated_there=tuple(packs))
        for count in range(len(packs)):
            first = tuple(packs[: count + 1])
            yield replace(schedule, updated_there=first, updates_stay=first)


def sweep_on_host(case, num_layers):
    """Those of them by which the host updates all."""
    several = [Placed("dp"), *placements("mixed", case.num_gpus)] if case.num_gpus > 1 else [Placed("pp")]
    for mode, pipelines, is_dealt in several:
        copies = case.num_gpus if mode == "dp" else pipelines
        samples = case.minibatch // copies
        sizes = [size for size in (1, 2, 4, 8) if samples % size == 0 and size <= samples]
        if is_dealt:
            sizes = [size for size in sizes if size < samples]
        for size in sizes:
            for count in range(1 if is_dealt else 0, num_layers):
                for cuts in combinations(range(1, num_layers), count):
                    edges = (0, *cuts, num_layers)
                    packs = tuple((first, last - 1) for first, last in pairwise(edges))
                    for prefetch, stash in ((1, "device"), (1, "host"), (0, "device"), (0, "host")):
                        yield Schedule(
                            mode=mode, num_devices=case.num_gpus, pipelines=pipelines,
                            dealt=(count,) if is_dealt else (),
                            minibatch=case.minibatch, microbatch_forward=size, packs_forward=packs[:-1],
                            microbatch_backward=size, packs_backward=packs, prefetch=prefetch, stash=stash,
                        )  # fmt: skip


def train(case, schedule, layers):
    """Seconds per step on the emulated clock; None if the plan does not fit."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cluster = cluster_of(case, case.num_gpus)
    plan = plan_of(schedule, layers, cluster.devices[0].memory_bytes)
    strategy = HarmonyStrategy(microbatch_size=plan.microbatch_size, cluster=cluster, plan=plan, layers=LAYERS)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", max_steps=NUM_STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(*batch_of(case, case.minibatch * NUM_STEPS))
    try:
        trainer.fit(build(case).to_empty(device="cpu"), DataLoader(data, batch_size=case.minibatch))
    except (DeviceOutOfMemoryError, CapacityError):
        return None
    return strategy.timeline().step_seconds[-1]


def best_of_sweep(case, layers, costs):
    """Seconds of the fastest plan, the plan, how many there are and how many were tried.

    Left out are plans that the simulator finds slower than its best by more than `MARGIN`. Of four ways to use memory the
    first that fits is tried: what leaves more room is not faster.
    """
    seconds, best, tried, done = float("inf"), None, 0, set()
    most = costs.profile.microbatch_sizes.backward[-1]
    family = [schedule for schedule in sweep(case, len(layers.layers)) if schedule.microbatch_backward <= most]
    predicted = [fair_seconds(schedule, costs) for schedule in family]
    fitting = [
        p for s, p in zip(family, predicted, strict=True) if runtime_peak_bytes(s, costs) <= costs.machine.memory_bytes
    ]
    for schedule, prediction in zip(family, predicted, strict=True):
        places = schedule.num_copies, schedule.updated_there, schedule.updates_stay
        kind = (schedule.microbatch_backward, schedule.packs_backward, places)
        if kind in done or prediction > MARGIN * min(fitting):
            continue
        taken = train(case, schedule, layers)
        tried += 1
        if taken is None:
            continue
        done.add(kind)
        if taken < seconds:
            seconds, best = taken, schedule
    return seconds, best, len(family), tried
