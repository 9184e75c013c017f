"""User code that takes gradients, or weights, in unusual ways: equal to plain training, or refused aloud."""

import copy
import random

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_numbers, same_weights, trainer
from torch import nn

from harmony_lightning import HarmonyStrategy, UnsupportedError

pytestmark = pytest.mark.usefixtures("devices")


def both(kind, strategy, microbatch_size=8, num_batches=2, **options):
    torch.manual_seed(0)
    reference = kind(optimizer=torch.optim.SGD)
    ours = copy.deepcopy(reference)
    parts = 8 // microbatch_size
    trainer(limit_train_batches=num_batches * parts, accumulate_grad_batches=parts, **options).fit(
        reference, loader(microbatch_size)
    )
    trainer(strategy, limit_train_batches=num_batches, **options).fit(ours, loader(8))
    return ours, reference


class TwoWeightsOneGradient(Chain):
    """Autograd hands both shifts the same gradient tensor."""

    def __init__(self, **options):
        super().__init__(**options)
        self.one, self.other = nn.Parameter(torch.zeros(1, WIDTH)), nn.Parameter(torch.zeros(1, WIDTH))

    def step(self, batch):
        inputs, targets = batch
        hidden = self.net(inputs) + (self.one + self.other)
        return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)


@pytest.mark.parametrize("strategy", [lambda: harmony(microbatch_size=2), lambda: HarmonyStrategy(microbatch_size=2)])
def test_weights_that_share_a_gradient_get_it_once_each(strategy):
    ours, reference = both(TwoWeightsOneGradient, strategy(), microbatch_size=2)
    assert same_weights(ours, reference)


class Detaching(nn.Module):
    """Takes no gradient to its second argument."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        return self.linear(x) + y.detach()


class Passed(Chain):
    """A shift that never gets a gradient, which is not a gradient of zero: weights decay with that. It is used once in
    front of the mixing layer's pack, and once in the same segment."""

    def __init__(self, **options):
        super().__init__(**options)
        self.shift = nn.Parameter(torch.ones(WIDTH))
        self.mix = Detaching()

    def step(self, batch):
        inputs, targets = batch
        skipped = self.net(inputs)
        hidden = self.mix(skipped, inputs * self.shift)
        hidden = self.mix(hidden, skipped * self.shift)
        return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)


@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_no_gradient_is_not_a_gradient_of_zero(microbatch_size):
    """Also where clipping by value, which wants some gradient, is given nothing but this weight."""
    torch.manual_seed(0)
    reference = Passed(weight_decay=0.1)
    ours = copy.deepcopy(reference)
    clip = {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value"}
    parts = 8 // microbatch_size
    plain = trainer(limit_train_batches=2 * parts, accumulate_grad_batches=parts, **clip)
    plain.fit(reference, loader(microbatch_size))
    layers = ["net.*", "mix", "head"]  # `mix` detaches within
    strategy = harmony(microbatch_size=microbatch_size, one_layer_per_pack=True, layers=layers)
    fitted = trainer(strategy, limit_train_batches=2, **clip)
    fitted.fit(ours, loader(8))
    assert ours.shift not in fitted.optimizers[0].state
    assert same_weights(ours, reference)


def test_exchanged_memory_of_weights_is_seen():
    """`parameter.data = ...`, as moving averages and flattening utilities do."""

    class Halving(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            for parameter in module.parameters():
                parameter.data = parameter.data * 0.5

    ours, reference = both(Chain, harmony(microbatch_size=8), callbacks=[Halving()])
    assert same_weights(ours, reference)
    assert same_numbers(sorted(ours.losses), sorted(reference.losses))


class Centred(Chain):
    """`buffer.data = ...` within the step, and the same for an attribute, with values from a GPU."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("center", torch.zeros(WIDTH))
        self.last = torch.zeros(WIDTH)

    def step(self, batch):
        inputs, targets = batch
        hidden = self.net(inputs)
        self.center.data = self.center.data * 0.9 + 0.1 * hidden.detach().mean(0)
        self.last.data = hidden.detach().mean(0)
        return nn.functional.mse_loss(self.head(hidden - self.center + 0.1 * self.last).squeeze(1), targets)


def test_exchanged_memory_of_buffers_stays_on_the_host():
    ours, reference = both(Centred, harmony(microbatch_size=8))
    assert same_weights(ours, reference)
    assert ours.losses == reference.losses
    assert (ours.center.device.type, type(ours.center), type(ours.last)) == ("cpu", torch.Tensor, torch.Tensor)


class Adversarial(Chain):
    """Differentiates with respect to its inputs inside the step, which must leave gradients of weights alone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        inputs = inputs.clone().requires_grad_()
        (direction,) = torch.autograd.grad(self.step((inputs, targets)), inputs)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        inputs = (inputs + 0.01 * direction.sign()).detach()
        loss = self.step((inputs, targets))
        self.losses.append(loss.item())
        self.manual_backward(loss)
        optimizer.step()


def test_gradients_of_inputs_only():
    ours, reference = both(Adversarial, harmony())
    assert same_weights(ours, reference)


def test_a_second_derivative_is_refused_not_wrong():
    class Penalised(Adversarial):
        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            inputs = inputs.clone().requires_grad_()
            loss = self.step((inputs, targets))
            (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
            self.manual_backward(loss + slope.pow(2).sum())

    with pytest.raises(UnsupportedError, match=r"second derivative through layer .* HarmonyStrategy\(layers="):
        trainer(harmony(), limit_train_batches=1).fit(Penalised(), loader(8))


def test_autocast_of_the_user_s_own_piles_up_no_casts():
    class Cast(Chain):
        def step(self, batch):
            inputs, targets = batch
            with torch.autocast("cpu", torch.bfloat16):
                outputs = self.head(self.net(inputs)).squeeze(1)
            return nn.functional.mse_loss(outputs.float(), targets)

    ours, reference = both(Cast, harmony(2, "170KiB"), microbatch_size=2)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("stash", ["host", "device"])
@pytest.mark.parametrize("memory", ["160KiB", "64MiB"])
def test_glue_may_write_what_a_layer_has_read(memory, stash):
    """`h += block(h)`: fine in plain training as the block itself does not keep h, but its recompute needs h as it was."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.full((WIDTH,), 0.1))
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.linear(torch.tanh(x + self.shift))

    class InPlace(Chain):
        def __init__(self, **options):
            super().__init__(**options)
            self.first = nn.Linear(WIDTH, WIDTH)
            self.net = nn.ModuleList(Shift() for _ in range(4))

        def step(self, batch):
            inputs, targets = batch
            hidden = self.first(inputs)
            for block in self.net:
                hidden += block(hidden)
            return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)

    strategy = harmony(1, memory, layers=["first", "net.*", "head"], stash=stash)
    ours, reference = both(InPlace, strategy, microbatch_size=2)
    assert same_weights(ours, reference)


def test_random_streams_of_the_process_survive_an_error():
    class Failing(Chain):
        def training_step(self, batch, batch_idx):
            random.random()
            raise ValueError("stop")

    random.seed(3)
    expected = random.random()
    random.seed(3)
    with pytest.raises(ValueError, match="stop"):
        trainer(harmony(), limit_train_batches=1).fit(Failing(), loader(8))
    assert random.random() == expected


@pytest.mark.parametrize("memory", ["120KiB", "8MiB"])
@pytest.mark.parametrize("write", ["in place", "data", "list", "out"])
def test_weights_written_inside_the_step_are_used_at_once(memory, write):
    """A moving average of the first block, which the same step then calls."""

    class Averaging(Chain):
        def __init__(self, **options):
            super().__init__(**options)
            self.slow = copy.deepcopy(self.net[0]).requires_grad_(False)

        def step(self, batch):
            inputs, _ = batch
            with torch.no_grad():
                before = self.slow(inputs)
                if write == "list":
                    torch._foreach_mul_(list(self.slow.parameters()), 0.5)
                    torch._foreach_add_(list(self.slow.parameters()), list(self.net[0].parameters()), alpha=0.5)
                for slow, fast in zip(self.slow.parameters(), self.net[0].parameters(), strict=True):
                    if write == "list":
                        break
                    if write == "out":
                        torch.lerp(slow, fast, 0.5, out=slow)
                    elif write == "data":
                        slow.data = slow.data * 0.5 + fast.data * 0.5
                    else:
                        slow.mul_(0.5).add_(fast, alpha=0.5)
                goal = self.slow(inputs) - before
            return super().step(batch) + (self.net[0](inputs) - goal).pow(2).mean()

    ours, reference = both(Averaging, harmony(1, memory, microbatch_size=8))
    assert same_numbers(ours.losses, reference.losses)
    assert same_weights(ours, reference)


def test_a_use_of_a_weight_without_gradient_is_no_hindrance():
    class Logged(Chain):
        def step(self, batch):
            inputs, _ = batch
            self.net[0](inputs).sum()  # looked at, not learned from
            return super().step(batch)

    ours, reference = both(Logged, harmony(2, "64MiB"), microbatch_size=2)
    assert same_weights(ours, reference)


class LossIsLeaf(Chain):
    """In every second step the loss is a weight itself, in the others a tensor of the user's own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.own = torch.tensor(0.5, requires_grad=True)

    def training_step(self, batch, batch_idx):
        return self.weight if batch_idx % 2 else self.own


@pytest.mark.parametrize("microbatch_size", [8, 2])
def test_a_loss_that_nothing_was_computed_for(microbatch_size):
    ours, reference = both(LossIsLeaf, harmony(microbatch_size=microbatch_size), num_batches=4)
    assert same_weights(ours, reference)
    assert reference.weight < 2 and ours.own.grad == reference.own.grad == 2


class WritingLater(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write, self.is_late = write, False
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        if self.is_late:
            self.write(x)
        return self.outer(torch.tanh(self.inner(x)))


class Late(Chain):
    def __init__(self, write, differentiates):
        super().__init__(depth=6)
        self.first, self.differentiates = WritingLater(write), differentiates

    def step(self, batch):
        self.first.is_late = self.trainer.global_step >= 3
        x = batch[0] * (self.head.weight.sum() if self.differentiates else 1)
        return super().step((self.first(x) + x, batch[1]))


def late(write, *, differentiates):
    """Losses and weights, of one device and of ours, where a layer's second plan has seen no write in its first call."""
    fits = []
    for strategy in ("auto", harmony(1, "240KiB", 8, layers=["first", "net.*"], plan="sizes")):
        torch.manual_seed(0)
        module = Late(write, differentiates)
        fits.append(module)
        trainer(strategy, limit_train_batches=5).fit(module, loader(8))
    return fits


@pytest.mark.parametrize("differentiates", [False, True])
def test_a_layer_that_begins_to_write_its_input_later(differentiates, nothing_stays):
    """What is written again is what has been there, so that the second run may begin with it; or the call begins anew."""
    plain, ours = late(lambda x: x[:, ::2].zero_(), differentiates=differentiates)
    assert same_numbers(plain.losses, ours.losses)
    assert same_weights(plain, ours)


def test_a_layer_that_begins_to_write_another_value_each_time(nothing_stays):
    plain, ours = late(lambda x: x.mul_(0.5), differentiates=True)
    assert same_weights(plain, ours)
    with pytest.raises(UnsupportedError, match=r"layer first writes its input 0 in place, which it did not .* x.clone"):
        late(lambda x: x.mul_(0.5), differentiates=False)
