"""How many functions of ours a layer's call takes: what its Python time goes with, whatever the machine is busy with."""

import sys
from collections import Counter
from pathlib import Path

from chain import Chain, loader, trainer

import harmony_lightning
from harmony_lightning import HarmonyStrategy
from harmony_lightning.runtime.engine import Engine

OURS = str(Path(harmony_lightning.__file__).parent)
NUM_BLOCKS, NUM_MICROBATCHES, NUM_STEPS = 8, 4, 4


def counted(monkeypatch, name, counts):
    """Count functions of ours that the engine's method calls; those of the last step stay."""
    original = getattr(Engine, name)

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            counts[name] += 1

    def method(*args, **kwargs):
        counts[name] = 0
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            return original(*args, **kwargs)
        finally:
            sys.setprofile(before)

    monkeypatch.setattr(Engine, name, method)


def test_a_layer_s_call_takes_no_more_functions_of_ours_than_it_did(monkeypatch):
    # About 290 and 137 of Python 3.11; where a few more are worth it, raise the limits.
    counts = Counter()
    counted(monkeypatch, "forward", counts)
    counted(monkeypatch, "backward", counts)
    strategy = HarmonyStrategy(microbatch_size=2, layers=["net.*"], one_layer_per_pack=True, plan="sizes")
    trainer(strategy, limit_train_batches=NUM_STEPS).fit(Chain(depth=NUM_BLOCKS), loader(2 * NUM_MICROBATCHES))
    num_calls = NUM_BLOCKS * NUM_MICROBATCHES
    assert 0 < counts["forward"] <= 300 * num_calls
    assert 0 < counts["backward"] <= 145 * num_calls
