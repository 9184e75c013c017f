"""Checkpoints are Lightning's own, into and out of the default strategy."""

import copy

import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer

from harmony_lightning import HarmonyStrategy

pytestmark = pytest.mark.usefixtures("devices")


def fit(module, strategy, path=None, max_epochs=1, batch_size=8, **options):
    fitted = trainer(strategy, max_epochs=max_epochs, **options)
    fitted.fit(module, loader(batch_size), ckpt_path=path)
    return fitted


def fresh():
    torch.manual_seed(0)
    return Chain()


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_file_is_that_of_one_device_to_the_bit(tmp_path):
    """Same keys, types and values: weights, optimizer state, loops."""
    one = fit(fresh(), harmony(microbatch_size=8))
    other = fit(fresh(), "auto")
    one.save_checkpoint(tmp_path / "ours.ckpt")
    other.save_checkpoint(tmp_path / "plain.ckpt")
    ours = torch.load(tmp_path / "ours.ckpt", weights_only=False)
    plain = torch.load(tmp_path / "plain.ckpt", weights_only=False)
    assert list(ours) == list(plain)
    assert equal(ours["state_dict"], plain["state_dict"])
    assert equal(ours["optimizer_states"], plain["optimizer_states"])
    assert (tmp_path / "ours.ckpt").stat().st_size < 1.1 * (tmp_path / "plain.ckpt").stat().st_size


@pytest.mark.parametrize(("first", "second"), [("harmony", "plain"), ("plain", "harmony"), ("harmony", "harmony")])
def test_training_goes_on_under_another_strategy(tmp_path, first, second):
    """One epoch here, one there, against two epochs on one device."""
    strategies = {"harmony": lambda: harmony(2, microbatch_size=8), "plain": lambda: "auto"}
    reference = fresh()
    fit(reference, "auto", max_epochs=2)
    fit(fresh(), strategies[first]()).save_checkpoint(tmp_path / "epoch.ckpt")
    resumed = fresh()
    fit(resumed, strategies[second](), path=tmp_path / "epoch.ckpt", max_epochs=2)
    assert same_weights(resumed, reference)


def test_any_number_of_gpus_goes_on_the_same(tmp_path):
    fit(fresh(), harmony(2)).save_checkpoint(tmp_path / "epoch.ckpt")
    results = []
    for num_gpus, memory in ((1, "120KiB"), (2, "300KiB"), (4, "200KiB")):
        resumed = fresh()
        fit(resumed, harmony(num_gpus, memory), path=tmp_path / "epoch.ckpt", max_epochs=2)
        results.append(resumed)
    assert same_weights(results[0], results[1])
    assert same_weights(results[0], results[2])


def test_weights_load_without_a_trainer(tmp_path):
    module = fresh()
    fit(module, harmony()).save_checkpoint(tmp_path / "epoch.ckpt")
    assert same_weights(Chain.load_from_checkpoint(tmp_path / "epoch.ckpt"), module)


def test_one_weight_saves_as_one_weight(tmp_path):
    """Weights share an arena in memory, not in files."""
    module = fresh()
    fit(module, harmony())
    torch.save(module.head.bias, tmp_path / "bias.pt")
    assert (tmp_path / "bias.pt").stat().st_size < 4096


def test_the_module_is_an_ordinary_one_afterwards():
    module = fresh()
    fit(module, harmony())
    assert all(inner._compiled_call_impl is None for inner in module.modules())
    twin = copy.deepcopy(module)
    inputs = torch.randn(3, 64)
    assert torch.equal(twin.net(inputs), module.net(inputs))
    fit(module, "auto")
    fit(module, HarmonyStrategy())


def test_checkpoint_in_the_middle_of_training_sees_finished_updates(tmp_path):
    import lightning as L

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    module, reference = fresh(), fresh()
    fit(module, harmony(2), callbacks=[Saving()])
    fit(reference, "auto", batch_size=2, limit_train_batches=12, accumulate_grad_batches=4)
    loaded = Chain.load_from_checkpoint(tmp_path / "middle.ckpt")
    assert same_weights(loaded, reference)
