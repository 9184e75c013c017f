"""Updates go on while the next step begins; whoever looks at weights or at states of the optimizer sees finished ones."""

import contextlib
import copy
import functools
import os
import signal
import threading
import time

import lightning as L
import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer
from torch.utils.data import DataLoader, TensorDataset
from wide import Wide, batch_of, cluster_of, on_meta

from harmony_lightning import EmulatedCluster, HarmonyStrategy
from harmony_lightning.hardware.presets import HostModel
from harmony_lightning.runtime.weights.residency import DeviceWeights
from harmony_lightning.strategy import updates

NUM_STEPS = 4


@pytest.fixture(params=["at once", "late"], autouse=True)
def swap_ins(request, monkeypatch):
    """Threads enqueue them when they come to it."""
    swap_in = DeviceWeights._swap_in

    def late(*args):
        time.sleep(0.003)
        swap_in(*args)

    if request.param == "late":
        monkeypatch.setattr(DeviceWeights, "_swap_in", late)


@pytest.fixture(params=["host", "device", "stays"])
def place(request, monkeypatch):
    """Where packs are updated. On a device that takes more memory; with much more, they stay there."""
    if request.param != "host":
        monkeypatch.setenv("HARMONY_UPDATE", "device")
        memory = "230KiB" if request.param == "device" else "1MiB"
        monkeypatch.setattr(harmony, "__defaults__", (2, memory, 2))
    return request.param


def fit(strategy=None, callbacks=(), make=Chain, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    module = make(depth=6, optimizer=optimizer)
    accumulate = {} if strategy else {"accumulate_grad_batches": 4}
    data = loader(8 if strategy else 2)
    steps = {"limit_train_batches": NUM_STEPS if strategy else 4 * NUM_STEPS}
    trainer(strategy or "auto", callbacks=list(callbacks), **steps, **accumulate, **options).fit(module, data)
    return module


class Looking(L.Callback):
    """Looks at something in front of each step but the first. Hooks behind a step have updates finished anyway."""

    def __init__(self, look):
        self.look = look
        self.seen = []
        self.num_in_flight = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        engine = getattr(trainer.strategy, "_engine", None)
        self.num_in_flight += engine is not None and not engine.rest.has_settled
        self.seen.append(self.look(trainer, module))


def moments(trainer, module):
    (optimizer,) = trainer.optimizers
    return [optimizer.state[parameter]["exp_avg"].clone() for parameter in module.parameters()]


LOOKS = {
    "values": lambda trainer, module: [parameter.detach().clone() for parameter in module.parameters()],
    "sum": lambda trainer, module: [parameter.sum() for parameter in module.parameters()],
    "data": lambda trainer, module: [parameter.data.clone() for parameter in module.parameters()],
    "numpy": lambda trainer, module: [torch.from_numpy(p.detach().numpy().copy()) for p in module.parameters()],
    "copy": lambda trainer, module: [p.detach() for p in copy.deepcopy(module).parameters()],
    "state dict": lambda trainer, module: [value.clone() for value in module.state_dict().values()],
    "moments": moments,
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_looked_at_is_that_of_the_end_of_the_step(look, place):
    plain, ours = Looking(LOOKS[look]), Looking(LOOKS[look])
    strategy = harmony(2)
    assert same_weights(fit(callbacks=[plain]), fit(strategy, callbacks=[ours]))
    assert len(plain.seen) == len(ours.seen) == NUM_STEPS - 1
    assert (place == "host") == (strategy.statistics().updates_on_devices == 0)
    assert bool(strategy.plan.updates_stay) == (place == "stays")
    # The first update makes the optimizer's states. Who has an array of weights may write it whenever no step is running.
    assert ours.num_in_flight == (0 if look == "numpy" else NUM_STEPS - 2)
    for expected, found in zip(plain.seen, ours.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class _Broken(Exception):
    pass


class Counting(torch.optim.Optimizer):
    """Takes its time, and counts its steps in numbers, which nobody can be seen to look at."""

    def __init__(self, parameters, lr, breaks=0):
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        self.breaks, self.breaking = breaks, id(parameters[0])
        """The step that fails, and whose; not that of its stand-in when the optimizer is tried."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    time.sleep(0.005)
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    parameter.sub_(parameter.grad, alpha=group["lr"])
                    if id(parameter) == self.breaking and state["step"] == self.breaks:
                        raise _Broken
        return loss


def test_a_checkpoint_holds_the_numbers_of_the_end_of_the_step(place):
    def counts(trainer, module):
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
        return [entry["step"] for entry in state.values()]

    looking = Looking(counts)
    strategy = harmony(2)
    fit(strategy, callbacks=[looking], optimizer=Counting)
    assert strategy.statistics().updates_just_in_time == NUM_STEPS
    assert looking.seen == [[step] * 14 for step in range(1, NUM_STEPS)]
    assert looking.num_in_flight == NUM_STEPS - 2


class Growing(Chain):
    """Has its optimizer take in a weight within a step."""

    def training_step(self, batch, batch_idx):
        (optimizer,) = self.trainer.optimizers
        if batch_idx == 2 * self.trainer.accumulate_grad_batches and len(optimizer.param_groups) == 1:
            self.extra = torch.nn.Parameter(torch.zeros(1))
            optimizer.add_param_group({"params": [self.extra]})
        return super().training_step(batch, batch_idx)


def test_a_group_of_parameters_may_be_added_within_a_step(place):
    plain, ours = fit(make=Growing), fit(harmony(2), make=Growing)
    assert same_weights(plain, ours) and torch.equal(plain.extra, ours.extra)


class Writing(L.Callback):
    """Writes weights in front of each step, as weight clipping does."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.clamp_(-0.05, 0.05)


def test_weights_may_be_written_between_steps(place):
    assert same_weights(fit(callbacks=[Writing()]), fit(harmony(2), callbacks=[Writing()]))


class Remembering(Chain):
    """Keeps views of the weights from the beginning, and uses them in the step and behind it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norms = []

    def on_fit_start(self):
        self.views = [parameter.data.view(-1) for parameter in self.parameters() if parameter.dim() == 1]

    def training_step(self, batch, batch_idx):
        self.norms.append(torch.cat(self.views).norm().item())  # in a list: no function is given a view itself
        return super().training_step(batch, batch_idx)


def test_views_of_weights_are_watched_too(place):
    plain, ours = fit(make=Remembering), fit(harmony(2), make=Remembering)
    assert ours.norms[::4] == plain.norms[::4]


def sum_in_child(module):
    """Of all weights, as a forked process sees them."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)  # a child that waits for ever ends without a word
        try:
            total = sum(float(p.detach().double().numpy().sum()) for p in module.parameters())
            os.write(writer, repr(total).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as told:
        return torch.tensor(float(told.read()), dtype=torch.float64)


def test_a_process_that_is_forked_finds_finished_weights(place):
    """As workers of a data loader are, between epochs."""
    plain, ours = (Looking(lambda trainer, module: [sum_in_child(module)]) for _ in range(2))
    fit(callbacks=[plain]), fit(harmony(2), callbacks=[ours])
    assert plain.seen == ours.seen and ours.num_in_flight


@contextlib.contextmanager
def held_by_a_thread(lock):
    is_held, may_go = threading.Event(), threading.Event()

    def hold():
        with lock:
            is_held.set()
            may_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    try:
        yield
    finally:
        may_go.set()
        thread.join()


def test_a_process_that_is_forked_waits_for_no_thread():
    """Threads stay behind, and what one of them holds at that moment, in the child it holds for good: here the worker,
    which has done its jobs and is about to wait for others."""

    def child_sees(trainer, module):
        if not isinstance(trainer.strategy, HarmonyStrategy):
            return [sum_in_child(module)]
        engine = trainer.strategy._engine
        engine.state.wait()
        with held_by_a_thread(engine.worker._changed):
            return [sum_in_child(module)]

    plain, ours = Looking(child_sees), Looking(child_sees)
    fit(callbacks=[plain]), fit(harmony(2), callbacks=[ours])
    assert plain.seen == ours.seen and ours.num_in_flight


def test_updates_go_on_while_the_next_step_begins():
    """On a host whose memory is slow, in the order in which the next forward wants them."""
    host = HostModel(name="slow", memory_bytes_per_second=1e9, update_parameters_per_second=1e8, flops_per_second=1e9)
    cluster = EmulatedCluster(2, "200KiB", preset="3090", host=host)
    strategy = HarmonyStrategy(microbatch_size=2, cluster=cluster, plan="sizes")
    assert same_weights(fit(strategy), fit())
    timeline = strategy.timeline()
    updates = [span for span in timeline.spans if span.lane.endswith("harmony-host-worker") and span.nbytes]
    forward = [
        span for device in range(2) for span in timeline.lane(device, "compute") if span.name.startswith("forward")
    ]
    assert any(update.start < span.start < update.end for update in updates for span in forward)


@pytest.mark.parametrize("update", ["host", "first"])
def test_updates_of_gradients_over_several_minibatches_hold_nothing_up(update):
    """Such a minibatch takes as long as one whose gradients wait for more."""
    options = {"mode": "pp", "microbatch_size": 8, "stash": "host", "one_layer_per_pack": True}
    cluster = cluster_of(2, "1080ti", memory="200MiB")
    strategy = HarmonyStrategy(plan="sizes", update=update, cluster=cluster, **options)
    data = DataLoader(TensorDataset(*batch_of(64 * 6)), batch_size=64)
    module = on_meta(functools.partial(Wide, depth=16)).to_empty(device="cpu")
    trainer(strategy, max_steps=3, accumulate_grad_batches=2).fit(module, data)
    waiting, updating, *_ = strategy.timeline().step_seconds
    assert updating < 1.025 * waiting


@pytest.mark.parametrize("forks", [False, True])
def test_an_update_that_fails_in_flight_ends_the_run(forks):
    def fork(trainer, module):
        if forks and os.fork() == 0:
            os._exit(0)

    looking = Looking(fork)
    with pytest.raises(_Broken):
        fit(harmony(2), callbacks=[looking], optimizer=functools.partial(Counting, breaks=3))
    assert len(looking.seen) == 3


def test_the_last_update_may_fail_too():
    with pytest.raises(_Broken):
        fit(harmony(2), optimizer=functools.partial(Counting, breaks=NUM_STEPS))


class Exchanging(Chain):
    """Gives weights other memory in front of each step, and within."""

    def on_train_batch_start(self, batch, batch_idx):
        self.head.weight.data = self.head.weight.data.clone()

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for block in self.net:
                block[0].bias.data = torch.ones_like(block[0].bias.data)
        return super().training_step(batch, batch_idx)


def test_the_memory_of_weights_may_be_exchanged(place):
    assert same_weights(fit(make=Exchanging), fit(harmony(2), make=Exchanging))


class Decaying(Chain):
    """Writes weights within the step, of packs that are on their way already."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.decay()

    def training_step(self, batch, batch_idx):
        self.decay()
        return super().training_step(batch, batch_idx)

    def decay(self):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.99)


def test_weights_may_be_written_within_the_step(place):
    # One microbatch: each further one would find weights that the one before has written.
    plain = Decaying(depth=6)
    ours = copy.deepcopy(plain)
    trainer(limit_train_batches=NUM_STEPS).fit(plain, loader(8))
    trainer(harmony(2, microbatch_size=8), limit_train_batches=NUM_STEPS).fit(ours, loader(8))
    assert same_weights(plain, ours)


@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_steps": 3, "max_epochs": -1}])
def test_the_last_gradients_are_there_after_the_run(end, monkeypatch):
    fits = [fit(strategy, **end) for strategy in (None, harmony(2))]
    assert same_weights(*fits)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*(one.parameters() for one in fits), strict=True))
    monkeypatch.setattr(updates, "LEFT_NBYTES", 1000)
    assert all(p.grad is None for p in fit(harmony(2), **end).parameters())


class Transforming(Chain):
    """Functions that take their tensors in a way of their own, while nobody knows which of them are being updated."""

    def training_step(self, batch, batch_idx):
        hidden = self.net(batch[0])
        squares = torch.func.vmap(lambda row: row.square().sum())(hidden)
        first, _, last = torch.tensor_split(
            hidden, torch.tensor([16, 40]), dim=1
        )  # indices on the host, whatever the device
        return (self.head(hidden).squeeze(1) - batch[1] + squares + first.sum(1) - last.sum(1)).square().mean()


def test_functions_with_ways_of_their_own():
    assert same_weights(fit(make=Transforming), fit(harmony(2), make=Transforming))
