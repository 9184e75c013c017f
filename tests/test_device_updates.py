"""Packs that are updated on devices: what the host would have made of them to the bit, and finished for all who look."""

import dataclasses

import lightning as L
import pytest
import torch
from chain import Chain, assert_same_optimizers, loader, same_weights, trainer
from torch.optim import lr_scheduler

from harmony_lightning import EmulatedCluster, HarmonyStrategy

NUM_STEPS = 4
MEMORY = "400KiB"


def planned(which=lambda index: True, **options):
    """The plan that is made for the chain, with some of its packs updated on devices."""
    strategy = HarmonyStrategy(
        microbatch_size=2, cluster=EmulatedCluster(2, MEMORY), one_layer_per_pack=True, **options
    )
    torch.manual_seed(0)
    trainer(strategy, limit_train_batches=1).fit(Chain(depth=6), loader(8))
    packs = strategy.plan.packs
    packs = [dataclasses.replace(pack, update="device" if which(i) else "host") for i, pack in enumerate(packs)]
    assert len(packs) > 2
    return dataclasses.replace(strategy.plan, packs=tuple(packs))


def on_devices(which=lambda index: True, **options):
    return HarmonyStrategy(
        plan=planned(which, **options), microbatch_size=2, cluster=EmulatedCluster(2, MEMORY), **options
    )


def fit(strategy=None, make=Chain, accumulate=1, num_steps=NUM_STEPS, ckpt_path=None, max_steps=-1, **options):
    torch.manual_seed(0)
    module = make(depth=6)
    parts = (1 if strategy else 4) * accumulate
    fitted = trainer(
        strategy or "auto",
        limit_train_batches=num_steps * parts,
        **({"accumulate_grad_batches": parts} if parts > 1 else {}),
        **options,
    )
    fitted.fit(module, loader(8 if strategy else 2, 80), ckpt_path=ckpt_path)
    return module, fitted


def assert_same(ours, plain):
    assert same_weights(ours[0], plain[0])
    assert_same_optimizers(ours[1].optimizers, plain[1].optimizers)


def updates(strategy):
    return strategy.statistics().updates_on_devices


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "foreach": (torch.optim.Adam, {"foreach": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "ASGD": (torch.optim.ASGD, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_the_host(name):
    kind, options = OPTIMIZERS[name]

    def make(depth):
        return Chain(depth=depth, optimizer=kind, **options)

    strategy = on_devices()
    assert_same(fit(strategy, make), fit(make=make))
    num_packs = len(strategy.plan.packs)
    assert updates(strategy) == (NUM_STEPS - 1) * num_packs  # the first step makes the states
    assert max(strategy.statistics().peak_device_bytes) <= 400 * 1024
