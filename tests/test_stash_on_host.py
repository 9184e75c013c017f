"""Stashes in planned places on the host: the same training, in as much memory as they have, step by step."""

import itertools

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from torch import nn
from torch.utils.data import DataLoader

from harmony_lightning.runtime import stash_places

LAYERS = ["net.*", "head"]
BATCH = 8
NUM_STEPS = 3


class Winding(Chain):
    """Skips, a weight that code between layers uses, too, a layer that is called twice."""

    def __init__(self, depth=6):
        super().__init__(depth, torch.optim.SGD)

    def forward(self, inputs):
        first = hidden = self.net[0](inputs)
        for layer in self.net[1:-1]:
            hidden = layer(hidden) + first
        hidden = nn.functional.linear(hidden, self.net[0][0].weight).tanh()
        hidden = self.net[1](hidden).mul(inputs.sigmoid())
        return self.head(self.net[-1](hidden)).squeeze(1)

    def step(self, batch):
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class Counting(L.Callback):
    """How many stashes had no place, and how much memory places took, behind each step."""

    def __init__(self):
        self.unplaced, self.nbytes = [], []

    def on_train_batch_end(self, trainer, *args):
        self.unplaced.append(trainer.strategy.statistics().unplaced_stashes)
        arenas = trainer.strategy._engine._user_code.stash._places._arenas
        self.nbytes.append(sum(arena.memory.numel() for arena in arenas))

    def each_unplaced(self):
        return [after - before for before, after in itertools.pairwise([0, *self.unplaced])]


def fit(module, num_gpus=2, memory="300KiB", batches=None, callbacks=(), options=None, **trainer_options):
    options = {"layers": LAYERS, "one_layer_per_pack": True, "stash": "host", **(options or {})}
    strategy, counting = harmony(num_gpus, memory, **options), Counting()
    fitted = trainer(
        strategy, **{"callbacks": [counting, *callbacks], "limit_train_batches": NUM_STEPS, **trainer_options}
    )
    fitted.fit(module, *(batches or [loader(BATCH)]))
    return strategy, counting


def twins_of(make):
    torch.manual_seed(0)
    ours, reference = make(), make()
    reference.load_state_dict(ours.state_dict())
    return ours, reference


CASES = [
    (1, {}),
    (2, {}),
    (3, {"one_layer_per_pack": False}),
    (2, {"mode": "dp"}),
    (2, {"mode": "mixed"}),
    (2, {"microbatch_size": 8}),
]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(("num_gpus", "options"), CASES)
def test_only_the_first_step_has_no_places_and_nothing_changes(num_gpus, options):
    ours, others = twins_of(Winding)
    strategy, counting = fit(ours, num_gpus, options=options)
    fit(others, num_gpus, options={**options, "stash": "device"})
    assert same_weights(ours, others)
    assert counting.unplaced == [counting.unplaced[0]] * NUM_STEPS and counting.unplaced[0] > 0
    assert counting.nbytes[0] == 0 and len(set(counting.nbytes[1:])) == 1
    # All of a step are there at the end of its forward. Each begins at a multiple of 64 bytes.
    most = strategy.statistics().stash_out_bytes / NUM_STEPS
    assert most <= counting.nbytes[-1] < most + 64 * counting.unplaced[0]


def test_training_is_that_of_one_device():
    ours, reference = twins_of(Chain)
    fit(ours)
    trainer(accumulate_grad_batches=4, limit_train_batches=4 * NUM_STEPS).fit(reference, loader(2))
    assert same_weights(ours, reference)


class Keeping(Chain):
    """Keeps results of four microbatches, with the graph that made them, which nobody differentiates."""

    def __init__(self):
        super().__init__(depth=4)
        self.kept = []

    def step(self, batch):
        self.kept = [*self.kept, self.net[0](batch[0])][-4:]
        return super().step(batch)


def test_graphs_that_are_kept_keep_their_places():
    ours, reference = twins_of(Keeping)
    _, counting = fit(ours, limit_train_batches=5)
    trainer(accumulate_grad_batches=4, limit_train_batches=20).fit(reference, loader(2))
    assert same_weights(ours, reference)
    # Every other step finds places taken by the one before.
    assert counting.each_unplaced() == [counting.unplaced[0], 0, 4, 0, 4]
    assert len(set(counting.nbytes[1:])) == 1


class OfAnyLength(Chain):
    def step(self, batch):
        return self.head(self.net(batch)).square().mean()


def test_larger_batches_get_larger_places_and_others_find_theirs():
    generator = torch.Generator().manual_seed(1)
    lengths = [8, 8, 4, 8, 24, 24, 8, 25, 24]
    batches = [torch.randn(8, length, WIDTH, generator=generator) for length in lengths]
    ours, reference = twins_of(OfAnyLength)
    whole = DataLoader(batches, batch_size=None)
    _, counting = fit(ours, memory="1MiB", batches=[whole], limit_train_batches=len(lengths))
    parts = DataLoader([part for batch in batches for part in batch.split(2)], batch_size=None)
    trainer(accumulate_grad_batches=4).fit(reference, parts)
    assert same_weights(ours, reference)
    first = counting.unplaced[0]
    # What is a little too large for its place is not worth a larger one until all are.
    assert counting.each_unplaced() == [first, 0, 0, 0, first, 0, 0, first, 0]
    assert counting.nbytes[5] == 3 * counting.nbytes[1] and counting.nbytes[8] * 24 == counting.nbytes[5] * 25


class Manual(Winding):
    """Two losses a batch, each differentiated by itself: what the second one leaves lies where the first one's was."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()


def test_passes_of_one_step_share_places():
    ours, reference = twins_of(Manual)
    strategy, counting = fit(ours, 1)
    trainer(limit_train_batches=NUM_STEPS).fit(reference, loader(BATCH))
    assert same_weights(ours, reference)
    assert counting.unplaced == [counting.unplaced[0]] * NUM_STEPS and counting.unplaced[0] > 0
    most = strategy.statistics().stash_out_bytes / NUM_STEPS / 2
    assert most <= counting.nbytes[-1] < most + 64 * counting.unplaced[0]


class Turning(Chain):
    """From the third step on it takes derivatives across packs: that step is given up, and run again in one piece."""

    def step(self, batch):
        inputs, targets = batch
        if self.global_step >= 2:
            inputs = inputs.clone().requires_grad_()
            (direction,) = torch.autograd.grad(super().step((inputs, targets)), inputs)
            inputs = (inputs + 0.1 * direction.sign()).detach()
        return super().step((inputs, targets))


def test_a_step_that_is_given_up_leaves_its_places_to_the_next():
    ours, reference = twins_of(Turning)
    _, counting = fit(ours, limit_train_batches=5)
    trainer(accumulate_grad_batches=4, limit_train_batches=20).fit(reference, loader(2))
    assert same_weights(ours, reference)
    assert counting.unplaced[1] == counting.unplaced[0] and counting.unplaced[-2] == counting.unplaced[-1]


def test_fifty_steps_with_evaluation_between_take_no_more_than_two():
    class Holding(L.Callback):
        def __init__(self):
            self.nbytes = []

        def on_train_batch_end(self, trainer, *args):
            self.nbytes.append(trainer.strategy._engine.cluster.devices[0].allocated_bytes())

    torch.manual_seed(0)
    samples = loader(4, 200)
    options = {
        "val_check_interval": 10,
        "limit_val_batches": 1,
        "limit_train_batches": 50,
        "accumulate_grad_batches": 2,
    }
    _, counting = fit(Chain(depth=2), 1, batches=[samples, loader(4, 4)], callbacks=[holding := Holding()], **options)
    assert counting.unplaced == [counting.unplaced[0]] * 50
    assert len({*counting.nbytes[1:]}) == 1
    assert max(holding.nbytes[2:]) <= holding.nbytes[1]


def test_a_host_without_so_much_memory_in_one_piece_goes_on_in_pieces(monkeypatch, caplog):
    class Full:
        def host_buffer(self, nbytes):
            raise RuntimeError("cannot allocate memory")

    plan = stash_places._Arena.plan
    monkeypatch.setattr(stash_places._Arena, "plan", lambda arena, cluster: plan(arena, Full()))
    ours, others = twins_of(Winding)
    _, counting = fit(ours, 1)
    fit(others, 1, options={"stash": "device"})
    assert counting.each_unplaced() == [counting.unplaced[0]] * NUM_STEPS and counting.unplaced[0] > 0
    assert same_weights(ours, others)
    assert sum("in one piece" in record.message for record in caplog.records) == 1
