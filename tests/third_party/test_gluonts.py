"""DeepAR of gluonts, whose estimator makes the module and the Trainer itself."""

import random

import pytest

pytest.importorskip("gluonts.torch", exc_type=(ImportError, RuntimeError))

import numpy as np
import torch
from beside_plain import QUIET
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator

import harmony_lightning  # noqa: F401  the name of the strategy, where the package is not installed

pytestmark = pytest.mark.third_party


def run(strategy):
    """Weights, and sampled forecasts."""
    walks = [np.random.default_rng(i).normal(size=80).cumsum() for i in range(4)]
    series = ListDataset([{"start": "2020-01-01", "target": walk} for walk in walks], freq="D")
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=4,
        num_layers=3,
        hidden_size=32,
        batch_size=8,
        num_batches_per_epoch=3,
        trainer_kwargs={**QUIET, "enable_checkpointing": True, "max_epochs": 2, "strategy": strategy},
    )
    predictor = estimator.train(series)
    return predictor.prediction_net.state_dict(), [forecast.samples for forecast in predictor.predict(series)]


def test_deep_ar_is_equal_to_the_bit(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = {"EMULATED_GPUS": 2, "MEMORY": "8MiB", "ONE_LAYER_PER_PACK": 1, "MICROBATCH_SIZE": 1_000_000}
    for name, value in settings.items():
        monkeypatch.setenv(f"HARMONY_{name}", str(value))
    (expected, forecasts), (actual, forecasts_too) = run("auto"), run("harmony")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert all(map(np.array_equal, forecasts_too, forecasts))
