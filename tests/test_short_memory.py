"""Memory that others take amid a step: what stays gives way, and the step goes on to the same result."""

import copy
from types import MappingProxyType

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn

from harmony_lightning import CapacityError, DeviceOutOfMemoryError, EmulatedCluster
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.prepare import Workload
from harmony_lightning.scheduler import make_plan
from harmony_lightning.strategy.planning import Planning
from harmony_lightning.strategy.training import PLAN_FILE

LAYERS = ["net.*", "head"]
NUM_STEPS = 5
TAKEN_IN = 3
"""The step, counted from 1, in which memory is taken: by then much stays."""


class Odd(Chain):
    """Dropout, batch norm and a branch, so that a layer that is run once more must draw and count as before."""

    def __init__(self):
        super().__init__(depth=0)
        blocks = (
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.GELU()) for _ in range(8)
        )
        self.net = nn.Sequential(*blocks)


class Taking(L.Callback):
    """Others take memory as a backward begins, and give it back with the step: all that is free but some bytes of it, or
    so many bytes in each step from then on."""

    def __init__(self, left=1 << 30, again=None):
        self.left, self.again, self.taken, self.num_backwards = left, again, [], 0
        self.plans, self.short = [], []

    def on_before_backward(self, trainer, module, loss):
        self.num_backwards += 1
        engine = trainer.strategy._engine
        if self.num_backwards == TAKEN_IN or (self.again and self.num_backwards > TAKEN_IN):
            with engine.cluster.activate(continues=True):
                for device in engine.cluster.devices:
                    nbytes = max(0, device.memory_bytes - device.allocated_bytes() - self.left)
                    nbytes = min(nbytes, self.again or nbytes)
                    self.taken.append(torch.zeros(nbytes, dtype=torch.uint8, device=device.torch_device))

    def on_train_batch_end(self, trainer, *args):
        self.taken.clear()
        self.plans.append(trainer.strategy.plan)
        self.short.append(trainer.strategy.statistics().short_of_memory)


def fit(module, taking, num_gpus, training=MappingProxyType({}), **options):
    strategy = harmony(num_gpus, "300KiB", layers=LAYERS, **options)
    torch.manual_seed(1)
    trainer(strategy, callbacks=[taking], limit_train_batches=NUM_STEPS, **training).fit(module, loader(8))
    return strategy


@pytest.mark.parametrize(
    ("num_gpus", "left", "options"),
    [
        (1, 1 << 10, {}),
        (2, 8 << 10, {}),
        (2, 12 << 10, {"mode": "dp", "one_layer_per_pack": True}),
        (2, 8 << 10, {"stash": "device"}),
        (1, 4 << 10, {"stash": "host"}),
    ],
)
def test_backward_goes_on_when_others_take_memory(num_gpus, left, options, caplog):
    torch.manual_seed(0)
    module = Odd()
    undisturbed = copy.deepcopy(module)
    taking = Taking(left)
    fit(module, taking, num_gpus, **options)
    assert "what was to stay on GPUs had to go" in caplog.text
    fit(undisturbed, Taking(), num_gpus, **options)
    assert same_weights(module, undisturbed)
    # It stays again behind the next step, which is measured, in less memory.
    assert taking.plans[TAKEN_IN].resident == () and taking.plans[-1].resident != ()
    assert taking.plans[-1].memory_bytes == int(0.8 * taking.plans[0].memory_bytes)
    assert taking.short == [0, 0, 1, 1, 1]


def test_memory_that_no_giving_way_makes_is_an_error(caplog):
    module = Odd()
    with pytest.raises(DeviceOutOfMemoryError, match="out of memory") as caught:
        fit(module, Taking(0), 2, mode="dp", one_layer_per_pack=True, stash="host")
    assert any(note.startswith("harmony: ") for note in caught.value.__notes__)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize(("stash", "training"), [("auto", {"accumulate_grad_batches": 2}), ("device", {})])
def test_when_others_take_memory_in_each_step_the_plan_is_made_again_once(stash, training, caplog):
    """More than the plan of the first step has to spare: steps behind the first short one would die of that."""
    torch.manual_seed(0)
    module = Odd()
    undisturbed = copy.deepcopy(module)
    taking = Taking(1 << 10, again=150 << 10)
    fit(module, taking, 1, training, stash=stash)
    told = [message for message in caplog.messages if "had to go" in message]
    assert len(told) == 1 and "had to go; planned again with 240 KiB per GPU, not 300 KiB" in told[0]
    assert taking.short == [0, 0, 1, 1, 1]
    assert len(taking.plans[-1].packs) > len(taking.plans[0].packs)
    fit(undisturbed, Taking(), 1, training, stash=stash)
    assert same_weights(module, undisturbed)


class Hungry(Odd):
    """Code between layers makes something large in one of the steps."""

    def __init__(self, needs_in, kib):
        super().__init__()
        self.needs_in, self.kib, self.num_steps = needs_in, kib, 0

    def on_train_batch_start(self, batch, batch_idx):
        self.num_steps += 1

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        x = self.net[:4](inputs)
        if self.num_steps == self.needs_in:
            x = x + torch.zeros(self.kib << 10, dtype=torch.uint8, device=x.device)[0]
        return nn.functional.mse_loss(self.head(self.net[4:](x)).squeeze(1), targets)


@pytest.mark.parametrize(
    ("needs_in", "kib", "smaller", "training"),
    [
        (1, 200, ["240"], {}),
        (1, 225, ["240", "122.9"], {}),
        (4, 200, ["240"], {}),
        (4, 200, ["240"], {"accumulate_grad_batches": 2}),
    ],
)
def test_a_forward_that_does_not_fit_begins_again_under_a_smaller_plan(
    needs_in, kib, smaller, training, caplog, tmp_path
):
    torch.manual_seed(0)
    module = Hungry(needs_in, kib)
    undisturbed = copy.deepcopy(module)
    undisturbed.needs_in = None
    taking = Taking()
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    fit(module, taking, 1, {**training, "logger": logger})
    assert not list(tmp_path.rglob(PLAN_FILE))  # which is for plans that a search has found
    told = [message for message in caplog.messages if "does not fit" in message or "planned again" in message]
    assert len(told) == 2 * len(smaller)
    for failed, again, size in zip(told[::2], told[1::2], smaller, strict=True):
        assert failed.startswith("harmony: the plan does not fit: gpu0 (emulated CUDA) out of memory")
        assert again.startswith(f"harmony: planned again with {size} KiB per GPU, not ")
    assert len(taking.plans[-1].packs) > 4
    assert {(plan.microbatch_size, plan.num_microbatches) for plan in taking.plans} == {(2, 4)}
    fit(undisturbed, Taking(), 1, training)
    assert same_weights(module, undisturbed)


class Needing(Planning):
    """There are plans for no less than a share of the memory."""

    def __init__(self, share, least):
        self._share, self._least = share, least

    def _prepare_for(self, share, workload, mode=None):
        if share < self._least:
            raise CapacityError("no plan is for less")
        decomposition = decompose(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 1)
        return decomposition, make_plan(
            decomposition,
            mode="pp",
            num_devices=1,
            memory_bytes=int(share * 100_000),
            microbatch_size=1,
            num_microbatches=round(100 * share),  # which tells what the plan was made for
            stash="host",
        )


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_where_no_plan_is_for_so_little_memory_it_is_the_one_for_the_least_that_there_is(failures):
    """Not the one for all of it, whose packs are known not to fit."""
    planning = Needing(0.8 ** (3 + failures), least=0.5)
    _, plan = planning._prepare(Workload(microbatch_size=1, num_microbatches=1))
    assert (plan.num_microbatches, plan.memory_bytes) == (51, int(0.8 ** (3 + failures) * 100_000))


class HungryLate(Chain):
    """Code between layers needs memory from the third step on, and most of it in its backward."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        x = self.net[:4](inputs)
        if self.trainer.global_step >= 2:
            x = nn.functional.gelu(x.repeat(1, 64)).unflatten(1, (64, WIDTH)).mean(1)
        return nn.functional.mse_loss(self.head(self.net[4:](x)).squeeze(1), targets)


@pytest.mark.parametrize(
    ("num_gpus", "kib", "options"),
    [
        (1, 186, {}),
        (1, 192, {"stash": "device"}),
        (1, 204, {}),  # all weights were to stay
        (2, 150, {"mode": "dp"}),
    ],
)
def test_backward_of_code_between_layers_goes_on_when_memory_is_short(num_gpus, kib, options):
    """What stays and sums of gradients go, and the operation that lacked memory is called again."""
    fits = []
    for memory in (f"{kib}KiB", "1MiB"):
        strategy = harmony(num_gpus, memory, **options)
        torch.manual_seed(0)
        module = HungryLate()
        trainer(strategy, limit_train_batches=4).fit(module, loader(8))
        fits.append((module, strategy.statistics().short_of_memory))
    (ours, num_short), (roomy, none_short) = fits
    assert same_weights(ours, roomy)
    assert num_short > 0 and none_short == 0


class _Product(torch.autograd.Function):
    """One of which a library of CUDA may find no room for its handle."""

    @staticmethod
    def forward(ctx, x, library):
        ctx.library = library
        library.called("forward")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.library.called("backward")
        return gradient.clone(), None


class Library:
    """Fails once: at the n-th call in a direction."""

    def __init__(self, direction=None, fails_at=0):
        self.direction, self.left = direction, fails_at

    def called(self, direction):
        if direction == self.direction:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    def __deepcopy__(self, memo):
        return self


class OfLibrary(nn.Module):
    def __init__(self, library):
        super().__init__()
        self.linear, self.library = nn.Linear(WIDTH, WIDTH), library

    def forward(self, x):
        return _Product.apply(self.linear(x), self.library)


def trained_with(library, *callbacks):
    torch.manual_seed(0)
    module = Chain()
    module.net[3] = OfLibrary(library)
    strategy = harmony(1, "200KiB", layers=LAYERS)
    trainer(strategy, callbacks=list(callbacks), limit_train_batches=4).fit(module, loader(8))
    return module, strategy.statistics().short_of_memory


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_library_that_finds_no_memory_for_itself_finds_it_when_what_stays_has_gone(direction, monkeypatch):
    """And torch has given it back: these libraries ask the driver."""
    trims, library = [], Library(direction, fails_at=10)
    monkeypatch.setattr(EmulatedCluster, "trim_device_memory", lambda self: trims.append(library.left))
    module, num_short = trained_with(library)
    undisturbed, _ = trained_with(Library())
    assert num_short == 1 and 0 in trims  # it has failed, and was not called again yet
    assert same_weights(module, undisturbed)


class BetweenLayers(L.Callback):
    def __init__(self, library):
        self.library = library

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """By now something stays."""
        if batch_idx == 2:
            engine = trainer.strategy._engine
            with engine.cluster.activate(continues=True):
                engine.state.memory.with_room(engine.cluster.devices[0], lambda: self.library.called("forward"))


def test_so_it_does_for_code_between_layers():
    library = Library("forward", fails_at=1)
    trained_with(Library(), BetweenLayers(library))
    assert library.left < 0


class Drawing(Chain):
    """Code between layers draws random numbers for what there may be no room."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        x = self.net[:4](inputs)
        if self.trainer.global_step >= 2:
            x = nn.functional.dropout(x.repeat(1, 64), 0.3).unflatten(1, (64, WIDTH)).mean(1)
        return nn.functional.mse_loss(self.head(self.net[4:](x)).squeeze(1), targets)


@pytest.mark.parametrize("kib", [204, 240, 288])
def test_what_is_drawn_between_layers_is_drawn_once(kib):
    """The function that lacked memory behind its draw is called again, and draws the same numbers."""
    fits = []
    for memory in (f"{kib}KiB", "1MiB"):
        strategy = harmony(1, memory)
        torch.manual_seed(0)
        module = Drawing()
        trainer(strategy, limit_train_batches=4).fit(module, loader(8))
        fits.append((module, strategy.statistics().short_of_memory))
    (ours, num_short), (roomy, none_short) = fits
    assert same_weights(ours, roomy)
    assert num_short > 0 and none_short == 0
