"""Packs go round the GPUs, but microbatches of the last one do, too: results, bytes, memory, and what it is good for."""

import dataclasses

import pytest
import torch
from chain import Chain, harmony, loader, same_weights, stays_within, trainer, twins
from test_precision import with_precision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from wide import Wide, batch_of, cluster_of, on_meta

from harmony_lightning import ConfigurationError, HarmonyStrategy, Plan
from harmony_lightning.scheduler import packing

BATCH = 8


def train_both(num_gpus, microbatch_size, modules=None, memory="200KiB", num_batches=3, precision="32-true", **options):
    """One module under harmony and one on one device, and the strategy."""
    ours, reference = modules or twins(optimizer=torch.optim.SGD)
    parts = BATCH // microbatch_size
    strategy = harmony(num_gpus, memory, microbatch_size, mode="mixed", one_layer_per_pack=True, **options)
    trainer(strategy, limit_train_batches=num_batches, **with_precision(precision)).fit(ours, loader(BATCH))
    plain = trainer(accumulate_grad_batches=parts, limit_train_batches=num_batches * parts, **with_precision(precision))
    plain.fit(reference, loader(microbatch_size))
    return ours, reference, strategy


def close(ours, reference):
    pairs = zip(ours.parameters(), reference.parameters(), strict=True)
    return all(torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6) for mine, theirs in pairs)


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("num_gpus", "microbatch_size"), [(2, 4), (3, 4), (4, 2)])
def test_equal_to_the_bit_with_no_more_microbatches_than_gpus(num_gpus, microbatch_size, precision):
    ours, reference, strategy = train_both(num_gpus, microbatch_size, memory="300KiB", precision=precision)
    assert strategy.plan.dealt == (len(strategy.plan.packs) - 1,)
    assert same_weights(ours, reference)
    assert sorted(ours.losses) == sorted(reference.losses)


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_otherwise_only_the_last_pack_is_added_up_in_another_order(num_gpus):
    torch.manual_seed(0)
    wide_head = [Chain(optimizer=torch.optim.SGD) for _ in range(2)]
    wide_head[1].load_state_dict(wide_head[0].state_dict())
    ours, reference, strategy = train_both(num_gpus, 1, wide_head, num_batches=1)
    (last,) = strategy.plan.dealt
    dealt = set(strategy.plan.packs[last].parameters)
    assert close(ours, reference)
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert name in dealt or torch.equal(mine, theirs)
    ours, reference, _ = train_both(num_gpus, 1)
    assert close(ours, reference)


class Tied(Chain):
    """The head's bias aside, the last block's weights are the first one's."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[-1][0].weight = self.net[0][0].weight
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.net[0][0].weight

    def step(self, batch):
        return (self.head(self.net(batch[0])).mean(1) - batch[1]).square().mean()


def test_a_weight_of_the_first_pack_and_of_the_dealt_one():
    torch.manual_seed(0)
    modules = Tied(optimizer=torch.optim.AdamW, lr=1e-3), Tied(optimizer=torch.optim.AdamW, lr=1e-3)
    modules[1].load_state_dict(modules[0].state_dict())
    ours, reference, strategy = train_both(2, 2, modules)
    assert any("head" in name for name in strategy.plan.packs[-1].layers)
    assert close(ours, reference)


def test_updated_where_the_gradients_are_added_up():
    plan = train_both(2, 2, memory="1MiB", update="device")[2].plan
    assert plan.packs[-1].update == "device"
    ours, reference, strategy = train_both(2, 2, memory="1MiB", update="device")
    assert close(ours, reference)
    assert strategy.statistics().updates_on_devices == 2 * len(plan.packs)


def test_evaluation_is_that_of_pp():
    ours, _ = twins()
    outputs = {}
    for mode in ("pp", "mixed"):
        strategy = harmony(2, mode=mode, one_layer_per_pack=True, evaluation_batches=3)
        fitted = trainer(strategy)
        (metrics,) = fitted.validate(ours, loader(BATCH), verbose=False)
        outputs[mode] = metrics, fitted.predict(ours, loader(BATCH))
    assert outputs["pp"][0] == outputs["mixed"][0]
    assert all(map(torch.equal, outputs["pp"][1], outputs["mixed"][1]))


# Bytes and memory -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("num_gpus", [1, 2, 3])
def test_the_last_pack_goes_to_every_gpu_and_its_gradients_leave_once(num_gpus):
    _, _, strategy = train_both(num_gpus, 2)
    statistics, plan = strategy.statistics(), strategy.plan
    weights, head = sum(pack.nbytes for pack in plan.packs), plan.packs[-1].nbytes
    met = sum(sum(plan.packs[index].nbytes for index in plan.packs_on(device)[-2:]) for device in range(num_gpus))
    assert plan.swap_in_bytes_per_step == 2 * weights + 2 * (num_gpus - 1) * head - met
    assert plan.swap_out_bytes_per_step == weights
    assert statistics.swap_in_bytes == 3 * plan.swap_in_bytes_per_step
    assert statistics.swap_out_bytes == 3 * plan.swap_out_bytes_per_step
    assert stays_within(statistics, plan.memory_bytes)


@pytest.mark.parametrize("microbatch_size", [2, 4])
def test_narrow_weights_and_gradients(nothing_stays, microbatch_size, monkeypatch):
    """Sums of gradients leave in float32, though each GPU may have made one alone."""
    monkeypatch.setattr(packing, "dealt_order", lambda *_: ())  # one GPU would do for so small a head
    totals, plans = [], []
    for num_batches in (3, 4):
        _, _, strategy = train_both(2, microbatch_size, memory="1MiB", num_batches=num_batches, precision="bf16-mixed")
        totals.append(strategy.statistics().swap_out_bytes)
        plans.append(strategy.plan)
    head = plans[1].packs[-1]
    assert head.narrow and totals[1] - totals[0] == plans[1].swap_out_bytes_per_step
    assert plans[1].swap_out_bytes_per_step == sum(pack.trainable_nbytes for pack in plans[1].packs)


def test_what_fits_stays():
    ours, reference, strategy = train_both(2, 4, memory="1MiB")
    plan = strategy.plan
    assert plan.dealt[0] in plan.resident
    assert [plan.dealt[0] in plan.packs_on(device) for device in (0, 1)] == [True, True]
    assert same_weights(ours, reference)
    assert stays_within(strategy.statistics(), plan.memory_bytes)


# The plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_deals_any_pack():
    plan = dataclasses.replace(train_both(2, 4)[2].plan, dealt=(1, 4), keep=(), resident=(), stash_stays=())
    assert [plan.visitors(pack) for pack in range(5)] == [(0,), (1, 0), (0,), (1,), (0, 1)]
    assert plan.packs_on(0)[:4] == (0, 1, 2, 4)
    ours, reference = twins(optimizer=torch.optim.SGD)
    strategy = harmony(2, "200KiB", 4, plan=plan)
    trainer(strategy).fit(ours, loader(BATCH))
    trainer(accumulate_grad_batches=2).fit(reference, loader(4))
    assert same_weights(ours, reference)


def test_a_plan_says_which_gpus_take_turns(nothing_stays):
    """Each counts by the microbatches it gets; one that gets none needs no weights."""
    plan = dataclasses.replace(train_both(3, 2)[2].plan, dealt_order=(2, 1, 2), keep=(), resident=(), stash_stays=())
    (last,) = plan.dealt
    assert [plan.device(last, m) for m in range(4)] == [2, 1, 2, 2]
    assert plan.visitors(last) == (2, 1) and last not in plan.packs_on(0)
    ours, reference = twins(optimizer=torch.optim.SGD)
    strategy = harmony(3, "200KiB", 2, plan=plan)
    trainer(strategy, limit_train_batches=3).fit(ours, loader(BATCH))
    trainer(accumulate_grad_batches=4, limit_train_batches=12).fit(reference, loader(2))
    assert close(ours, reference)
    assert strategy.statistics().swap_in_bytes == 3 * plan.swap_in_bytes_per_step
    assert strategy.statistics().swap_out_bytes == 3 * plan.swap_out_bytes_per_step


@pytest.mark.parametrize(
    ("head", "count", "devices"),
    [(1, 4, ()), (1, 5, (2, 3, 2, 3, 2)), (2, 10, (2, 3, 0, 1, 2, 3, 0, 2, 3, 2)), (0.2, 6, (2, 2, 2, 2, 2, 2))],
)
def test_the_gpu_that_is_last_in_forward_and_first_in_backward_gets_fewer(head, count, devices):
    """Of seven packs on four GPUs it is the second one."""
    assert packing.dealt_order([100] * 6 + [int(100 * head)], 4, count) == devices


@pytest.mark.parametrize(
    ("count", "devices"),
    [(4, ()), (8, (0, 1, 2, 3, 0, 1, 2, 0)), (12, (0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 0))],
)
def test_several_packs_that_are_dealt_count_together(count, devices):
    """Of seven packs on four GPUs the fourth one is the first that is dealt, so that the third one's GPU gets fewer."""
    assert packing.dealt_order([100] * 7, 4, count, num_dealt=3) == devices


def test_plans_say_what_is_dealt():
    plan = train_both(2, 4, num_batches=1)[2].plan
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ConfigurationError, match="dealt names pack 99, but packs are 0 to 8"):
        dataclasses.replace(plan, dealt=(99,))
    with pytest.raises(ConfigurationError, match="dealt_order names device 2, but devices are 0 to 1"):
        dataclasses.replace(plan, dealt_order=(0, 2))
    with pytest.raises(ConfigurationError, match="or in mode 'dp', the microbatches of all packs are"):
        dataclasses.replace(plan, mode="dp")


# What it is good for --------------------------------------------------------------------------------------------------


def step_seconds(mode):
    """Of one step; the head has twice a block's weights, and its forward and backward are one."""
    inputs, targets = (tensor.expand(64, *tensor.shape[1:]) for tensor in batch_of(1))
    strategy = HarmonyStrategy(mode=mode, microbatch_size=8, one_layer_per_pack=True, cluster=cluster_of(4))
    data = DataLoader(TensorDataset(inputs, targets), batch_size=64)
    trainer(strategy).fit(on_meta(lambda: Wide(3)).to_empty(device="cpu"), data)
    return max(span.end for span in strategy.timeline().spans)


def test_no_gpu_waits_for_a_large_head():
    assert step_seconds("mixed") < 0.95 * step_seconds("pp")


def test_a_dealt_pack_is_updated_when_all_of_its_gradient_has_come():
    """By the emulated clock, too. The second microbatch is smaller, and its GPU waits for what the other one has."""
    strategy = HarmonyStrategy(mode="mixed", microbatch_size=32, one_layer_per_pack=True, cluster=cluster_of(2))
    data = DataLoader(TensorDataset(*batch_of(33)), batch_size=33)
    trainer(strategy).fit(on_meta(lambda: Wide(3)).to_empty(device="cpu"), data)
    (last,), timeline = strategy.plan.dealt, strategy.timeline()
    first, second = strategy.plan.visitors(last)
    sent = [timeline.lane(device, "sum-out") for device in (first, second)]
    update = max((span for span in timeline.spans if span.name == "update"), key=lambda span: span.nbytes)
    assert sum(span.nbytes for span in sent[0]) == sum(span.nbytes for span in sent[1]) > 0
    assert sent[0][0].end <= sent[1][0].start and sent[1][-1].end <= update.start
