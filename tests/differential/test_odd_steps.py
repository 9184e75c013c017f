"""Steps, loaders and hooks that are unusual but legal, and those that Lightning refuses: both as on one device."""

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset


class Endless(IterableDataset):
    """Of a length that nobody knows."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(19):
            yield torch.randn(WIDTH, generator=generator), torch.randn((), generator=generator)


def log_conditionally(self, batch, batch_idx):
    loss = self.step(batch)
    if batch_idx % 2:
        self.log("odd", loss, on_step=True, on_epoch=True)
    self.log("x", loss, sync_dist=True, logger=False, rank_zero_only=True, prog_bar=True)
    return loss


def log_a_graph(self, batch, batch_idx):
    loss = self.step(batch)
    self.log("x", loss, enable_graph=True)
    return loss


def log_a_reserved_name(self, batch, batch_idx):
    loss = self.step(batch)
    self.log("x/dataloader_idx_1", loss)
    return loss


def write_into_the_batch(self, batch, batch_idx):
    batch[0].add_(1)
    return self.step(batch)


def freeze_and_thaw(self, batch, batch_idx):
    for parameter in self.net[0].parameters():
        parameter.requires_grad_(batch_idx % 2 == 0)
    return self.step(batch)


def stop(self, outputs, batch, batch_idx):
    self.trainer.should_stop = batch_idx == 2


STEPS = {
    "a loss without a graph": lambda self, batch, batch_idx: self.step(batch).detach(),
    "no loss": lambda self, batch, batch_idx: {"x": 1},
    "a list": lambda self, batch, batch_idx: [self.step(batch)],
    "a text": lambda self, batch, batch_idx: "x",
    "a loss of one element": lambda self, batch, batch_idx: self.step(batch).reshape(1),
    "a loss of three elements": lambda self, batch, batch_idx: self.step(batch).repeat(3),
    "conditional log": log_conditionally,
    "logged graph": log_a_graph,
    "reserved name": log_a_reserved_name,
    "batch written": write_into_the_batch,
    "freezing": freeze_and_thaw,
}
HOOKS = {
    "epoch skipped": {"on_train_batch_start": lambda self, batch, batch_idx: -1 if batch_idx == 2 else None},
    "stopped": {"on_train_batch_end": stop},
    "transfer": {
        "on_before_batch_transfer": lambda self, batch, index: [batch[0] + 1, batch[1]],
        "on_after_batch_transfer": lambda self, batch, index: [batch[0] * 2, batch[1]],
    },
    "logged in hooks": {
        "on_after_backward": lambda self: self.log("backward", 3.0),
        "on_before_optimizer_step": lambda self, optimizer: self.log("optimizer", 2.0, on_step=True),
        "on_train_epoch_end": lambda self: self.log("epoch", 1.0),
    },
}
LOADERS = {
    "of unknown length": lambda: DataLoader(Endless(), batch_size=8),
    "several, by name": lambda: CombinedLoader({"a": loader(4, 12), "b": loader(6, 24)}, "min_size"),
    "several, in a list": lambda: [loader(8, 24), loader(8, 24)],
    "one after the other": lambda: CombinedLoader([loader(4, 12), loader(6, 24)], "sequential"),
}


def losses_of_all(self, batch, batch_idx):
    if isinstance(batch, dict):
        return self.step(batch["a"]) + self.step(batch["b"])
    return self.step(batch[0]) + self.step(batch[1]) if isinstance(batch[0], list) else self.step(batch)


def outcome(strategy, overrides, batches, **options):
    """Weights, metrics and progress, or the error."""
    torch.manual_seed(0)
    module = type("Odd", (Chain,), overrides)()
    fitted = trainer(strategy, max_epochs=2, **options)
    try:
        fitted.fit(module, batches())
    except Exception as error:
        return type(error), str(error)
    return dict(module.named_parameters()), dict(fitted.callback_metrics), fitted.global_step, fitted.current_epoch


CASES = (
    [
        (name, {"training_step": step}, lambda: DataLoader(list(loader(8, 24)), batch_size=None))
        for name, step in STEPS.items()
    ]
    + [(name, hooks, lambda: loader(8)) for name, hooks in HOOKS.items()]
    + [(f"loaders: {name}", {"training_step": losses_of_all}, make) for name, make in LOADERS.items()]
)


@pytest.mark.parametrize("microbatch_size", [8, 2])
@pytest.mark.parametrize(("name", "overrides", "batches"), CASES, ids=[name for name, _, _ in CASES])
def test_odd_or_refused_alike(name, overrides, batches, microbatch_size):
    plain, ours = (outcome(s, overrides, batches) for s in ("auto", harmony(2, microbatch_size=microbatch_size)))
    if isinstance(plain[0], type):
        assert ours == plain
        return
    tolerance = {"rtol": 0, "atol": 0} if microbatch_size == 8 else {"rtol": 2e-3, "atol": 1e-4}
    for expected, actual in zip(plain[:2], ours[:2], strict=True):
        assert list(expected) == list(actual)
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, **tolerance, msg=key)
    assert plain[2:] == ours[2:]


def test_predictions_can_be_written_instead_of_returned():
    written = []

    class Writer(BasePredictionWriter):
        def write_on_batch_end(self, trainer, module, prediction, indices, batch, batch_idx, dataloader_idx):
            written.append(prediction)

        def write_on_epoch_end(self, trainer, module, predictions, indices):
            written.append(torch.cat(predictions))

    for strategy in ("auto", harmony(2)):
        torch.manual_seed(0)
        fitted = trainer(strategy, callbacks=[Writer("batch_and_epoch")])
        assert fitted.predict(Chain(), loader(8), return_predictions=False) is None
    assert len(written) == 12
    for plain, ours in zip(written[:6], written[6:], strict=True):
        assert type(ours) is torch.Tensor and torch.equal(plain, ours)
