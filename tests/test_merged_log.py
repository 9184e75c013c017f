import pytest
import torch
from torchmetrics import MeanMetric

from harmony_lightning.strategy.merged_log import MergedLog, merged_log

FLAVOURS = ["lightning.pytorch", "pytorch_lightning"]


class Rows:
    """Every row of metrics that reached the logger."""

    @staticmethod
    def make(pl):
        class RowLogger(pl.loggers.logger.Logger):
            name, version = "rows", 0

            def __init__(self):
                super().__init__()
                self.rows = []

            def log_metrics(self, metrics, step=None):
                self.rows.append({"step": step, **metrics})

            def log_hyperparams(self, *args, **kwargs):
                pass

        return RowLogger()


def microbatched(pl, microbatch_size, failing=False):
    """One device whose training_step runs the module once per slice, as interleaved microbatches would log."""

    class Microbatched(pl.strategies.SingleDeviceStrategy):
        def training_step(self, batch, batch_idx):
            running = (0, 1)
            with merged_log(self.lightning_module.trainer.fit_loop.epoch_loop, lambda: running):
                outputs = []
                for index, part in enumerate(batch.split(microbatch_size)):
                    running = (index, len(part))
                    outputs.append((super().training_step(part, batch_idx), len(part)))
                if failing:
                    raise RuntimeError("after the microbatches")
            return sum(loss * count for loss, count in outputs) / len(batch)

    return Microbatched(device=torch.device("cpu"))


def module(pl, training_step):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.metric = MeanMetric()
            self.seen = []

        def training_step(self, batch, batch_idx):
            training_step(self, batch, batch_idx)
            return ((self.weight - batch) ** 2).mean()

        def on_train_batch_end(self, *args):
            self.seen.append(dict(self.trainer.callback_metrics))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def fit(flavour, training_step, *, microbatch_size=None, batch_size=6, num_rows=15, failing=False):
    pl = pytest.importorskip(flavour)
    logger = Rows.make(pl)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        strategy="auto" if microbatch_size is None else microbatched(pl, microbatch_size, failing),
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = module(pl, training_step)
    data = torch.linspace(-1, 3, num_rows).square()  # no two microbatches have the same mean
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size)
    results = trainer.fit_loop.epoch_loop._results
    try:
        trainer.fit(model, loader)
    finally:
        assert trainer.fit_loop.epoch_loop._results is results
    return logger.rows, model.seen


def assert_same(plain, merged):
    """Sums run in another order than in one batch: equal to a few float32 roundings."""
    for plain_rows, merged_rows in zip(plain, merged, strict=True):
        assert len(plain_rows) == len(merged_rows) > 0
        for want, got in zip(plain_rows, merged_rows, strict=True):
            assert list(got) == list(want)  # the same keys in the same order
            for key in want:
                assert float(got[key]) == pytest.approx(float(want[key]), rel=2e-6, abs=1e-6), key


def log_means(self, batch, batch_idx):
    self.log("mean", batch.mean(), on_step=True, on_epoch=True, prog_bar=True)
    self.log("step_only", (batch - self.weight).mean())
    self.log("epoch_only", batch.mean(), on_step=False, on_epoch=True)


def log_reductions(self, batch, batch_idx):
    for name in ("sum", "max", "min"):
        self.log(name, getattr(batch, name)(), reduce_fx=name, on_step=True, on_epoch=True)
    self.log("torch_max", batch.max(), reduce_fx=torch.max, on_step=True, on_epoch=True)
    self.log("avg", batch.mean(), reduce_fx="AVG", on_epoch=True)


def log_dictionary(self, batch, batch_idx):
    values = {"a": batch.mean(), "b": batch.double().mean(), "lr": 0.1, "half": batch.mean().bfloat16() * 0 + 0.5}
    self.log_dict(values, on_step=True, on_epoch=True)


def log_explicit_sizes(self, batch, batch_idx):
    self.log("loss", batch.mean(), batch_size=len(batch), on_step=True, on_epoch=True)
    above = batch[batch > 0.1]  # a weight that is not the number of samples
    self.log("above", above.mean(), batch_size=len(above), on_step=True, on_epoch=True)


def log_twice(self, batch, batch_idx):
    self.log("x", batch.mean(), on_step=True, on_epoch=True)
    self.log("x", batch.mean() + 1, on_step=True, on_epoch=True)


def log_metric(self, batch, batch_idx):
    self.metric.update(batch)
    self.log("metric", self.metric, on_step=False, on_epoch=True)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("microbatch_size", [3, 4])  # 6 -> 3+3 and 4+2; the last batch of 3 -> 3 and 3
@pytest.mark.parametrize(
    "training_step", [log_means, log_reductions, log_dictionary, log_explicit_sizes, log_twice, log_metric]
)
def test_the_rows_are_those_of_the_whole_minibatch(flavour, training_step, microbatch_size):
    plain = fit(flavour, training_step)
    assert_same(plain, fit(flavour, training_step, microbatch_size=microbatch_size))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_ragged_last_batch_has_its_own_weight(flavour):
    sizes = {"num_rows": 11, "batch_size": 6}  # 6 -> 4+2, 5 -> 4+1
    assert_same(fit(flavour, log_means, **sizes), fit(flavour, log_means, microbatch_size=4, **sizes))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_metric_is_passed_on_where_every_batch_has_several_microbatches(flavour):
    plain = fit(flavour, log_metric, num_rows=12)
    assert_same(plain, fit(flavour, log_metric, microbatch_size=4, num_rows=12))


def test_an_exception_drops_what_was_logged_and_restores_the_collection():
    recorded = []

    def training_step(self, batch, batch_idx):
        log_means(self, batch, batch_idx)
        recorded.append(self.trainer)

    with pytest.raises(RuntimeError, match="after the microbatches"):
        fit(FLAVOURS[0], training_step, microbatch_size=3, failing=True)
    results = recorded[0].fit_loop.epoch_loop._results
    assert not isinstance(results, MergedLog)
    assert len(recorded) == 2
    assert not results


def test_lightning_reports_unlike_arguments_itself():
    def training_step(self, batch, batch_idx):
        self.log("x", batch.mean(), prog_bar=bool(batch[0] > 0.5))

    with pytest.raises(Exception, match="twice in `training_step` with different arguments") as caught:
        fit(FLAVOURS[0], training_step, microbatch_size=3)
    assert type(caught.value).__name__ == "MisconfigurationException"


def test_lightning_reports_an_unknown_reduction_itself():
    def training_step(self, batch, batch_idx):
        self.log("x", batch.mean(), reduce_fx=torch.median)

    with pytest.raises(Exception, match="If you need a custom reduction"):
        fit(FLAVOURS[0], training_step, microbatch_size=3)


def test_reading_metrics_within_the_step_gives_what_was_logged_so_far():
    read = []

    def training_step(self, batch, batch_idx):
        self.log("index", float(batch_idx))
        self.log("mean", batch.mean(), on_step=False, on_epoch=True)
        held = self.trainer.fit_loop._results["training_step.mean"]
        read.append((self.trainer.callback_metrics["index"].item(), (held.value / held.cumulated_batch_size).item()))

    fit(FLAVOURS[0], training_step, microbatch_size=3, num_rows=12)
    part = torch.linspace(-1, 3, 12).square().view(4, 3).mean(1).tolist()
    first = (part[0] + part[1]) / 2
    means = [part[0], first, (first + part[2]) / 2, sum(part) / 4]
    assert [index for index, _ in read] == [0.0, 0.0, 1.0, 1.0] * 2
    assert [mean for _, mean in read] == pytest.approx(means * 2)


class Collection(dict):
    """Takes calls as Lightning's does."""

    def __init__(self):
        super().__init__()
        self.calls, self.batch = [], None

    def log(self, fx, name, value, **kwargs):
        self.calls.append((fx, name, value, kwargs))
        self[name] = value


def replayed(values, counts, **kwargs):
    collection = Collection()
    log = MergedLog(collection)
    for index, (value, count) in enumerate(zip(values, counts, strict=True)):
        log.set_microbatch(index, count)
        log.log("training_step", "x", value, **kwargs)
    assert collection.calls == []
    log.replay()
    ((_, _, value, kwargs),) = collection.calls
    return value, kwargs


def test_a_constant_keeps_its_bits():
    third = torch.tensor(1 / 3)
    assert replayed([third] * 7, [3, 1, 2, 5, 7, 1, 1], reduce_fx="mean")[0].equal(third)


def test_half_precision_is_averaged_in_single():
    values = [torch.tensor(value, dtype=torch.bfloat16) for value in (256.0, 258.0)]
    value, _ = replayed(values, [1, 1], reduce_fx="mean")
    assert value.dtype == torch.float32
    assert value.item() == 257.0


def test_no_batch_size_is_made_up():
    values = [torch.tensor(1.0), torch.tensor(2.0)]
    assert replayed(values, [3, 1], batch_size=None)[1]["batch_size"] is None
    assert replayed(values, [3, 1])[0].item() == 1.25
    value, kwargs = replayed(values, [3, 1], batch_size=5)
    assert (value.item(), kwargs["batch_size"]) == (1.5, 10)


def test_no_graph_is_kept_unless_asked_for():
    weight = torch.ones((), requires_grad=True)
    assert not replayed([weight * 1, weight * 2], [1, 1])[0].requires_grad
    assert replayed([weight * 1, weight * 2], [1, 1], enable_graph=True)[0].requires_grad


def test_a_tensor_that_is_written_later_was_logged_as_it_was():
    total = torch.zeros(())
    collection = Collection()
    log = MergedLog(collection)
    for index in range(2):
        log.set_microbatch(index, 1)
        log.log("training_step", "total", total.add_(1))
    log.replay()
    assert collection.calls[0][2] == 1.5


def test_calls_that_are_held_back_come_unmerged_each_with_its_metric_value():
    collection, metric = Collection(), MeanMetric()
    log = MergedLog(collection)
    for index in (0, 1, 0):
        log.set_microbatch(index, 1)
        metric(float(10 * index + len(log._calls)))
        log.log("validation_step", "mean", metric)
        log.log("validation_step", "index", torch.tensor(index))
    found = []
    collection.log = lambda fx, name, value, **kwargs: found.append(getattr(value, "_forward_cache", value).item())
    log.replay_of(0)
    assert found == [0, 0, 4, 0]
    log.replay_of(1)
    assert found[4:] == [12, 1]


def test_keys_come_in_the_order_in_which_they_were_first_seen():
    collection = Collection()
    log = MergedLog(collection)
    # Two microbatches that run alternately, and a key that only the second one logs.
    for index, name in ((0, "b"), (1, "b"), (1, "late"), (0, "a"), (1, "a")):
        log.set_microbatch(index, 1)
        log.log("training_step", name, torch.tensor(float(index)))
    log.replay()
    log.replay()
    assert [(name, value.item()) for _, name, value, _ in collection.calls] == [("b", 0.5), ("late", 1.0), ("a", 0.5)]


def test_everything_else_is_the_collections_own():
    collection = Collection()
    log = MergedLog(collection)
    assert not log
    collection["x"] = 1
    assert log
    assert "x" in log
    assert log["x"] == 1
    assert list(log) == ["x"]
    assert list(log.values()) == [1]
    log.batch = "the minibatch"
    assert collection.batch == "the minibatch"
    with pytest.raises(AttributeError):
        log.missing  # noqa: B018
