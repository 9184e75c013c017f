"""Programs that nobody thought of: a random graph of layers and code between them, with a random strategy and without.

All is computed in float64, where additions in another order differ by 1e-12, and a wrong gradient by far more.
`PYTHONPATH=tests python tests/differential/test_random_programs.py 1000 1200` tries other seeds.
"""

import contextlib
import functools
import random
import sys

import lightning as L
import pytest
import torch
from chain import trainer
from oracle import make_strategy
from test_derivatives import Scaling
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from harmony_lightning import CapacityError, DeviceOutOfMemoryError, EmulatedCluster, HarmonyStrategy

WIDTH, BATCH = 16, 8
SEEDS = range(24)


def linear():
    return nn.Linear(WIDTH, WIDTH)


class Layer(nn.Module):
    """Has several results, some without a gradient, and does not use all it is given."""

    def __init__(self):
        super().__init__()
        self.one, self.other = linear(), linear()

    def forward(self, x, y=None, *, uses=True):
        a = torch.tanh(self.one(x))
        b = self.other(y).relu() if y is not None and uses else None
        return {"a": a, "rest": (b, a.detach().sum(1), len(x))}


class Counting(nn.Module):
    """Writes a buffer, and makes numbers of the default type."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += self.training
        return x * self.scale * torch.ones(WIDTH, device=x.device).div(3)


def call(layer, x, y, *, gives, uses):
    out = layer(x, y if gives else None, uses=uses)
    b, sums, num = out["rest"]
    assert num == len(x) and not sums.requires_grad
    return (out["a"] if b is None else (out["a"] + b) / 2) + 0.01 * sums[:, None]


def by_value(layers, x, y):
    """Where a sample goes depends on itself."""
    best = x.detach().argmax(1) % len(layers)
    out = torch.zeros_like(x)
    for index, layer in enumerate(layers):
        rows = (best == index).nonzero()[:, 0]
        if len(rows):
            out = out.index_add(0, rows, torch.tanh(layer(x[rows])))
    return out + y / 2


def hooked(layer, x, y):
    h = layer(x)
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2) * 0.5)
    return h.mul_(0.5).add_(y) / 2


def differentiated(layer, x, y):
    h = torch.tanh(layer(x))
    source = x if x.requires_grad else h
    return h + torch.autograd.grad(h.square().sum(), source, retain_graph=True)[0].detach()


def without_gradient(layer, x, y):
    with torch.no_grad():
        target = layer(x)
    return torch.tanh(layer(y)) - target / 4


KINDS = [
    lambda r: (linear(), lambda m, x, y: torch.tanh(m(x)) + y / 2),
    lambda r: (nn.Sequential(linear(), nn.ReLU(inplace=True), linear()), lambda m, x, y: (m(x) + x) / 2),
    lambda r: (nn.LayerNorm(WIDTH), lambda m, x, y: m(x) / 2 + y / 2),
    lambda r: (Layer(), functools.partial(call, gives=r.random() < 0.7, uses=r.random() < 0.7)),
    lambda r: (Counting(), lambda m, x, y: m(x) + F.linear(y, torch.diag(m.scale)) / 4),
    lambda r: (nn.ModuleList(linear() for _ in range(2)), by_value),
    lambda r: (linear(), hooked),
    lambda r: (linear(), without_gradient),
    lambda r: (linear().requires_grad_(False), lambda m, x, y: torch.tanh(m(x.detach())) + y / 2),
    lambda r: (nn.Sequential(linear(), nn.Tanh()), lambda m, x, y: checkpoint(m, x, use_reentrant=False) + y / 2),
    lambda r: (nn.ParameterList([torch.ones(WIDTH)]), lambda m, x, y: Scaling.apply(x, m[0]) / 2 + y / 2),
    lambda r: (nn.GRU(WIDTH, WIDTH), lambda m, x, y: m(torch.stack([x, y]))[0][1]),
    lambda r: (nn.Identity(), lambda m, x, y: torch.cat([a.flip(1) for a in (x + y).chunk(2, 1)], 1) / 2),
]


class Program(L.LightningModule):
    def __init__(self, r):
        super().__init__()
        self.first, self.head, self.shift = linear(), nn.Linear(WIDTH, 1), nn.Parameter(torch.ones(WIDTH))
        kinds = [*KINDS, lambda r: (linear(), differentiated)] if r.random() < 0.25 else KINDS
        made = [r.choice(kinds)(r) for _ in range(r.randint(2, 6))]
        self.layers = nn.ModuleList(layer for layer, _ in made)
        self.calls = [(r.randrange(len(made)), r.randrange(3), r.randrange(8)) for _ in range(len(made) + 2)]
        self.ways = [way for _, way in made]
        self.optimizer = r.choice(["SGD", "AdamW", "RMSprop"])

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        values = [inputs * self.shift, self.first(inputs)]
        for index, near, far in self.calls:
            x, y = values[-1 - near % len(values)], values[far % len(values)]
            values.append(self.ways[index](self.layers[index], x, y))
        return F.mse_loss(self.head(values[-1]).squeeze(1), targets)

    def configure_optimizers(self):
        options = {"AdamW": {"eps": 1e-2, "weight_decay": 0.1}, "RMSprop": {"eps": 1e-2}}.get(self.optimizer, {})
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=1e-2, **options)


def train(seed, strategy):
    torch.manual_seed(seed)
    module = Program(random.Random(seed))
    data = torch.randn(20, WIDTH, dtype=torch.float64)
    fitted = trainer(strategy, precision="64-true", **{"gradient_clip_val": 0.5} if seed % 5 == 4 else {})
    fitted.fit(module, DataLoader(TensorDataset(data, data.sin().sum(1)), batch_size=BATCH))
    states = [fitted.optimizers[0].state.get(p, {}) for p in module.parameters()]
    return module.state_dict(), states


def options_for(seed):
    r = random.Random(~seed)
    options = {
        "mode": r.choice(["pp", "dp", "mixed"]),
        "microbatch_size": r.choice([2, 3, 8]),
        "microbatches_per_forward": r.choice([1, 2, 3]),
        "stash": r.choice(["auto", "device", "host"]),
        "update": r.choice(["host", "device", "first"]),
        "one_layer_per_pack": r.random() < 0.6,
    }
    num_gpus = r.randint(1, 4)
    if num_gpus == 4 and options["mode"] != "dp" and r.random() < 0.7:
        options["pipelines"] = 2
    return options, num_gpus


def train_in_little_memory(seed):
    """In the least that is enough, nearly."""
    options, num_gpus = options_for(seed)
    for memory in ("12KiB", "20KiB", "36KiB", "1MiB"):
        with contextlib.suppress(CapacityError, DeviceOutOfMemoryError):
            return train(seed, HarmonyStrategy(cluster=EmulatedCluster(num_gpus, memory), **options))
    raise AssertionError("it does not train in a hundred times what it needs")


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_are_those_of_one_device(seed):
    size = options_for(seed)[0]["microbatch_size"]
    reference = train(seed, make_strategy(L.pytorch, size) if size < BATCH else "auto")
    torch.testing.assert_close(train_in_little_memory(seed), reference, rtol=1e-8, atol=1e-9)


if __name__ == "__main__":
    for seed in range(*map(int, sys.argv[1:])):
        print(seed, flush=True)
        test_random_programs_are_those_of_one_device(seed)
