"""Where the search has packs updated: nothing crosses the links where everything fits; numbers stay those of the host."""

import logging

import lightning as L
import pytest
import torch
from chain import assert_same_optimizers, same_weights, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.profiled import _is_cut

WIDTH, DEPTH, SAMPLES, NUM_STEPS = 1024, 6, 16, 6
WEIGHTS = DEPTH * 4 * WIDTH * (WIDTH + 1)
"""Bytes of the layers of a net, its small head left out."""
HALF = int(2.4 * WEIGHTS)
"""Of the memory that all takes: weights, what is remembered of them, new weights, gradients; and room for a step."""
OPTIMIZERS = {
    "Adam": (torch.optim.Adam, {"lr": 1e-3}),
    "fused": (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    "SGD": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path / "cache"))


class Net(L.LightningModule):
    def __init__(self, optimizer="Adam", norm=False):
        super().__init__()
        self.optimizer = optimizer
        more = [nn.BatchNorm1d(WIDTH)] if norm else []
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH))
        self.net, self.head = nn.Sequential(*blocks, *more), nn.Linear(WIDTH, 1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return nn.functional.mse_loss(self.head(self.net(inputs)).squeeze(1), targets)

    def configure_optimizers(self):
        kind, options = OPTIMIZERS[self.optimizer]
        return kind(self.parameters(), **options)


class Counting(L.Callback):
    """Bytes of weights, gradients and states that have crossed host links, step by step."""

    def __init__(self):
        self.totals = []

    def on_train_batch_start(self, trainer, *args):
        found = trainer.strategy.statistics()
        self.totals.append((found.swap_in_bytes, found.swap_out_bytes, found.stash_in_bytes + found.stash_out_bytes))


def batches(start=0, stop=NUM_STEPS):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES * NUM_STEPS, WIDTH, generator=generator)
    targets = torch.randn(SAMPLES * NUM_STEPS, generator=generator)
    part = slice(SAMPLES * start, SAMPLES * stop)
    return DataLoader(TensorDataset(inputs[part], targets[part]), batch_size=SAMPLES)


def strategy_of(memory, num_gpus=1, **options):
    return HarmonyStrategy(cluster=EmulatedCluster(num_gpus, memory, preset="3090"), **options)


def fit(strategy, optimizer="Adam", loader=None, ckpt_path=None, norm=False, **options):
    torch.manual_seed(0)
    module, counting = Net(optimizer, norm), Counting()
    run = trainer(strategy, callbacks=[] if strategy == "auto" else [counting], **options)
    run.fit(module, loader or batches(), ckpt_path=ckpt_path)
    return module, run, counting.totals


def plainly(optimizer, size):
    """On one device, over microbatches of a size."""
    torch.manual_seed(0)
    module = Net(optimizer)
    stepping = module.configure_optimizers()
    for inputs, targets in batches():
        stepping.zero_grad()
        for part in zip(inputs.split(size), targets.split(size), strict=True):
            (module.training_step(part, 0) * (len(part[0]) / len(inputs))).backward()
        stepping.step()
    return module


@pytest.mark.parametrize("num_gpus", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_where_everything_fits_nothing_crosses_the_links(optimizer, num_gpus, caplog):
    caplog.set_level(logging.INFO, "harmony_lightning")
    strategy = strategy_of("1GiB", num_gpus, mode="pp")
    module, _, totals = fit(strategy, optimizer)
    assert totals[-1] == totals[-2]
    plan = strategy.plan
    assert plan.swap_in_bytes_per_step == plan.swap_out_bytes_per_step == 0
    assert len(plan.updates_stay) == len(plan.packs)
    assert "all updated on GPUs" in caplog.text
    assert same_weights(module, plainly(optimizer, plan.microbatch_size))


def seconds_of(strategy):
    return strategy.timeline().step_seconds[-1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_where_half_of_it_fits_devices_update_what_does(optimizer):
    options = {"microbatch_size": 8, "layers": [nn.Linear]}
    strategy = strategy_of(HALF, **options)
    module, run, _ = fit(strategy, optimizer)
    on_host = strategy_of(HALF, update="host", **options)
    other, other_run, _ = fit(on_host, optimizer)
    places = {pack.update for pack in strategy.plan.packs}
    assert places == {"host", "device"} and strategy.statistics().updates_on_devices
    assert same_weights(module, other) and same_weights(module, plainly(optimizer, 8))
    assert_same_optimizers(run.optimizers, other_run.optimizers)
    assert seconds_of(strategy) <= seconds_of(on_host)
    assert max(strategy.statistics().peak_device_bytes) <= HALF


def test_the_user_is_obeyed():
    strategy = strategy_of("1GiB", update="host")
    fit(strategy)
    assert {pack.update for pack in strategy.plan.packs} == {"host"}
    assert strategy.statistics().updates_on_devices == 0


@pytest.mark.parametrize(
    ("options", "run_options", "norm"),
    [
        ({}, {"deterministic": True}, False),
        ({}, {}, True),
        ({"plan": "packs"}, {}, False),
        ({"plan": "sizes"}, {}, False),
    ],
)
def test_where_places_must_not_depend_on_speed_the_host_updates(options, run_options, norm):
    strategy = strategy_of("1GiB", **options)
    try:
        fit(strategy, "fused", norm=norm, **run_options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert strategy.statistics().updates_on_devices == 0
    assert {pack.update for pack in strategy.plan.packs} == {"host"}


class Looks(L.Callback):
    def on_train_batch_end(self, *args):
        pass


class Sees(L.Callback):
    def on_after_backward(self, *args):
        pass


@pytest.mark.parametrize("callback", [Looks, Sees])
def test_what_sees_gradients_has_the_host_update_without_a_warning(callback, caplog):
    strategy = strategy_of("1GiB")
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "harmony_lightning"):
        trainer(strategy, callbacks=[callback()], max_steps=3).fit(Net("fused"), batches())
    assert strategy.statistics().updates_on_devices == 0
    assert {pack.update for pack in strategy.plan.packs} == {"host"}
    assert "updates on devices are left out" in caplog.text
    assert not [r for r in caplog.records if r.levelno > logging.INFO and r.name.startswith("harmony")]


@pytest.mark.parametrize(("first", "second"), [("1GiB", HALF), (HALF, "1GiB")])
def test_training_is_resumed_with_other_memory(first, second, tmp_path):
    options = {"microbatch_size": 8, "layers": [nn.Linear]}
    _, half, _ = fit(strategy_of(first, **options), "fused", batches(0, 3))
    half.save_checkpoint(tmp_path / "half.ckpt")
    strategy = strategy_of(second, **options)
    module, _, _ = fit(strategy, "fused", batches(3), ckpt_path=tmp_path / "half.ckpt", max_epochs=2)
    assert strategy.statistics().updates_on_devices
    assert same_weights(module, plainly("fused", 8))


def test_layers_with_a_weight_in_common_are_known():
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    module[2].weight = module[0].weight
    layers = decompose(module, 1, [nn.Linear])
    assert layers.tied == (frozenset({0, 2}),) and layers.state_nbytes is None
    states = {weight.name: (weight.nbytes, 4) for weight in layers.weights}
    assert layers.with_states(states).state_nbytes == [88, 88, 88]
    assert (
        _is_cut(layers.tied[0], (0, 1)) and not _is_cut(layers.tied[0], (0, 2)) and not _is_cut(layers.tied[0], (1, 1))
    )
