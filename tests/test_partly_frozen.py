"""Packs of which only some weights train (adapters): what is frozen and still there does not come again."""

import contextlib
import copy
import dataclasses
import itertools
from collections import Counter

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from test_frozen import LowRank
from test_precision import with_precision
from test_residency import AMPLE, NUM_STEPS, Looking
from weight_writes import WAYS, writer_of

from harmony_lightning.runtime.weights.casts import Casts

LAYERS = ["net.*", "head"]
BATCH = 8


class Adapted(Chain):
    """A chain of frozen blocks with adapters, but for one; its head is frozen but for the bias."""

    def __init__(self, without=None, **options):
        super().__init__(**options)
        self.requires_grad_(False)
        for index, block in enumerate(self.net):
            if index != without:
                block[0] = LowRank(block[0])
        self.head.bias.requires_grad_()

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], **self.options)


def twins(make=Adapted, **options):
    torch.manual_seed(0)
    module = make(**options)
    return module, copy.deepcopy(module)


def fit(ours, reference, num_gpus=2, memory=AMPLE, *, parts=4, precision="32-true", callback=None, **options):
    """Both beside each other, on the same microbatches; what the strategy has copied in each step."""
    looking, batches = Looking(), options.pop("batches", NUM_STEPS)
    strategy = harmony(num_gpus, memory, BATCH // parts, one_layer_per_pack=True, layers=LAYERS, **options)
    callbacks = [[] if callback is None else [callback()] for _ in range(2)]
    steps = {"limit_train_batches": batches, **with_precision(precision)}
    trainer(strategy, callbacks=[*callbacks[0], looking], **steps).fit(ours, loader(BATCH))
    steps["limit_train_batches"] *= parts
    trainer(callbacks=callbacks[1], accumulate_grad_batches=parts, **steps).fit(reference, loader(BATCH // parts))
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


@pytest.mark.parametrize("settles", [False, True])
def test_frozen_weights_are_not_cast_again(settles, monkeypatch):
    """Neither behind updates that are in flight nor behind a step after which anybody may have looked at weights."""
    cast, original = Counter(), Casts._cast

    def noting(self, pack, names):
        cast.update(names)
        original(self, pack, names)

    monkeypatch.setattr(Casts, "_cast", noting)
    ours, _ = twins()
    strategy = harmony(2, AMPLE, one_layer_per_pack=True, layers=LAYERS)
    steps = {"limit_train_batches": NUM_STEPS, **with_precision("bf16-mixed")}
    trainer(strategy, callbacks=[Looking()] if settles else [], **steps).fit(ours, loader(BATCH))
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert {cast[name] for name in cast.keys() - trained} == {2}  # slots have changed, which lets updates settle
    assert min(cast[name] for name in trained) >= NUM_STEPS - 1


def frozen_weight(module):
    layer = module.net[2][0]
    return layer.base.weight if isinstance(layer, LowRank) else layer.weight


class Writing(L.Callback):
    """Writes a frozen weight once, in a hook between two steps or around the optimizer's."""

    def __init__(self, hook, way):
        self.way, self.is_done = way, False
        setattr(self, hook, self.write)

    def on_train_start(self, trainer, module):
        self.write_weight = writer_of(frozen_weight(module), module, self.way)

    def write(self, trainer, *args):
        if trainer.global_step >= 3 and not self.is_done:
            self.is_done = True
            self.write_weight()


AROUND_STEP = itertools.product(["on_after_backward", "on_before_optimizer_step"], ["data", "numpy"])


@pytest.mark.parametrize(("hook", "way"), [*itertools.product(["on_train_batch_end"], WAYS), *AROUND_STEP])
@pytest.mark.parametrize("without", [None, 2], ids=["partly frozen", "all frozen"])
def test_frozen_weights_that_somebody_writes_come_again(hook, way, without):
    ours, reference = twins(without=without)
    looking = fit(ours, reference, parts=1, callback=lambda: Writing(hook, way))
    assert same_weights(ours, reference)
    assert max(looking.each("swap_in_bytes")[3:]) >= frozen_weight(ours).nbytes


class WritingFirst(L.Callback):
    """Writes a weight of the first block in front of backward, which has no use for it."""

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step == 3:
            module.net[0][0].base.weight.data.mul_(1.5)


def test_frozen_weights_may_be_written_in_front_of_backward():
    ours, reference = twins()
    fit(ours, reference, parts=1, callback=WritingFirst)
    assert same_weights(ours, reference)


class Averaging(L.Callback):
    """Looks at what trains behind each step."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *args):
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.data * 0.5 for name, p in trained.items()}


def test_whoever_looks_at_what_trains_leaves_the_rest_where_it_is():
    ours, reference = twins()
    looking = fit(ours, reference, callback=Averaging)
    assert same_weights(ours, reference)
    assert looking.each("swap_in_bytes")[2:] == [nbytes(ours, trains=True)] * (NUM_STEPS - 2)


class LookingAtOne(L.Callback):
    """Looks at a weight in front of each step."""

    def __init__(self, hook, name):
        self.name = name
        setattr(self, hook, self.look)

    def look(self, trainer, module, *args):
        self.norm = module.get_parameter(self.name).detach().norm()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("name", ["net.2.0.base.weight", "net.2.0.up.weight"])
def test_whoever_looks_at_a_frozen_weight_has_those_come_again_that_lie_beside_it(name, hook, precision):
    ours, reference = twins()
    looking = fit(ours, reference, callback=lambda: LookingAtOne(hook, name), precision=precision)
    assert same_weights(ours, reference)
    plan = looking.plans[-1]
    (seen,) = [pack for pack in plan.packs if name in pack.parameters]
    again = 0 if ours.get_parameter(name).requires_grad else seen.nbytes - seen.trained_nbytes
    assert looking.each("swap_in_bytes")[3:] == [plan.swap_in_bytes_per_step + again] * (NUM_STEPS - 3)
    assert again < nbytes(ours, trains=False) // 4


def test_whoever_looks_at_what_is_being_updated_leaves_frozen_weights_where_they_are():
    """Nobody looks behind steps, so that updates are on their way when the next one begins."""
    swapped = []
    for batches in (4, 5):
        strategy = harmony(2, AMPLE, one_layer_per_pack=True, layers=LAYERS)
        look = LookingAtOne("on_train_batch_start", "net.2.0.up.weight")
        trainer(strategy, limit_train_batches=batches, callbacks=[look]).fit(twins()[0], loader(BATCH))
        swapped.append(strategy.statistics().swap_in_bytes)
    assert swapped[1] - swapped[0] == strategy.plan.swap_in_bytes_per_step


class Tied(Adapted):
    """The frozen weight of one block is that of another, which borrows it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[5][0].base.weight = self.net[1][0].base.weight


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_frozen_weight_of_two_packs_stays_in_both(precision):
    ours, reference = twins(Tied)
    looking = fit(ours, reference, precision=precision)
    assert same_weights(ours, reference)
    assert looking.each("swap_in_bytes")[3:] == [looking.plans[-1].swap_in_bytes_per_step] * (NUM_STEPS - 3)
    assert looking.plans[-1].swap_in_bytes_per_step == sum(pack.trained_nbytes for pack in looking.plans[-1].packs)


class Failing(Adapted):
    """A microbatch of the fourth step fails; the step is left out."""

    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == 14:
            raise ValueError("this one")
        return super().training_step(batch, batch_idx)


def test_a_step_that_fails_leaves_weights_that_the_next_run_trains_on():
    ours, reference = twins(Failing)
    for module, parts in ((ours, 1), (reference, 4)):
        for fails in (True, False):
            strategy = harmony(2, AMPLE, one_layer_per_pack=True, layers=LAYERS) if parts == 1 else "auto"
            run = trainer(strategy, accumulate_grad_batches=parts, limit_train_batches=5 * parts)
            with pytest.raises(ValueError, match="this one") if fails else contextlib.nullcontext():
                run.fit(module, loader(BATCH // parts))
    assert same_weights(ours, reference)
