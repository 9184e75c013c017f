"""Several pipelines side by side, pp x dp, and where gradients are added up: results, bytes, memory, what is chosen."""

import dataclasses
import functools

import pytest
import torch
from chain import harmony, loader, same_weights, stays_within, trainer, twins
from test_precision import with_precision
from torch.utils.data import DataLoader, TensorDataset
from wide import Wide, batch_of, cluster_of, on_meta

from harmony_lightning import ConfigurationError, HarmonyStrategy, Plan
from harmony_lightning.errors import DeviceOutOfMemoryError
from harmony_lightning.runtime.updates import device_sums
from harmony_lightning.runtime.updates.gradients import GradientStore

BATCH = 8


def fit(strategy, microbatch_size, num_batches=3, optimizer=torch.optim.SGD, precision="32-true"):
    """The module under a strategy, and the same on one device."""
    ours, reference = twins(optimizer=optimizer)
    parts = BATCH // microbatch_size
    trainer(strategy, limit_train_batches=num_batches, **with_precision(precision)).fit(ours, loader(BATCH))
    plain = trainer(accumulate_grad_batches=parts, limit_train_batches=num_batches * parts, **with_precision(precision))
    plain.fit(reference, loader(microbatch_size))
    return ours, reference


def train(num_gpus, pipelines, microbatch_size, memory="200KiB", num_batches=3, precision="32-true", **options):
    strategy = harmony(num_gpus, memory, microbatch_size, pipelines=pipelines, one_layer_per_pack=True, **options)
    return *fit(strategy, microbatch_size, num_batches, precision=precision), strategy


def close(ours, reference):
    pairs = zip(ours.parameters(), reference.parameters(), strict=True)
    return all(torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6) for mine, theirs in pairs)


@functools.cache
def plan_of(num_gpus, microbatch_size, memory="200KiB", **options):
    plan = train(num_gpus, options.pop("pipelines", 2), microbatch_size, memory, num_batches=1, **options)[2].plan
    return dataclasses.replace(plan, resident=(), stash_stays=(), keep=(), peak_bytes=())


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("num_gpus", "pipelines", "microbatch_size"), [(4, 2, 4), (6, 2, 4), (6, 3, 4), (8, 4, 2)])
def test_equal_to_the_bit_with_no_more_microbatches_than_pipelines(num_gpus, pipelines, microbatch_size, precision):
    ours, reference, strategy = train(num_gpus, pipelines, microbatch_size, precision=precision)
    assert strategy.plan.pipelines == pipelines and strategy.plan.depth == num_gpus // pipelines
    assert same_weights(ours, reference)
    assert sorted(ours.losses) == sorted(reference.losses)


def out_of_memory(*_):
    raise DeviceOutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("mode", "pipelines"), [("pp", 2), ("dp", 1)])
def test_it_does_not_matter_to_the_bit_in_how_many_pieces_gradients_are_passed_on(monkeypatch, mode, pipelines):
    """Over the microbatches of each GPU first, then over GPUs, in their order; as by the host, where memory is short."""
    plan = dataclasses.replace(plan_of(4, 1), mode=mode, pipelines=pipelines)
    ours, reference = fit(harmony(4, "200KiB", 1, plan=plan), 1)
    assert close(ours, reference)
    monkeypatch.setattr(device_sums, "summed_nbytes", lambda nbytes: 1024)
    assert same_weights(ours, fit(harmony(4, "200KiB", 1, plan=plan), 1)[0])
    monkeypatch.setattr(device_sums, "summed_nbytes", out_of_memory)
    strategy = harmony(4, "200KiB", 1, plan=plan)
    assert same_weights(ours, fit(strategy, 1)[0])
    assert strategy.statistics().swap_out_bytes == 3 * plan.num_copies * plan.swap_out_bytes_per_step


def test_updated_on_the_gpus_of_the_first_pipeline():
    plan = plan_of(4, 2, "1MiB", update="device")
    assert {plan.update_device(pack) for pack in range(len(plan.packs))} == {0, 1}
    assert all(pack.update == "device" for pack in plan.packs)
    strategy = harmony(4, "1MiB", 2, plan=plan, update="device")
    assert close(*fit(strategy, 2))
    assert strategy.statistics().updates_on_devices == 2 * len(plan.packs)  # the first step makes the states


def test_what_is_added_up_for_an_update_does_not_leave_to_make_room(monkeypatch):
    plan, left = plan_of(4, 2, "1MiB", update="device"), []
    bring_to = GradientStore._bring_to

    def bring(store, home, gradient):
        left.append(store.leave(store._devices[home]))  # as memory that is short asks for
        return bring_to(store, home, gradient)

    monkeypatch.setattr(GradientStore, "_bring_to", bring)
    assert close(*fit(harmony(4, "1MiB", 2, plan=plan, update="device"), 2))
    assert left and not any(left)


def test_evaluation_is_that_of_one_pipeline():
    ours, _ = twins()
    outputs = []
    for pipelines in (1, 2):
        strategy = harmony(4, pipelines=pipelines, one_layer_per_pack=True, evaluation_batches=3)
        fitted = trainer(strategy)
        (metrics,) = fitted.validate(ours, loader(BATCH), verbose=False)
        outputs.append((metrics, fitted.predict(ours, loader(BATCH))))
    assert outputs[0][0] == outputs[1][0]
    assert all(map(torch.equal, outputs[0][1], outputs[1][1]))


# Bytes and memory -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize(("mode", "num_gpus", "pipelines"), [("pp", 4, 2), ("pp", 6, 3), ("dp", 4, 1)])
def test_weights_come_to_each_pipeline_and_sums_of_gradients_leave_once(mode, num_gpus, pipelines):
    plan = dataclasses.replace(plan_of(4, 2), mode=mode, num_devices=num_gpus, pipelines=pipelines)
    strategy = harmony(num_gpus, "200KiB", 2, plan=plan)
    ours, reference = fit(strategy, 2)
    statistics, copies = strategy.statistics(), plan.num_copies
    weights = sum(pack.nbytes for pack in plan.packs)
    met = sum(sum(plan.packs[pack].nbytes for pack in plan.packs_on(device)[-2:]) for device in range(num_gpus))
    assert close(ours, reference)
    assert plan.swap_in_bytes_per_step == 2 * copies * weights - met
    assert plan.swap_out_bytes_per_step == weights
    assert statistics.swap_in_bytes == 3 * plan.swap_in_bytes_per_step
    assert statistics.swap_out_bytes == 3 * plan.swap_out_bytes_per_step
    summed = 3 * (copies - 1) * sum(pack.gradient_slot_nbytes for pack in plan.packs)
    assert (statistics.p2p_bytes > summed) if plan.depth > 1 else (statistics.p2p_bytes == summed)
    assert stays_within(statistics, plan.memory_bytes)


def test_what_fits_stays_on_each():
    ours, reference, strategy = train(4, 2, 4, memory="1MiB")
    plan = strategy.plan
    assert plan.resident and same_weights(ours, reference)
    assert stays_within(strategy.statistics(), plan.memory_bytes)


# The plan -------------------------------------------------------------------------------------------------------------


def test_microbatches_go_to_pipelines_in_turn_and_packs_round_the_gpus_of_one():
    plan = plan_of(6, 2)
    assert [[plan.device(pack, m) for m in range(3)] for pack in range(4)] == [
        [0, 3, 0],
        [1, 4, 1],
        [2, 5, 2],
        [0, 3, 0],
    ]
    assert plan.devices_of(1) == (1, 4) and plan.visitors(1) == (1, 4) and plan.packs_on(4)[:3] == (1, 4, 7)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pipelines": 4}, "pipelines must divide the 6 devices, as each has as many of them, got 4"),
        ({"pipelines": 0}, "pipelines must divide the 6 devices, as each has as many of them, got 0"),
        ({"pipelines": 6}, "6 pipelines over 6 devices in mode 'pp': in 'dp' each device is a pipeline by itself"),
        ({"mode": "dp"}, "2 pipelines over 6 devices in mode 'dp'"),
        ({"dealt": (1,)}, "dealt names pack 1, but with several pipelines"),
    ],
)
def test_a_faulty_placement_is_told(changes, told):
    with pytest.raises(ConfigurationError, match=told):
        dataclasses.replace(plan_of(6, 2), **changes)


def test_gpus_that_make_no_such_pipelines_are_told_before_the_first_step():
    ours, _ = twins()
    with pytest.raises(ConfigurationError, match="pipelines must divide the 3 devices"):
        trainer(harmony(3, pipelines=2)).fit(ours, loader(BATCH))


# What it is good for --------------------------------------------------------------------------------------------------


def searched(**options):
    """The plan that is searched for six layers on eight GPUs, and seconds of a settled step."""
    strategy = HarmonyStrategy(cluster=cluster_of(8, "4090"), update="host", **options)
    inputs, targets = (tensor.expand(160, *tensor.shape[1:]) for tensor in batch_of(1))
    data = DataLoader(TensorDataset(inputs, targets), batch_size=32)
    trainer(strategy, max_steps=5).fit(on_meta(lambda: Wide(5)).to_empty(device="cpu"), data)
    return strategy.plan, strategy.timeline().step_seconds[-1]


def test_they_are_faster_than_one_where_packs_are_few_for_so_many_gpus_and_auto_is_fastest():
    plan, seconds = searched(mode="pp", pipelines=2)
    assert plan.pipelines == 2
    for others in ({"mode": "pp", "pipelines": 1}, {"mode": "dp"}):
        assert seconds < 0.95 * searched(**others)[1]
    assert searched()[1] < seconds  # its last pack is dealt
