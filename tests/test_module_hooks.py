"""What users hang on their modules: hooks, parametrisations, normalisations, pruning."""

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated", "ignore:.*Full backward hook is firing")


def fit_both(change, microbatch_size=8, num_gpus=2, memory="200KiB", depth=16, **options):
    """A chain that `change` has changed, plainly and under harmony; both after one epoch, and what `change` returned."""
    runs = []
    for strategy in ("auto", harmony(num_gpus, memory, microbatch_size=microbatch_size)):
        torch.manual_seed(0)
        module = Chain(depth=depth)
        noted = change(module)
        accumulate = 8 // microbatch_size if strategy == "auto" else 1
        run = trainer(strategy, accumulate_grad_batches=accumulate, **options)
        run.fit(module, loader(8 // accumulate), loader(8))
        runs.append((module, noted))
    weights = sum(p.nbytes for p in module.parameters())
    assert weights > run.strategy.plan.memory_bytes
    return *runs[0], *runs[1]


def linears(module):
    return [block[0] for block in module.net]


def test_forward_hooks_and_pre_hooks_change_and_see_values():
    """One value per call; microbatches in their order at each layer."""

    def change(module):
        seen = []
        for index, linear in enumerate(linears(module)):
            linear.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
            linear.register_forward_hook(lambda m, args, out, index=index: seen.append((index, out.sum().item())))
            linear.register_forward_hook(lambda m, args, out: out - 0.1)
        return seen

    reference, expected, ours, seen = fit_both(change, microbatch_size=2)
    assert same_weights(ours, reference)
    assert sorted(dict.fromkeys(seen)) == sorted(dict.fromkeys(expected))


def test_a_forward_hook_may_run_again_when_backward_recomputes_its_layer():
    """As under activation checkpointing, if backward needs what comes behind it. Where nothing is differentiated it runs
    once."""

    def change(module):
        calls = []
        module.net[9].insert(1, nn.Tanh())
        for index, watched in enumerate((module.net[5], module.net[7][0], module.net[9][1])):
            watched.register_forward_hook(lambda m, args, out, index=index: calls.append((index, m.training, len(out))))
        return calls

    reference, expected, ours, calls = fit_both(change)
    assert same_weights(ours, reference)
    for index in range(3):
        assert expected.count((index, True, 8)) == 5
        assert calls.count((index, True, 8)) in (5, 10)
        assert calls.count((index, False, 8)) == expected.count((index, False, 8))


def test_tensor_hooks_that_a_forward_hook_registers_fire():
    """The usual way to gradients of activations."""

    def change(module):
        norms = []

        def watch(m, args, out):
            if out.requires_grad:
                out.register_hook(lambda gradient: norms.append(gradient.norm().item()))

        for watched in (module.net[5], module.net[7][0]):
            watched.register_forward_hook(watch)
        return norms

    reference, expected, ours, norms = fit_both(change)
    assert same_weights(ours, reference)
    assert norms == expected
    assert len(norms) == 10


def test_hooks_on_activations_feed_a_loss():
    """Feature extraction: results kept by a hook are used between layers."""

    class Extracting(Chain):
        def __init__(self):
            super().__init__(depth=16)
            self.kept = {}
            for index in (3, 11):
                self.net[index].register_forward_hook(self.keep(index))

        def keep(self, index):
            def hook(module, args, result):
                self.kept[index] = result

            return hook

        def step(self, batch):
            loss = super().step(batch)
            return loss + sum(kept.square().mean() for kept in self.kept.values())

    runs = []
    for strategy in ("auto", harmony(2, "200KiB", microbatch_size=8)):
        torch.manual_seed(0)
        module = Extracting()
        trainer(strategy).fit(module, loader(8))
        runs.append(module)
    assert same_weights(*runs)


@pytest.mark.parametrize("place", ["layer", "within a layer", "above layers"])
def test_full_backward_hooks_see_and_change_gradients(place):
    def change(module):
        seen = []

        def see(m, grad_input, grad_output):
            seen.append((grad_output[0].norm().item(), None if grad_input[0] is None else grad_input[0].norm().item()))
            return (grad_input[0] * 0.5,) if grad_input[0] is not None else None

        target = {"layer": module.net[4], "within a layer": module.net[4][0], "above layers": module.net}[place]
        target.register_full_backward_hook(see)
        target.register_full_backward_pre_hook(lambda m, grad_output: (grad_output[0] * 2,))
        return seen

    reference, expected, ours, seen = fit_both(change)
    assert seen == expected != []
    assert same_weights(ours, reference)


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y, *, scale):
        return self.one(x) * scale, torch.tanh(self.other(y))


class Forked(Chain):
    """Two inputs and two results; one input needs no gradient. The root is called, too."""

    def __init__(self):
        super().__init__(depth=8)
        self.two = _Two()

    def forward(self, x):
        return self.head(sum(self.two(x, y=self.net(x), scale=2.0)))

    def step(self, batch):
        return nn.functional.mse_loss(self(batch[0]).squeeze(1), batch[1])


def test_full_backward_hooks_of_all_modules_see_the_same():
    """Tensors where plain training has tensors, and None where it has None."""

    def told(gradients):
        return [None if gradient is None else gradient.norm().item() for gradient in gradients]

    seen = []
    for strategy in ("auto", harmony(2, "120KiB", microbatch_size=8), harmony(2, "20MiB", microbatch_size=8)):
        torch.manual_seed(0)
        module = Forked()
        noted = {name: [] for name, _ in module.named_modules()}
        for name, inner in module.named_modules():
            calls = noted[name]
            inner.register_full_backward_pre_hook(lambda m, g, calls=calls: calls.append(told(g)))
            inner.register_full_backward_hook(lambda m, i, o, calls=calls: calls.append((told(i), told(o))))
        trainer(strategy, limit_train_batches=3).fit(module, loader(8))
        seen.append(noted)
    assert seen[1] == seen[0] == seen[2]
    assert all(len(calls) == 6 for calls in noted.values())


def test_hooks_that_are_removed_in_the_middle_of_training():
    class Watching(Chain):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.handle = self.net[2][0].register_forward_hook(lambda m, args, out: out * 2)
            if batch_idx == 3:
                self.handle.remove()

    runs = []
    for strategy in ("auto", harmony(microbatch_size=8)):
        torch.manual_seed(0)
        module = Watching()
        trainer(strategy).fit(module, loader(8))
        runs.append(module)
    assert same_weights(*runs)


def parametrize_all(function):
    def change(module):
        for linear in linears(module):
            function(linear)

    return change


NORMALISATIONS = {
    "weight_norm hook": weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm hook": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda linear: prune.random_unstructured(linear, "weight", amount=0.4),
    "pruned twice": lambda linear: prune.ln_structured(
        prune.random_unstructured(linear, "weight", amount=0.3), "weight", amount=0.3, n=2, dim=0
    ),
}


@pytest.mark.parametrize("change", NORMALISATIONS.values(), ids=NORMALISATIONS)
def test_normalised_and_pruned_weights(change):
    """One microbatch: to the bit, power iterations in buffers included."""
    reference, _, ours, _ = fit_both(parametrize_all(change), memory="250KiB", depth=20)
    assert same_weights(ours, reference)


@pytest.mark.parametrize("kind", ["weight_norm hook", "weight_norm", "pruned"])
def test_normalised_and_pruned_weights_in_microbatches(kind):
    """Without a state that calls write, four microbatches equal accumulation."""
    reference, _, ours, _ = fit_both(
        parametrize_all(NORMALISATIONS[kind]), microbatch_size=2, memory="250KiB", depth=20
    )
    assert same_weights(ours, reference)


@pytest.mark.parametrize("kind", ["weight_norm hook", "spectral_norm hook", "pruned"])
def test_weights_that_hooks_made_are_on_the_host_afterwards(kind):
    reference, _, ours, _ = fit_both(parametrize_all(NORMALISATIONS[kind]), memory="250KiB", depth=20)
    for mine, theirs in zip(linears(ours), linears(reference), strict=True):
        assert type(mine.weight) is torch.Tensor
        assert torch.equal(mine.weight, theirs.weight)


def test_pruning_is_made_permanent_afterwards():
    reference, _, ours, _ = fit_both(parametrize_all(NORMALISATIONS["pruned"]), memory="250KiB", depth=20)
    for linear in (*linears(ours), *linears(reference)):
        prune.remove(linear, "weight")
    assert same_weights(ours, reference)


class Normed(Chain):
    def __init__(self):
        super().__init__(depth=16)
        for index in (2, 9):
            self.net[index].append(nn.BatchNorm1d(WIDTH))


@pytest.mark.parametrize("microbatch_size", [1, 3])
def test_microbatches_of_batch_norms_have_two_samples_at_least(microbatch_size):
    sizes = []

    class Counting(Normed):
        def step(self, batch):
            sizes.append(len(batch[0]))
            return super().step(batch)

    module = Counting()
    trainer(harmony(2, "200KiB", microbatch_size=microbatch_size), limit_train_batches=1).fit(module, loader(7))
    assert sum(sizes) == 7
    assert min(sizes) >= 2


def test_sync_batchnorm_changes_nothing_in_one_process():
    runs = []
    for strategy in ("auto", harmony(2, "200KiB", microbatch_size=8)):
        torch.manual_seed(0)
        module = Normed()
        trainer(strategy, sync_batchnorm=True).fit(module, loader(8))
        assert any(type(m) is nn.BatchNorm1d for m in module.modules())
        runs.append(module)
    assert same_weights(*runs)
