"""What fits stays on the devices: the same training, fewer copies, no more memory than there is."""

import dataclasses
import functools
import itertools

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer, twins
from torch import nn
from torch.utils.data import DataLoader
from weight_writes import WAYS, writer_of

from harmony_lightning import CapacityError, EmulatedCluster, HarmonyStrategy, Plan
from harmony_lightning.hardware.presets import GpuModel, HostModel

LAYERS = ["net.*", "head"]
AMPLE = "2MiB"
NUM_STEPS = 5


class Looking(L.Callback):
    """Notes what each step has copied, and under which plan."""

    def __init__(self):
        self.plans = []
        self.statistics = []
        self.peaks = []

    def on_train_batch_start(self, trainer, *args):
        for device in trainer.strategy._engine.cluster.devices:
            device.reset_peak()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.plans.append(trainer.strategy.plan)
        self.statistics.append(trainer.strategy.statistics())
        self.peaks.append(tuple(device.peak_bytes() for device in trainer.strategy._engine.cluster.devices))

    def each(self, name):
        """Bytes of each step."""
        totals = [0, *(getattr(one, name) for one in self.statistics)]
        return [after - before for before, after in itertools.pairwise(totals)]


@functools.cache
def plain(mode="pp", depth=8):
    reference = twins(depth=depth)[0]
    trainer(accumulate_grad_batches=4, limit_train_batches=4 * NUM_STEPS).fit(reference, loader(2))
    return reference


def fit(strategy, module=None, batches=8, **options):
    module = module or twins()[0]
    looking = Looking()
    fitted = trainer(strategy, callbacks=[looking], limit_train_batches=NUM_STEPS, **options)
    fitted.fit(module, loader(batches))
    return module, looking


@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("num_gpus", [1, 2, 3])
@pytest.mark.parametrize("memory", ["80KiB", "120KiB", "200KiB", "300KiB", AMPLE])
def test_training_is_the_same_and_copies_are_the_plan_s(mode, num_gpus, memory):
    strategy = harmony(num_gpus, memory, mode=mode)
    module, looking = fit(strategy)
    if mode == "pp" or num_gpus == 1:
        assert same_weights(module, plain())
    else:  # devices' sums of gradients are added up
        for mine, theirs in zip(module.parameters(), plain().parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert looking.each("swap_in_bytes") == [plan.swap_in_bytes_per_step for plan in looking.plans]
    assert max(map(max, looking.peaks)) <= looking.plans[-1].memory_bytes
    # A step in which something stayed has been seen by then, so little is left to guess.
    assert looking.peaks[-1] == pytest.approx(looking.plans[-1].peak_bytes, rel=0.01)


@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_with_ample_memory_each_weight_comes_in_once_and_nothing_is_made_again(mode, num_gpus):
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x).relu()

    module = twins()[0]
    for block in module.net:
        block[0] = Counted(WIDTH, WIDTH)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    _, looking = fit(harmony(num_gpus, AMPLE, mode=mode, one_layer_per_pack=True, layers=LAYERS), module)
    copies = num_gpus if mode == "dp" else 1
    assert looking.each("swap_in_bytes")[1:] == [copies * weights] * (NUM_STEPS - 1)
    assert looking.each("stash_out_bytes")[1:] == looking.each("stash_in_bytes")[1:] == [0] * (NUM_STEPS - 1)
    assert looking.each("stash_out_bytes")[0] > 0
    # Twice in the first step, which is measured; then once, by each of four microbatches.
    assert len(calls) == 8 * 4 * (2 + NUM_STEPS - 1)


def hand_written(**stays):
    made = harmony(1, "200KiB", layers=LAYERS)
    fit(made, limit_val_batches=0)
    packs = made.plan.packs
    assert len(packs) > 4
    return dataclasses.replace(
        made.plan, **{"resident": (), "stash_stays": (), "keep": (), "peak_bytes": (), "memory_bytes": 1 << 20, **stays}
    )


@pytest.mark.parametrize(
    "stays",
    [
        {},
        {"resident": (0, 2)},
        {"stash_stays": (1, 3)},
        {"keep": ("net.1", "net.4")},
        {"keep": ("net.1", "net.4"), "prefetch": 0},
        {"keep": ("net.1", "net.4", "head"), "stash_stays": (1, 4), "resident": (4,)},
        {"stash": "device", "resident": (0, 1, 2, 3), "keep": ("net.0",)},
    ],
)
def test_a_plan_written_by_hand_is_carried_out_as_it_stands(stays):
    """Kept activations show weights wherever these are by then: their slot has had others meanwhile."""
    plan = Plan.from_json(hand_written(**stays).to_json())
    module, looking = fit(harmony(1, AMPLE, layers=LAYERS, plan=plan))
    assert same_weights(module, plain())
    assert all(one == plan for one in looking.plans)
    assert looking.each("swap_in_bytes") == [plan.swap_in_bytes_per_step] * NUM_STEPS


def test_slots_of_a_plan_that_cannot_fit_are_told():
    plan = hand_written(resident=(0, 1, 2, 3, 4), memory_bytes=100 << 10)
    with pytest.raises(CapacityError, match=r"slots .* take .* of gpu0, of which the plan may use 100 KiB .* than 5"):
        fit(harmony(1, "100KiB", layers=LAYERS, plan=plan))


def test_layers_that_a_plan_keeps_are_not_run_again():
    begun = []
    module = twins()[0]
    for index, block in enumerate(module.net):
        block.register_forward_pre_hook(lambda block, args, index=index: begun.append(index))
    plan = hand_written(keep=("net.1", "net.4"))
    fit(harmony(1, AMPLE, layers=LAYERS, plan=plan), module)
    microbatches = 4 * NUM_STEPS
    assert [begun.count(index) for index in range(6)] == [
        microbatches * (1 if index in (1, 4) else 2) for index in range(6)
    ]


GPU = GpuModel(
    name="GPU",
    memory_bytes=1 << 30,
    flops_per_second={"float32": 1e9},
    memory_bytes_per_second=1e11,
    link_bytes_per_second=1e8,
    launch_seconds=0.0,
)
FAST_LINK = dataclasses.replace(GPU, link_bytes_per_second=1e9)
HOST = HostModel(name="host", memory_bytes_per_second=1e11, update_parameters_per_second=1e9, flops_per_second=1e12)


@pytest.mark.parametrize("num_gpus", [1, 2])
@pytest.mark.parametrize("gpu", [GPU, FAST_LINK], ids=["link-bound", "compute-bound"])
def test_more_memory_is_never_slower_and_never_moves_more(num_gpus, gpu):
    """With the same packs: what these are is decided before anything is known of a step. Time is bought with bytes only
    where there is room for a second slot, from which packs are swapped in ahead. Steps of the same length may differ by a
    fraction of one swap-in."""
    seconds, nbytes = [], []
    for memory in ["135KiB", "150KiB", "165KiB", "185KiB", AMPLE]:
        cluster = EmulatedCluster(num_gpus, memory, preset=gpu, host=HOST)
        strategy = HarmonyStrategy(microbatch_size=2, cluster=cluster, layers=LAYERS, one_layer_per_pack=True)
        ends = []

        class Timing(Looking):
            def on_train_batch_end(self, trainer, *args):
                super().on_train_batch_end(trainer, *args)
                ends.append(trainer.strategy.timeline().seconds)  # noqa: B023

        timing = Timing()
        trainer(strategy, callbacks=[timing], limit_train_batches=NUM_STEPS).fit(
            twins(depth=6 * num_gpus)[0], loader(8)
        )
        seconds.append(ends[-1] - ends[-2])
        moved = timing.each("swap_in_bytes")[-1] + 2 * timing.each("stash_out_bytes")[-1]
        nbytes.append((timing.plans[-1].prefetch, -moved))
    assert nbytes == sorted(nbytes)
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(seconds))
    assert len(set(nbytes)) > 2 and seconds[-1] < seconds[0]


class OfAnyLength(Chain):
    """Sequences, whose length differs from batch to batch."""

    def training_step(self, batch, batch_idx):
        loss = self.head(self.net(batch)).square().mean()
        self.losses.append(loss.item())
        return loss


def sequences(lengths, num_samples):
    generator = torch.Generator().manual_seed(1)
    return DataLoader([torch.randn(num_samples, n, WIDTH, generator=generator) for n in lengths], batch_size=None)


def test_batches_larger_than_all_before_leave_nothing_where_it_was():
    """They find what room there is without residency; what is larger in one dimension only is unknown, too."""
    lengths = [8, 8, 8, 40, 8, 24, 41, 8]
    torch.manual_seed(0)
    ours, reference = OfAnyLength(), OfAnyLength()
    reference.load_state_dict(ours.state_dict())
    looking = Looking()
    strategy = harmony(1, "700KiB", layers=LAYERS, one_layer_per_pack=True)
    trainer(strategy, callbacks=[looking]).fit(ours, sequences(lengths, 8))
    halves = DataLoader([part for batch in sequences(lengths, 8) for part in batch.split(2)], batch_size=None)
    trainer(accumulate_grad_batches=4).fit(reference, halves)
    assert same_weights(ours, reference)
    assert [bool(plan.stash_stays) for plan in looking.plans] == [False, True, True, False, True, True, False, True]
    assert max(map(max, looking.peaks)) <= 700 << 10


class Skipping(Chain):
    """Stochastic depth: which block is left out differs from step to step."""

    def __init__(self, is_skipped):
        super().__init__()
        self.is_skipped = is_skipped

    def step(self, batch):
        x = batch[0]
        for index, block in enumerate(self.net):
            if not self.is_skipped(index, self.global_step):
                x = x + block(x)
        return nn.functional.mse_loss(self.head(x).squeeze(1), batch[1])


def every_block_in_turn(index, step):
    return index == step % 8


def half_of_them_in_turn(index, step):
    return index < 4 and step % 2 == 0


def one_at_times(index, step):
    return index == 5 and step % 4 != 3


@pytest.mark.parametrize("is_skipped", [every_block_in_turn, half_of_them_in_turn, one_at_times])
@pytest.mark.parametrize("memory", ["110KiB", AMPLE])
def test_steps_that_call_other_layers_do_not_end_residency(is_skipped, memory, caplog):
    torch.manual_seed(0)
    ours, reference = Skipping(is_skipped), Skipping(is_skipped)
    reference.load_state_dict(ours.state_dict())
    looking = Looking()
    strategy = harmony(2, memory, layers=LAYERS, one_layer_per_pack=True)
    trainer(strategy, callbacks=[looking], max_epochs=4).fit(ours, loader(8))
    trainer(accumulate_grad_batches=4, max_epochs=4).fit(reference, loader(2))
    assert same_weights(ours, reference)
    assert strategy.statistics().short_of_memory == 0 and "had to go" not in caplog.text
    assert max(map(max, looking.peaks)) <= EmulatedCluster(1, memory).devices[0].memory_bytes
    assert all(plan.stash_stays and plan.resident for plan in looking.plans[8:])
    if memory == AMPLE:
        assert all(len(plan.resident) == len(plan.keep) == len(plan.packs) == 9 for plan in looking.plans[8:])
        assert looking.each("stash_out_bytes")[8:] == [0] * 12


def test_in_a_step_with_unknown_calls_nothing_stays_where_memory_is_full():
    """From the call on that was not measured; the room for it was given to others."""
    looking = Looking()
    module = Skipping(lambda index, step: index == 5 and step < 4)
    trainer(harmony(1, "110KiB", layers=LAYERS, one_layer_per_pack=True), callbacks=[looking], max_epochs=2).fit(
        module, loader(8)
    )
    assert [bool(plan.stash_stays) for plan in looking.plans[1:8]] == [True, True, True, False, False, True, True]
    assert all(max(peaks) <= 110 << 10 for peaks in looking.peaks)


def test_results_that_user_code_keeps_hold_no_slots():
    """With the graph that made them, as metrics keep them: it leads to weights, which lie in slots of earlier plans."""
    kept, allocated = [], []

    class Keeping(Chain):
        def step(self, batch):
            outputs = self.head(self.net(batch[0])).squeeze(1)
            kept.append(outputs)
            return nn.functional.mse_loss(outputs, batch[1])

        def on_train_batch_end(self, *args):
            devices = self.trainer.strategy._engine.cluster.devices
            allocated.append(sum(device.allocated_bytes() for device in devices))

    _, looking = fit(harmony(2, "120KiB"), Keeping())
    assert looking.plans[0].resident != looking.plans[-1].resident
    slots = sum(looking.plans[-1].slots_nbytes(device) for device in (0, 1))
    gradients = sum(looking.plans[-1].gradient_slots_nbytes(device) for device in (0, 1))
    assert len(kept) == 4 * NUM_STEPS and kept[0].grad_fn is not None
    assert allocated[-1] <= slots + gradients + len(kept) * 512


def test_what_user_code_puts_on_a_device_has_its_place():
    """Room that was free when the step was measured."""

    class Hoarding(L.Callback):
        def __init__(self):
            self.hoard = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx >= 3:
                device = trainer.strategy._engine.cluster.devices[0]
                with trainer.strategy._engine.cluster.activate():
                    self.hoard.append(torch.zeros(40 << 10, dtype=torch.uint8, device=device.torch_device))

    looking = Looking()
    module = twins()[0]
    fitted = trainer(harmony(1, "300KiB"), callbacks=[Hoarding(), looking], limit_train_batches=NUM_STEPS)
    fitted.fit(module, loader(8))
    assert same_weights(module, plain())
    resident = [len(plan.resident) for plan in looking.plans]
    assert resident[2] >= resident[3] > resident[4]
    assert looking.peaks[3] == looking.plans[3].peak_bytes  # what others hold is part of it
    assert looking.peaks[4] <= looking.plans[4].peak_bytes <= (300 << 10,)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_what_stays_goes_when_memory_is_short_after_all(when, caplog):
    """A layer that at times needs far more than when it was measured, be it in its second run."""
    calls = []

    class Hungry(nn.Linear):
        def forward(self, x):
            is_second_run = torch._C._current_graph_task_id() != -1
            calls.append(is_second_run)
            if len(calls) > 10 and is_second_run == (when == "backward"):
                torch.zeros(150 << 8, device=x.device)
            return super().forward(x)

    module = twins()[0]
    module.net[4][0].__class__ = Hungry
    looking = Looking()
    # With stashes on the host only the last layer keeps its activations.
    stash = "host" if when == "backward" else "auto"
    strategy = harmony(1, "300KiB", layers=LAYERS, one_layer_per_pack=True, stash=stash)
    trainer(strategy, callbacks=[looking], limit_train_batches=NUM_STEPS).fit(module, loader(8))
    assert same_weights(module, plain())
    assert any(calls) and "memory was short" in caplog.text
    assert 1 <= strategy.statistics().short_of_memory <= 2
    assert max(map(max, looking.peaks)) <= 300 << 10


class Evaluated(Chain):
    def predict_step(self, batch, batch_idx):
        return self.head(self.net(batch[0])).squeeze(1)


class Writing(L.Callback):
    """Writes a weight between batches."""

    def __init__(self, way):
        self.way = way

    def on_predict_start(self, trainer, module):
        self.write = writer_of(module.net[2][0].weight, module, self.way)

    def on_predict_batch_end(self, *args):
        self.write()


@pytest.mark.parametrize("way", [*WAYS, "nothing"])
@pytest.mark.parametrize("memory", ["200KiB", AMPLE])
def test_evaluation_sees_what_is_written_between_batches(way, memory):
    torch.manual_seed(0)
    ours, reference = Evaluated(), Evaluated()
    reference.load_state_dict(ours.state_dict())
    strategy = harmony(2, memory)
    callbacks = [[] if way == "nothing" else [Writing(way)] for _ in range(2)]
    found = trainer(strategy, callbacks=callbacks[0]).predict(ours, loader(8))
    expected = trainer(callbacks=callbacks[1]).predict(reference, loader(8))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    weights = sum(parameter.nbytes for parameter in ours.parameters())
    swapped = strategy.statistics().swap_in_bytes
    if way == "nothing" and memory == AMPLE:
        assert swapped == 2 * weights  # slots have changed behind the first batch, which was measured
    assert swapped <= len(found) * weights


def test_frozen_weights_stay_from_step_to_step():
    module = twins()[0]
    module.net.requires_grad_(False)
    module.net[0].requires_grad_(True)
    _, looking = fit(harmony(1, AMPLE, layers=LAYERS, one_layer_per_pack=True), module)
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    assert looking.each("swap_in_bytes")[2:] == [trained] * (NUM_STEPS - 2)


def test_weights_stay_while_gradients_are_accumulated():
    module = twins()[0]
    weights = sum(parameter.nbytes for parameter in module.parameters())
    looking = Looking()
    strategy = harmony(1, AMPLE, layers=LAYERS, one_layer_per_pack=True)
    trainer(strategy, callbacks=[looking], limit_train_batches=8, accumulate_grad_batches=4).fit(module, loader(4))
    per_batch = looking.each("swap_in_bytes")
    assert per_batch[1] == weights  # slots have changed
    assert per_batch[2] == 0
    assert sum(per_batch[4:]) <= 2 * weights


def test_manual_optimization_leaves_nothing_where_it_was():
    class Manual(Chain):
        def __init__(self, **options):
            super().__init__(**options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()

    torch.manual_seed(0)
    ours, reference = Manual(), Manual()
    reference.load_state_dict(ours.state_dict())
    options = {"limit_train_batches": NUM_STEPS, "limit_val_batches": 2, "val_check_interval": 1}
    trainer(harmony(2, "300KiB", microbatch_size=8), **options).fit(ours, loader(8), loader(8))
    trainer(**options).fit(reference, loader(8), loader(8))
    assert same_weights(ours, reference)
