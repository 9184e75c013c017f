"""Forecasters of darts, which imports `pytorch_lightning`, builds its own modules, and makes its Trainer itself."""

import pytest

pytest.importorskip("darts.models", exc_type=(ImportError, RuntimeError))

import numpy as np
import torch
from beside_plain import QUIET
from darts import TimeSeries
from darts.models import NBEATSModel, RNNModel, TransformerModel, TSMixerModel

from harmony_lightning import EmulatedCluster
from harmony_lightning.pytorch_lightning import HarmonyStrategy

pytestmark = pytest.mark.third_party

KINDS = {
    "NBEATS": (NBEATSModel, {"num_stacks": 3, "num_layers": 2, "layer_widths": 64, "output_chunk_length": 4}),
    "Transformer": (TransformerModel, {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "output_chunk_length": 4}),
    "RNN": (RNNModel, {"model": "LSTM", "hidden_dim": 32, "n_rnn_layers": 2, "training_length": 16}),
    "TSMixer": (TSMixerModel, {"hidden_size": 32, "output_chunk_length": 4}),
}


def strategy():
    return HarmonyStrategy(cluster=EmulatedCluster(2, "3MiB"), memory="700KiB", microbatch_size=1_000_000)


@pytest.mark.parametrize("name", KINDS)
def test_forecasters_are_equal_to_the_bit(name):
    kind, sizes = KINDS[name]
    series = TimeSeries.from_values(np.sin(np.arange(60) / 3).astype("float32"))
    found = []
    for make_strategy in (lambda: "auto", strategy):
        options = {**QUIET, "strategy": make_strategy(), "limit_train_batches": 3}
        model = kind(
            input_chunk_length=12, n_epochs=1, batch_size=8, random_state=0, pl_trainer_kwargs=options, **sizes
        )
        model.fit(series, val_series=series)
        swapped = model.trainer.strategy
        model.trainer_params["strategy"] = make_strategy()
        found.append((model.model.state_dict(), model.predict(4, verbose=False).values()))
    assert swapped.statistics().steps == 3 and swapped.statistics().swap_in_bytes > 0
    (expected, forecast), (actual, forecast_too) = found
    tensors = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert tensors and all(torch.equal(expected[name], actual[name]) for name in tensors)
    assert np.array_equal(forecast, forecast_too)
