"""The runtime waits for what it must, and the race check notices each wait that is left out."""

import contextlib

import torch
from chain import WIDTH, Chain, loader, trainer
from torch import nn

from harmony_lightning import EmulatedCluster, HarmonyStrategy, RaceError


class _Tied(Chain):
    """Glue uses a layer's weight once more."""

    def step(self, batch):
        inputs, targets = batch
        inputs = nn.functional.linear(inputs, self.net[0][0].weight)
        return nn.functional.mse_loss(self.head(self.net(inputs)).squeeze(1), targets)


class _Manual(Chain):
    """Differentiates by itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.step(batch))
        optimizer.step()


class _InOnePiece(Chain):
    """Differentiates across packs by itself, and then not all that it has used."""

    def training_step(self, batch, batch_idx):
        self.step(batch).backward()
        with torch.no_grad():
            self.step(batch)
        self.net[0](batch[0]).mean().backward()
        return super().training_step(batch, batch_idx)


class _Broken(Exception):
    pass


class _Breaking(torch.optim.Optimizer):
    """Fails on the host worker, which then drops what else has been submitted."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        if any(p.grad is not None and len(p) == WIDTH for group in self.param_groups for p in group["params"]):
            raise _Broken
        return loss  # of the strategy's trial with tiny weights


class _BreakingChain(Chain):
    def __init__(self, **options):
        super().__init__(optimizer=_Breaking, **options)


SCENARIOS = {
    "pp": (Chain, {"mode": "pp"}),
    "buffers go round": (Chain, {"mode": "pp", "depth": 14}),
    "dp": (Chain, {"mode": "dp"}),
    "stash on the device": (Chain, {"stash": "device"}),
    "stash on the host": (Chain, {"stash": "host"}),
    "tied": (_Tied, {}),
    "manual": (_Manual, {}),
    "update fails": (_BreakingChain, {}),
    "updates on devices": (Chain, {"update": "device"}),
    "updates stay": (Chain, {"update": "device", "memory": "1MiB"}),
    "narrow pp": (Chain, {"mode": "pp"}),
    "narrow dp": (Chain, {"mode": "dp"}),
    "narrow, in one piece": (_InOnePiece, {}),
    "narrow, in one go": (Chain, {"gradient_wire": "half"}),
    "narrow dp, in one go": (Chain, {"gradient_wire": "half", "mode": "dp"}),
    "narrow, first ones stay": (Chain, {"update": "first", "memory": "500KiB"}),
    "narrow, masters leave": (Chain, {"update": "device"}),
}
"""Those with narrow weights learn in their first step that they have some, and so take more."""


def run(scenario, ignored=None):
    """Three steps of training, validation and prediction; returns where the runtime waited."""
    make, options = SCENARIOS[scenario]
    options = dict(options)
    torch.manual_seed(0)
    module = make(depth=options.pop("depth", 6))
    cluster = EmulatedCluster(2, options.get("memory", "500KiB" if make in (_Tied, _Manual) else "230KiB"))
    cluster.machine.waits, cluster.machine.ignored = {}, ignored
    strategy = HarmonyStrategy(microbatch_size=2, cluster=cluster, **options)
    steps = {"limit_train_batches": 3}
    if scenario.startswith("narrow"):
        steps = {"limit_train_batches": 4, "precision": "bf16-mixed"}
        steps |= {"gradient_clip_val": 0.1} if scenario.endswith("in one go") else {}
    with_harmony = trainer(strategy, limit_val_batches=1, limit_predict_batches=1, **steps)
    with contextlib.suppress(_Broken):
        with_harmony.fit(module, loader(8, 32), loader(8, 8))
    with_harmony.predict(module, loader(8, 8))
    return cluster.machine.waits


def test_every_wait_that_is_left_out_is_noticed():
    places = {}
    for scenario in SCENARIOS:
        for place in run(scenario):
            places.setdefault(place, []).append(scenario)
    assert len({place.split(":")[0] for place in places}) >= 5, places
    unnoticed = []
    for place, scenarios in places.items():
        for scenario in scenarios:
            try:
                run(scenario, ignored=place)
            except RaceError:
                break
        else:
            unnoticed.append(place)
    assert not unnoticed
