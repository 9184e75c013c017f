"""What torch refuses because a tensor that backward needs was written in place is refused here, too, or computed rightly:
gradients are never those of other values."""

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn

MODIFIED = "one of the variables needed for gradient computation has been modified by an inplace operation"


class Writing(nn.Module):
    """A layer that writes what one of its operations has saved, in front of another that saves something. It begins to when
    what it did first has been learned."""

    is_on = True

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        hidden = torch.sigmoid(self.first(x))
        if self.is_on:
            (x if self.what == "its input" else hidden).mul_(2)
        return self.second(hidden)


class Written(Chain):
    def __init__(self, what):
        super().__init__(depth=4)
        self.writing = Writing(what)

    def on_train_batch_start(self, batch, batch_idx):
        self.writing.is_on = batch_idx == 2

    def step(self, batch):
        inputs, targets = batch
        return super().step((self.writing(self.net[0](inputs)), targets))


KINDS = {
    "recomputed": {"memory": "120KiB", "microbatch_size": 8},
    "kept": {"memory": "20MiB", "microbatch_size": 8},
    "joint": {"memory": "120KiB", "microbatch_size": 2, "microbatches_per_forward": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["its input", "a result"])
def test_a_layer_may_not_write_what_its_backward_needs(what, kind):
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=MODIFIED):
        trainer().fit(Written(what), loader(8))
    strategy = harmony(**KINDS[kind], one_layer_per_pack=True, layers=(Writing,))
    with pytest.raises(RuntimeError, match=rf"{MODIFIED}.* x.clone") as caught:
        trainer(strategy).fit(Written(what), loader(8))
    assert any("in backward of layer writing" in note for note in caught.value.__notes__)


class Clamping(nn.Module):
    """Bounds one weight when others of its slot have been saved; takes a derivative by itself, or not."""

    def __init__(self, differentiates):
        super().__init__()
        self.differentiates = differentiates
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        hidden = torch.sigmoid(self.first(x))
        with torch.no_grad():
            self.second.weight.clamp_(-0.05, 0.05)
        if self.differentiates:
            (slope,) = torch.autograd.grad(hidden.square().sum(), hidden, create_graph=True)
            hidden = hidden + slope
        return self.second(hidden)


@pytest.mark.parametrize("kind", ["recomputed", "kept"])
@pytest.mark.parametrize("differentiates", [False, True])
def test_a_layer_may_write_another_weight_than_what_it_has_used(differentiates, kind):
    fits = []
    for strategy in ("auto", harmony(**KINDS[kind], one_layer_per_pack=True, layers=("net.*", "head", Clamping))):
        torch.manual_seed(0)
        module = Chain(depth=3)
        module.net.insert(1, Clamping(differentiates))
        trainer(strategy).fit(module, loader(8))
        fits.append(module)
    assert same_weights(*fits)


class Late(Chain):
    """Code between layers writes, in place or not, an input of a layer, its result, or a result of its own."""

    def __init__(self, what, in_place=True):
        super().__init__(depth=4)
        self.what, self.in_place = what, in_place
        self.bounded = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid())

    def double(self, x, what):
        if what != self.what:
            return x
        return x.mul_(2) if self.in_place else x * 2

    def step(self, batch):
        inputs, targets = batch
        before = self.net[0](inputs) + 0
        result = self.bounded(before)
        before = self.double(before, "an input")
        rooted = (result + 1).sqrt()
        result, rooted = self.double(result, "a result"), self.double(rooted, "the code's own")
        return super().step((before + result + rooted, targets))


@pytest.mark.parametrize("memory", ["120KiB", "20MiB"])
@pytest.mark.parametrize("what", ["an input", "a result", "the code's own"])
def test_what_is_written_late_between_layers_has_the_gradient_of_what_was_there(what, memory):
    with pytest.raises(RuntimeError, match=MODIFIED):
        trainer().fit(Late(what), loader(8))
    fits = []
    for module, strategy in ((Late, harmony(memory=memory, microbatch_size=8)), (lambda w: Late(w, False), "auto")):
        torch.manual_seed(0)
        fits.append(module(what))
        trainer(strategy).fit(fits[-1], loader(8))
    assert same_weights(*fits)


class Between(Chain):
    """Code between layers writes a weight that trains."""

    def __init__(self, write):
        super().__init__(depth=4)
        self.write = write

    def step(self, batch):
        self.write(self.head.weight)
        return super().step(batch)


def _set_item(weight):
    weight[0, 0] = 1


@pytest.mark.parametrize("write", [torch.Tensor.zero_, _set_item, lambda weight: torch.relu_(weight)])
@pytest.mark.parametrize("strategy", ["auto", harmony, lambda: harmony(memory="20MiB", microbatch_size=8)])
def test_a_weight_may_not_be_written_where_a_gradient_would_go_on_from_it(write, strategy):
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad is being used in an in-place operation"):
        trainer(strategy if strategy == "auto" else strategy()).fit(Between(write), loader(8))


def test_initialisations_write_weights_without_gradient():
    """Which torch's functions see to by themselves; the weight is written, and trains on from there."""
    fits = []
    for strategy in ("auto", harmony(microbatch_size=8)):
        torch.manual_seed(0)
        fits.append(Between(lambda weight: nn.init.constant_(weight, 0.1)))
        trainer(strategy, limit_train_batches=3).fit(fits[-1], loader(8))
    assert same_weights(*fits)
