"""Checkpoints on their way: what is in them, who else reads and writes them, and when."""

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import lightning as L
import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn

HERE = Path(__file__).parent


def fresh(kind=Chain, **options):
    torch.manual_seed(0)
    return kind(**options)


def fit(module, strategy, path=None, data=None, **options):
    fitted = trainer(strategy, **options)
    fitted.fit(module, data if data is not None else loader(8), ckpt_path=path)
    return fitted


def read(path):
    return torch.load(path, weights_only=False)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_types_are_those_of_one_device(tmp_path, precision):
    files = {}
    for name, strategy in (("plain", "auto"), ("ours", harmony(2, "200KiB", microbatch_size=8))):
        fit(fresh(), strategy, precision=precision).save_checkpoint(tmp_path / name)
        files[name] = read(tmp_path / name)
    for key in ("state_dict", "optimizer_states"):
        kinds = [[(t.dtype, t.shape) for t in tensors(files[name][key])] for name in ("plain", "ours")]
        assert kinds[0] == kinds[1] != []


def tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_weights_only_files(tmp_path):
    files = {}
    for name, strategy in (("plain", "auto"), ("ours", harmony(microbatch_size=8))):
        fit(fresh(), strategy).save_checkpoint(tmp_path / name, weights_only=True)
        files[name] = torch.load(tmp_path / name, weights_only=True)
    assert list(files["plain"]) == list(files["ours"])
    assert "optimizer_states" not in files["ours"]
    assert equal(files["plain"]["state_dict"], files["ours"]["state_dict"])
    again = fresh()
    trainer(harmony()).validate(again, loader(8), ckpt_path=tmp_path / "ours", verbose=False)
    assert equal(dict(again.state_dict()), files["plain"]["state_dict"])


class WithHparams(Chain):
    def __init__(self, depth=8, name="x"):
        super().__init__(depth=depth)
        self.save_hyperparameters()


class Data(L.LightningDataModule):
    def __init__(self, batch_size=8):
        super().__init__()
        self.save_hyperparameters()
        self.seen = 0

    def train_dataloader(self):
        return loader(self.hparams.batch_size)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.seen += len(batch[0])
        return batch

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_hyperparameters_and_the_state_of_the_datamodule(tmp_path):
    files = {}
    for name, strategy in (("plain", "auto"), ("ours", harmony(microbatch_size=8))):
        module = fresh(WithHparams, depth=9, name="y")
        fit(module, strategy, data=Data()).save_checkpoint(tmp_path / name)
        files[name] = read(tmp_path / name)
    assert list(files["ours"]) == list(files["plain"])
    assert files["ours"]["Data"] == {"seen": 40}
    for key in ("hyper_parameters", "datamodule_hyper_parameters", "Data", "state_dict", "optimizer_states"):
        assert equal(files["ours"][key], files["plain"][key]), key
    loaded = WithHparams.load_from_checkpoint(tmp_path / "ours")
    assert loaded.hparams.depth == 9
    assert same_weights(loaded, module)
    data = Data()
    fit(fresh(WithHparams, depth=9), harmony(), tmp_path / "plain", data, max_epochs=2)
    assert data.seen == 80


def test_a_file_that_is_written_beside_training_holds_the_moment_it_was_asked_for(tmp_path):
    """The writer is held back until training has gone on."""
    may_write = threading.Event()

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            assert may_write.wait(60)
            super().save_checkpoint(*args, **kwargs)

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")
            if trainer.global_step == 4:
                may_write.set()

    reference = fresh()
    fit(reference, "auto", limit_train_batches=2)
    fitted = fit(fresh(), harmony(microbatch_size=8), callbacks=[Saving()], plugins=[AsyncCheckpointIO(Slow())])
    fitted.strategy.checkpoint_io.teardown()
    saved = read(tmp_path / "two.ckpt")
    assert equal(saved["state_dict"], dict(reference.state_dict()))
    assert saved["global_step"] == 2
    assert all(state["step"] == 2 for state in saved["optimizer_states"][0]["state"].values())


def test_loading_in_the_middle_of_training(tmp_path):
    """What a callback that goes back to an earlier state does: copies on the GPUs are renewed."""

    class GoingBack(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / f"{id(trainer)}.ckpt")
            if batch_idx == 2:
                state = read(tmp_path / f"{id(trainer)}.ckpt")
                trainer.strategy.load_model_state_dict(state)
                trainer.strategy.load_optimizer_state_dict(state)

    runs = []
    for strategy in ("auto", harmony(microbatch_size=8)):
        module = fresh()
        fit(module, strategy, callbacks=[GoingBack()])
        runs.append(module)
    assert same_weights(*runs)


class Tied(Chain):
    def __init__(self):
        super().__init__()
        self.net[6][0].weight = self.net[1][0].weight


@pytest.mark.parametrize("kind", [Chain, Tied])
def test_safetensors_write_the_weights_at_any_time(tmp_path, kind):
    """The library's own functions: tied weights once, under either name back again."""
    safetensors = pytest.importorskip("safetensors.torch")

    class Exporting(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                safetensors.save_model(module, tmp_path / "middle.safetensors")
                self.expected = copy.deepcopy(module)

    exporting, module = Exporting(), fresh(kind)
    fit(module, harmony(), callbacks=[exporting])
    safetensors.save_model(module, tmp_path / "end.safetensors")
    for name, expected in (("middle", exporting.expected), ("end", module)):
        loaded = kind()
        safetensors.load_model(loaded, tmp_path / f"{name}.safetensors")
        assert same_weights(loaded, expected)
    nbytes = sum(p.nbytes for p in module.parameters())
    assert nbytes < (tmp_path / "end.safetensors").stat().st_size < nbytes + 4096


SCRIPT = """
import os, sys, torch
from chain import Chain, loader, trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

class Sharded(Chain):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard
        for block in (*self.net, self.head):
            fully_shard(block, mesh=self.device_mesh["data_parallel"])

def fit(kind, epochs, start, path):
    torch.manual_seed(0)
    if kind == "ddp":
        module, strategy = Chain(), DDPStrategy(process_group_backend="gloo")
    else:
        module, strategy = Sharded(), ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    data, rank = loader(8).dataset, int(os.environ.get("LOCAL_RANK", "0"))
    half = torch.utils.data.Subset(data, [index for index in range(len(data)) if index % 8 // 4 == rank])
    run = trainer(strategy, devices=2, max_epochs=epochs, use_distributed_sampler=False)
    run.fit(module, torch.utils.data.DataLoader(half, batch_size=4), ckpt_path=start)
    run.save_checkpoint(path)

kind, ours, first, second = sys.argv[1:]
fit(kind, 1, None, first)
fit(kind, 2, ours, second)
"""


def fit_elsewhere(folder, kind):
    """Two processes, each with half of every batch of eight samples: one epoch from the start, saved as `theirs.ckpt`; and
    one that goes on from `ours.ckpt`, saved as `behind.ckpt`."""
    script = folder / "elsewhere.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    files = [str(folder / f"{name}.ckpt") for name in ("ours", "theirs", "behind")]
    command = [sys.executable, str(script), kind, *files]
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["ddp", "model parallel"])
def test_training_goes_on_after_and_before_several_processes(tmp_path, kind):
    """One epoch there, one here: equal to one device that goes on from the same file. One epoch here, one there: equal up
    to the order in which the processes' halves are added."""
    fit(fresh(), harmony(2, microbatch_size=8)).save_checkpoint(tmp_path / "ours.ckpt")
    fit_elsewhere(tmp_path, kind)
    continued = {}
    for name, strategy in (("plain", "auto"), ("ours", harmony(3, microbatch_size=8))):
        module = fresh()
        fit(module, strategy, tmp_path / "theirs.ckpt", max_epochs=2).save_checkpoint(tmp_path / name)
        continued[name] = read(tmp_path / name)
    assert equal(continued["ours"]["state_dict"], continued["plain"]["state_dict"])
    assert equal(continued["ours"]["optimizer_states"], continued["plain"]["optimizer_states"])

    assert list(read(tmp_path / "ours.ckpt")["state_dict"]) == list(read(tmp_path / "theirs.ckpt")["state_dict"])
    there, here = read(tmp_path / "behind.ckpt")["state_dict"], continued["ours"]["state_dict"]
    assert read(tmp_path / "behind.ckpt")["global_step"] == 10
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-3, atol=1e-4)


def test_any_plan_goes_on_the_same(tmp_path):
    """Other GPUs, packs, stashes and layers than those of the run that has written the file."""
    fit(fresh(), harmony(2, stash="device")).save_checkpoint(tmp_path / "one.ckpt")
    plans = [
        harmony(1, "300KiB"),
        harmony(3, "200KiB", stash="device"),
        harmony(2, layers=["net.*"]),
        harmony(1, mode="dp"),
    ]
    files = []
    for index, strategy in enumerate(plans):
        fit(fresh(), strategy, tmp_path / "one.ckpt", max_epochs=2).save_checkpoint(tmp_path / f"{index}.ckpt")
        files.append(read(tmp_path / f"{index}.ckpt"))
    for other in files[1:]:
        assert equal(other["state_dict"], files[0]["state_dict"])
        assert equal(other["optimizer_states"], files[0]["optimizer_states"])


def test_a_module_with_frozen_weights_and_buffers_is_saved_and_resumed(tmp_path):
    class Mixed(Chain):
        def __init__(self):
            super().__init__()
            self.net[2].requires_grad_(False)
            self.register_buffer("scale", torch.tensor([2.0]))
            self.register_buffer("unsaved", torch.tensor([3.0]), persistent=False)
            self.net[5] = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))

        def step(self, batch):
            return super().step((batch[0] * self.scale * self.unsaved, batch[1]))

    first = fresh(Mixed)
    fit(first, harmony(2, "200KiB", microbatch_size=8)).save_checkpoint(tmp_path / "one.ckpt")
    assert "unsaved" not in read(tmp_path / "one.ckpt")["state_dict"]
    runs = []
    for strategy in ("auto", harmony(1, "200KiB", microbatch_size=8)):
        module = fresh(Mixed)
        fit(module, strategy, tmp_path / "one.ckpt", max_epochs=2)
        runs.append(module)
    assert same_weights(*runs)
