"""Packs of which only some weights train (adapters): what is frozen and still there does not come again."""

import copy
import dataclasses

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from test_frozen import LowRank
from test_precision import with_precision
from test_residency import AMPLE, NUM_STEPS, Looking

LAYERS = ["net.*", "head"]
BATCH = 8


class Adapted(Chain):
    """A chain of frozen blocks with adapters; its head is frozen but for the bias."""

    def __init__(self, **options):
        super().__init__(**options)
        self.requires_grad_(False)
        for block in self.net:
            block[0] = LowRank(block[0])
        self.head.bias.requires_grad_()

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], **self.options)


def twins(make=Adapted, **options):
    torch.manual_seed(0)
    module = make(**options)
    return module, copy.deepcopy(module)


def fit(ours, reference, num_gpus=2, memory=AMPLE, *, precision="32-true", callbacks=(), batches=NUM_STEPS, **options):
    """Both beside each other, on the same microbatches; what the strategy has copied in each step."""
    looking = Looking()
    strategy = harmony(num_gpus, memory, one_layer_per_pack=True, layers=LAYERS, **options)
    steps = {"limit_train_batches": batches, **with_precision(precision)}
    theirs = {**steps, "limit_train_batches": 4 * batches, "accumulate_grad_batches": 4}
    trainer(strategy, callbacks=[*callbacks, looking], **steps).fit(ours, loader(BATCH))
    trainer(callbacks=copy.deepcopy(list(callbacks)), **theirs).fit(reference, loader(2))
    return looking


def nbytes(module, *, trains, width=4):
    return sum(width * p.numel() for p in module.parameters() if p.requires_grad is trains)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("num_gpus", "mode"), [(1, "pp"), (2, "pp"), (3, "pp"), (2, "dp"), (2, "mixed")])
def test_where_all_stays_only_what_trains_comes_in(num_gpus, mode, precision):
    ours, reference = twins(optimizer=torch.optim.SGD)
    looking = fit(ours, reference, num_gpus, mode=mode, precision=precision)
    plan = looking.plans[-1]
    trained = sum(len(plan.visitors(p)) * pack.trained_nbytes for p, pack in enumerate(plan.packs))
    assert trained == plan.swap_in_bytes_per_step < nbytes(ours, trains=False) // 4
    assert trained >= nbytes(ours, trains=True) // (2 if precision == "bf16-mixed" else 1)
    # Slots change behind the first step, and behind the second one if weights are narrow from then on.
    assert looking.each("swap_in_bytes")[3:] == [trained] * (NUM_STEPS - 3)
    if mode == "pp":
        assert same_weights(ours, reference)
    else:  # devices' sums of gradients are added up
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_frozen_weights_of_packs_that_take_turns_are_found_where_backward_ends(num_gpus, prefetch):
    """A device's first packs come last in backward, and first in the next step."""
    plan = fit(*twins(), num_gpus, mode="pp", batches=1).plans[0]
    plan = dataclasses.replace(plan, prefetch=prefetch)
    ours, reference = twins()
    first, *others = fit(ours, reference, num_gpus, plan=plan).each("swap_in_bytes")
    assert same_weights(ours, reference)
    ends = [plan.packs[i] for d in range(num_gpus) for i in range(d, len(plan.packs), num_gpus)[: 1 + prefetch]]
    found = sum(pack.nbytes - pack.trained_nbytes for pack in ends)
    assert others == [first - found] * (NUM_STEPS - 1) and found >= 4 * WIDTH * WIDTH
    assert (plan.swap_in_bytes(is_first=True), plan.swap_in_bytes_per_step) == (first, first - found)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_where_devices_update_what_trains_nothing_comes(precision):
    """Beside the weights that the host has to make states of first."""
    swapped = []
    for batches in (4, 5):
        ours, reference = twins()
        strategy = harmony(2, AMPLE, one_layer_per_pack=True, layers=LAYERS, update="device", stash="device")
        trainer(strategy, limit_train_batches=batches, **with_precision(precision)).fit(ours, loader(BATCH))
        plain = trainer(accumulate_grad_batches=4, limit_train_batches=4 * batches, **with_precision(precision))
        plain.fit(reference, loader(2))
        assert same_weights(ours, reference) and strategy.statistics().updates_on_devices
        swapped.append(strategy.statistics().swap_in_bytes)
    assert swapped[1] - swapped[0] == strategy.plan.swap_in_bytes_per_step == 0


class Writing(L.Callback):
    """Writes a frozen weight once, between two steps or within one."""

    def __init__(self, hook, way):
        self.way, self.calls, self.view = way, 0, None
        setattr(self, hook, self._call)

    def on_train_start(self, trainer, module):
        self.view = {
            "a view from before": lambda: module.net[2][0].base.weight.view(-1),
            "numpy": lambda: module.net[2][0].base.weight.detach().numpy(),
        }.get(self.way, lambda: None)()

    @torch.no_grad()
    def _call(self, trainer, module, *args):
        self.calls += 1
        weight = module.net[2][0].base.weight
        if trainer.global_step != 2 or weight.grad_fn is not None or self.calls < 0:
            return
        self.calls = -1000
        if self.way == "in place":
            weight.mul_(1.5)
        elif self.way == "data":
            weight.data.view(-1)[5:].mul_(1.5)
        elif self.way == "exchange":
            weight.data = weight.data * 1.5
        elif self.way == "state dict":
            state = module.state_dict()
            module.load_state_dict({**state, "net.2.0.base.weight": state["net.2.0.base.weight"] * 1.5})
        elif self.way == "a view from before":
            self.view.mul_(1.5)
        elif self.way == "numpy":
            self.view *= 1.5
