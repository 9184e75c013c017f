"""A message-passing network of chemprop: layers are given a graph object, and the loss is a metric."""

import pytest

pytest.importorskip("chemprop", exc_type=(ImportError, RuntimeError))

import numpy as np
from beside_plain import run_both
from chemprop import data, featurizers, models
from chemprop import nn as chemprop_nn

pytestmark = pytest.mark.third_party


def test_a_message_passing_network_is_equal_to_the_bit():
    molecules = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCC", "CCCl", "CNC", "COC"]
    points = [data.MoleculeDatapoint.from_smi(text, np.array([float(i)])) for i, text in enumerate(molecules)]
    dataset = data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())
    loader = data.build_dataloader(dataset, shuffle=False, batch_size=4, num_workers=0)

    def make_module():
        return models.MPNN(
            chemprop_nn.BondMessagePassing(d_h=64, depth=3),
            chemprop_nn.MeanAggregation(),
            chemprop_nn.RegressionFFN(input_dim=64, hidden_dim=128, n_layers=4),
            batch_norm=True,
        )

    runs = run_both(make_module, loader, memory=600_000, room=900_000, validate=loader, predict=loader)
    assert runs.differences == {}
