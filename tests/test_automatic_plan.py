"""Profile, search, train: the same numbers as one device, a plan that is kept, and one that gives way."""

import dataclasses
import functools
import logging
import sys

import lightning as L
import pytest
import torch
from chain import Chain, loader, same_weights, stays_within, trainer, twins
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from wide import Wide, batch_of, cluster_of, on_meta

from harmony_lightning import EmulatedCluster, HarmonyStrategy, Plan
from harmony_lightning.profiler import topology
from harmony_lightning.scheduler.packing import dealt_order
from harmony_lightning.scheduler.runtime.translate import plan_of
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
    return HarmonyStrategy(cluster=EmulatedCluster(num_gpus, memory, preset=preset), **options)


def trained_plainly(module, microbatch_size, num_samples=48):
    """On one device over the same microbatches, gradients added up in their order."""
    optimizer = module.configure_optimizers()
    for inputs, targets in loader(16, num_samples):
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


def test_unlike_gpus_have_the_plan_made_from_sizes_and_a_warning_once(told, monkeypatch):
    """Nobody has measured which of them is slower at what."""
    devices = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("RTX 3090", "RTX 4070")[device.index])
    monkeypatch.setattr(automatic, "machine_of", lambda cluster: topology._measure(devices, progress=print))
    strategy = automatic_strategy()
    trainer(strategy, precision="bf16-mixed").fit(Chain(), loader(16, 48))  # behind the first step weights are narrow
    lines = [record for record in told.records if "the plan made from sizes stays" in record.message]
    assert [record.levelno for record in lines] == [logging.WARNING, logging.INFO]
    assert "equal GPUs, these are RTX 3090, RTX 4070; choose equal ones with devices=" in lines[0].message
    assert strategy.statistics().steps == 3


@pytest.mark.parametrize(
    ("plan", "gpus", "mode", "size"), [("auto", 2, "pp", "auto"), (None, 3, "pp", "auto"), (None, 3, "mixed", 2)]
)
def test_a_bred_plan_trains_to_the_same_weights(plan, gpus, mode, size, told, monkeypatch):
    """Before the first step, or with its microbatches behind it; not the plan in use, though that may be as fast."""
    monkeypatch.setattr("harmony_lightning.scheduler.search.genetic_runtime.MAX_SIMULATED", 40)
    monkeypatch.setattr("harmony_lightning.scheduler.search.genetic_runtime.MARGIN", -1.0)
    found = []

    def find_plan(*asked):
        found.append(find_plan_of(*asked))
        return found[-1]

    find_plan_of = automatic.find_plan
    monkeypatch.setattr(automatic, "find_plan", find_plan)
    memory = 100 * 1024
    module, reference = twins(depth=8)
    assert sum(weight.nbytes for weight in module.parameters()) > memory  # gradients and states not counted
    strategy = automatic_strategy(gpus, memory, mode=mode, plan=plan, planner="genetic", microbatch_size=size)
    trainer(strategy).fit(module, loader(16, 48))
    assert stays_within(strategy.statistics(), memory)
    expected = trained_plainly(reference, strategy.plan.microbatch_size)
    schedule = found[-1].found.best.schedule
    if mode == "mixed":  # gradients of the last pack are added up by device first
        assert strategy.plan.dealt_order == schedule.dealt_order != ()
        for one, other in zip(module.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    else:
        assert same_weights(module, expected)
    assert [len(pack.layers) for pack in strategy.plan.packs] == [
        end - first + 1 for first, end in schedule.packs_backward
    ]
    assert (strategy.plan.prefetch, strategy.plan.stash) == (schedule.prefetch, schedule.stash)
    assert sum("bred, " in message and "the default planner's takes" in message for message in told.messages) == 1


def wide(memory, num_steps=6, **options):
    """Seconds of the last step of a model whose layers take a GPU long enough, and the plan."""
    strategy = HarmonyStrategy(cluster=cluster_of(1, memory=memory), **options)
    data = TensorDataset(*batch_of(8 * num_steps))
    run = trainer(strategy, max_steps=num_steps)
    run.fit(on_meta(functools.partial(Wide, depth=3)).to_empty(device="cpu"), DataLoader(data, batch_size=8))
    return strategy.timeline().step_seconds[-1], strategy.plan


@pytest.mark.parametrize("memory", [None, "120MiB"])
def test_nothing_is_slower_than_the_plan_from_sizes_alone(memory):
    from_sizes, plan = wide(memory, plan="sizes")
    of_packs, found = wide(memory, plan="packs")
    assert (found.mode, found.microbatch_size) == (plan.mode, plan.microbatch_size)
    by_default, _ = wide(memory)
    assert by_default < of_packs <= from_sizes
    if memory is None:  # one pack holds everything, so nothing overlaps
        assert len(plan.packs) == 1 < len(found.packs) and of_packs < 0.7 * from_sizes


def find(monkeypatch, *spans):
    """Whatever the search finds, these are the packs."""
    original = automatic.find_plan

    def find_plan(measured, machine, decomposition, question, in_use):
        planned = original(measured, machine, decomposition, question, in_use)
        schedule = dataclasses.replace(planned.found.best.schedule, packs_forward=spans[:-1], packs_backward=spans)
        plan = plan_of(schedule, planned.decomposition, question.memory_bytes, in_use)
        return dataclasses.replace(planned, plan=plan)

    monkeypatch.setattr(automatic, "find_plan", find_plan)


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"microbatches_per_forward": 2}])
def test_where_packs_alone_are_searched_results_are_those_of_the_plan_from_sizes(options, told, monkeypatch):
    """The search has its turn behind the first step, and changes nothing but packs."""
    find(monkeypatch, (0, 0), (1, 3), (4, 8))
    precision = options.pop("precision", "32-true")
    ends = []
    for plan in ("sizes", "packs"):
        module, _ = twins(depth=8)
        strategy = HarmonyStrategy(plan=plan, cluster=EmulatedCluster(1, "1MiB", preset="3090"), **options)
        trainer(strategy, precision=precision).fit(module, loader(16, 64))
        assert stays_within(strategy.statistics(), 2**20) and strategy.plan.resident
        assert bool(strategy.plan.narrow_dtype) == (precision != "32-true")
        ends.append((module, strategy.plan.packs))
    assert same_weights(ends[0][0], ends[1][0]) and len(ends[0][1]) < len(ends[1][1]) == 3
    assert sum("predicted" in message for message in told.messages) == 1


def test_a_plan_that_was_found_behind_the_first_step_gives_way_to_that_of_the_first_step(told, monkeypatch):
    find(monkeypatch, (0, 8))
    module, reference = twins(depth=8)
    strategy = HarmonyStrategy(plan="packs", cluster=EmulatedCluster(1, "200KiB", preset="3090"))
    trainer(strategy).fit(module, loader(16, 64))
    assert "the plan does not fit" in told.text and len(strategy.plan.packs) > 1
    assert stays_within(strategy.statistics(), 200 * 1024) and strategy.statistics().steps == 4
    assert same_weights(module, trained_plainly(reference, 4, 64))


def test_microbatches_are_chosen_anew_when_narrow_weights_are_known(monkeypatch):
    """The minibatch at hand is cut again."""
    original, asked = automatic.find_plan, []

    def find_plan(measured, machine, decomposition, question, in_use=None):
        asked.append(question.microbatch_size)
        sized = dataclasses.replace(question, microbatch_size=4 * len(asked))
        return original(measured, machine, decomposition, sized, in_use)

    monkeypatch.setattr(automatic, "find_plan", find_plan)
    module, strategy = Chain(depth=6), automatic_strategy()
    seen = []
    hook = module.net[0].register_forward_hook(lambda _, args, result: seen.append(len(args[0])))
    trainer(strategy, precision="bf16-mixed").fit(module, loader(16, 48))
    hook.remove()
    assert asked == [None, None] and strategy.plan.microbatch_size == 8 and strategy.plan.narrow_dtype == "bfloat16"
    assert seen[-8:] == [4] * 4 + [8] * 4 and strategy.statistics().steps == 3


class _Normed(Chain):
    def __init__(self):
        super().__init__(depth=6)
        self.net.insert(1, nn.BatchNorm1d(64))


@pytest.mark.parametrize(("kind", "options"), [(_Normed, {}), (Chain, {"deterministic": True})])
def test_microbatches_are_not_searched_where_numbers_must_not_depend_on_speed(kind, options, told):
    """A microbatch of 2 is what sizes alone make of 16 samples for two GPUs; launches are all that counts here."""
    plans = []
    for more in (options, {}):
        torch.manual_seed(0)
        strategy = automatic_strategy(memory="400KiB")
        try:
            trainer(strategy, max_steps=2, **more).fit(kind() if kind is _Normed else kind(depth=6), loader(16, 32))
        finally:
            torch.use_deterministic_algorithms(False)
        plans.append(strategy.plan)
    assert (plans[0].mode, plans[0].microbatch_size) == ("pp", 2) and "predicted" in told.text
    assert kind is _Normed or plans[1].microbatch_size > 2


def test_a_plan_that_stays_though_memory_was_short_is_not_said_to_be_another(told, monkeypatch):
    class Short(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.strategy._engine.state.memory.has_lacked_memory = True
            monkeypatch.delattr(automatic, "find_plan", raising=False)  # the search fails from here on

    strategy = automatic_strategy()
    trainer(strategy, callbacks=[Short()]).fit(Chain(), loader(16, 48))
    said = [message for message in told.messages if "memory was short" in message]
    assert len(said) == 1 and said[0].endswith("had to go; the plan stays, as no other was found")
    assert "planned again" not in told.text and strategy.plan.memory_bytes == 160 * 1024


def test_the_second_run_finds_the_profile_in_the_cache(told, monkeypatch):
    plans = []
    for _ in range(2):
        torch.manual_seed(0)
        strategy = automatic_strategy()
        trainer(strategy, max_steps=1).fit(Chain(depth=6), loader(16, 16))
        plans.append(strategy.plan)
    assert plans[0] == plans[1]
    assert [("(from the cache)" in m) for m in told.messages if m.startswith("harmony profile: ")] == [False, True]


@pytest.mark.parametrize("fails", [False, True])
def test_memory_that_the_search_has_used_goes_back_before_slots_are_made(fails, monkeypatch):
    events = []
    find = automatic.find_plan

    def found(*args):
        events.append("searched")
        if fails:
            raise ValueError("for a test")
        return find(*args)

    monkeypatch.setattr(automatic, "find_plan", found)
    monkeypatch.setattr(EmulatedCluster, "trim_device_memory", lambda cluster: events.append("trimmed"), raising=False)
    trainer(HarmonyStrategy(cluster=EmulatedCluster(1, "1MiB", preset="3090")), max_steps=1).fit(Chain(), loader(8))
    assert events[:2] == ["searched", "trimmed"]


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
    assert found == dataclasses.replace(strategy.plan, resident=(), stash_stays=(), keep=found.keep, peak_bytes=())
    run.save_checkpoint(path)  # behind the run
    checkpoint = torch.load(path, weights_only=True)
    assert Plan.from_json(checkpoint[PLAN_KEY]).packs == found.packs
    trainer("auto", max_steps=2).fit(Chain(depth=6), loader(16, 32), ckpt_path=path)  # any other strategy takes it
    file = tmp_path / "plan.json"
    file.write_text(checkpoint[PLAN_KEY])
    given = HarmonyStrategy(plan=file, cluster=EmulatedCluster(2, "160KiB"))
    run = trainer(given, max_steps=1)
    run.fit(Chain(depth=6), loader(16, 16))
    assert given.plan.packs == found.packs
    run.save_checkpoint(path)
    assert Plan.from_json(torch.load(path, weights_only=True)[PLAN_KEY]) == given.plan


def test_a_plan_that_was_made_for_other_memory_is_carried_out():
    """With less memory, smaller layers were found."""
    plans = []
    for memory in ("120KiB", "1MiB"):
        strategy = HarmonyStrategy(cluster=EmulatedCluster(2, memory), microbatch_size=4)
        trainer(strategy, max_steps=1).fit(Chain(depth=8), loader(16, 16))
        plans.append(strategy.plan)
    assert plans[0].packs[0].layers[0] == "net.0.0" and plans[1].packs[0].layers[0] == "net.0"
    module, reference = twins(depth=8)
    given = HarmonyStrategy(cluster=EmulatedCluster(2, "1MiB"), plan=plans[0])
    trainer(given).fit(module, loader(16, 48))
    assert given.plan.packs == plans[0].packs
    assert same_weights(module, trained_plainly(reference, 4))


def test_a_plan_that_does_not_fit_gives_way_to_a_smaller_one(told, monkeypatch):
    budgets = []
    original = automatic.find_plan

    def too_large(measured, machine, decomposition, question, in_use):
        planned = original(measured, machine, decomposition, question, in_use)
        budgets.append(question.memory_bytes)
        if len(budgets) > 1:
            return planned
        schedule = dataclasses.replace(planned.found.best.schedule, packs_forward=(), packs_backward=((0, 12),))
        return dataclasses.replace(planned, plan=plan_of(schedule, planned.decomposition, question.memory_bytes))

    monkeypatch.setattr(automatic, "find_plan", too_large)
    module, reference = twins(depth=12)
    strategy = automatic_strategy(1, "130KiB", mode="pp")
    trainer(strategy).fit(module, loader(16, 48))
    assert budgets == [130 * 1024, int(0.8 * 130 * 1024)]
    assert "the plan does not fit: gpu0 (emulated CUDA) out of memory" in told.text
    assert "planned again with 104 KiB per GPU" in told.text
    assert stays_within(strategy.statistics(), 130 * 1024)
    assert same_weights(module, trained_plainly(reference, strategy.plan.microbatch_size))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mixed", "memory": "1MiB"},
        {"update": "device", "memory": "1MiB"},
        {"update": "first", "memory": "300KiB", "mode": "pp", "num_gpus": 4},
        {"microbatches_per_forward": 2, "mode": "pp"},
    ],
)
def test_what_the_user_asked_for_is_searched_with_it(options, told):
    """Layers of 16 KiB cost nothing beside a launch, so that other packs than those from sizes are found."""
    module, reference = twins(depth=8)
    strategy = automatic_strategy(plan="packs", **options)
    trainer(strategy).fit(module, loader(16, 64))
    plan = strategy.plan
    assert any("predicted" in message for message in told.messages), told.messages
    assert plan.dealt == ((len(plan.packs) - 1,) if options.get("mode") == "mixed" else ())
    order = dealt_order([pack.nbytes for pack in plan.packs], plan.num_devices, plan.num_microbatches)
    assert plan.dealt_order == (order if plan.dealt else ())
    assert (plan.packs[0].update == "device") == ("update" in options)
    assert sum("is updated on the host" in message for message in told.messages) <= plan.num_devices
    assert plan.microbatches_per_forward == options.get("microbatches_per_forward", 1)
    expected = trained_plainly(reference, plan.microbatch_size, 64)
    if "update" in options:
        assert same_weights(module, expected)
        return
    # Sums in another order, and kernels of another size, differ by rounding; Adam divides by what is small.
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("memory", ["90MiB", "300MiB"])
def test_what_is_predicted_for_settled_steps_is_what_they_take(memory, monkeypatch):
    """One has little to spare, the other some for weights, activations and updates."""
    found, original = [], automatic.find_plan

    def find_plan(*asked):
        found.append(original(*asked))
        return found[-1]

    monkeypatch.setattr(automatic, "find_plan", find_plan)
    strategy = HarmonyStrategy(cluster=cluster_of(2, memory=memory), plan="auto", mode="pp", microbatch_size=1)
    data = TensorDataset(*batch_of(8 * 8))
    module = on_meta(functools.partial(Wide, depth=6)).to_empty(device="cpu")
    trainer(strategy, max_steps=8).fit(module, DataLoader(data, batch_size=8))
    best = found[-1].found.best
    assert bool(best.schedule.updates_stay) == (memory == "300MiB")
    assert strategy.plan.updates_stay == best.schedule.updates_stay
    assert bool(best.schedule.stash_stays or best.schedule.resident)
    assert best.seconds == pytest.approx(strategy.timeline().step_seconds[-1], rel=0.05)


@pytest.mark.filterwarnings("error:.*not registered")
@pytest.mark.parametrize("plan", ["auto", "packs"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"preset": None}, "nobody knows how fast"),
        ({}, "cannot be profiled: ValueError: not twice"),
        ({"one_layer_per_pack": True}, "one layer in each pack"),
    ],
)
def test_where_no_plan_can_be_found_the_one_from_sizes_stays(plan, options, reason, told):
    class Once(Chain):
        def step(self, batch):
            if self.trainer_is_gone():
                raise ValueError("not twice")
            return super().step(batch)

        def trainer_is_gone(self):
            return not isinstance(self._trainer, L.Trainer)

    strategy = automatic_strategy(**options, plan=plan)
    trainer(strategy, max_steps=2).fit(Once(depth=6), loader(16, 32))
    assert strategy.statistics().steps == 2 and strategy.plan is not None
    assert sum(reason in message for message in told.messages) == 1
    assert not [record for record in told.records if record.levelno > logging.INFO]


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

    plain = run(plan="sizes", microbatch_size=4, mode="pp")
    for plan in ("auto", "packs"):
        found = run(plan=plan, microbatch_size=4, mode="pp")
        assert found.seen == plain.seen == [4] * 8
        assert all(torch.equal(a, b) for a, b in zip(calls[:2], calls[-2:], strict=True))
        assert same_weights(found, plain)


class _Held(Chain):
    """A function in it calls the layers of the module that it was made for."""

    def __init__(self):
        super().__init__(depth=6)
        net = self.net
        self.through = lambda inputs: net(inputs)

    def step(self, batch):
        return nn.functional.mse_loss(self.head(self.through(batch[0])).squeeze(1), batch[1])


class _Wrapped(Chain):
    def __init__(self):
        super().__init__(depth=6)
        inner = self.training_step
        self.training_step = lambda batch, batch_idx, more=None: inner(batch, batch_idx)


class _Leaves(Chain):
    def __init__(self):
        super().__init__(depth=6)

    def step(self, batch):
        return super().step(batch) if isinstance(self._trainer, L.Trainer) else sys.exit("not finite")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(_Held, "calls layers of the module itself"), (_Wrapped, "put into the module"), (_Leaves, "not finite")],
)
def test_what_is_run_aside_cannot_reach_the_run(kind, reason, told):
    module = kind()
    run = trainer(automatic_strategy(plan="packs", microbatch_size=4), max_steps=2)
    run.fit(module, loader(16, 32))
    assert reason in told.text
    assert len(module.losses) == 8 and module._trainer is run
    assert run.callback_metrics["loss_epoch"].item() == pytest.approx(sum(module.losses) / 8)


def test_the_step_is_given_its_own_arguments_and_no_anomaly_is_looked_for(told):
    class Any(Chain):
        def training_step(self, *args):
            assert args[1] < 2
            return super().training_step(*args)

    trainer(automatic_strategy(plan="packs"), max_steps=2, detect_anomaly=True).fit(Any(depth=6), loader(16, 32))
    assert "predicted" in told.text


def test_a_module_that_changes_to_and_fro_is_searched_for_once_each_way(told):
    class Toggled(Chain):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].requires_grad_(batch_idx % 2 == 0)

    trainer(automatic_strategy(plan="packs")).fit(Toggled(depth=6), loader(16, 96))
    assert sum("predicted" in message for message in told.messages) == 2


@pytest.mark.parametrize(("folder", "is_told"), [("s3://bucket/run", False), ("file/run", True)])
def test_a_log_folder_that_is_none_ends_nothing(folder, is_told, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(L.Trainer, "log_dir", folder)
    logger = L.pytorch.loggers.CSVLogger(tmp_path / "logs")
    trainer(automatic_strategy(plan="packs"), max_steps=2, logger=logger).fit(Chain(depth=6), loader(16, 32))
    assert not (tmp_path / "s3:").exists() and ("the plan is not kept" in told.text) == is_told
