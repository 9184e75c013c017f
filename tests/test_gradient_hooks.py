"""Whoever watches or changes gradients finds what plain training shows: the same values, as often, in the same order."""

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn

from harmony_lightning import HarmonyStrategy


def both(kind, strategy, microbatch_size=8, num_batches=2, callbacks=lambda: [], **options):
    """Returns (ours, reference, statistics)."""
    torch.manual_seed(0)
    ours = kind()
    torch.manual_seed(0)
    reference = kind()
    parts = 8 // microbatch_size
    plain = {"accumulate_grad_batches": parts} if parts > 1 else {}
    trainer(limit_train_batches=num_batches * parts, callbacks=callbacks(), **{**options, **plain}).fit(
        reference, loader(microbatch_size)
    )
    fitted = trainer(strategy, limit_train_batches=num_batches, callbacks=callbacks(), **options)
    fitted.fit(ours, loader(8))
    return ours, reference, fitted.strategy.statistics()


STRATEGIES = pytest.mark.parametrize(
    "strategy",
    [lambda: harmony(2, "120KiB", 8), lambda: harmony(2, "120KiB", 8, stash="device"), lambda: HarmonyStrategy()],
    ids=["swapped", "device stash", "host"],
)


class Watched(Chain):
    """Keeps what hooks on all its parameters are given."""

    manual = False

    def __init__(self):
        super().__init__(depth=4)
        self.automatic_optimization = not self.manual
        self.seen = {}
        for name, parameter in self.named_parameters():
            if not name.startswith("net.1"):
                parameter.register_hook(lambda gradient, name=name: self.note(name, gradient.clone()))
            if name.startswith("net.2"):
                parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
            if not name.startswith("net.3"):
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, name=name: self.note("after " + name, parameter.grad.clone())
                )

    def note(self, name, value):
        self.seen.setdefault(name, []).append(value)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.manual:
            if batch_idx % 2 == 0:
                self.optimizers().zero_grad()
            self.manual_backward(loss)
            if batch_idx % 2:
                self.optimizers().step()
        return loss


def assert_same_notes(ours, reference, **tolerance):
    assert ours.seen.keys() == reference.seen.keys()
    for name, values in reference.seen.items():
        assert len(ours.seen[name]) == len(values), name
        for mine, theirs in zip(ours.seen[name], values, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, **(tolerance or {"rtol": 0, "atol": 0}))


@STRATEGIES
def test_parameter_hooks_get_the_gradients_of_plain_training(strategy):
    ours, reference, statistics = both(Watched, strategy())
    assert_same_notes(ours, reference)
    assert same_weights(ours, reference)
    assert statistics.updates_just_in_time == 2


@STRATEGIES
@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameter_hooks_run_once_for_each_backward_of_a_minibatch(strategy, accumulate):
    ours, reference, _ = both(Watched, strategy(), num_batches=4, accumulate_grad_batches=accumulate)
    assert len(ours.seen["head.weight"]) == 4
    assert_same_notes(ours, reference)
    assert same_weights(ours, reference)


def test_parameter_hooks_get_the_whole_minibatch_s_gradient_from_microbatches():
    """As of one backward over the minibatch; its sum is formed microbatch by microbatch, so the last bits differ."""
    torch.manual_seed(0)
    ours = Watched()
    torch.manual_seed(0)
    reference = Watched()
    trainer(limit_train_batches=1).fit(reference, loader(8))
    trainer(harmony(2, "120KiB", 2), limit_train_batches=1).fit(ours, loader(8))
    assert_same_notes(ours, reference, rtol=1e-5, atol=1e-7)


class Tied(Watched):
    """The first and the third block share a weight, which hooks on it see whole."""

    def __init__(self):
        super().__init__()
        self.net[2][0].weight = self.net[0][0].weight


@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("kind", [Watched, Tied])
def test_parameter_hooks_get_sums_over_gpus_and_uses(mode, kind):
    torch.manual_seed(0)
    ours = kind()
    torch.manual_seed(0)
    reference = kind()
    trainer(limit_train_batches=1).fit(reference, loader(8))
    trainer(harmony(3, "160KiB", 2, mode=mode), limit_train_batches=1).fit(ours, loader(8))
    assert_same_notes(ours, reference, rtol=1e-4, atol=1e-6)
    assert len(ours.seen["net.0.0.weight"]) == 1


@STRATEGIES
def test_parameter_hooks_in_manual_optimization(strategy):
    class Manual(Watched):
        manual = True

    ours, reference, _ = both(Manual, strategy(), num_batches=4)
    assert_same_notes(ours, reference)
    assert same_weights(ours, reference)


def test_optimizers_in_post_accumulate_hooks():
    """The idiom that frees each gradient as soon as it is there."""

    class InBackward(Chain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.steppers = {p: torch.optim.Adam([p]) for p in self.parameters()}
            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(self.update)

        def update(self, parameter):
            self.steppers[parameter].step()
            self.steppers[parameter].zero_grad()

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.step(batch))
            assert all(parameter.grad is None for parameter in self.parameters())

        def configure_optimizers(self):
            return None

    ours, reference, _ = both(InBackward, harmony(2, "120KiB", 8))
    assert same_weights(ours, reference)


def test_hooks_for_several_parameters():
    norms = []

    class Several(Chain):
        def on_train_start(self):
            parameters = [*self.net[0].parameters(), self.head.weight]
            parameters[0].register_hook(lambda gradient: None)
            parameters[1].register_hook(lambda gradient: None)
            parameters[2].register_hook(lambda gradient: None)
            torch.autograd.graph.register_multi_grad_hook(
                parameters, lambda gradients: norms.append([g.norm().item() for g in gradients])
            )

    both(Several, harmony(2, "120KiB", 8))
    assert norms[:2] == norms[2:]


def test_a_hook_that_fails_fails_the_step_with_its_own_error():
    class Failing(Chain):
        def __init__(self):
            super().__init__()
            self.head.bias.register_hook(self.fail)

        def fail(self, gradient):
            raise ValueError("in a parameter's hook")

    with pytest.raises(ValueError, match="in a parameter's hook"):
        trainer(harmony()).fit(Failing(), loader(8))


class TensorHooks(Chain):
    """Hooks on tensors of the user's own code, on a layer's result, and on one used across packs."""

    def __init__(self):
        super().__init__(depth=4)
        self.seen = {}
        for index, block in enumerate(self.net):
            block[0].register_full_backward_hook(
                lambda module, inputs, outputs, index=index: self.note(f"module {index}", *inputs, *outputs)
            )
            block[0].register_full_backward_pre_hook(
                lambda module, outputs, index=index: (outputs[0] * 1.5,) if index == 1 else None
            )
        self.head.register_forward_hook(self.watch_result)

    def note(self, name, *gradients):
        self.seen.setdefault(name, []).extend(g.detach().clone() for g in gradients if g is not None)

    def watch_result(self, module, inputs, result):
        result.register_hook(lambda gradient: self.note("head", gradient))

    def step(self, batch):
        inputs, targets = batch
        hidden = self.net[0](inputs)
        hidden.register_hook(lambda gradient: self.note("used twice", gradient))
        hidden.retain_grad()
        self.kept = hidden
        later = self.net[1:](hidden)
        later.register_hook(lambda gradient: gradient * 0.5)
        mixed = torch.tanh(later) + hidden
        mixed.register_hook(lambda gradient: self.note("glue", gradient))
        return nn.functional.mse_loss(self.head(mixed).squeeze(1), targets)

    def on_after_backward(self):
        self.note("retained", self.kept.grad)


@STRATEGIES
def test_tensor_and_module_hooks_get_the_gradients_of_plain_training(strategy):
    ours, reference, _ = both(TensorHooks, strategy())
    assert set(reference.seen) == {"used twice", "glue", "head", "retained", *(f"module {i}" for i in range(4))}
    assert_same_notes(ours, reference)
    assert same_weights(ours, reference)


class Ignoring(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        return self.linear(x) + y.detach()


@STRATEGIES
def test_a_tensor_that_gets_no_gradient_calls_no_hook(strategy):
    class Ignored(Chain):
        def __init__(self):
            super().__init__(depth=4)
            self.mix = Ignoring()

        def step(self, batch):
            inputs, targets = batch
            ignored = self.net(inputs)
            ignored.register_hook(lambda gradient: gradient.clamp(max=1))
            return nn.functional.mse_loss(self.head(self.mix(inputs, ignored)).squeeze(1), targets)

    ours, reference, _ = both(Ignored, strategy())
    assert same_weights(ours, reference)


@STRATEGIES
def test_forward_hooks_run_once_and_what_they_keep_has_a_gradient(strategy):
    class Matching(Chain):
        """Its loss uses what a hook has kept of the first layer, and hooks change what others return."""

        def __init__(self):
            super().__init__(depth=4)
            self.calls = []
            self.kept = {}
            self.net[0][0].register_forward_hook(self.keep)
            self.net[1][0].register_forward_hook(lambda module, args, result: result * 0.5)
            self.net[2][0].register_forward_hook(self.with_kwargs, with_kwargs=True)

        def keep(self, module, args, result):
            self.calls.append(tuple(result.shape))
            self.kept["hidden"] = result

        def with_kwargs(self, module, args, kwargs, result):
            self.calls.append(len(kwargs))

        def step(self, batch):
            return super().step(batch) + self.kept["hidden"].pow(2).mean()

    ours, reference, _ = both(Matching, strategy())
    assert ours.calls == reference.calls
    assert same_weights(ours, reference)


class Recorder(L.Callback):
    """Every hook around backward and step, with the norms of all gradients at that time."""

    def __init__(self, rows):
        self.rows = rows

    def note(self, name, module):
        norms = [None if p.grad is None else p.grad.norm().item() for p in module.parameters()]
        self.rows.append((name, norms))

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.note("callback zero", module)

    def on_before_backward(self, trainer, module, loss):
        self.rows.append(("callback loss", loss.item(), loss.requires_grad))
        self.note("callback before", module)

    def on_after_backward(self, trainer, module):
        self.note("callback after", module)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.note("callback step", module)

    def on_train_batch_end(self, trainer, module, *args):
        self.note("callback end", module)


class Overriding(Chain):
    """Takes over every hook that has to do with gradients."""

    rows: list

    def __init__(self):
        super().__init__(optimizer=torch.optim.Adam, amsgrad=True)
        self.rows = []

    def note(self, name):
        Recorder.note(self, name, self)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.note("optimizer_step")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.note("optimizer_step behind")

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.note("optimizer_zero_grad")
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.note("clip")
        self.clip_gradients(optimizer, 0.01, "norm")

    def on_before_zero_grad(self, optimizer):
        self.note("zero")

    def on_before_backward(self, loss):
        self.rows.append(("loss", loss.item()))

    def backward(self, loss):
        self.note("backward")
        loss.backward()

    def on_after_backward(self):
        self.note("after")
        self.head.weight.grad.mul_(2)

    def on_before_optimizer_step(self, optimizer):
        self.note("step")


@STRATEGIES
@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_hooks_see_complete_gradients_in_the_order_of_plain_training(strategy, accumulate):
    rows = []

    def callbacks():
        rows.append([])
        return [Recorder(rows[-1])]

    ours, reference, statistics = both(
        Overriding, strategy(), num_batches=4, callbacks=callbacks, accumulate_grad_batches=accumulate
    )
    assert rows[1] == rows[0]
    assert ours.rows == reference.rows
    assert same_weights(ours, reference)
    assert (statistics.updates_just_in_time, statistics.updates_whole) == (0, 4 // accumulate)


@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_gradients_can_be_looked_at_when_the_step_is_over_although_updates_were_just_in_time(microbatch_size):
    rows = []

    class Looking(L.Callback):
        def __init__(self):
            rows.append([])
            self.rows = rows[-1]

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step > len(self.rows):
                self.rows.append([p.grad.norm().item() for p in module.parameters()])

    ours, reference, statistics = both(
        Chain, harmony(2, microbatch_size=microbatch_size), microbatch_size, callbacks=lambda: [Looking()]
    )
    assert same_weights(ours, reference)
    assert rows[1] == rows[0]
    assert statistics.updates_just_in_time == 2


@pytest.mark.parametrize("by", ["trainer", "user"])
@pytest.mark.parametrize("where", ["layer", "glue"])
def test_an_anomaly_is_found_and_named_before_any_weight_has_changed(by, where):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return torch.sqrt(self.linear(x) * 0)

    class Odd(Chain):
        def __init__(self):
            super().__init__()
            self.root = Root()

        def on_train_start(self):
            torch.autograd.set_detect_anomaly(True)

        def step(self, batch):
            inputs, targets = batch
            hidden = self.net(inputs)
            hidden = self.root(hidden) if where == "layer" else torch.sqrt(self.root.linear(hidden) * 0)
            return nn.functional.mse_loss(self.head(hidden * 0).squeeze(1), targets)

    torch.manual_seed(0)
    module = Odd()
    before = [parameter.clone() for parameter in module.parameters()]
    layers = ["net.*", "root", "head"] if where == "layer" else ()
    with pytest.raises(RuntimeError, match=r"'SqrtBackward0' returned nan values") as caught:
        trainer(harmony(2, "170KiB", layers=layers), limit_train_batches=1, detect_anomaly=by == "trainer").fit(
            module, loader(8)
        )
    (note,) = [note for note in caught.value.__notes__ if note.startswith("harmony: ")]
    assert ("layer root" if where == "layer" else "between layers") in note
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_training_with_anomaly_detection_equals_training_without():
    ours, reference, statistics = both(Chain, harmony(), microbatch_size=2, detect_anomaly=True)
    assert same_weights(ours, reference)
    assert statistics.updates_whole == 2
