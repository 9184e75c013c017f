"""In mixed precision, weights that autocast would cast travel in its type; numbers are those of one device to the bit."""

import copy
import threading
from collections import Counter
from unittest import mock

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from test_precision import with_precision
from torch import nn
from torch.nn import functional as F

from harmony_lightning import Plan
from harmony_lightning.runtime.weights.casts import Casts

BATCH = 8


def fit(module, strategy="auto", microbatch_size=BATCH, num_batches=4, precision="bf16-mixed", **options):
    """The module trained, and its Trainer. One device accumulates over what the strategy calls microbatches."""
    parts = 1 if strategy != "auto" else BATCH // microbatch_size
    if parts > 1:
        options["accumulate_grad_batches"] = parts
    fitted = trainer(strategy, limit_train_batches=num_batches * parts, **with_precision(precision), **options)
    fitted.fit(module, loader(BATCH // parts))
    return fitted


def assert_same(make, microbatch_size=2, strategy=None, num_batches=4, **options):
    """Trains beside one device; returns the strategy. The first step is learned from, so there must be more."""
    torch.manual_seed(0)
    ours = make()
    reference = copy.deepcopy(ours)
    strategy = strategy or harmony(2, "400KiB", microbatch_size, one_layer_per_pack=True)
    fit(ours, strategy, num_batches=num_batches, **options)
    fit(reference, "auto", microbatch_size, num_batches, **options)
    assert sorted(getattr(ours, "losses", [])) == sorted(getattr(reference, "losses", []))
    assert same_weights(ours, reference)
    return strategy


def narrow(strategy):
    return {name for pack in strategy.plan.packs for name in pack.narrow}


# What travels ---------------------------------------------------------------------------------------------------------


def per_step(name, microbatch_size, num_gpus=2, **options):
    """Swap bytes of one step in full flow, out of the runtime's counters, and its plan."""
    totals = []
    for num_batches in (3, 4):
        torch.manual_seed(0)
        strategy = harmony(num_gpus, "1MiB", microbatch_size, one_layer_per_pack=True, **options)
        fit(Chain(), strategy, num_batches=num_batches, precision=name)
        statistics = strategy.statistics()
        totals.append((statistics.swap_in_bytes, statistics.swap_out_bytes))
        traffic = [device.traffic for device in strategy._emulated.devices]
        to_devices = sum(t.host_to_device_bytes for t in traffic)
        counted = statistics.swap_in_bytes + statistics.stash_in_bytes + statistics.input_bytes
        assert counted <= to_devices < counted + 1024  # a few numbers
    (first_in, first_out), (in_bytes, out_bytes) = totals
    return in_bytes - first_in, out_bytes - first_out, strategy.plan


IN_NUMBERS = 2 * sum(p.numel() for p in Chain().parameters()) - 3 * (WIDTH * WIDTH + WIDTH) - (WIDTH + 1)
"""Each weight twice a step, those of the last two packs on either device, for which there are slots, once."""
OUT_NUMBERS = sum(p.numel() for p in Chain().parameters())


@pytest.mark.parametrize(
    ("name", "microbatch_size", "bytes_in", "bytes_out"),
    [
        ("32-true", 2, 4, 4),
        ("64-true", 2, 8, 8),
        ("bf16-true", 2, 2, 2),
        ("16-true", 2, 2, 2),
        ("bf16-mixed", 2, 2, 4),  # a sum of four gradients
        ("bf16-mixed", 8, 2, 2),
        ("16-mixed", 2, 2, 4),
        ("16-mixed", 8, 2, 2),
    ],
)
def test_bytes_of_a_weight_and_of_a_gradient(nothing_stays, name, microbatch_size, bytes_in, bytes_out):
    in_bytes, out_bytes, plan = per_step(name, microbatch_size)
    assert (in_bytes, out_bytes) == (bytes_in * IN_NUMBERS, bytes_out * OUT_NUMBERS)
    assert (in_bytes, out_bytes) == (plan.swap_in_bytes_per_step, plan.swap_out_bytes_per_step)


def test_half_a_sum():
    _, out_bytes, plan = per_step("bf16-mixed", 2, gradient_wire="half")
    assert out_bytes == 2 * OUT_NUMBERS == plan.swap_out_bytes_per_step


def test_slots_are_half_as_large():
    plans = []
    for name in ("32-true", "bf16-mixed"):
        strategy = harmony(1, "1MiB", 2, one_layer_per_pack=True)
        fit(Chain(depth=16), strategy, precision=name)
        plans.append(strategy.plan)
    wide, half = plans
    assert [pack.layers for pack in wide.packs] == [pack.layers for pack in half.packs]
    assert [pack.slot_nbytes for pack in wide.packs[:-1]] == [2 * pack.slot_nbytes for pack in half.packs[:-1]]
    assert half.arena_nbytes() < wide.arena_nbytes()


# Equality -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("microbatch_size", [2, 8])
@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_same_numbers_as_one_device(name, microbatch_size, mode):
    options = {"limit_val_batches": 2, "val_check_interval": 1} if microbatch_size == 8 else {}
    strategy = harmony(2, microbatch_size=microbatch_size, mode=mode)
    strategy = assert_same(Careful, microbatch_size, strategy, precision=name, **options)
    assert len(narrow(strategy)) == 18
    assert strategy.plan.narrow_dtype == {"bf16-mixed": "bfloat16", "16-mixed": "float16"}[name]


class Careful(Chain):
    """AdamW's usual epsilon is zero in float16."""

    def __init__(self):
        super().__init__(eps=1e-3)


class Lower(nn.Linear):
    """Casts by itself, to the type of its weight."""

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias) + 1


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight, self.bias), self.weight)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class Giving(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias), self.weight


class Full(nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.float()
        return gradient @ weight.t(), x.t() @ gradient * 3


class Own(nn.Linear):
    def forward(self, x):
        return Times.apply(x.float(), self.weight) + self.bias.numel() * 0.01


class Under(nn.Linear):
    """Out of sight of torch functions."""

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            return F.linear(x.float(), self.weight.double().float(), self.bias)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH) + torch.arange(WIDTH) / 1000)

    def forward(self, x):
        x = x.float().clone()  # gradients of its uses are added up here, and not among those of other modules
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Of one odd layer, and others around it."""

    def __init__(self, odd):
        super().__init__()
        self.norm = Norm()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.odd = odd(WIDTH, WIDTH)
        self.bare = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x):
        hidden = self.odd(torch.tanh(self.into(self.norm(x))))
        if isinstance(hidden, tuple):
            hidden = hidden[0] * hidden[1].sum(0)
        return x + self.out(torch.tanh(hidden) @ self.bare)


class Odd(Chain):
    def __init__(self, odd=nn.Linear, depth=3):
        super().__init__(depth=0)
        self.net = nn.Sequential(*(Block(odd) for _ in range(depth)))


ODD = {
    nn.Linear: {"odd.weight", "odd.bias"},
    Lower: {"odd.bias"},
    Twice: {"odd.bias"},
    Scaled: {"odd.bias"},
    Giving: {"odd.bias"},
    Full: set(),
    Own: set(),
    Under: set(),
}


@pytest.mark.parametrize("microbatch_size", [2, 8])
@pytest.mark.parametrize("odd", ODD)
def test_a_weight_with_another_use_stays_as_it_is(odd, microbatch_size):
    strategy = harmony(2, "2MiB", microbatch_size, one_layer_per_pack=True, layers=[Block])
    strategy = assert_same(lambda: Odd(odd), microbatch_size, strategy)
    usual = {"into.weight", "into.bias", "bare", "out.1.weight"}
    expected = {f"net.{block}.{name}" for block in range(3) for name in usual | ODD[odd]}
    assert narrow(strategy) == expected | {"head.weight", "head.bias"}


def test_convolutions():
    class Image(Chain):
        def __init__(self):
            super().__init__(depth=0)
            self.net = nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)),
                nn.Conv2d(1, 8, 3, padding=1),
                nn.ConvTranspose2d(8, 8, 3, padding=1),
                nn.GroupNorm(2, 8),
                nn.Flatten(),
                nn.Linear(512, WIDTH),
            )

    strategy = assert_same(Image, strategy=harmony(2, "2MiB", 2, one_layer_per_pack=True))
    assert {name for name in narrow(strategy) if name.endswith("weight")} == {
        "net.1.weight",
        "net.2.weight",
        "net.5.weight",
        "head.weight",
    }


class Tied(Chain):
    """The table of an embedding is the head's weight, too."""

    def __init__(self):
        super().__init__(depth=4)
        self.embedding = nn.Embedding(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embedding.weight

    def step(self, batch):
        tokens = (batch[0] * 10).long() % WIDTH
        return F.cross_entropy(self.head(self.net(self.embedding(tokens).mean(1))), tokens[:, 0])


def test_a_tied_weight_travels_for_each_pack_as_that_uses_it():
    """With one microbatch: the parts of several packs are sums of their own."""
    strategy = assert_same(Tied, 8)
    by_layer = {layer: pack.narrow for pack in strategy.plan.packs for layer in pack.layers}
    assert by_layer["embedding"] == ()
    assert by_layer["head"] == ("head.weight",)


def test_a_tied_weight_that_all_its_layers_cast():
    class TwoHeads(Chain):
        def __init__(self):
            super().__init__(depth=6)
            self.net[4][0].weight = self.net[1][0].weight

    strategy = assert_same(TwoHeads, 8)
    assert sum("net.1.0.weight" in pack.narrow for pack in strategy.plan.packs) == 2


def test_a_layer_that_is_called_several_times_in_a_microbatch():
    class Again(Chain):
        def step(self, batch):
            hidden = self.net[1](self.net[1](self.net[0](batch[0])))
            return F.mse_loss(self.head(self.net[1](hidden)).squeeze(1), batch[1])

    strategy = assert_same(lambda: Again(depth=2))
    assert "net.1.0.weight" in narrow(strategy)


def test_frozen_weights():
    class Frozen(Chain):
        def __init__(self):
            super().__init__(depth=6)
            self.net[:3].requires_grad_(False)
            self.net[4][0] = Twice(WIDTH, WIDTH).requires_grad_(False)

    strategy = assert_same(Frozen)
    assert "net.0.0.weight" in narrow(strategy)
    assert "net.4.0.bias" in narrow(strategy)


def test_weights_are_frozen_and_thawed_between_epochs():
    class Thawing(Chain):
        def on_train_epoch_start(self):
            self.net[:4].requires_grad_(self.current_epoch % 2 == 0)

    assert_same(lambda: Thawing(depth=6), num_batches=2, max_epochs=3)


@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_packs_that_a_device_updates_have_some_too(microbatch_size):
    strategy = harmony(2, "1MiB", microbatch_size, one_layer_per_pack=True, update="device")
    assert_same(lambda: Chain(depth=4), microbatch_size, strategy)
    assert {pack.update for pack in strategy.plan.packs} == {"device"}
    assert narrow(strategy)


# Later uses -----------------------------------------------------------------------------------------------------------


class Changing(nn.Linear):
    """Uses its weight in another way later, in training, in evaluation, or for some samples."""

    other = False
    by_sample = False

    def forward(self, x):
        result = F.linear(x, self.weight, self.bias)
        if self.other and (not self.by_sample or bool(x.detach().sum() > 15)):
            result = result * self.weight.pow(2).mean() + (self.weight.dtype == torch.float32)
        return result


class Changes(Chain):
    def __init__(self, when):
        super().__init__(depth=4)
        self.net[2][0] = Changing(WIDTH, WIDTH)
        self.when = when
        self.seen = []

    def step(self, batch):
        self.net[2][0].other = self.when(self, batch)
        return super().step(batch)

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.step(batch).item())


@pytest.mark.parametrize("microbatch_size", [2, 8])
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("last", [2, 100])
def test_another_use_in_a_later_step_gets_the_weight_as_it_is(last, by_sample, microbatch_size):
    used = []

    def make():
        module = Changes(lambda module, batch: 2 <= module.global_step <= last)
        module.net[2][0].by_sample = by_sample
        module.net[2].register_forward_hook(lambda module, args, result: used.append(bool(args[0].sum() > 15)))
        return module

    strategy = assert_same(make, microbatch_size, num_batches=5)
    assert len(set(used)) == 2 or microbatch_size == 8
    assert "net.2.0.weight" not in narrow(strategy)
    assert {"net.2.0.bias", "net.1.0.weight"} <= narrow(strategy)


def test_another_use_in_evaluation_gets_the_weight_as_it_is():
    seen = []

    def make():
        module = Changes(lambda module, batch: not module.trainer.training)
        seen.append(module.seen)
        return module

    torch.manual_seed(0)
    ours, reference = make(), make()
    reference.load_state_dict(ours.state_dict())
    strategy = harmony(2, "400KiB", 8, one_layer_per_pack=True)
    for module, way in ((ours, strategy), (reference, "auto")):
        fitted = trainer(way, limit_train_batches=3, limit_val_batches=2, max_epochs=2, precision="bf16-mixed")
        fitted.fit(module, loader(8), loader(8))
    assert seen[0] == seen[1]
    assert same_weights(ours, reference)
    assert "net.2.0.weight" not in narrow(strategy)


def test_a_second_use_in_a_later_call_is_a_sum_in_float32():
    class Later(nn.Linear):
        other = False

        def forward(self, x):
            x = F.linear(x, self.weight, self.bias)
            return F.linear(x, self.weight) if self.other else x

    class Module(Changes):
        def __init__(self):
            super().__init__(lambda module, batch: module.global_step >= 2)
            self.net[2][0] = Later(WIDTH, WIDTH)

    assert_same(Module, num_batches=5)


def test_forwards_of_several_microbatches_at_once():
    """They round otherwise, in bfloat16."""
    torch.manual_seed(0)
    ours = Changes(lambda module, batch: module.global_step == 3)
    reference = copy.deepcopy(ours)
    strategy = harmony(2, "400KiB", 2, one_layer_per_pack=True, microbatches_per_forward=2)
    fit(ours, strategy, num_batches=5)
    fit(reference, "auto", 2, num_batches=5)
    assert strategy.statistics().joint_forwards > 0
    assert {"net.2.0.bias", "net.1.0.weight"} <= narrow(strategy)
    assert "net.2.0.weight" not in narrow(strategy)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0.02)


def test_a_given_plan_s_narrow_weights_need_no_autocast(tmp_path):
    strategy = harmony(2, "400KiB", 2)
    fit(Odd(Lower), strategy)
    plan = Plan.from_json(strategy.plan.to_json())
    assert plan == strategy.plan
    with_all = harmony(2, "400KiB", 2, plan=plan)
    assert_same(lambda: Odd(Lower), strategy=with_all, precision="32-true", num_batches=2)
    assert with_all.plan.narrow_dtype == "bfloat16"
    assert_same(lambda: Odd(Lower), strategy=harmony(2, "400KiB", 2, plan=plan), num_batches=2)


# Casts ----------------------------------------------------------------------------------------------------------------


class Beginning(L.Callback):
    """Calls something in front of the last step but one, when it has shown what is narrow and what may stay."""

    def __init__(self, begin):
        self.begin = begin
        self.strategy = None

    def setup(self, trainer, module, stage):
        self.strategy = self.strategy or trainer.strategy  # ours comes first

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.strategy is self.strategy and trainer.global_step == 8:
            self.begin()


def cast_by(*callbacks):
    """By kind of thread, how often one has cast a pack in the last two of ten steps, as a multiple of the packs."""
    strategy = harmony(2, "400KiB", 2, one_layer_per_pack=True)
    threads, cast = [], Casts._cast

    def noting(*args):
        threads.append(threading.current_thread().name.removeprefix("harmony-").rstrip("-01"))
        cast(*args)

    with mock.patch.object(Casts, "_cast", noting):
        callbacks = [Beginning(threads.clear), *callbacks]
        assert_same(lambda: Chain(depth=6), strategy=strategy, num_batches=5, max_epochs=2, callbacks=callbacks)
    assert all(pack.narrow for pack in strategy.plan.packs)
    return {name: count / len(strategy.plan.packs) for name, count in Counter(threads).items()}


def test_they_are_cast_behind_their_update():
    found = cast_by()
    assert found.keys() == {"cast"} and 2 <= found["cast"] <= 3  # some of the step before may still be on their way


class Looking(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.head.weight.sum().item()


def test_somebody_who_looks_at_weights_between_steps_has_them_cast_at_their_swap_ins():
    assert cast_by(Looking()) == {"swap-in": 2}


# Masters --------------------------------------------------------------------------------------------------------------


class Writing(L.Callback):
    """Writes weights between steps, each time in another way."""

    def __init__(self):
        self.arrays = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step = batch_idx // trainer.accumulate_grad_batches
        weight = module.net[1][0].weight
        if step == 1:
            weight.data.mul_(0.5)
        elif step == 2:
            with torch.no_grad():
                module.net[2][0].weight.copy_(module.net[3][0].weight)
        elif step == 3:
            module.net[0][0].weight.detach().numpy()[:] += 0.125
        elif step == 4:
            weight.data = weight.data + 0.25


@pytest.mark.parametrize("microbatch_size", [2, 8])
@pytest.mark.parametrize("clip", [None, 0.1], ids=["pack by pack", "in one go"])
def test_weights_that_the_user_writes_between_steps(microbatch_size, clip):
    assert_same(lambda: Chain(depth=4), microbatch_size, num_batches=5, callbacks=[Writing()], gradient_clip_val=clip)


class KeepingMemory(L.Callback):
    """Writes a frozen weight between steps where torch does not see it: through an array that it once took."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        step, rest = divmod(batch_idx, trainer.accumulate_grad_batches)
        if rest == 0 and step == 2:
            self.array = module.net[1][0].weight.detach().numpy()
        elif rest == 0 and step > 2:
            self.array *= 0.75


@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_a_frozen_weight_that_the_user_writes_behind_torch(mode):
    def make():
        module = Chain(depth=4)
        module.net[1].requires_grad_(False)
        return module

    torch.manual_seed(0)
    ours = make()
    reference = copy.deepcopy(ours)
    strategy = harmony(2, "400KiB", 2, mode=mode, one_layer_per_pack=True)
    fit(ours, strategy, 2, 5, callbacks=[KeepingMemory()])
    fit(reference, "auto", 2, 5, callbacks=[KeepingMemory()])
    assert "net.1.0.weight" in narrow(strategy)
    assert sorted(ours.losses) == pytest.approx(sorted(reference.losses), rel=1e-5)


def test_a_weight_that_is_written_within_a_step():
    class Writer(Chain):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net[2][0].weight.mul_(0.75)
            return super().training_step(batch, batch_idx)

    assert_same(lambda: Writer(depth=4), 8)


def test_manual_optimization_behind_automatic():
    class Manual(Chain):
        def on_train_epoch_start(self):
            self.automatic_optimization = self.current_epoch % 2 == 0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not self.automatic_optimization:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    assert_same(lambda: Manual(depth=4), 8, num_batches=3, max_epochs=3)


def test_checkpoints_hold_float32(tmp_path):
    saved = {}

    class Saving(L.Callback):
        def __init__(self, kind):
            self.kind = kind

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                path = tmp_path / f"{self.kind}.ckpt"
                trainer.save_checkpoint(path)
                saved[self.kind] = torch.load(path, weights_only=False)

    torch.manual_seed(0)
    ours = Chain(depth=4)
    reference = copy.deepcopy(ours)
    fit(ours, harmony(2, "400KiB", 8, one_layer_per_pack=True), callbacks=[Saving("ours")])
    fit(reference, callbacks=[Saving("plain")])
    torch.testing.assert_close(saved["ours"]["state_dict"], saved["plain"]["state_dict"], rtol=0, atol=0)
    assert {value.dtype for value in saved["ours"]["state_dict"].values()} == {torch.float32}
    assert same_weights(ours, reference)


def test_predictions_behind_training():
    torch.manual_seed(0)
    ours = Chain(depth=4)
    reference = copy.deepcopy(ours)
    results = []
    for module, way in ((ours, harmony(2, "400KiB", 8, one_layer_per_pack=True)), (reference, "auto")):
        fitted = fit(module, way)
        results.append(fitted.predict(module, loader(8)))
        results.append(fitted.validate(module, loader(8), verbose=False))
    torch.testing.assert_close(results[:2], results[2:], rtol=0, atol=0)


# gradient_wire="half" -------------------------------------------------------------------------------------------------


def gradients(precision, **options):
    """Of the second of two steps, under SGD with a rate of 1: how far weights went."""
    torch.manual_seed(0)
    module = Chain(depth=4, optimizer=torch.optim.SGD, lr=0.0)
    strategy = harmony(2, "400KiB", 2, one_layer_per_pack=True, **options)
    found = {}

    class Keeping(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            found.update({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    fit(module, strategy, num_batches=2, precision=precision, callbacks=[Keeping()])
    return found


@pytest.mark.parametrize(("name", "unit"), [("bf16-mixed", 2.0**-8), ("16-mixed", 2.0**-11)])
def test_half_the_bytes_cost_one_rounding(name, unit):
    exact, half = gradients(name), gradients(name, gradient_wire="half")
    assert any(not torch.equal(exact[key], half[key]) for key in exact)
    for key, value in exact.items():
        assert half[key].dtype is torch.float32
        least = 2.0**-25 / 2**10 if name == "16-mixed" else 0.0  # unscaled by then
        assert bool(((half[key] - value).abs() <= (unit * value.abs()).clamp_min(least)).all())
