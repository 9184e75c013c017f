"""A model whose layers take a GPU long enough that what a schedule gets right or wrong shows: for fake data only."""

from dataclasses import replace

import lightning as L
import torch
from chain import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.hardware.presets import gpu_model, host_model
from harmony_lightning.profiled import profile, step_of
from harmony_lightning.profiler.machine import preset_machine
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.translate import plan_of

WIDTH = 1024


class _Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden * WIDTH), nn.Linear(hidden * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Wide(L.LightningModule):
    """Blocks of 2 x 4 MiB of float32 weights, and a head of 16 MiB, on sequences of 128."""

    def __init__(self, depth=6, hidden=(1,)):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(hidden[index % len(hidden)]) for index in range(depth))
        self.head = nn.Linear(WIDTH, 4096)

    def training_step(self, batch, batch_idx):
        x, target = batch
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), target.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


def on_meta(make):
    with torch.device("meta"):
        return make()


def batch_of(samples):
    return torch.zeros(samples, 128, WIDTH), torch.zeros(samples, 128, dtype=torch.long)


def cluster_of(num_gpus, gpu="3090", host="server", memory=None):
    return EmulatedCluster(num_gpus, memory, preset=gpu, host=host, fake=True, check_races=False)


def costs_of(make, num_gpus, gpu="3090", host="server", largest=4, memory_bytes=None):
    """What the module costs on so many GPUs, and its layers in the order of calls."""
    module = on_meta(make)
    layers = decompose(module, 2**26)
    machine = preset_machine(num_gpus, gpu_model(gpu), host_model(host), memory_bytes)
    cluster = cluster_of(num_gpus, gpu, host, memory_bytes)
    measured, _ = profile(module, layers, batch_of, step_of(), cluster, machine, largest=largest, is_fresh=True)
    ordered = layers.reordered(measured.profile.names)
    trained = {weight.name for weight in layers.weights if weight.is_trainable}
    weights = [len(trained.intersection(layer.weights)) for layer in ordered.layers]
    return Costs(measured.profile, machine, weights=weights), ordered


def train(make, schedule, layers, gpu="3090", host="server", num_steps=5, memory=None):
    """Seconds of a settled step and peak bytes when the runtime carries a schedule out."""
    cluster = cluster_of(schedule.num_devices, gpu, host, memory)
    if schedule.updated_there:
        layers = layers.with_states({weight.name: (weight.nbytes, weight.nbytes, 4) for weight in layers.weights})
    plan = replace(plan_of(schedule, layers, cluster.devices[0].memory_bytes), resident=schedule.resident)
    module = on_meta(make).to_empty(device="cpu")
    strategy = HarmonyStrategy(microbatch_size=plan.microbatch_size, cluster=cluster, plan=plan)
    data = TensorDataset(*batch_of(schedule.minibatch * num_steps))
    trainer(strategy, max_steps=num_steps).fit(module, DataLoader(data, batch_size=schedule.minibatch))
    return strategy.timeline().step_seconds[-1], max(strategy.statistics().peak_device_bytes)
