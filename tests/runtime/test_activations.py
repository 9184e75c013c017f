"""What operations inside a layer save: made again, no more than needed, or kept."""

import copy
import gc
import weakref

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer, twins
from torch import nn

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.runtime.activations import Activations

pytestmark = pytest.mark.usefixtures("devices")


class Scaled(torch.autograd.Function):
    """A user's own function, which reads what it saved twice."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, _ = ctx.saved_tensors
        _, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class ScaledByAttribute(torch.autograd.Function):
    """One that holds a weight as an attribute of its own, where no hook of autograd sees it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * ctx.weight, (gradient * x).sum(0)


class Scale(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return self.function.apply(x, self.weight)


class Counted(nn.Module):
    """Counts how far its forward gets."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.begun = self.ended = 0

    def forward(self, x):
        self.begun += 1
        y = self.linear(x)
        self.ended += 1
        return y


class WithBlocks(Chain):
    """The chain, with one more kind of block behind each of its own."""

    def __init__(self, make_block, **options):
        super().__init__(depth=6, **options)
        for block in self.net:
            block.append(make_block())


class WithDetour(WithBlocks):
    """Its second block has no backward, so that packs come back into other slots than they were in."""

    def step(self, batch):
        x = self.net[0](batch[0])
        with torch.no_grad():
            detour = self.net[1](x)
        return self.head(self.net[2:](x + detour)).square().mean()


@pytest.mark.parametrize("function", [Scaled, ScaledByAttribute])
def test_functions_of_the_user_differentiate_as_always(function):
    torch.manual_seed(0)
    ours = WithDetour(lambda: Scale(function))
    reference = copy.deepcopy(ours)
    trainer(harmony(num_gpus=1, memory="160KiB", layers=["net.*", "head"])).fit(ours, loader(8))
    trainer(accumulate_grad_batches=4).fit(reference, loader(2))
    assert same_weights(ours, reference)


@pytest.mark.usefixtures("nothing_stays")
def test_a_recompute_ends_with_what_backward_needs():
    module = WithBlocks(Counted)
    trainer(harmony(layers=["net.*", "head"])).fit(module, loader(8))
    counters = [block[2] for block in module.net]
    # 5 minibatches of 4 microbatches. The matrix product saves its operands and is not done again.
    assert [counter.ended for counter in counters] == [20] * 6
    assert [counter.begun for counter in counters] == [40] * 6


@pytest.mark.usefixtures("nothing_stays")
def test_the_last_layer_is_not_run_again():
    module, _ = twins()
    module.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), Counted(), nn.Tanh(), nn.Linear(WIDTH, 1))
    fitted = trainer(harmony(memory="400KiB", layers=["net.*", "head"]))
    fitted.fit(module, loader(8))
    assert fitted.strategy.plan.keep == ("head",)
    assert module.head[1].begun == 20  # 5 minibatches of 4 microbatches


class OutOfOrder(Chain):
    """Goes through its last layer first, and out of that pack again."""

    def step(self, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(
            self.head(self.net(self.tail(inputs))).squeeze(1) + self.tail(inputs)[:, 0], targets
        )

    def __init__(self):
        super().__init__()
        self.tail = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def test_a_microbatch_may_leave_the_pack_whose_layer_kept_its_activations():
    torch.manual_seed(0)
    ours = OutOfOrder()
    reference = copy.deepcopy(ours)
    options = {"num_gpus": 1, "memory": "160KiB", "layers": ["net.*", "head", "tail"]}
    first = trainer(harmony(**options), max_steps=1)
    first.fit(copy.deepcopy(ours), loader(8))
    given = first.strategy.plan
    assert given.keep == ("tail",)  # in the order of registration, which the first step shows not to be that of calls
    trainer(harmony(**options, plan=given)).fit(ours, loader(8))
    trainer(accumulate_grad_batches=4).fit(reference, loader(2))
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)  # tail's two gradients are added elsewhere


def recompute_of(*tensors):
    def recompute(save):
        with torch.autograd.graph.saved_tensors_hooks(save, lambda position: None):
            for tensor in tensors:
                torch.exp(tensor)  # saves its result

    return recompute


def test_what_was_handed_out_is_not_held():
    activations = Activations("layer", is_kept=False)
    x = torch.ones(3, requires_grad=True)
    assert activations.save(x.exp()) == 0
    activations.open(recompute_of(x))
    loaded = activations.load(0)
    assert activations.load(0) is loaded
    reference = weakref.ref(loaded)
    del loaded
    gc.collect()
    assert reference() is None
    assert torch.equal(activations.load(0), x.exp())  # made once more


def test_what_was_made_again_goes_with_the_backward_though_nobody_asked_for_it():
    made = []

    def recompute(save):
        with torch.autograd.graph.saved_tensors_hooks(save, lambda position: None):
            exponential = torch.ones(3, requires_grad=True).exp()
            made.append(weakref.ref(exponential))
            exponential.sin()  # saves a tensor whose own graph holds the hook

    activations = Activations("layer", is_kept=False)
    for _ in range(2):
        activations.save(torch.ones(3))
    activations.open(recompute)
    activations.load(0)
    gc.disable()
    try:
        assert made[0]() is not None
        activations.close()
        assert made[0]() is None
    finally:
        gc.enable()


def test_what_was_written_since_is_made_again():
    activations = Activations("layer", is_kept=True)
    x = torch.ones(3, requires_grad=True)
    result = x.exp().detach()
    activations.save(result)
    result.mul_(2)
    activations.open(recompute_of(x))
    assert torch.equal(activations.load(0), x.exp())


@pytest.mark.parametrize("other", [[], [torch.ones(2)]], ids=["fewer", "of another shape"])
def test_a_recompute_that_differs_is_refused(other):
    activations = Activations("net.3", is_kept=False)
    activations.save(torch.ones(3))
    activations.open(recompute_of(*(tensor.requires_grad_() for tensor in other)))
    with pytest.raises(UnsupportedError, match=r"layer net\.3 did something else when it was recomputed"):
        activations.load(0)


def test_nothing_is_available_outside_of_backward():
    activations = Activations("net.3", is_kept=True)
    activations.save(torch.ones(3))
    with pytest.raises(UnsupportedError, match=r"inside layer net\.3 was used outside"):
        activations.load(0)
