"""Errors in user code: they reach the user as they are, soon, and leave everything usable."""

import contextlib
import gc
import re
import threading
import time

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn

from harmony_lightning import DeviceOutOfMemoryError
from harmony_lightning.errors import in_one_line

pytestmark = pytest.mark.usefixtures("devices")

NUM_MICROBATCHES = 4
NOTE = re.compile(r"harmony: .+, pack (\d+), microbatch (\d+), gpu([01])")


class Broken(RuntimeError):
    """An error that nobody else raises."""


class Passing(nn.Linear):
    """A layer without effect that can fail in either direction."""

    def forward(self, x, breaks=None):
        if breaks == "forward":
            raise Broken("in a layer")
        if breaks == "backward" and x.requires_grad:
            x.register_hook(fail)
        if breaks == "memory":
            torch.empty(1 << 20, device=x.device)
        if breaks == "interrupt":
            raise KeyboardInterrupt
        return x + 0 * super().forward(x)


def fail(gradient):
    raise Broken("in a hook")


class Fragile(Chain):
    """Fails at a place of choice, in one microbatch of the second minibatch, and again if that is run again."""

    def __init__(self):
        super().__init__(depth=6)
        self.passing = Passing(WIDTH, WIDTH, bias=False)
        self.breaks = None
        self.in_microbatch = 0
        self.microbatch = -1
        self.entered = self.left = 0

    def on_train_batch_start(self, batch, batch_idx):
        self.microbatch = -1

    def training_step(self, batch, batch_idx):
        self.microbatch += 1
        breaks = self.breaks if batch_idx == 1 and self.microbatch % NUM_MICROBATCHES == self.in_microbatch else None
        with self.watched():
            inputs, targets = batch
            x = self.net[:3](inputs)
            if breaks == "between":
                raise Broken("between layers")
            if breaks == "interrupt between":
                raise KeyboardInterrupt
            if breaks == "tensor hook":
                x.register_hook(fail)
            if breaks == "memory between":
                x = torch.cat([x] * 100_000)
            x = self.net[3:](self.passing(x, breaks))
            if breaks == "end":
                raise Broken("at the end")
            return nn.functional.mse_loss(self.head(x).squeeze(1), targets)

    @contextlib.contextmanager
    def watched(self):
        self.entered += 1
        try:
            with torch.autograd.profiler.record_function("user"), torch.enable_grad():
                yield
        finally:
            self.left += 1


def module_that(breaks, in_microbatch=0, kind=Fragile):
    torch.manual_seed(0)
    module = kind()
    module.breaks, module.in_microbatch = breaks, in_microbatch
    return module


def fit_and_fail(module, error, strategy=None):
    """Fit until the error; returns it with the strategy's cluster."""
    strategy = strategy or harmony(2)
    began = time.monotonic()
    with pytest.raises(error) as caught:
        trainer(strategy, limit_train_batches=3).fit(module, loader(8))
    assert time.monotonic() - began < 20  # nobody waits for somebody who has left
    return caught.value, strategy._emulated


def notes_of(error):
    return [note for note in getattr(error, "__notes__", ()) if note.startswith("harmony: ")]


def assert_nothing_is_left_behind(module, cluster):
    assert all(inner._compiled_call_impl is None for inner in module.modules())
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    assert all(parameter.device == torch.device("cpu") for parameter in module.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    # After an error in backward torch keeps what was queued until the thread's next backward.
    torch.ones((), requires_grad=True).mul(1).backward()
    gc.collect()
    assert [device.allocated_bytes() for device in cluster.devices] == [0, 0]


WHERE = {
    "between": ("between layers", "in the user's code between layers"),
    "end": ("at the end", "in the user's code between layers"),
    "forward": ("in a layer", "in layer passing"),
    "backward": ("in a hook", "in backward of layer passing"),
    "tensor hook": ("in a hook", "in backward of"),
}


@pytest.mark.parametrize("in_microbatch", range(NUM_MICROBATCHES))
@pytest.mark.parametrize("breaks", WHERE)
def test_the_user_s_error_arrives_with_its_place(breaks, in_microbatch):
    module = module_that(breaks, in_microbatch)
    error, cluster = fit_and_fail(module, Broken)
    text, place = WHERE[breaks]
    assert type(error) is Broken
    assert error.args == (text,)
    (note,) = notes_of(error)
    assert place in note
    pack, microbatch, gpu = map(int, NOTE.fullmatch(note).groups())
    assert microbatch == in_microbatch
    assert gpu == pack % 2
    del error
    assert_nothing_is_left_behind(module, cluster)


@pytest.mark.parametrize(
    ("breaks", "place"), [("memory", "in layer passing"), ("memory between", "in the user's code between layers")]
)
def test_out_of_memory_arrives_as_such(breaks, place):
    module = module_that(breaks, in_microbatch=2)
    error, cluster = fit_and_fail(module, DeviceOutOfMemoryError)
    assert "out of memory" in str(error)
    (note,) = notes_of(error)
    assert place in note
    gpu = NOTE.fullmatch(note)[3]
    assert str(error).startswith(f"gpu{gpu} ")
    del error
    assert_nothing_is_left_behind(module, cluster)


@pytest.mark.parametrize("in_microbatch", [0, NUM_MICROBATCHES - 1])
@pytest.mark.parametrize("breaks", ["interrupt", "interrupt between"])
def test_a_keyboard_interrupt_ends_the_run(breaks, in_microbatch):
    """Lightning turns it into an exit of the process."""
    module = module_that(breaks, in_microbatch)
    cluster = fit_and_fail(module, (KeyboardInterrupt, SystemExit))[1]
    assert_nothing_is_left_behind(module, cluster)


def train_reference(module, num_minibatches):
    num_microbatches = NUM_MICROBATCHES * num_minibatches
    trainer(accumulate_grad_batches=NUM_MICROBATCHES, limit_train_batches=num_microbatches).fit(module, loader(2))
    return module


@pytest.mark.parametrize("breaks", [*WHERE, "memory", "interrupt"])
def test_each_weight_is_that_of_before_or_behind_the_step_and_fit_works_again(breaks):
    """An error in backward may find the weights of later packs updated already."""
    module = module_that(breaks, in_microbatch=1)
    before, behind = (train_reference(module_that(None), num_minibatches) for num_minibatches in (1, 2))
    fit_and_fail(module, (Broken, DeviceOutOfMemoryError, KeyboardInterrupt, SystemExit))
    triples = zip(module.parameters(), before.parameters(), behind.parameters(), strict=True)
    is_old = [torch.equal(mine, old) for mine, old, new in triples if not torch.equal(mine, new)]
    assert all(is_old)
    if breaks not in ("backward", "tensor hook"):
        assert same_weights(module, before)
        module.breaks = None
        trainer(harmony(2), limit_train_batches=3).fit(module, loader(8))
        assert same_weights(module, train_reference(before, 3))
    else:
        module.breaks = None
        trainer(harmony(2), limit_train_batches=3).fit(module, loader(8))
        assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("breaks", ["between", "forward", "end"])
@pytest.mark.parametrize("in_microbatch", [0, 2])
def test_finally_blocks_and_context_managers_of_parked_microbatches_run(breaks, in_microbatch):
    module = module_that(breaks, in_microbatch)
    fit_and_fail(module, Broken)
    assert module.entered == module.left > NUM_MICROBATCHES


def test_an_error_in_the_answer_to_the_end_does_not_hide_the_first():
    class Answering(Fragile):
        @contextlib.contextmanager
        def watched(self):
            try:
                yield
            finally:
                if self.left >= 0 and self.breaks is not None:
                    self.left += 1
                    if self.left > NUM_MICROBATCHES + 1:
                        raise ValueError("while it was ended")

    module = module_that("forward", 3, Answering)
    error, cluster = fit_and_fail(module, Broken)
    assert len(notes_of(error)) == 1
    assert module.left == 2 * NUM_MICROBATCHES
    del error
    assert_nothing_is_left_behind(module, cluster)


def test_layers_may_be_called_in_finally_blocks():
    """By the microbatch that fails, and by those that are ended where they wait."""
    called = []

    class Recovering(Fragile):
        def training_step(self, batch, batch_idx):
            try:
                return super().training_step(batch, batch_idx)
            finally:
                if batch_idx == 1:
                    called.append(len(self.passing(batch[0])))

    module = module_that("between", 3, Recovering)
    error, cluster = fit_and_fail(module, Broken)
    assert error.args == ("between layers",)
    assert called == [2] * NUM_MICROBATCHES
    del error
    assert_nothing_is_left_behind(module, cluster)


@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("stash", ["host", "device"])
def test_modes_and_stashes_fail_alike(mode, stash):
    module = module_that("forward", in_microbatch=1)
    error, cluster = fit_and_fail(module, Broken, harmony(2, mode=mode, stash=stash))
    (note,) = notes_of(error)
    assert ", microbatch 1, " in note
    del error
    assert_nothing_is_left_behind(module, cluster)


def test_an_error_on_the_host_worker_arrives_too():
    """Updates run there."""

    threads = []

    class Failing(torch.optim.Optimizer):
        def __init__(self, parameters, lr):
            super().__init__(parameters, {"lr": lr})

        def step(self, closure=None):
            loss = closure() if closure is not None else None
            if any(p.grad is not None and len(p) == WIDTH for group in self.param_groups for p in group["params"]):
                threads.append(threading.current_thread().name)
                raise Broken("in the optimizer")
            return loss  # of the strategy's trial with tiny weights: separable

    torch.manual_seed(0)
    module = Chain(optimizer=Failing)
    before = [parameter.clone() for parameter in module.parameters()]
    error, cluster = fit_and_fail(module, Broken)
    assert error.args == ("in the optimizer",)
    assert threads == ["harmony-host-worker"]
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    del error
    assert_nothing_is_left_behind(module, cluster)


@pytest.mark.parametrize("function", ["validate", "predict"])
def test_evaluation_fails_alike(function):
    class Failing(Chain):
        def step(self, batch):
            return super().step(batch) + passing(self.head.bias.expand(2, WIDTH), "forward").mean()

        def predict_step(self, batch, batch_idx):
            return self.step(batch)

    torch.manual_seed(0)
    module = Failing()
    module.passing = passing = Passing(WIDTH, WIDTH)
    strategy = harmony(2)
    options = {"verbose": False} if function == "validate" else {}
    with pytest.raises(Broken) as caught:
        getattr(trainer(strategy), function)(module, loader(8), **options)
    (note,) = notes_of(caught.value)
    assert "in layer passing" in note
    assert "microbatch 0" in note
    del caught
    assert_nothing_is_left_behind(module, strategy._emulated)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no", "no"),
        ("", "RuntimeError"),
        ("\n CUDA error\nCompile with more", "CUDA error"),
        ("Net(\n  (a): B(\n  )\n) takes 1 argument", "Net(...) takes 1 argument"),
        ("Net(", "Net("),
        ("Errors in loading:\n\tMissing key: a", "Errors in loading: Missing key: a"),
    ],
)
def test_an_error_in_one_line(said, told):
    assert in_one_line(RuntimeError(said)) == told
