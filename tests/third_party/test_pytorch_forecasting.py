"""Forecasters of pytorch-forecasting: unchanged LightningModules, dataloaders and `predict` of that package."""

import pytest

pytest.importorskip("pytorch_forecasting", exc_type=(ImportError, RuntimeError))

import numpy as np
import pandas as pd
from beside_plain import run_both
from pytorch_forecasting import DecoderMLP, DeepAR, NBeats, NHiTS, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss

pytestmark = pytest.mark.third_party


def series(**columns):
    rng = np.random.default_rng(0)
    frames = [
        pd.DataFrame(
            {
                "time": np.arange(40),
                "group": f"series {i}",
                "target": rng.normal(size=40).cumsum().astype("float32"),
                "known": rng.normal(size=40).astype("float32"),
                "kind": rng.choice(["a", "b", "c"], 40),
            }
        )
        for i in range(4)
    ]
    return TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True),
        time_idx="time",
        target="target",
        group_ids=["group"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["target"],
        **columns,
    )


def with_covariates():
    return series(
        time_varying_known_reals=["known"],
        time_varying_known_categoricals=["kind"],
        static_categoricals=["group"],
        add_relative_time_idx=True,
        add_target_scales=True,
    )


def run(data, make_module, **options):
    train = data.to_dataloader(train=True, batch_size=8, num_workers=0, shuffle=False)
    validate = data.to_dataloader(train=False, batch_size=8, num_workers=0)

    def predict_with(module, strategy):
        trainer = {"strategy": strategy, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        return module.predict(validate, mode="raw", trainer_kwargs=trainer)

    limits = {"limit_train_batches": 3, "limit_val_batches": 2}
    return run_both(make_module, train, validate=validate, predict_with=predict_with, **limits, **options)


@pytest.mark.parametrize(
    ("make_data", "kind", "sizes", "memory"),
    [
        (series, NBeats, {"widths": [64, 128], "num_blocks": [2, 2], "num_block_layers": [2, 2]}, 280_000),
        (series, NHiTS, {"hidden_size": 64}, 100_000),
        (with_covariates, DecoderMLP, {"hidden_size": 128, "n_hidden_layers": 4}, 400_000),
    ],
)
def test_feed_forward_forecasters_are_equal_to_the_bit(make_data, kind, sizes, memory):
    data = make_data()
    runs = run(
        data,
        lambda: kind.from_dataset(data, learning_rate=0.01, log_interval=-1, **sizes),
        memory=memory,
        room=2 * memory,
    )
    assert runs.differences == {}


def test_deep_ar_is_equal_to_the_bit():
    """Its forecasts are samples, so that random numbers are drawn between layers."""
    data = series(time_varying_known_reals=["known"], static_categoricals=["group"])

    def make_module():
        return DeepAR.from_dataset(data, hidden_size=32, rnn_layers=3, learning_rate=0.01, log_interval=-1)

    assert run(data, make_module, memory=310_000, room=3_000_000).differences == {}


def test_temporal_fusion_transformer():
    """Its encodings are used by many layers, so their gradients are added up in another order; Adam makes a step of full
    size from the rounding noise that is the gradient of the keys' biases."""
    data = with_covariates()

    def make_module():
        return TemporalFusionTransformer.from_dataset(
            data,
            hidden_size=48,
            attention_head_size=2,
            lstm_layers=2,
            hidden_continuous_size=16,
            loss=QuantileLoss(),
            learning_rate=0.01,
            log_interval=2,
        )

    runs = run(data, make_module, memory=1_050_000, room=2_800_000)
    unequal = {name: d for name, d in runs.differences.items() if "k_layers" not in name and "optimizer" not in name}
    assert max(unequal.values(), default=0) < 1e-3, unequal
    forecasts = [d for name, d in runs.differences.items() if name.startswith(("prediction", "metric"))]
    assert max(forecasts, default=0) < 1e-4
