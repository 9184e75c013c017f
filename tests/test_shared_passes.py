"""Several batches of an evaluation go through each pack together, and nothing but the number of swap-ins tells."""

import copy
import itertools
import math

import lightning as L
import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection

from harmony_lightning.strategy.look_ahead import LookAhead

pytestmark = pytest.mark.usefixtures("nothing_stays")  # passes are counted

BATCH = 4


class Rows(Logger):
    """Keeps what is logged, in order."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name = version = "rows"

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class Evaluated(Chain):
    """Logs every kind of value, and returns what it has computed."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mse = MeanSquaredError()
        self.both = MetricCollection({"again": MeanSquaredError(), "root": MeanSquaredError(squared=False)})
        self.mean = MeanMetric()
        self.seen = []

    def evaluate(self, batch, batch_idx, dataloader_idx=0):
        inputs, targets = batch
        outputs = self.head(self.net(inputs)).squeeze(1)
        loss = nn.functional.mse_loss(outputs, targets)
        if batch_idx % 2:
            self.log("odd", loss, on_step=True, on_epoch=True)
        self.mse(outputs, targets)
        self.log("mse", self.mse, on_step=True, on_epoch=True)
        self.both.update(outputs, targets)
        self.log_dict(self.both)
        self.mean.update(loss)
        self.log("mean so far", self.mean.compute(), on_step=True, on_epoch=False)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", outputs.max(), reduce_fx="max")
        self.seen.append((batch_idx, dataloader_idx))
        return {"loss": loss, "outputs": outputs}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return self.evaluate(batch, batch_idx, dataloader_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return self.evaluate(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append((batch_idx, dataloader_idx))
        return {"outputs": self.head(self.net(batch[0])), "batch_idx": batch_idx}


def make(kind=Evaluated, **options):
    torch.manual_seed(0)
    return kind(**options)


def plain(run, module=None, **options):
    return evaluate("auto", run, module, **options)


def shared(run, num_batches, module=None, strategy=(), **options):
    return evaluate(harmony(2, evaluation_batches=num_batches, **dict(strategy)), run, module, **options)


def evaluate(strategy, run, module=None, **options):
    """What comes of it: results, rows of the logger, random state; and the module and the strategy."""
    module, rows = make() if module is None else module, Rows()
    torch.manual_seed(1)
    with_strategy = trainer(strategy, **{"logger": rows, "log_every_n_steps": 1, **options})
    result = run(with_strategy, module)
    return (result, rows.rows, getattr(module, "seen", None), torch.rand(())), module, with_strategy


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or (one != one and other != other)


def passes(run):
    """How often the whole model was swapped in."""
    _, module, with_strategy = run
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    count, rest = divmod(with_strategy.strategy.statistics().swap_in_bytes, nbytes)
    assert rest == 0
    return count


VALIDATE = lambda run, module: run.validate(module, loader(BATCH), verbose=False)  # noqa: E731
TEST = lambda run, module: run.test(module, loader(BATCH), verbose=False)  # noqa: E731
PREDICT = lambda run, module: run.predict(module, loader(BATCH))  # noqa: E731


@pytest.mark.parametrize("run", [VALIDATE, TEST, PREDICT], ids=["validate", "test", "predict"])
@pytest.mark.parametrize("num_batches", [1, 2, 4, 100])
def test_batches_share_passes_and_results_are_the_same(run, num_batches, devices):
    """Ten batches: the first one runs alone, and nine are left to share."""
    expected, *_ = plain(run)
    found = shared(run, num_batches)
    assert equal(found[0], expected)
    assert passes(found) == (10 if num_batches == 1 else 1 + math.ceil(9 / num_batches))


def test_with_microbatches_dealt_over_the_gpus():
    """In dp each GPU takes batches of its own, and so weights of its own."""
    expected, *_ = plain(VALIDATE)
    found = shared(VALIDATE, 3, strategy={"mode": "dp"})
    assert equal(found[0], expected)
    assert passes(found) == 1 + 3 * 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precisions(precision):
    expected, *_ = plain(VALIDATE, precision=precision)
    found = shared(VALIDATE, 3, precision=precision)
    assert equal(found[0], expected)
    predicted, *_ = plain(PREDICT, precision=precision)
    assert equal(shared(PREDICT, 3, precision=precision)[0], predicted)


def test_groups_end_where_a_dataloader_does():
    """Seven batches and five: 1 + (3, 3) and (3, 2)."""

    def run(with_strategy, module):
        loaders = [loader(BATCH, num_samples=27), loader(BATCH, num_samples=20)]
        metrics = with_strategy.validate(module, loaders, verbose=False)
        return metrics, with_strategy.predict(module, loaders)

    expected, *_ = plain(run)
    found = shared(run, 3)
    assert equal(found[0], expected)
    assert passes(found) == 5


@pytest.mark.parametrize("mode", ["max_size", "min_size"])
def test_combined_loaders(mode):
    class Combined(Evaluated):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.step(batch["a"]) + self.step(batch["b"]) if None not in batch.values() else 0.0)

    def run(with_strategy, module):
        loaders = {"a": loader(BATCH), "b": loader(2, num_samples=14)}
        return with_strategy.validate(module, L.pytorch.utilities.CombinedLoader(loaders, mode), verbose=False)

    expected, *_ = plain(run, make(Combined))
    assert equal(shared(run, 3, make(Combined))[0], expected)


@pytest.mark.parametrize("limit", [5, 0.5])
def test_limits(limit):
    options = {"limit_val_batches": limit, "limit_predict_batches": limit}
    for run in (VALIDATE, PREDICT):
        expected, *_ = plain(run, **options)
        found = shared(run, 3, **options)
        assert equal(found[0], expected)
        assert passes(found) == 3


def test_no_batch_is_fetched_that_is_not_asked_for():
    """Data without a length, of which Lightning itself fetches one batch ahead."""

    class Stream(IterableDataset):
        def __iter__(self):
            for index in itertools.count():
                self.num_given = index + 1
                yield torch.full((64,), float(index)), torch.tensor(float(index))

    def run(with_strategy, module):
        data = Stream()
        metrics = with_strategy.validate(module, DataLoader(data, batch_size=2), verbose=False)
        return metrics, data.num_given

    expected, *_ = plain(run, limit_val_batches=6)
    assert equal(shared(run, 4, limit_val_batches=6)[0], expected)


def test_validation_within_training():
    """With the check before the first epoch; what evaluation calls does not count as the order of calls in training."""

    def run(with_strategy, module):
        with_strategy.fit(module, loader(8), loader(BATCH))
        return {name: float(value) for name, value in with_strategy.callback_metrics.items()}

    options = {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 2}
    whole = {"microbatch_size": 8}
    expected, reference, _ = plain(run, **options)
    one_by_one = shared(run, 1, strategy=whole, **options)
    found, ours, with_strategy = shared(run, 5, strategy=whole, **options)
    assert equal(found, expected)
    assert same_weights(ours, reference)
    assert with_strategy.strategy.plan == one_by_one[2].strategy.plan
    # Four validations of ten batches in two passes each, and one pass for each of the first two batches.
    saved = 4 * (10 - 2) * sum(parameter.nbytes for parameter in ours.parameters())
    swapped = [t.strategy.statistics().swap_in_bytes for t in (one_by_one[2], with_strategy)]
    assert swapped[0] - swapped[1] == saved


def test_a_batch_that_the_step_changes_is_seen_changed_behind_it(tmp_path):
    """And batches, predictions and their indices reach the writer of predictions in their turn."""

    class Writer(BasePredictionWriter):
        def __init__(self):
            super().__init__("batch")
            self.written = []

        def write_on_batch_end(self, run, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
            self.written.append((prediction, batch_indices, batch, batch_idx))

    class Popping(Chain):
        def predict_step(self, batch, batch_idx):
            return self.head(self.net(batch.pop("inputs"))) + batch["more"].add_(1)

    def run(with_strategy, module):
        data = [{"inputs": torch.randn(64), "more": torch.randn(1)} for _ in range(20)]
        predicted = with_strategy.predict(module, DataLoader(data, batch_size=2))
        return predicted, with_strategy.callbacks[0].written

    expected, *_ = plain(run, make(Popping), callbacks=[Writer()])
    found = shared(run, 4, make(Popping), callbacks=[Writer()])
    assert [written[1] for written in expected[0][1]] == [[2 * i, 2 * i + 1] for i in range(10)]
    assert equal(found[0], expected)
    assert passes(found) == 4


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_an_error_comes_in_its_turn(bad):
    class Failing(Evaluated):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.evaluate(batch, batch_idx)
            if batch_idx == bad:
                raise ValueError("no luck")

    def run(with_strategy, module):
        with pytest.raises(ValueError, match="no luck") as info:
            VALIDATE(with_strategy, module)
        del info
        return with_strategy._evaluation_loop.batch_progress.current.processed

    expected, *_ = plain(run, make(Failing))
    found, module, with_strategy = shared(run, 4, make(Failing))
    assert found[:2] == expected[:2]
    assert found[0] == bad
    module.validation_step = lambda batch, batch_idx: None  # the trainer goes on to work
    VALIDATE(with_strategy, module)


def test_an_error_in_the_data_comes_in_its_turn():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index == 10:
                raise ValueError("no sample")
            return torch.full((64,), float(index)), torch.tensor(0.0)

    def run(with_strategy, module):
        with pytest.raises(ValueError, match="no sample"):
            with_strategy.validate(module, DataLoader(Broken(), batch_size=2), verbose=False)

    expected, *_ = plain(run)
    found = shared(run, 4)
    assert len(found[0][1]) == 5
    assert equal(found[0], expected)
    assert passes(found) == 2


class Drawing(Evaluated):
    """Some steps draw, in front of the layers, between them or behind them."""

    def __init__(self, place, drawing):
        super().__init__()
        self.place, self.drawing = place, drawing

    def predict_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        value = self.noise("front", batch_idx, batch[0])
        for index, block in enumerate(self.net):
            value = self.noise("between", batch_idx, block(value)) if index == 4 else block(value)
        return self.noise("behind", batch_idx, self.head(value))

    def noise(self, place, batch_idx, value):
        is_here = place == (self.place if self.place != "anywhere" else PLACES[-batch_idx % 3])
        return value + torch.randn_like(value) if is_here and batch_idx in self.drawing else value


PLACES = ("front", "between", "behind")


@pytest.mark.parametrize("place", [*PLACES, "anywhere"])
def test_random_numbers_are_drawn_in_the_order_of_the_steps(place, caplog):
    expected, *_ = plain(PREDICT, make(Drawing, place=place, drawing=range(10)))
    found = shared(PREDICT, 4, make(Drawing, place=place, drawing=range(10)))
    assert equal(found[0], expected)
    assert passes(found) == 10
    assert sum("predict_step: it draws random numbers" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("place", [*PLACES, "anywhere"])
@pytest.mark.parametrize("drawing", [(3,), (2, 3, 4), (4, 7), (5,)])
def test_a_step_that_draws_out_of_turn_is_run_again(place, drawing):
    """The first step has drawn nothing, so that steps 1-4 and 5-8 share passes until one does."""
    expected, *_ = plain(PREDICT, make(Drawing, place=place, drawing=drawing))
    found = shared(PREDICT, 4, make(Drawing, place=place, drawing=drawing))
    assert equal([found[0][0], found[0][3]], [expected[0], expected[3]])
    assert passes(found) < 11


def test_what_is_run_again_gets_its_batch_again():
    class Popping(Drawing):
        def predict_step(self, batch, batch_idx):
            return super().predict_step([batch.pop("inputs")], batch_idx)

    def run(with_strategy, module):
        return with_strategy.predict(module, DataLoader([{"inputs": torch.ones(64)} for _ in range(20)], batch_size=2))

    expected, *_ = plain(run, make(Popping, place="between", drawing=(3,)))
    found = shared(run, 4, make(Popping, place="between", drawing=(3,)))
    assert equal(found[0][0], expected[0])


def test_metrics_are_touched_in_the_order_of_the_steps():
    """Though they are in the middle of the step, and hold what has come so far."""

    class Midway(Evaluated):
        def validation_step(self, batch, batch_idx):
            value = batch[0]
            for index, block in enumerate(self.net):
                value = block(value)
                if index in (1, 5):
                    self.mean(value)
                    self.log(f"mean {index}", self.mean.compute(), on_step=True, on_epoch=True)
            self.log("loss", value.mean())

    expected, *_ = plain(VALIDATE, make(Midway))
    found = shared(VALIDATE, 4, make(Midway))
    assert equal(found[0], expected)


def test_steps_that_go_different_ways():
    """Some leave early, some loop over all layers several times, as those that generate do."""

    class Ways(Evaluated):
        def predict_step(self, batch, batch_idx):
            value = batch[0]
            for _ in range((2, 1, 3, 0)[batch_idx % 4]):
                value = self.net(value) + value
            if batch_idx % 3 == 0:
                return None
            return self.head(value)

    expected, *_ = plain(PREDICT, make(Ways))
    found = shared(PREDICT, 5, make(Ways))
    assert equal(found[0][0], expected[0])


def test_derivatives_end_the_sharing(caplog):
    class Forces(Evaluated):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                inputs = batch[0].clone().requires_grad_()
                (force,) = torch.autograd.grad(self.head(self.net(inputs)).sum(), inputs)
            self.log("force", force.abs().mean(), on_step=True, on_epoch=True)

    options = {"inference_mode": False}
    expected, *_ = plain(VALIDATE, make(Forces), **options)
    found = shared(VALIDATE, 4, make(Forces), **options)
    assert equal(found[0], expected)
    assert sum("it takes derivatives across layers" in record.message for record in caplog.records) == 1


def test_batches_that_do_not_fit_together_run_alone(caplog):
    def run(with_strategy, module):
        return with_strategy.validate(module, loader(64, num_samples=640), verbose=False)

    expected, *_ = plain(run)
    found = shared(run, 8)
    assert equal([found[0][0], found[0][3]], [expected[0], expected[3]])
    assert any("at once do not fit" in record.message for record in caplog.records)


def test_a_module_in_training_mode_shares_no_pass():
    """A step that was run again would count twice in its statistics."""

    class Training(Drawing):
        def __init__(self):
            super().__init__("between", range(3, 10))
            self.norm = nn.BatchNorm1d(64)

        def on_predict_epoch_start(self):
            self.norm.train()

        def predict_step(self, batch, batch_idx):
            return super().predict_step([self.norm(batch[0])], batch_idx)

    expected, reference, _ = plain(PREDICT, make(Training))
    found = shared(PREDICT, 4, make(Training))
    assert equal(found[0], expected)
    assert torch.equal(found[1].norm.running_mean, reference.norm.running_mean)


class EndHook(Evaluated):
    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen.append(("end", batch_idx, len(self.seen)))


class StartHook(Evaluated):
    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.head.bias.data += 1


class TransferHook(Evaluated):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.seen.append("transfer")
        return batch


class Watching(Callback):
    def on_validation_batch_end(self, run, module, outputs, batch, batch_idx, dataloader_idx=0):
        module.seen.append(("end", batch_idx))


@pytest.mark.parametrize(
    ("kind", "callbacks", "name"),
    [
        (EndHook, [], "EndHook.on_validation_batch_end"),
        (StartHook, [], "StartHook.on_validation_batch_start"),
        (TransferHook, [], "TransferHook.on_before_batch_transfer"),
        (Evaluated, [Watching()], "Watching.on_validation_batch_end"),
        (
            Evaluated,
            [L.pytorch.callbacks.LambdaCallback(on_validation_batch_start=lambda *args: None)],
            "LambdaCallback.on_validation_batch_start",
        ),
    ],
)
def test_code_of_the_users_between_two_steps_keeps_batches_alone(kind, callbacks, name, caplog):
    expected, *_ = plain(VALIDATE, make(kind), callbacks=copy.deepcopy(callbacks))
    found = shared(VALIDATE, 4, make(kind), callbacks=callbacks)
    assert equal(found[0], expected)
    assert passes(found) == 10
    assert sum(name in record.message for record in caplog.records) == 1
    assert passes(shared(PREDICT, 4, make(kind), callbacks=callbacks)) == (10 if kind is TransferHook else 4)


def test_hooks_that_transfer_batches_run_once_for_each(devices):
    class Transfer(Evaluated):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.num_transferred = getattr(self, "num_transferred", 0) + 1
            return [batch[0] * self.num_transferred, batch[1]]

    expected, *_ = plain(VALIDATE, make(Transfer))
    found = shared(VALIDATE, 4, make(Transfer))
    assert equal(found[0], expected)
    assert passes(found) == 4


def test_a_step_that_brings_tensors_to_the_device_itself():
    class Bringing(Evaluated):
        def predict_step(self, batch, batch_idx):
            inputs = self.trainer.strategy.batch_to_device(batch[0])
            return self.head(self.net(inputs))

    expected, *_ = plain(PREDICT, make(Bringing))
    assert equal(shared(PREDICT, 4, make(Bringing))[0], expected)


def test_a_step_that_asks_for_its_batches_itself(caplog):
    class Asking(Chain):
        def validation_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            self.log("loss", self.step(batch), batch_size=BATCH)

    expected, *_ = plain(VALIDATE, make(Asking))
    assert equal(shared(VALIDATE, 4, make(Asking))[0], expected)
    assert sum("dataloader_iter" in record.message for record in caplog.records) == 1


def test_profilers_see_every_action_end():
    class Profiled(Evaluated):
        def predict_step(self, batch, batch_idx):
            with self.trainer.profiler.profile("forward"):
                return self.head(self.net(batch[0]))

    expected, *_ = plain(PREDICT, make(Profiled), profiler="simple")
    assert equal(shared(PREDICT, 4, make(Profiled), profiler="simple")[0], expected)


class Fetcher:
    """Lightning's, as far as it is known here."""

    def __init__(self, items):
        self.items, self.num_asked, self.done = list(items), 0, False

    def __next__(self):
        self.num_asked += 1
        item = self.items.pop(0) if self.items else StopIteration()
        self.done = not self.items
        if isinstance(item, BaseException):
            raise item
        return item


def test_looking_ahead():
    error = ValueError("broken")
    items = [("a", 0, 0), ("b", 1, 0), ("c", 2, 0), ("d", 0, 1), error, ("e", 2, 1)]
    fetcher = Fetcher(items)
    ahead = LookAhead(fetcher, lambda: 2)
    found = []
    for expected in items:
        if expected is error:
            with pytest.raises(ValueError, match="broken"):
                next(ahead)
        else:
            assert next(ahead) == expected
        found.append((fetcher.num_asked, [fetched.batch for fetched in ahead.following], ahead.done))
    assert found == [
        (2, ["b"], False),
        (2, [], False),
        (4, [], False),  # another dataloader
        (5, [], False),  # an error
        (5, [], False),
        (7, [], True),
    ]
    with pytest.raises(StopIteration):
        next(ahead)
