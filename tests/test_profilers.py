"""Profilers and monitors: interleaved microbatches, all GPUs."""

import lightning as L
import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer, twins
from lightning.pytorch import callbacks
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from harmony_lightning.strategy.merged_profile import merged_profile


class Profiled(Chain):
    """The user's own action spans layers of all packs."""

    def training_step(self, batch, batch_idx):
        with self.trainer.profiler.profile("own"):
            return super().training_step(batch, batch_idx)


PROFILERS = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "torch": PyTorchProfiler,
    "torch with module names": lambda **options: PyTorchProfiler(record_module_names=True, **options),
}


@pytest.mark.parametrize("make", PROFILERS.values(), ids=PROFILERS)
def test_profilers_take_interleaved_microbatches(tmp_path, make):
    torch.manual_seed(0)
    ours = Profiled()
    torch.manual_seed(0)
    reference = Chain()
    trainer(accumulate_grad_batches=4).fit(reference, loader(2))
    profiler = make(dirpath=tmp_path, filename="profile")
    trainer(harmony(), profiler=profiler).fit(ours, loader(8))
    assert same_weights(ours, reference)
    assert (tmp_path / "fit-profile.txt").stat().st_size > 0
    assert "start" not in vars(profiler)
    assert "stop" not in vars(profiler)


def test_a_span_lasts_from_the_first_microbatch_to_the_last():
    profiler = SimpleProfiler()
    trainer(harmony(), profiler=profiler).fit(Profiled(), loader(8))
    assert len(profiler.recorded_durations["own"]) == 5
    assert not profiler.current_actions
    whole = profiler.recorded_durations["run_training_batch"]
    assert all(0 < own < step for own, step in zip(profiler.recorded_durations["own"], whole, strict=True))


def test_an_error_inside_leaves_the_profiler_as_it_was():
    class Failing(Profiled):
        def step(self, batch):
            raise ValueError("own error")

    profiler = SimpleProfiler()
    with pytest.raises(ValueError, match="own error"):
        trainer(harmony(), profiler=profiler).fit(Failing(), loader(8))
    assert "own" not in profiler.current_actions
    assert "start" not in vars(profiler)


def test_an_action_that_never_began_is_the_profiler_s_to_judge():
    profiler = SimpleProfiler()
    with merged_profile(profiler), pytest.raises(ValueError, match="never started"):
        profiler.stop("nothing")


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", "0"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_hyperparams(self, *args, **kwargs): ...


def test_device_stats_of_all_gpus():
    pytest.importorskip("psutil")
    rows = Rows()
    strategy = harmony(3)
    fitted = trainer(strategy, callbacks=[callbacks.DeviceStatsMonitor()], logger=rows, log_every_n_steps=1)
    fitted.fit(Chain(), loader(8))
    row, *_ = [row for row in rows.rows if "DeviceStatsMonitor.on_train_batch_end/gpu2.peak_bytes" in row]
    limit = strategy.plan.memory_bytes
    for gpu in range(3):
        assert 0 < row[f"DeviceStatsMonitor.on_train_batch_end/gpu{gpu}.allocated_bytes"] <= limit
        assert 0 < row[f"DeviceStatsMonitor.on_train_batch_end/gpu{gpu}.peak_bytes"] <= limit
    assert any("cpu_percent" in name for name in row)
    assert "get_device_stats" not in vars(fitted.accelerator)


def test_throughput_monitor():
    rows = Rows()
    monitor = callbacks.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2)
    trainer(harmony(), callbacks=[monitor], logger=rows, log_every_n_steps=1).fit(Chain(), loader(8))
    assert [row["train/samples"] for row in rows.rows if "train/samples" in row] == [8, 16, 24, 32, 40]


@pytest.mark.usefixtures("nothing_stays")
def test_statistics_are_read_while_training():
    """What a callback of the user's own would watch."""
    seen = []

    class Watching(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.strategy.statistics().swap_in_bytes)

    ours, _ = twins()
    fitted = trainer(harmony(), callbacks=[Watching()])
    fitted.fit(ours, loader(8))
    assert seen == [fitted.strategy.plan.swap_in_bytes_per_step * step for step in range(1, 6)]


def test_actions_of_the_strategy_are_named_as_on_one_device(tmp_path):
    names = []
    for strategy in ("auto", harmony(2)):
        profiler = SimpleProfiler(dirpath=tmp_path)
        fit = trainer(strategy, profiler=profiler, limit_train_batches=2, limit_val_batches=1)
        fit.fit(Chain(depth=6), loader(8), loader(8))
        names.append({name for name in profiler.recorded_durations if name.startswith("[Strategy]")})
        assert "profile" not in vars(profiler)
    plain, ours = names
    steps = {"training_step", "validation_step", "backward", "batch_to_device", "on_train_start"}
    assert {f"[Strategy]SingleDeviceStrategy.{step}" for step in steps} <= plain & ours
