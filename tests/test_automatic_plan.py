"""`plan="auto"`: profile, search, train; the same numbers as one device, a plan that is kept, and one that gives way."""

import dataclasses
import logging

import lightning as L
import pytest
import torch
from chain import Chain, loader, same_weights, stays_within, trainer, twins
from torch import nn

from harmony_lightning import EmulatedCluster, HarmonyStrategy, Plan
from harmony_lightning.strategy import automatic
from harmony_lightning.strategy.training import PLAN_FILE, PLAN_KEY


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, "harmony_lightning")
    return caplog


def automatic_strategy(num_gpus=2, memory="160KiB", preset="3090", **options):
    return HarmonyStrategy(plan="auto", cluster=EmulatedCluster(num_gpus, memory, preset=preset), **options)


def trained_plainly(module, microbatch_size):
    """On one device over the same microbatches, gradients added up in their order."""
    optimizer = module.configure_optimizers()
    for inputs, targets in loader(16, 48):
        optimizer.zero_grad()
        parts = list(zip(inputs.split(microbatch_size), targets.split(microbatch_size), strict=True))
        for part in parts:
            (module.step(part) * (len(part[0]) / len(inputs))).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("mode", ["auto", "pp"])
def test_the_plan_is_found_and_trains_to_the_same_weights(mode, told):
    module, reference = twins(depth=8)
    strategy = automatic_strategy(mode=mode)
    trainer(strategy).fit(module, loader(16, 48))
    plan, statistics = strategy.plan, strategy.statistics()
    assert statistics.num_microbatches == plan.num_microbatches and stays_within(statistics, 160 * 1024)
    assert sum("harmony plan: " in message and "predicted" in message for message in told.messages) == 1
    expected = trained_plainly(reference, plan.microbatch_size)
    if plan.mode == "pp":
        assert same_weights(module, expected)
    else:  # devices add up their own microbatches first
        for one, other in zip(module.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_is_no_slower_than_the_plan_from_sizes_alone():
    def seconds(**options):
        torch.manual_seed(0)
        strategy = HarmonyStrategy(cluster=EmulatedCluster(2, "300KiB", preset="1080ti"), **options)
        trainer(strategy, max_steps=4).fit(Chain(depth=10), loader(32, 128))
        return strategy.timeline().seconds

    assert seconds(plan="auto") < seconds()


def test_the_second_run_finds_the_profile_in_the_cache(told, monkeypatch):
    plans = []
    for _ in range(2):
        torch.manual_seed(0)
        strategy = automatic_strategy()
        trainer(strategy, max_steps=1).fit(Chain(depth=6), loader(16, 16))
        plans.append(strategy.plan)
    assert plans[0] == plans[1]
    assert [("(from the cache)" in m) for m in told.messages if m.startswith("harmony profile: ")] == [False, True]


def test_a_microbatch_size_of_the_user_is_kept():
    strategy = automatic_strategy(microbatch_size=4, mode="pp", stash="host")
    trainer(strategy, max_steps=1).fit(Chain(depth=6), loader(16, 16))
    assert (strategy.plan.microbatch_size, strategy.plan.mode, strategy.plan.stash) == (4, "pp", "host")


def test_the_plan_is_kept_with_the_run_and_in_the_checkpoint(tmp_path):
    strategy = automatic_strategy()
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    run = trainer(strategy, max_steps=2, logger=logger)
    run.fit(Chain(depth=6), loader(16, 32))
    path = tmp_path / "run.ckpt"
    found = Plan.from_json((tmp_path / "lightning_logs" / "version_0" / PLAN_FILE).read_text())
    assert found == strategy.plan
    again = automatic_strategy()
    run = trainer(again, max_steps=1)
    module = Chain(depth=6)
    run.fit(module, loader(16, 16))

    class Save(L.Callback):
        def on_train_end(self, trainer, module):
            trainer.save_checkpoint(path)

    trainer(automatic_strategy(), max_steps=1, callbacks=[Save()]).fit(Chain(depth=6), loader(16, 16))
    checkpoint = torch.load(path, weights_only=True)
    assert Plan.from_json(checkpoint[PLAN_KEY]).packs == found.packs
    trainer("auto", max_steps=2).fit(Chain(depth=6), loader(16, 32), ckpt_path=path)  # any other strategy takes it
    file = tmp_path / "plan.json"
    file.write_text(checkpoint[PLAN_KEY])
    given = HarmonyStrategy(plan=file, cluster=EmulatedCluster(2, "160KiB"))
    trainer(given, max_steps=1).fit(Chain(depth=6), loader(16, 16))
    assert given.plan.packs == found.packs


def test_a_plan_that_does_not_fit_gives_way_to_a_smaller_one(told, monkeypatch):
    budgets = []
    original = automatic.find_plan

    def too_large(measured, machine, decomposition, question):
        budgets.append(question.memory_bytes)
        if len(budgets) == 1:
            question = dataclasses.replace(question, memory_bytes=10 * question.memory_bytes)
        return original(measured, machine, decomposition, question)

    monkeypatch.setattr(automatic, "find_plan", too_large)
    module, reference = twins(depth=12)
    strategy = automatic_strategy(1, "130KiB", mode="pp")
    trainer(strategy).fit(module, loader(16, 48))
    assert budgets == [130 * 1024, int(0.8 * 130 * 1024)]
    assert "the plan does not fit: gpu0 (emulated CUDA) out of memory" in told.text
    assert "planning again with 104 KiB per GPU" in told.text
    assert stays_within(strategy.statistics(), 130 * 1024)
    assert same_weights(module, trained_plainly(reference, strategy.plan.microbatch_size))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"preset": None}, "nobody knows how fast"), ({}, "cannot be profiled: ValueError: not twice")],
)
def test_where_no_plan_can_be_found_the_one_from_sizes_stays(options, reason, told):
    class Once(Chain):
        def step(self, batch):
            if self.trainer_is_gone():
                raise ValueError("not twice")
            return super().step(batch)

        def trainer_is_gone(self):
            return self._trainer is None

    strategy = automatic_strategy(**options)
    trainer(strategy, max_steps=1).fit(Once(depth=6), loader(16, 16))
    assert reason in told.text and strategy.statistics().steps == 1


def test_user_code_does_not_notice():
    calls = []

    class Watched(Chain):
        def __init__(self):
            super().__init__(depth=6)
            self.seen = []
            self.dropout = nn.Dropout(0.1)

        def step(self, batch):
            self.seen.append(len(batch[0]))
            return super().step((self.dropout(batch[0]), batch[1]))

        def on_train_batch_start(self, batch, batch_idx):
            calls.append(torch.get_rng_state())

    def run(**options):
        torch.manual_seed(3)
        module = Watched()
        trainer(HarmonyStrategy(cluster=EmulatedCluster(2, "160KiB", preset="3090"), **options), max_steps=2).fit(
            module, loader(16, 32)
        )
        return module

    found = run(plan="auto", microbatch_size=4, mode="pp")
    plain = run(microbatch_size=4, mode="pp")
    assert found.seen == plain.seen == [4] * 8
    assert all(torch.equal(a, b) for a, b in zip(calls[:2], calls[2:], strict=True))
    assert same_weights(found, plain)
