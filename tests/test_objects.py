"""Layers that are given objects with tensors inside, and metrics that keep tensors in their attributes."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn

from harmony_lightning import HarmonyStrategy, UnsupportedError
from harmony_lightning.runtime.structure import place_tensors


@dataclass(frozen=True)
class Graph:
    nodes: torch.Tensor
    weights: dict
    note: str = "kept"


class OnGraphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, graph):
        return self.linear(graph.nodes).relu() * graph.weights["scale"][:, None]


class Total(nn.Module):
    """As metrics are: a buffer, and sums in plain attributes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.total = torch.tensor(0.0)

    def forward(self, loss):
        self.total += loss.detach()
        graph = torch.tensor(0.0)
        graph += loss
        return graph * self.scale.sum()


class WithObjects(Chain):
    def __init__(self, **options):
        super().__init__(**options)
        self.on_graphs = OnGraphs()
        self.criterion = Total()

    def step(self, batch):
        inputs, targets = batch
        graph = Graph(inputs, {"scale": inputs.mean(1)})
        hidden = self.on_graphs(graph) + self.net(inputs).flip(0)
        # A slice and an expanded tensor: layers are recomputed with the strides of the first time.
        hidden = self.net[0](torch.stack([hidden, hidden], 2)[:, :, 0]) + self.net[1](
            inputs[:1].expand(len(inputs), -1)
        )
        assert graph.note == "kept"
        return self.criterion(nn.functional.mse_loss(self.head(hidden).squeeze(1), targets))


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_layers_take_objects_with_tensors_inside(num_gpus):
    modules = []
    for strategy in ("auto", harmony(num_gpus, "160KiB", microbatch_size=8)):
        torch.manual_seed(0)
        modules.append(WithObjects(optimizer=torch.optim.SGD))
        trainer(strategy, limit_train_batches=3).fit(modules[-1], loader(8))
    assert modules[0].losses == modules[1].losses
    assert modules[0].criterion.total.item() == modules[1].criterion.total.item()
    assert same_weights(*modules)


def test_tensors_are_placed_in_the_objects_that_hold_them():
    inner = Graph(torch.ones(2), {"scale": torch.zeros(1)})
    outer = {"graph": inner, "pair": (torch.ones(1), "text"), "list": [torch.ones(3), inner]}
    outer["self"] = outer
    assert place_tensors(outer, lambda tensor: tensor + 1) is outer
    assert outer["graph"] is inner and outer["list"][1] is inner
    assert inner.nodes.tolist() == [2, 2] and inner.weights["scale"].tolist() == [1]
    assert outer["pair"][0].tolist() == [2] and outer["pair"][1] == "text"
    assert outer["list"][0].tolist() == [2, 2, 2]


# Gradients through objects --------------------------------------------------------------------------------------------


class Bag:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("hidden",)

    def __init__(self, hidden):
        self.hidden = hidden


class Attributes(dict):
    """As configuration libraries and metric dicts are."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


@dataclass
class Record:
    hidden: torch.Tensor


KINDS = [Bag, Slotted, Attributes, Record, SimpleNamespace]


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return 2 * gradient * weight, 2 * (gradient * x).sum(0)


class Reading(nn.Module):
    """Returns a tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, bag):
        return Twice.apply(bag.hidden, self.scale) + self.linear(bag.hidden).relu()


class Replacing(Reading):
    """Leaves its result in the object, and returns that."""

    def forward(self, bag):
        bag.hidden = super().forward(bag)
        return bag


class Making(Reading):
    """Returns another object."""

    def forward(self, bag):
        return Bag(hidden=self.linear(bag.hidden).relu() * self.scale, former=[bag.hidden])


class Writing(Reading):
    """Writes a tensor within the object in place. Recompute must find the object as it was."""

    def forward(self, bag):
        bag.hidden *= 0.5
        return (self.linear(bag.hidden) * self.scale).tanh()


class OverBags(Chain):
    def __init__(self, kind, layer, **options):
        super().__init__(depth=4, **options)
        self.kind = kind
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(4))

    def step(self, batch):
        inputs, targets = batch
        bag = self.kind(hidden=self.first(inputs))
        for layer in self.layers:
            before, result = bag.hidden, layer(bag)
            if isinstance(layer, Replacing):
                assert result is bag
                assert bag.hidden is not before
            elif isinstance(layer, Making):
                bag = self.kind(hidden=result.hidden + 0.5 * result.former[0])
            elif isinstance(layer, Writing):
                bag = self.kind(hidden=bag.hidden + result)
            else:
                assert bag.hidden is before
                bag = self.kind(hidden=result)
        return nn.functional.mse_loss(self.head(self.net(bag.hidden)).squeeze(1), targets)


def both(reference, strategy, microbatch_size=8):
    ours = copy.deepcopy(reference)
    parts = 8 // microbatch_size
    plain = {"accumulate_grad_batches": parts} if parts > 1 else {}
    trainer(limit_train_batches=2 * parts, **plain).fit(reference, loader(microbatch_size))
    trainer(strategy, limit_train_batches=2).fit(ours, loader(8))
    return ours, reference


LAYERS = ["first", "layers.*", "net.*", "head"]


@pytest.mark.parametrize(("num_gpus", "microbatch_size", "stash"), [(1, 8, "host"), (2, 2, "host"), (2, 2, "device")])
@pytest.mark.parametrize("layer", [Reading, Replacing, Making, Writing])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_objects(kind, layer, num_gpus, microbatch_size, stash):
    torch.manual_seed(0)
    strategy = harmony(num_gpus, "160KiB", microbatch_size, layers=LAYERS, stash=stash)
    ours, reference = both(OverBags(kind, layer, optimizer=torch.optim.SGD), strategy, microbatch_size)
    assert same_weights(ours, reference)
    assert sorted(ours.losses) == sorted(reference.losses)


def test_objects_train_on_the_host_and_in_one_piece():
    class Manual(OverBags):
        def __init__(self):
            super().__init__(Bag, Replacing, optimizer=torch.optim.SGD)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(self.step(batch))
            self.optimizers().step()

    for strategy in (HarmonyStrategy(microbatch_size=8), harmony(2, "160KiB", 8, layers=LAYERS)):
        torch.manual_seed(0)
        ours, reference = both(Manual(), strategy)
        assert same_weights(ours, reference)


class Tail(nn.Module):
    """Adds to a cache, of which each layer looks at its own entry and at the one before."""

    def __init__(self, index):
        super().__init__()
        self.index = index
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, cache):
        if self.index:
            hidden = hidden + cache.entries[self.index - 1].mean(0)
        cache.entries.append(self.linear(hidden))
        return hidden + cache.entries[-1].tanh()


def test_of_a_cache_that_goes_through_all_layers_only_what_is_used_is_moved():
    class Cached(Chain):
        def __init__(self):
            super().__init__(depth=1, optimizer=torch.optim.SGD)
            self.layers = nn.ModuleList(Tail(index) for index in range(8))

        def step(self, batch):
            hidden, cache = self.net(batch[0]), Bag(entries=[])
            for layer in self.layers:
                hidden = layer(hidden, cache)
            entries = sum(entry.mean() for entry in cache.entries)
            return nn.functional.mse_loss(self.head(hidden).squeeze(1), batch[1]) + entries

    torch.manual_seed(0)
    reference = Cached()
    ours = copy.deepcopy(reference)
    trainer(limit_train_batches=1).fit(reference, loader(8))
    fitted = trainer(harmony(2, "160KiB", 8, layers=["layers.*", "net.*", "head"]), limit_train_batches=1)
    fitted.fit(ours, loader(8))
    assert same_weights(ours, reference)
    entry_nbytes = 8 * WIDTH * 4
    # Each border passes the hidden state and one entry, there and back; all entries go to the last pack, and back.
    assert fitted.strategy.statistics().p2p_bytes <= entry_nbytes * (9 * 2 * 2 + 8 * 2)


@pytest.mark.parametrize("container", [dict, list])
def test_what_a_layer_writes_into_lists_and_dicts_is_seen(container):
    class Into(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, state, inner):
            if container is dict:
                state["out"] = self.linear(state.pop("in"))
            else:
                state.append(self.linear(state.pop()))
            inner["seen"].append(1)

    class Over(Chain):
        def __init__(self):
            super().__init__(depth=2, optimizer=torch.optim.SGD)
            self.into = Into()

        def step(self, batch):
            hidden, seen = self.net(batch[0]), []
            state = {"other": hidden, "in": hidden} if container is dict else [hidden, hidden]
            self.into(state, inner={"seen": seen})
            assert seen == [1]
            assert len(state) == 2
            assert state["other" if container is dict else 0] is hidden
            hidden = state["out" if container is dict else 1]
            return nn.functional.mse_loss(self.head(hidden).squeeze(1), batch[1])

    for strategy in (harmony(2, "160KiB", 2, layers=["into", "net.*", "head"]), HarmonyStrategy(microbatch_size=2)):
        torch.manual_seed(0)
        ours, reference = both(Over(), strategy, 2)
        assert same_weights(ours, reference)


def test_autograd_functions_of_the_user_s_own_work_between_layers():
    class Around(Chain):
        def __init__(self):
            super().__init__(depth=4, optimizer=torch.optim.SGD)
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def step(self, batch):
            first = self.net[0](batch[0])
            hidden = self.net[1:](first) + Twice.apply(first, self.scale)
            return nn.functional.mse_loss(self.head(hidden).squeeze(1), batch[1])

    torch.manual_seed(0)
    ours, reference = both(Around(), harmony(2, "160KiB", 2, layers=["net.*", "head"]), 2)
    assert same_weights(ours, reference)


class Made:
    """Cannot be copied part by part."""

    def __new__(cls, hidden):
        made = object.__new__(cls)
        made.hidden = hidden
        return made


def by_attribute(module, hidden):
    module.layers[0].kept = hidden
    return module.layers[0](module.first(hidden))


def by_closure(module, hidden):
    return module.layers[0](module.first(hidden), lambda x: x + hidden)


def by_made(module, hidden):
    return module.layers[0](Made(hidden))


@pytest.mark.parametrize(
    ("hand_over", "message"),
    [
        (
            by_attribute,
            r"layer layers.0 used a result of \w+, which requires a gradient and is neither an argument nor",
        ),
        (by_closure, r"layer layers.0 used a result of \w+, which requires a gradient and is neither an argument nor"),
        (by_made, r"layer layers.0 was given an object .* shape \(8, 64\).* cannot be copied"),
    ],
)
def test_a_gradient_that_would_be_lost_is_refused(hand_over, message):
    class Anyhow(Reading):
        kept = None

        def forward(self, given, function=None):
            if isinstance(given, Made):
                given = given.hidden
            if function is not None:
                given = function(given)
            return self.linear(given if self.kept is None else given + self.kept)

    class Losing(OverBags):
        def step(self, batch):
            return self.head(hand_over(self, self.first(batch[0]))).mean()

    with pytest.raises(UnsupportedError, match=message):
        trainer(harmony(1, "200KiB", 8, layers=LAYERS), limit_train_batches=1).fit(Losing(Bag, Anyhow), loader(8))
