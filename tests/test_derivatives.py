"""User code that takes derivatives by itself, in automatic and in manual optimization: equal, or refused before damage."""

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer, twins
from torch import nn
from torch.utils.checkpoint import checkpoint

from harmony_lightning import UnsupportedError
from harmony_lightning.hardware.emulated_device import EmulatedDevice

STASHES = pytest.mark.parametrize("stash", ["host", "device"])


def both(kind, strategy, microbatch_size=8, num_batches=2, **options):
    """Returns (ours, reference, fitted trainer)."""
    torch.manual_seed(0)
    ours = kind(**options)
    torch.manual_seed(0)
    reference = kind(**options)
    parts = 8 // microbatch_size
    torch.manual_seed(1)
    plain = trainer(limit_train_batches=num_batches * parts, accumulate_grad_batches=parts)
    plain.fit(reference, loader(microbatch_size))
    torch.manual_seed(1)
    fitted = trainer(strategy, limit_train_batches=num_batches)
    fitted.fit(ours, loader(8))
    return ours, reference, fitted


class Adversarial(Chain):
    """Steps on inputs moved along their own gradient, which goes through all layers."""

    def step(self, batch):
        inputs, targets = batch
        inputs = inputs.clone().requires_grad_()
        (direction,) = torch.autograd.grad(super().step((inputs, targets)), inputs)
        return super().step(((inputs + 0.1 * direction.sign()).detach(), targets))


class AdversarialByBackward(Chain):
    """The same with `backward`: gradients of weights that it leaves behind are gone at `zero_grad`."""

    def step(self, batch):
        inputs, targets = batch
        inputs = inputs.clone().requires_grad_()
        super().step((inputs, targets)).backward()
        return super().step(((inputs + 0.1 * inputs.grad.sign()).detach(), targets))


@STASHES
@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_a_gradient_across_packs_in_automatic_optimization(stash, microbatch_size, caplog):
    strategy = harmony(2, "160KiB", microbatch_size=microbatch_size, stash=stash)
    ours, reference, fitted = both(Adversarial, strategy, microbatch_size)
    assert same_weights(ours, reference)
    assert len(fitted.strategy.plan.packs) > 2
    assert sum("runs in one piece" in record.message for record in caplog.records) == 1
    assert fitted.strategy.statistics().updates_just_in_time == 2


@pytest.mark.parametrize(("num_gpus", "mode"), [(1, "pp"), (3, "pp"), (2, "dp")])
def test_one_piece_does_not_depend_on_gpus_and_mode(num_gpus, mode):
    strategy = harmony(num_gpus, "160KiB", microbatch_size=2, mode=mode)
    ours, reference, fitted = both(Adversarial, strategy, 2)
    if mode == "pp":
        assert same_weights(ours, reference)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert max(fitted.strategy.statistics().peak_device_bytes) <= 160 << 10
    assert fitted.strategy.plan.num_microbatches == 4


@pytest.mark.parametrize("manual", [False, True])
def test_checkpoints_in_one_piece_go_from_gpu_to_gpu(manual):
    class Checkpointing(Adversarial):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual

        def step(self, batch):
            inputs, targets = batch
            halves = self.net[:4], self.net[4:]
            for half in halves:
                inputs = checkpoint(half, inputs, use_reentrant=False)
            loss = super().step(batch)
            return loss + nn.functional.mse_loss(self.head(inputs).squeeze(1), targets)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if manual:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    ours, reference, _ = both(Checkpointing, harmony(2, "160KiB", microbatch_size=8))
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


class Scaling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).sum(0)


class BackwardByHand(Chain):
    """Code of its own runs in backward, of a part that is on the first GPU."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def step(self, batch):
        inputs, targets = batch
        hidden = Scaling.apply(self.net[0](inputs), self.scale)
        hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3) * 0.5)
        return nn.functional.mse_loss(self.head(self.net[1:](hidden) + hidden).squeeze(1), targets)


class AdversarialByHand(Adversarial, BackwardByHand):
    pass


class ManualByHand(BackwardByHand):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(self.step(batch))
        self.optimizers().step()


@pytest.mark.parametrize("kind", [AdversarialByHand, ManualByHand])
def test_the_user_s_own_backward_in_one_piece_computes_where_its_tensors_are(kind):
    strategy = harmony(3, "160KiB", microbatch_size=8, one_layer_per_pack=True)
    ours, reference, _ = both(kind, strategy)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_one_piece_in_mixed_precision_casts_when_swap_ins_have_read():
    """A pack that has come in ahead for the next microbatch is not cast anew meanwhile."""
    strategy = harmony(2, "160KiB", microbatch_size=2, mode="dp")
    fitted = trainer(strategy, precision="bf16-mixed", limit_train_batches=3)
    fitted.fit(Adversarial(), loader(8))
    assert strategy.plan.narrow_dtype == "bfloat16"


def test_one_piece_takes_its_random_stream_along_from_gpu_to_gpu(monkeypatch):
    """Emulated GPUs draw from the host, so here each has a counter for a generator."""
    counters, drawn = {}, []
    monkeypatch.setattr(EmulatedDevice, "seed_random", lambda device, seed: counters.update({device.index: 0}))
    monkeypatch.setattr(EmulatedDevice, "random_state", lambda device: torch.tensor(counters.get(device.index, -1)))
    monkeypatch.setattr(
        EmulatedDevice, "set_random_state", lambda device, state: counters.update({device.index: int(state)})
    )

    class Drawing(Adversarial):
        def training_step(self, batch, batch_idx):
            inputs = batch[0]
            for block in self.net:
                inputs = block(inputs)
                index = inputs.device.index
                drawn.append((index, counters[index]))
                counters[index] += 1
            return self.step(batch)

    trainer(harmony(2, "160KiB", microbatch_size=4), limit_train_batches=1).fit(Drawing(depth=4), loader(8))
    of_last_microbatch = drawn[-4:]
    assert [count for _, count in of_last_microbatch] == [0, 1, 2, 3]
    assert {index for index, _ in of_last_microbatch} == {0, 1}
    assert set(counters.values()) == {-1}  # the process's own generators go on where they were


def test_one_piece_trains_with_accumulation_clipping_and_parameter_hooks():
    seen = []

    class Hooked(Adversarial):
        def __init__(self):
            super().__init__()
            self.head.weight.register_hook(lambda gradient: seen.append(gradient.norm().item()))

    torch.manual_seed(0)
    ours = Hooked()
    torch.manual_seed(0)
    reference = Hooked()
    options = {"limit_train_batches": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.01}
    trainer(**options).fit(reference, loader(8))
    trainer(harmony(2, "160KiB", microbatch_size=8), **options).fit(ours, loader(8))
    assert same_weights(ours, reference)
    assert seen[:4] == seen[4:]


def test_a_backward_of_the_user_s_own_in_automatic_optimization():
    ours, reference, _ = both(AdversarialByBackward, harmony(2, "160KiB", microbatch_size=8))
    assert same_weights(ours, reference)


def test_the_second_attempt_draws_the_same_random_numbers():
    class Noisy(Adversarial):
        def step(self, batch):
            inputs, targets = batch
            return super().step((inputs + torch.randn(inputs.shape), targets))

    ours, reference, _ = both(Noisy, harmony(2, "160KiB", microbatch_size=8))
    assert same_weights(ours, reference)


def test_one_piece_and_cut_agree_and_the_random_streams_too():
    """A regulariser that needs a gradient only in the second minibatch."""

    class Sometimes(Chain):
        differentiates = False

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            inputs = (inputs + torch.randn(inputs.shape)).requires_grad_()
            loss = self.step((inputs, targets))
            if self.differentiates and batch_idx == 1:
                torch.autograd.grad(loss, inputs, retain_graph=True)
            return loss

    torch.manual_seed(0)
    one = Sometimes()
    torch.manual_seed(0)
    other = Sometimes()
    other.differentiates = True
    torch.manual_seed(1)
    trainer(harmony(2), limit_train_batches=4).fit(one, loader(8))
    torch.manual_seed(1)
    trainer(harmony(2, "160KiB"), limit_train_batches=4).fit(other, loader(8))
    assert same_weights(one, other)


def test_a_gradient_within_one_segment_needs_no_second_attempt(caplog):
    class Local(Chain):
        def step(self, batch):
            point = torch.ones(3, requires_grad=True)
            (slope,) = torch.autograd.grad(point.pow(2).sum(), point)
            return super().step(batch) * slope.mean()

    ours, reference, _ = both(Local, harmony(2), microbatch_size=2)
    assert same_weights(ours, reference)
    assert not any("one piece" in record.message for record in caplog.records)


def total(gradients):
    return torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()


class Balanced(Chain):
    """Weighs two losses by the gradients of shared weights, one of them used in glue, one not at all."""

    def __init__(self, manual=False, how="grad"):
        super().__init__(depth=6)
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.idle = nn.Parameter(torch.zeros(3))
        self.automatic_optimization = not manual
        self.how = how

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        hidden = self.net(inputs + self.shift)
        one, other = hidden.pow(2).mean(), nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)
        shared = [self.shift, *self.net[0].parameters(), self.idle, hidden, self.net[4][0].weight]
        if self.how == "grad":
            first = torch.autograd.grad(one, shared, retain_graph=True, allow_unused=True)
            second = torch.autograd.grad((other,), shared, torch.ones(()), retain_graph=True, allow_unused=True)
            assert first[3] is None
            assert [g.shape for g in first if g is not None] == [t.shape for t in shared if t is not self.idle]
            ratio = (total(first[:4]) / total(second[:4])).detach()
        else:
            one.backward(inputs=shared[:3], retain_graph=True)
            torch.autograd.backward(other, inputs=shared[:3], retain_graph=True)
            ratio = total([parameter.grad for parameter in shared[:3]])
            assert self.head.weight.grad is None or self.automatic_optimization or batch_idx
        self.losses.append(ratio.item())
        loss = one + ratio.to(other.device) * other
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss


@pytest.mark.parametrize("how", ["grad", "backward"])
@pytest.mark.parametrize("manual", [False, True])
def test_gradients_of_chosen_weights(manual, how):
    strategy = harmony(2, "160KiB", microbatch_size=8)
    ours, reference, fitted = both(Balanced, strategy, manual=manual, how=how)
    assert ours.losses == reference.losses
    assert same_weights(ours, reference)
    assert len(fitted.strategy.plan.packs) > 2


def test_gradients_of_weights_that_are_not_used_are_refused_as_by_torch():
    class Unused(Chain):
        def __init__(self):
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(3))

        def step(self, batch):
            loss = super().step(batch)
            (gradient,) = torch.autograd.grad(
                loss, self.idle, retain_graph=True, materialize_grads=self.materializes or None
            )
            assert torch.equal(gradient, torch.zeros(3))
            return loss

    Unused.materializes = True
    trainer(harmony(2), limit_train_batches=1).fit(Unused(), loader(8))
    Unused.materializes = False
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        trainer(harmony(2), limit_train_batches=1).fit(Unused(), loader(8))


def test_a_second_derivative_through_weights_is_refused():
    """As of the inner loop of a meta-learner."""

    class Meta(Chain):
        def step(self, batch):
            weight = self.net[0][0].weight
            (gradient,) = torch.autograd.grad(super().step(batch), weight, create_graph=True)
            return super().step(batch) + gradient.pow(2).sum()

    with pytest.raises(UnsupportedError, match="second derivative"):
        trainer(harmony(2), limit_train_batches=1).fit(Meta(), loader(8))


class Penalised(Chain):
    """A gradient penalty whose inner gradient comes in as a constant."""

    def step(self, batch):
        inputs, _ = batch
        inputs = inputs.clone().requires_grad_()
        score = self.head(self.net(inputs))
        (slope,) = torch.autograd.grad(score, inputs, torch.ones_like(score), create_graph=True)
        return score.mean() + slope.pow(2).sum()


@pytest.mark.parametrize("manual", [False, True])
def test_a_gradient_penalty_is_refused_before_any_weight_has_changed(manual):
    class Module(Penalised):
        def training_step(self, batch, batch_idx):
            loss = self.step(batch)
            if manual:
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    torch.manual_seed(0)
    module = Module()
    module.automatic_optimization = not manual
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(UnsupportedError, match=r"second derivative through layer net.*layers=\[ThatModule\]"):
        trainer(harmony(2, "160KiB"), limit_train_batches=1).fit(module, loader(8))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())


class Energy(nn.Module):
    """Minus the gradient of a scalar that two linear maps make: a force."""

    def __init__(self, how="autograd"):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.how = how
        self.register_buffer("num_calls", torch.zeros(()))

    def energy(self, x):
        return self.second(torch.tanh(self.first(x))).pow(2).sum()

    def forward(self, x):
        self.num_calls += 1
        x = nn.functional.dropout(x, 0.1)
        if self.how == "func":
            return -torch.func.grad(self.energy)(x)
        x = x.detach().requires_grad_() if not x.requires_grad else x
        return -torch.autograd.grad(self.energy(x), x, create_graph=True)[0]


@STASHES
@pytest.mark.parametrize("how", ["autograd", "func"])
def test_a_second_derivative_within_one_layer(how, stash):
    """What the refusal recommends."""

    class Forces(Chain):
        def __init__(self):
            super().__init__(depth=4)
            self.force = Energy(how)

        def step(self, batch):
            inputs, targets = batch
            return nn.functional.mse_loss(self.head(self.force(self.net(inputs))).squeeze(1), targets)

    strategy = harmony(2, "400KiB", microbatch_size=8, stash=stash, layers=["net.*", "head", Energy])
    ours, reference, _ = both(Forces, strategy)
    assert same_weights(ours, reference)
    assert ours.force.num_calls == 2


@STASHES
@pytest.mark.parametrize("manual", [False, True])
def test_functional_transforms_between_layers(manual, stash):
    class Transforming(Chain):
        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            hidden = self.net(inputs)
            slope = torch.func.grad(lambda x: x.pow(3).sum())(hidden)
            squares = torch.func.vmap(lambda row: row.pow(2).sum())(hidden)
            loss = nn.functional.mse_loss(self.head(hidden + slope).squeeze(1) + squares, targets)
            if manual:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    def make():
        module = Transforming(depth=4)
        module.automatic_optimization = not manual
        return module

    ours, reference, _ = both(make, harmony(2, "160KiB", microbatch_size=8, stash=stash))
    assert same_weights(ours, reference)


class Mapping(Chain):
    """Of what a layer of another pack has made, and of weights."""

    def step(self, batch):
        inputs, targets = batch
        hidden = self.net[0](inputs)
        result = self.head(self.net[1:](hidden)).squeeze(1)
        squares = torch.vmap(lambda row: row.square().sum() + row @ self.head.weight[0])(hidden)
        pairs = torch.vmap(torch.vmap(lambda x, y: torch.sin(x * y)), in_dims=(1, None))(hidden, hidden[:, 0])
        norms = torch.vmap(lambda row: row.norm())(self.net[2][0].weight)
        return nn.functional.mse_loss(result + squares, targets) + pairs.mean() + norms.mean()


@STASHES
@pytest.mark.parametrize("num_gpus", [1, 3])
def test_vmap_of_what_other_packs_have_made(num_gpus, stash):
    strategy = harmony(num_gpus, "200KiB", microbatch_size=8, stash=stash, one_layer_per_pack=True)
    ours, reference, _ = both(lambda: Mapping(depth=4), strategy)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):  # uses are added in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_a_transform_would_lose_is_refused_with_the_way_out():
    class Losing(Chain):
        follows = False

        def step(self, batch):
            hidden = self.net[0](batch[0])
            loss = super().step((hidden, batch[1]))
            given = hidden * 1 if self.follows else hidden
            return loss + torch.func.grad(lambda x: torch.sin(x).sum())(given).square().mean()

    strategy = harmony(2, microbatch_size=8, one_layer_per_pack=True)
    with pytest.raises(UnsupportedError, match=r"a transform of torch.func that differentiates .* x \* 1"):
        trainer(strategy).fit(Losing(), loader(8))
    Losing.follows = True
    ours, reference, _ = both(Losing, harmony(2, microbatch_size=8, one_layer_per_pack=True))
    assert same_weights(ours, reference)


def test_a_transform_over_layers_is_refused_with_the_way_out():
    class Transforming(Chain):
        def step(self, batch):
            inputs, _ = batch
            return torch.func.grad(lambda x: self.net(x).sum())(inputs).sum() + super().step(batch)

    with pytest.raises(UnsupportedError, match=r"layer net\.0.* inside a transform of torch\.func"):
        trainer(harmony(2), limit_train_batches=1).fit(Transforming(), loader(8))


def test_weights_that_changed_behind_the_forward_are_noticed():
    """torch refuses it as well."""

    class Stale(Chain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.step(batch)
            self.manual_backward(loss, retain_graph=True)
            self.optimizers().step()
            self.manual_backward(loss)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trainer(limit_train_batches=1).fit(Stale(), loader(8))
    with pytest.raises(UnsupportedError, match="weights of layer head were changed between"):
        trainer(harmony(2), limit_train_batches=1).fit(Stale(), loader(8))


def test_functional_call_uses_the_weights_that_it_is_given():
    class Fast(Chain):
        def step(self, batch):
            inputs, targets = batch
            fast = {name: weight * 0.5 for name, weight in self.net.named_parameters()}
            hidden = torch.func.functional_call(self.net, fast, (inputs,))
            return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)

    ours, reference, _ = both(Fast, harmony(2, "1MiB", microbatch_size=8))
    assert same_weights(ours, reference)
    assert ours.losses == reference.losses


def test_an_overridden_backward_that_differentiates_otherwise_is_told_what_to_do():
    class Own(Chain):
        def backward(self, loss):
            torch.autograd.grad(loss, list(self.parameters()))

    with pytest.raises(RuntimeError) as caught:
        trainer(harmony(2), limit_train_batches=1).fit(Own(), loader(8))
    assert any("torch.autograd.grad inside training_step" in note for note in caught.value.__notes__)


def test_patched_functions_are_given_back():
    before = torch.autograd.graph.disable_saved_tensors_hooks
    module, _ = twins()
    trainer(harmony(2), limit_train_batches=1).fit(module, loader(8))
    assert torch.autograd.graph.disable_saved_tensors_hooks is before


@STASHES
def test_gradients_of_inputs_in_evaluation(stash):
    """As of energies by positions: with gradients on, and none of the weights'."""

    class Slopes(Chain):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                inputs = batch[0].clone().requires_grad_()
                (slope,) = torch.autograd.grad(self.head(self.net(inputs)).sum(), inputs)
            self.log("slope", slope.norm())

    torch.manual_seed(0)
    module = Slopes()
    options = {"inference_mode": False, "limit_val_batches": 2}
    expected = trainer(**options).validate(module, loader(8), verbose=False)
    fitted = trainer(harmony(2, "160KiB", stash=stash), **options)
    assert fitted.validate(module, loader(8), verbose=False) == expected
    assert all(parameter.grad is None for parameter in module.parameters())
