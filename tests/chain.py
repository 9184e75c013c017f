"""What many tests share: a small module, its data, a quiet Trainer, a two-step optimizer."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harmony_lightning import EmulatedCluster, HarmonyStrategy

WIDTH = 64

on_cuda = False
"""Whether `harmony` means real GPUs and `trainer` trains on one; the fixture `devices` sets it."""


class Chain(L.LightningModule):
    """A chain of equal blocks: 16.6 KB of float32 weights each."""

    def __init__(self, depth=8, optimizer=torch.optim.AdamW, **options):
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(depth)))
        self.head = nn.Linear(WIDTH, 1)
        self.optimizer = optimizer
        self.options = {"lr": 1e-2, **options}
        self.losses = []

    def step(self, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(self.head(self.net(inputs)).squeeze(1), targets)

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.losses.append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def predict_step(self, batch, batch_idx):
        return self.head(self.net(batch[0]))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)


def loader(batch_size, num_samples=40):
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(num_samples, WIDTH, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randn(num_samples, generator=generator)), batch_size=batch_size)


def trainer(strategy="auto", **options):
    quiet = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "gpu" if on_cuda else "cpu",
        "devices": getattr(strategy, "num_gpus", 1),
    }
    return L.Trainer(strategy=strategy, **{**quiet, **options})


def harmony(num_gpus=2, memory="120KiB", microbatch_size=2, **options):
    """GPUs of so little memory that the chain has to be swapped: emulated ones, or as many real ones, whose plan is made
    for that little memory. No plan is searched for GPUs whose speed nobody knows, as that of these emulated ones."""
    if not on_cuda:
        return HarmonyStrategy(microbatch_size=microbatch_size, cluster=EmulatedCluster(num_gpus, memory), **options)
    if num_gpus > torch.cuda.device_count():
        pytest.skip(f"needs {num_gpus} GPUs")
    strategy = HarmonyStrategy(microbatch_size=microbatch_size, memory=memory, **{"plan": "sizes", **options})
    strategy.num_gpus = num_gpus
    return strategy


def twins(**options):
    """The same module twice."""
    torch.manual_seed(0)
    module = Chain(**options)
    return module, copy.deepcopy(module)


def same_weights(one, other):
    """To the bit on the host. On a GPU plain training also updates there, and its division and root round otherwise."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    if on_cuda:
        return all(torch.allclose(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6) for a, b in pairs)
    return all(torch.equal(a, b) for a, b in pairs)


def same_numbers(ours, reference):
    """Losses, or norms, of several steps; as alike as the weights."""
    if on_cuda:
        return torch.allclose(torch.tensor(ours), torch.tensor(reference), rtol=1e-4, atol=1e-5)
    return ours == reference


def stays_within(statistics, memory_bytes):
    """Whether no device had more in use. Real GPUs also hold the workspaces of CUDA's libraries; `test_gpu` limits them."""
    return on_cuda or max(statistics.peak_device_bytes) <= memory_bytes


def assert_same_optimizers(ours, reference):
    for mine, theirs in zip(ours, reference, strict=True):
        mine, theirs = mine.state_dict(), theirs.state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        assert list(mine["state"]) == list(theirs["state"])
        torch.testing.assert_close(mine["state"], theirs["state"], rtol=0, atol=0)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware: a step up along the gradient, a new gradient there, and from the old place a step with it."""

    def __init__(self, parameters, lr=0.1, rho=0.05):
        super().__init__(parameters, {"lr": lr, "rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups

    def weights(self):
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for _, p in self.weights()]), p=2)
        for group, parameter in self.weights():
            self.state[parameter]["old"] = parameter.data.clone()
            parameter.add_(parameter.grad * (group["rho"] / (norm + 1e-12)).to(parameter))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for _, parameter in self.weights():
            parameter.data = self.state[parameter]["old"]
        self.base.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "needs a closure"
        with torch.enable_grad():
            loss = closure()
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss
