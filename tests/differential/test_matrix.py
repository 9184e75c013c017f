"""Harmony against one device over a product of Lightning's features: every pair of values of two features is tried.

With one microbatch everything is that of plain Lightning to the bit. With several, weights and optimizer states are those
of one device that accumulates over the same microbatches, to the bit (in dp GPUs sum up first: up to rounding), and all
else is what plain Lightning does with whole minibatches, numbers up to the rounding of another order of additions.
"""

import math

import pytest
import torch
from matrix import FEATURES, PLANS, is_possible, run
from pairs import covering_pairs, pairs_of

CASES = covering_pairs(FEATURES, is_possible)
ROUNDING = {"32-true": 2e-4, "64-true": 1e-9, "bf16-mixed": 5e-2, "bf16-true": 0.15}
"""Of whole minibatches against their microbatches after a few steps, relative to the largest value."""


def name_of(case):
    return "-".join(str(value).replace(" ", "_") for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_harmony_does_what_one_device_does(case):
    package = ("lightning.pytorch", "pytorch_lightning")[CASES.index(case) % 2]
    ours = run(package, case, "harmony")
    plain = run(package, case, "plain")
    is_whole = PLANS[case["plan"]][2] == 8 or case["optimization"] != "automatic"
    assert ours.statistics.num_packs >= 3
    assert max(ours.statistics.peak_device_bytes) > 0

    reference = plain if is_whole else run(package, case, "oracle")
    # Metrics gather in float32 whatever the precision is.
    rounding = ROUNDING[
        "32-true" if case["logging"] == "metric" and case["precision"] == "64-true" else case["precision"]
    ]
    close = 0.0 if is_whole else rounding
    summed_first = close if case["plan"] == "dp on 2" else 0.0
    if not is_whole:
        assert ours.statistics.num_microbatches > 1
    assert_same(reference.weights, ours.weights, summed_first, "weights")
    assert_same(reference.optimizers, ours.optimizers, summed_first, "optimizer states")
    assert_same(plain.schedulers, ours.schedulers, close, "schedulers")
    assert plain.progress == ours.progress
    hooks = [[event for event in one.events if event[0] != "gradients"] for one in (plain, ours)]
    assert_same(*hooks, 0.0, "hooks")
    gradients = [[event for event in one.events if event[0] == "gradients"] for one in (reference, ours)]
    assert_same(*gradients, summed_first, "gradients")
    assert_same(plain.rows, ours.rows, close, "rows")
    assert_same(plain.outputs, ours.outputs, close, "outputs")
    assert_same(plain.metrics, ours.metrics, close, "metrics")


def assert_same(expected, actual, tolerance, path):
    """Same structure and types; tensors and floats equal up to `tolerance` of the largest value, 0 being to the bit."""
    assert type(expected) is type(actual), path
    if isinstance(expected, dict):
        assert list(expected) == list(actual), path
        for key in expected:
            assert_same(expected[key], actual[key], tolerance, f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(actual), path
        for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
            assert_same(one, other, tolerance, f"{path}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert (expected.shape, expected.dtype) == (actual.shape, actual.dtype), path
        assert not actual.requires_grad or expected.requires_grad, path
        one, other = expected.detach().double(), actual.detach().double()
        scale = max(1.0, float(one.abs().max())) if one.numel() else 1.0
        assert bool(((one - other).abs() <= tolerance * scale).all()), f"{path}: {expected} != {actual}"
    elif isinstance(expected, float):
        assert math.isclose(expected, actual, rel_tol=tolerance, abs_tol=tolerance), path
    else:
        assert expected == actual, path


def test_every_possible_pair_of_features_is_tried():
    tried = {pair for case in CASES for pair in pairs_of(case)}
    assert all(is_possible(case) for case in CASES)
    single = {item for pair in tried for item in pair}
    assert single == {(name, value) for name, values in FEATURES.items() for value in values}
    product = math.prod(len(values) for values in FEATURES.values())
    assert len(CASES) < product / 10_000
