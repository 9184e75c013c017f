"""Packs that are updated on devices: what the host would have made of them to the bit, and finished for all who look."""

import dataclasses
import functools
import itertools
import logging
import re

import lightning as L
import pytest
import torch
from chain import Chain, assert_same_optimizers, loader, same_weights, trainer
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from wide import Wide, cluster_of, on_meta

from harmony_lightning import EmulatedCluster, HarmonyStrategy

NUM_STEPS = 4
MEMORY = "500KiB"


@functools.cache
def made(**options):
    """The plan that is made for the chain."""
    strategy = HarmonyStrategy(
        microbatch_size=2, cluster=EmulatedCluster(2, MEMORY), one_layer_per_pack=True, **options
    )
    torch.manual_seed(0)
    trainer(strategy, limit_train_batches=1).fit(Chain(depth=6), loader(8))
    return strategy.plan


def planned(which=lambda index: True, stay=(), **options):
    """The plan that is made for the chain, with some of its packs updated on devices."""
    packs = made(**options).packs
    packs = [dataclasses.replace(pack, update="device" if which(i) else "host") for i, pack in enumerate(packs)]
    assert len(packs) > 2
    stay = [index for index, pack in enumerate(packs) if pack.update == "device" and (stay == "all" or index in stay)]
    return dataclasses.replace(made(**options), packs=tuple(packs), updates_stay=tuple(stay))


def on_devices(which=lambda index: True, stay=(), **options):
    return HarmonyStrategy(
        plan=planned(which, stay, **options), microbatch_size=2, cluster=EmulatedCluster(2, MEMORY), **options
    )


def fit(strategy=None, make=Chain, accumulate=1, num_steps=NUM_STEPS, ckpt_path=None, num_parts=4, **options):
    torch.manual_seed(0)
    module = make(depth=6)
    parts = (1 if strategy else num_parts) * accumulate
    fitted = trainer(
        strategy or "auto",
        limit_train_batches=num_steps * parts,
        **({"accumulate_grad_batches": parts} if parts > 1 else {}),
        **options,
    )
    fitted.fit(module, loader(8 if strategy else 8 // num_parts, 80), ckpt_path=ckpt_path)
    return module, fitted


def assert_same(ours, plain):
    assert same_weights(ours[0], plain[0])
    assert_same_optimizers(ours[1].optimizers, plain[1].optimizers)


def updates(strategy):
    return strategy.statistics().updates_on_devices


@pytest.mark.parametrize("stay", [(), "all"])
def test_the_last_gradients_are_there_after_the_run(stay):
    strategy = on_devices(stay=stay)
    ours, plain = fit(strategy, max_epochs=2), fit(max_epochs=2)
    assert updates(strategy)
    assert_same(ours, plain)
    for mine, theirs in zip(ours[0].parameters(), plain[0].parameters(), strict=True):
        assert type(mine.grad) is torch.Tensor
        assert torch.equal(mine.grad, theirs.grad)


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "foreach": (torch.optim.Adam, {"foreach": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "ASGD": (torch.optim.ASGD, {}),
}


@pytest.mark.parametrize(
    ("name", "stay"),
    [*((name, (1, 4)) for name in OPTIMIZERS), *itertools.product(("SGD", "AdamW", "foreach"), ((), "all"))],
    ids=str,
)
def test_equal_to_the_host(name, stay):
    kind, options = OPTIMIZERS[name]

    def make(depth):
        return Chain(depth=depth, optimizer=kind, **options)

    strategy = on_devices(stay=stay)
    assert_same(fit(strategy, make), fit(make=make))
    num_packs = len(strategy.plan.packs)
    assert updates(strategy) == (NUM_STEPS - 1) * num_packs  # the first step makes the states
    assert max(strategy.statistics().peak_device_bytes) <= 500 * 1024


@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_packs_may_differ_in_where_they_are_updated(mode):
    mixed, on_host = on_devices(lambda index: index % 2 == 0, mode=mode), on_devices(lambda index: False, mode=mode)
    assert_same(fit(mixed), fit(on_host))
    num_packs = len(mixed.plan.packs)
    assert updates(mixed) == (NUM_STEPS - 1) * -(-num_packs // 2)
    assert updates(on_host) == 0
    assert sum(pack.update == "device" for pack in mixed.plan.packs) == -(-num_packs // 2)


def test_in_dp_the_device_with_the_sum_updates():
    there, on_host = on_devices(mode="dp"), on_devices(lambda index: False, mode="dp")
    assert_same(fit(there), fit(on_host))
    assert updates(there) == (NUM_STEPS - 1) * len(there.plan.packs)


class Skipping(Chain):
    """The first block is none of some microbatches'."""

    def step(self, batch):
        hidden, targets = batch
        for block in self.net[hidden[0, 0].item() > 0 :]:
            hidden = block(hidden)
        return torch.nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)


@pytest.mark.parametrize("stay", [(), "all"], ids=["nothing stays", "all stay"])
def test_gradients_of_a_pack_may_be_on_another_device_in_each_step(stay):
    """What its optimizer remembers is where the plan says, or on the host, but never in two places."""
    there = on_devices(lambda index: index == 0, stay, mode="dp")
    on_host = HarmonyStrategy(mode="dp", microbatch_size=2, cluster=EmulatedCluster(2, MEMORY), one_layer_per_pack=True)
    assert_same(fit(there, Skipping, num_steps=8), fit(on_host, Skipping, num_steps=8))
    assert 0 < updates(there) < 7


@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_the_plan_that_is_made_keeps_packs_where_they_are_updated(mode):
    cluster = EmulatedCluster(2, "2MiB")
    options = {"mode": mode, "microbatch_size": 2, "stash": "device", "one_layer_per_pack": True}
    strategy = HarmonyStrategy(update="device", cluster=cluster, **options)
    on_host = HarmonyStrategy(cluster=cluster, **options)
    assert_same(fit(strategy), fit(on_host))
    assert len(strategy.plan.updates_stay) == len(strategy.plan.packs) > 1
    assert updates(strategy) == (NUM_STEPS - 1) * len(strategy.plan.packs)


@pytest.mark.parametrize(("mode", "count"), [("pp", 2), ("dp", 1), ("mixed", 2)])
def test_the_first_packs_alone(mode, count):
    """All GPUs wait for theirs when a step begins. In dp all have the first one, and its weights stay nowhere."""
    options = {"mode": mode, "microbatch_size": 2, "one_layer_per_pack": True}
    strategy = HarmonyStrategy(update="first", cluster=EmulatedCluster(2, MEMORY), **options)
    on_host = HarmonyStrategy(cluster=EmulatedCluster(2, MEMORY), **options)
    assert_same(fit(strategy), fit(on_host))
    plan = strategy.plan
    assert [index for index, pack in enumerate(plan.packs) if pack.update == "device"] == list(range(count))
    assert plan.updates_stay == tuple(range(count))
    assert updates(strategy) == (NUM_STEPS - 1) * count


class Peeking(L.Callback):
    """Looks at a weight, and writes another, while they are newer on a GPU."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 4:
            assert module.net[0][0].weight.abs().sum() > 0
        if batch_idx == 6:
            with torch.no_grad():
                module.net[1][0].weight.mul_(0.5)


def half_frozen(depth):
    module = Chain(depth=depth)
    module.net[0][0].weight.requires_grad_(False)
    return module


@pytest.mark.parametrize(("make", "callbacks"), [(Chain, (Peeking,)), (half_frozen, ())])
def test_narrow_weights_stay_as_masters(make, callbacks):
    """They are cast on the GPU for each pass, to what the host would have cast them to."""
    options = {"microbatch_size": 2, "one_layer_per_pack": True}
    runs, strategies = [], []
    for update in ("first", "host"):
        strategies.append(HarmonyStrategy(update=update, cluster=EmulatedCluster(2, MEMORY), **options))
        called = [callback() for callback in callbacks]
        runs.append(fit(strategies[-1], make, num_steps=8, precision="bf16-mixed", callbacks=called))
    assert_same(*runs)
    plan = strategies[0].plan
    assert plan.updates_stay == (0, 1) and all(plan.packs[index].narrow for index in (0, 1))
    assert updates(strategies[0]) > 8


@functools.cache
def narrow_made(mode):
    """The plan that is made to update all packs on devices."""
    options = {"mode": mode, "microbatch_size": 2, "one_layer_per_pack": True, "stash": "device"}
    strategy = HarmonyStrategy(update="device", cluster=EmulatedCluster(2, MEMORY), **options)
    fit(strategy, num_steps=2, precision="bf16-mixed")
    return strategy.plan


def narrow_plan(count, mode):
    """With so many first packs updated on devices, none of which stays."""
    plan = dataclasses.replace(narrow_made(mode), updates_stay=(), prefetch=1)
    assert all(pack.narrow and pack.state_nbytes for pack in plan.packs)
    packs = [
        pack if index < count else dataclasses.replace(pack, update="host", state_nbytes=0, state_slot_nbytes=0)
        for index, pack in enumerate(plan.packs)
    ]
    return dataclasses.replace(plan, packs=tuple(packs))


@functools.cache
def narrow_on_host(mode, callback):
    strategy = HarmonyStrategy(
        mode=mode, microbatch_size=2, cluster=EmulatedCluster(2, MEMORY), one_layer_per_pack=True
    )
    return fit(strategy, num_steps=8, precision="bf16-mixed", callbacks=[callback()] if callback else [])


@pytest.mark.parametrize("callback", [None, Peeking])
@pytest.mark.parametrize(("mode", "count"), [("pp", 1), ("pp", 2), ("pp", 7), ("dp", 2)])
def test_narrow_weights_leave_as_masters(mode, count, callback):
    """And the next forward finds the last ones where they were updated, before they are on the host."""
    plan, counts = narrow_plan(count, mode), []
    strategy = HarmonyStrategy(plan=plan, cluster=EmulatedCluster(2, plan.memory_bytes))

    class Counting(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            statistics = strategy.statistics()
            counts.append((statistics.swap_in_bytes, statistics.swap_out_bytes))

    callbacks = [Counting(), *([callback()] if callback else [])]
    ours = fit(strategy, num_steps=8, precision="bf16-mixed", callbacks=callbacks)
    assert_same(ours, narrow_on_host(mode, callback))
    assert updates(strategy) >= 6 * count
    found = [plan.is_left(index) for index in range(len(plan.packs))]
    assert sum(found) == (0 if mode == "dp" else min(count, 4))  # in two slots on each device
    if callback is None:
        assert {(b - a, d - c) for (a, c), (b, d) in itertools.pairwise(counts[2:])} == {
            (plan.swap_in_bytes_per_step, plan.swap_out_bytes_per_step)
        }


def tied(depth):
    module = Chain(depth=depth)
    for index in (0, 1):
        module.net[3 + index][0].weight, module.net[3 + index][0].bias = (
            module.net[index][0].weight,
            module.net[index][0].bias,
        )
    return module


@pytest.mark.parametrize(
    ("make", "memory", "reason"),
    [(Chain, "150KiB", r"slots would take \d.*, each has 150 KiB"), (tied, MEMORY, "has no weights of its own")],
)
def test_not_even_the_first_packs(make, memory, reason, caplog):
    options = {"microbatch_size": 2, "one_layer_per_pack": True}
    strategy = HarmonyStrategy(update="first", cluster=EmulatedCluster(2, memory), **options)
    on_host = HarmonyStrategy(cluster=EmulatedCluster(2, memory), **options)
    with caplog.at_level(logging.INFO, logger="harmony_lightning"):
        assert_same(fit(strategy, make, num_steps=2), fit(on_host, make, num_steps=2))
    assert re.search(reason, caplog.text)
    assert updates(strategy) == 0


def turn_seconds(**options):
    """From the last backward of a step to the second forward of the next one, at the first pack, which is a large one; and
    the plan."""
    strategy = HarmonyStrategy(microbatch_size=2, one_layer_per_pack=True, cluster=cluster_of(2), **options)
    data = TensorDataset(torch.zeros(12, 128, 1024), torch.zeros(12, 128, dtype=torch.long))
    module = on_meta(lambda: Wide(2)).to_empty(device="cpu")
    trainer(strategy).fit(module, DataLoader(data, batch_size=4))
    spans = strategy.timeline().lane(0, "compute")
    backward = max(i for i, span in enumerate(spans[:-20]) if span.name == "backward of pack 0, microbatch 1")
    forward = next(span for span in spans[backward:] if span.name == "forward of pack 0, microbatch 1")
    return forward.start - spans[backward].end, strategy.plan


def test_the_next_step_begins_at_once():
    """Whether what was updated stays, or leaves while the step goes on."""
    on_host, _ = turn_seconds(update="host")
    stays, plan = turn_seconds(update="first")
    leaves, plan = turn_seconds(plan=dataclasses.replace(plan, updates_stay=()))
    assert plan.is_left(0) and max(stays, leaves) < 0.3 * on_host


class Scheduled(Chain):
    """Two groups with options of their own, and rates that change with every step. Some weights are frozen."""

    def configure_optimizers(self):
        for parameter in self.net[2].parameters():
            parameter.requires_grad_(False)
        groups = [
            {"params": [*self.net[:3].parameters(), self.head.bias], "lr": 1e-3, "betas": (0.8, 0.9)},
            {"params": [*self.net[3:].parameters()], "weight_decay": 0.3},
        ]  # nobody steps the head's weight
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        schedule = lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1 / (1 + step)])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stay", [(), "all"], ids=["swapped", "all stay"])
def test_groups_schedules_and_accumulation(accumulate, stay):
    strategy = on_devices(stay=stay)
    options = {"accumulate": accumulate, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    ours = fit(strategy, Scheduled, **options)
    # Several minibatches are added up in another order than their microbatches in plain training.
    on_host = on_devices(lambda index: False) if accumulate > 1 else None
    assert_same(ours, fit(on_host, Scheduled, **options))
    assert updates(strategy) == (NUM_STEPS - 1) * (len(strategy.plan.packs) - 1)


@pytest.mark.parametrize("first", ["host", "device", "stays"])
@pytest.mark.parametrize("second", ["host", "device"])
def test_training_is_resumed_in_the_middle(tmp_path, first, second):
    plain = fit()
    stay = "all" if first == "stays" else ()
    half = trainer(on_devices(lambda index: first != "host", stay), limit_train_batches=2)
    torch.manual_seed(0)
    half.fit(Chain(depth=6), loader(8, 80))
    half.save_checkpoint(tmp_path / "half.ckpt")
    strategy = on_devices(lambda index: second == "device")
    rest = trainer(strategy, max_epochs=2, limit_train_batches=2)
    module = Chain(depth=6)
    rest.fit(module, Again(loader(8, 80)), ckpt_path=tmp_path / "half.ckpt")
    assert_same((module, rest), plain)
    assert updates(strategy) == (len(strategy.plan.packs) if second == "device" else 0)


class Again:
    """Goes on where the epoch before ended."""

    def __init__(self, batches):
        self.batches = list(batches)[2:]

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_bytes_are_those_of_the_plan(stays, mode):
    options = {"microbatch_size": 2, "mode": mode, "stash": "device"}
    strategy = HarmonyStrategy(
        update="device",
        one_layer_per_pack=True,
        cluster=EmulatedCluster(2, MEMORY if mode == "pp" else "1MiB"),
        **options,
    )
    fit(strategy, num_steps=1)
    plan = strategy.plan
    assert plan.updates_stay == tuple(range(len(plan.packs)))  # there is room
    if not stays:
        plan = dataclasses.replace(plan, updates_stay=())
    strategy = HarmonyStrategy(plan=plan, cluster=EmulatedCluster(2, plan.memory_bytes), **options)
    counts = []

    class Counting(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            statistics = strategy.statistics()
            counts.append((statistics.swap_in_bytes, statistics.swap_out_bytes))

    ours = fit(strategy, callbacks=[Counting()])
    assert_same(ours, fit(HarmonyStrategy(cluster=EmulatedCluster(2, MEMORY), **options)))
    weights = sum(pack.nbytes for pack in plan.packs)
    assert sum(pack.state_nbytes for pack in plan.packs) == 2 * weights
    for before, after in itertools.pairwise(counts[2:]):  # the first step is the host's, the second brings states in
        assert after[0] - before[0] == plan.swap_in_bytes_per_step
        assert after[1] - before[1] == plan.swap_out_bytes_per_step
    assert plan.swap_out_bytes_per_step == (0 if mode == "pp" else weights) if stays else 3 * weights
    assert (plan.swap_in_bytes_per_step == 0) == (stays and mode == "pp")
    assert max(strategy.statistics().peak_device_bytes) <= plan.memory_bytes


def test_packs_are_updated_on_the_host_where_the_device_has_no_room(caplog):
    strategy = HarmonyStrategy(update="device", microbatch_size=2, cluster=EmulatedCluster(2, "120KiB"))
    with caplog.at_level(logging.WARNING):
        assert_same(fit(strategy), fit())
    assert updates(strategy) == 0
    assert "the host updates all packs" in caplog.text


class Hooked(Chain):
    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []
        self.head.weight.register_hook(lambda gradient: self.seen.append(gradient.clone()))


@pytest.mark.parametrize("stay", [(), "all"], ids=["swapped", "all stay"])
def test_weights_whose_gradients_are_watched_stay_with_the_host(stay):
    strategy = on_devices(stay=stay)
    ours, plain = fit(strategy, Hooked), fit(make=Hooked)
    assert_same(ours, plain)
    # The head's bias is updated on a device all the same.
    assert updates(strategy) == (NUM_STEPS - 1) * len(strategy.plan.packs)


class Between(Chain):
    """Uses weights of layers between layers, so that their gradients go to the host."""

    def step(self, batch):
        inputs, targets = batch
        fast = {name: weight * 0.5 for name, weight in self.net.named_parameters()}
        hidden = torch.func.functional_call(self.net, fast, (inputs,))
        return torch.nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)


@pytest.mark.parametrize("stay", [(), "all"], ids=["swapped", "all stay"])
def test_weights_that_are_used_between_layers_are_updated_on_the_host(stay):
    strategy, on_host = (
        HarmonyStrategy(plan=plan, microbatch_size=2, cluster=EmulatedCluster(2, "1MiB"))
        for plan in (planned(stay=stay), planned(lambda index: False))
    )
    assert_same(fit(strategy, Between), fit(on_host, Between))
    assert updates(strategy) == NUM_STEPS - 1  # of the head


OBSERVERS = {
    "clipping by norm": {"gradient_clip_val": 0.1},
    "a hook": {"callbacks": lambda: [type("Sees", (L.Callback,), {"on_after_backward": lambda *args: None})()]},
    "looking back": {"callbacks": lambda: [type("Sees", (L.Callback,), {"on_train_batch_end": lambda *args: None})()]},
}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_sees_gradients_has_the_host_update(observer, caplog):
    options = OBSERVERS[observer]
    options = {name: value() if callable(value) else value for name, value in options.items()}
    strategy = on_devices()
    with caplog.at_level(logging.INFO):
        assert_same(fit(strategy, **options), fit(**options))
    assert updates(strategy) == 0
    assert caplog.text.count("are updated on the host: ") == 1


class Renewing(torch.optim.Optimizer):
    """Makes its states anew in each step, counts in numbers, and forgets one of them."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["mean"] = state["mean"] * 0.9 + parameter.grad if "mean" in state else parameter.grad.clone()
                state["rows"] = (
                    torch.cat([state["rows"], parameter.grad[:1].clone()])
                    if "rows" in state
                    else (parameter.grad[:1].clone())
                )
                if state["step"] == 2:
                    state["old"] = parameter.clone()
                if state["step"] == 4:
                    del state["old"]
                parameter.sub_(state["mean"], alpha=group["lr"])
        return loss


def test_an_optimizer_may_make_its_states_anew():
    strategy = on_devices()
    assert_same(
        fit(strategy, lambda depth: Chain(depth, optimizer=Renewing)),
        fit(make=lambda depth: Chain(depth, optimizer=Renewing)),
    )
    assert updates(strategy) == (NUM_STEPS - 1) * len(strategy.plan.packs)


class Listing(torch.optim.SGD):
    """Remembers a list."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr, momentum=0.9)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["notes"] = [1, 2]


class Elsewhere(torch.optim.Optimizer):
    """Remembers beside `state`."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.momenta = {p: torch.zeros_like(p) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.momenta[parameter].mul_(0.9).add_(parameter.grad), alpha=group["lr"])
        return loss


@pytest.mark.parametrize("kind", [Listing, Elsewhere])
def test_what_cannot_move_is_updated_on_the_host(kind, caplog):
    strategy = on_devices()
    with caplog.at_level(logging.INFO):
        ours = fit(strategy, lambda depth: Chain(depth, optimizer=kind))
    assert same_weights(ours[0], fit(make=lambda depth: Chain(depth, optimizer=kind))[0])
    assert updates(strategy) == 0
    assert "updated on the host" in caplog.text


def timeline(stay):
    strategy = HarmonyStrategy(
        plan=planned(stay=stay, stash="device"), microbatch_size=2, cluster=EmulatedCluster(2, MEMORY, preset="3090")
    )
    fit(strategy)
    return strategy.timeline()


def test_time_is_the_same_each_time_and_less_where_packs_stay():
    swapped, again, stays = timeline(()), timeline(()), timeline("all")
    assert swapped == again
    ends = [max(span.end for span in one.spans if span.lane == "compute") for one in (swapped, stays)]
    assert ends[1] < ends[0]
    assert any(span.name.startswith("states of pack") for span in swapped.spans)


class Detour(Chain):
    """Now and then through a pack behind all others, and then from the first one on: gradients of the first one come in
    two visits, with others between."""

    def __init__(self, depth):
        super().__init__(depth)
        self.detour = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))

    def step(self, batch):
        hidden = self.detour(batch[0]) if self.trainer.global_step % 3 == 1 else batch[0]
        for block in self.net:
            hidden = block(hidden)
        return torch.nn.functional.mse_loss(self.head(hidden).squeeze(1), batch[1])


def test_states_that_were_brought_in_for_nothing_have_been_read_before_the_host_writes_them():
    strategy = HarmonyStrategy(microbatch_size=4, cluster=EmulatedCluster(1, "200KiB"), update="device")
    ours = fit(strategy, Detour, num_steps=5, num_parts=2)
    assert updates(strategy)
    assert_same(ours, fit(make=Detour, num_steps=5, num_parts=2))


class Penalised(Chain):
    def step(self, batch):
        return super().step(batch) + self.net[0][0].weight.square().sum() * 1e-3


def test_narrow_gradients_of_which_some_have_been_used_on_the_device():
    strategy = HarmonyStrategy(
        microbatch_size=8, cluster=EmulatedCluster(2, "300KiB"), update="first", one_layer_per_pack=True
    )
    ours = fit(strategy, Penalised, precision="bf16-mixed", num_parts=1)
    assert updates(strategy)
    assert_same(ours, fit(make=Penalised, precision="bf16-mixed", num_parts=1))


class WrittenWithoutTorch(Chain):
    """NumPy arrays in the weights' memory are written where nobody sees it."""

    def on_fit_start(self):
        self.arrays = [parameter.detach().numpy() for parameter in self.net.parameters()]
        self.num_batches = 0

    def on_train_batch_start(self, *_):
        if self.num_batches % self.trainer.accumulate_grad_batches == 0:
            for array in self.arrays:
                array *= 0.5
        self.num_batches += 1


@pytest.mark.parametrize("stay", [(), "all"])
def test_memory_that_is_known_outside_of_torch_may_be_written_between_steps(stay):
    strategy = on_devices(stay=stay)
    assert_same(fit(strategy, WrittenWithoutTorch), fit(make=WrittenWithoutTorch))
    assert updates(strategy)
