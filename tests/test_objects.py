"""Layers that are given objects with tensors inside, and metrics that keep tensors in their attributes."""

from dataclasses import dataclass

import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer
from torch import nn

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
