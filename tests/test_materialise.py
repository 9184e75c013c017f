"""Modules that are declared first and get their weights later, on a host that has room for one copy."""

import copy
import subprocess
import sys

import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer
from lightning.pytorch import callbacks
from torch import nn

from harmony_lightning import ConfigurationError
from harmony_lightning.strategy.materialise import materialise


class Tied(Chain):
    """A weight with two names, buffers, padding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 64, padding_idx=9)
        self.logits = nn.Linear(64, 10, bias=False)
        self.logits.weight = self.words.weight
        self.norm = nn.BatchNorm1d(64)

    def step(self, batch):
        x = self.norm(self.net(batch[0] + self.words(torch.arange(len(batch[0])) % 10)))
        return super().step((x, batch[1])) + self.logits(x).square().mean()


def built(kind=Tied):
    torch.manual_seed(0)
    return kind()


def declared(kind=Tied):
    with torch.device("meta"):
        return kind()


def test_meta_modules_get_the_values_that_building_would_have_drawn():
    """Built in the order in which they are registered, so the same numbers are drawn."""
    module = declared()
    parameters = list(module.parameters())
    torch.manual_seed(0)
    materialise(module)
    plain = built()
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert module.logits.weight is module.words.weight
    plain.words.reset_parameters()  # the tied weight is drawn once: there was nothing to draw for `logits`
    assert (module.words.weight[9] == 0).all()
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, module.get_buffer(name))
    for name in ("net.0.0.weight", "net.7.0.bias", "head.weight"):
        assert torch.equal(module.get_parameter(name), plain.get_parameter(name))


def test_a_meta_module_trains_like_one_that_was_built():
    ours, reference = declared(Chain), built(Chain)
    torch.manual_seed(0)
    fitted = trainer(harmony(microbatch_size=8))
    fitted.fit(ours, loader(8))
    trainer().fit(reference, loader(8))
    assert same_weights(ours, reference)
    assert fitted.strategy.statistics().num_packs >= 4


@pytest.mark.parametrize("how", ["meta", "empty"])
@pytest.mark.parametrize("function", ["fit", "validate"])
def test_a_checkpoint_fills_what_was_declared(tmp_path, how, function):
    reference = trainer()
    module = built(Chain)
    reference.fit(module, loader(8))
    reference.save_checkpoint(tmp_path / "one.ckpt")
    ours = trainer(harmony(microbatch_size=8), max_epochs=2)
    if how == "meta":
        loaded = declared(Chain)
    else:
        with ours.init_module(empty_init=True):
            loaded = Chain()
    if function == "fit":
        ours.fit(loaded, loader(8), ckpt_path=tmp_path / "one.ckpt")
        continued = built(Chain)
        trainer(max_epochs=2).fit(continued, loader(8), ckpt_path=tmp_path / "one.ckpt")
        assert same_weights(loaded, continued)
    else:
        ours.validate(loaded, loader(8), ckpt_path=tmp_path / "one.ckpt", verbose=False)
        assert same_weights(loaded, module)


def test_empty_modules_keep_what_was_loaded_into_them(tmp_path):
    first = trainer()
    module = built(Chain)
    first.fit(module, loader(8))
    first.save_checkpoint(tmp_path / "one.ckpt")
    ours = trainer(harmony())
    with ours.init_module(empty_init=True):
        loaded = Chain.load_from_checkpoint(tmp_path / "one.ckpt")
    ours.validate(loaded, loader(8), verbose=False)
    assert same_weights(loaded, module)


def test_empty_modules_without_a_checkpoint_are_drawn_at_set_up():
    fitted = trainer(harmony(microbatch_size=8))
    with fitted.init_module(empty_init=True):
        ours = Tied()
    with torch.no_grad():
        ours.net[3][0].bias.fill_(3.0)
    torch.manual_seed(0)
    materialise(ours)
    assert (ours.net[3][0].bias == 3).all()
    assert torch.equal(ours.net[0][0].weight, built().net[0][0].weight)
    assert (ours.words.weight[9] == 0).all()
    assert all(torch.isfinite(p).all() for p in ours.parameters())
    before = copy.deepcopy(ours)
    fitted.fit(ours, loader(8))
    assert not same_weights(ours, before)


def test_modules_are_built_on_the_host_otherwise():
    fitted = trainer(harmony())
    torch.manual_seed(0)
    with fitted.init_module():
        module = Chain()
    assert same_weights(module, built(Chain))


class Unfillable(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return x * self.scale


class Forgetful(Unfillable):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.zeros(64), persistent=False)

    def reset_parameters(self):
        self.scale.data.fill_(1.0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unfillable, r"module net\.3 \(Unfillable\) .* nothing fills its scale"),
        (Forgetful, r"module net\.3 \(Forgetful\) .* nothing fills its offset: let its reset_parameters"),
    ],
)
def test_what_cannot_be_filled_is_told_by_name(kind, message):
    with torch.device("meta"):
        module = Chain()
        module.net[3] = kind()
    with pytest.raises(ConfigurationError, match=message):
        trainer(harmony()).fit(module, loader(8))


class Initialising(Chain):
    """Chooses other values than its modules would."""

    def __init__(self):
        super().__init__()
        self.net[3] = Unfillable()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)
        if isinstance(module, Unfillable):
            nn.init.constant_(module.scale, 2.0)


def test_the_model_s_own_choice_of_values_counts():
    module = declared(Initialising)
    materialise(module)
    assert (module.net[0][0].weight == 0.5).all()
    assert (module.net[3].scale == 2).all()
    assert module.net[0][0].bias.abs().max() <= 1 / 8


def test_a_transformer_on_the_meta_device():
    """Its buffers are in no checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )

    class Model(Chain):
        def __init__(self):
            super().__init__(depth=1)
            self.net = self.head = None
            self.model = LlamaForCausalLM(config)

        def step(self, batch):
            return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    module, plain = declared(Model), Model()
    data = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))
    fitted = trainer(harmony(2, "320KiB"))
    fitted.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    for name, buffer in plain.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer), name
    assert 0.01 < module.model.model.embed_tokens.weight.std() < 0.04
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Copying(callbacks.Callback):
    """A moving average as users write it."""

    def setup(self, run, module, stage):
        self.average = copy.deepcopy(module.state_dict())

    def on_train_batch_end(self, run, module, *args):
        for name, value in module.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def on_fit_end(self, run, module):
        module.load_state_dict(self.average)


COPYING = {
    "ema": lambda: callbacks.EMAWeightAveraging(decay=0.9),
    "ema that begins late": lambda: callbacks.EMAWeightAveraging(decay=0.9, update_starting_at_step=4),
    "mean": lambda: callbacks.WeightAveraging(),
    "swa": lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
    "user's": Copying,
}


def without_values(how):
    with trainer(harmony()).init_module(empty_init=True) if how == "empty" else torch.device("meta"):
        return Chain()


@pytest.mark.parametrize("make_callback", COPYING.values(), ids=COPYING)
@pytest.mark.parametrize("how", ["meta", "empty"])
def test_callbacks_that_copy_the_module_before_it_is_set_up(how, make_callback):
    """The average takes part in the check before the first epoch, too."""

    class Noting(callbacks.Callback):
        def on_validation_end(self, run, module):
            scores.append(float(run.callback_metrics["val_loss"]))

    strategy, ours = harmony(microbatch_size=8), without_values(how)
    reference, found = built(Chain), []
    for module, which in ((reference, "auto"), (ours, strategy)):
        scores = []
        found.append(scores)
        torch.manual_seed(0)
        run = trainer(which, max_epochs=3, callbacks=[make_callback(), Noting()])
        run.fit(module, loader(8), loader(8))
    assert same_weights(ours, reference)
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.parametrize("how", ["meta", "empty"])
def test_an_average_is_resumed_into_a_module_that_was_declared(tmp_path, how):
    def averaging():
        return callbacks.EMAWeightAveraging(decay=0.9)

    reference = built(Chain)
    run = trainer(callbacks=[averaging()])
    run.fit(reference, loader(8))
    run.save_checkpoint(tmp_path / "one.ckpt")
    for_all = {"max_epochs": 2, "num_sanity_val_steps": 0}
    trainer(callbacks=[averaging()], **for_all).fit(reference, loader(8), loader(8), ckpt_path=tmp_path / "one.ckpt")
    strategy, ours = harmony(microbatch_size=8), without_values(how)
    run = trainer(strategy, callbacks=[averaging()], **for_all)
    run.fit(ours, loader(8), loader(8), ckpt_path=tmp_path / "one.ckpt")
    assert same_weights(ours, reference)


class Configured(Chain):
    """Builds itself when it is told to, once."""

    def __init__(self):
        super().__init__(depth=1)
        self.net = None
        self.num_built = 0

    def configure_model(self):
        if self.net is None:
            self.num_built += 1
            self.net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(8)))


def test_configure_model():
    runs = []
    for strategy in ("auto", harmony(microbatch_size=8)):
        torch.manual_seed(0)
        module = Configured()
        fitted = trainer(strategy)
        fitted.fit(module, loader(8))
        scores = fitted.validate(module, loader(8), verbose=False)
        assert module.num_built == 1
        runs.append((module, scores))
    assert same_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_configure_model_before_a_checkpoint_is_loaded(tmp_path):
    torch.manual_seed(0)
    module = Configured()
    first = trainer(harmony())
    first.fit(module, loader(8))
    first.save_checkpoint(tmp_path / "one.ckpt")
    again = Configured()
    trainer(harmony()).validate(again, loader(8), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert same_weights(again, module)


PEAK = """
import resource, sys, torch, lightning as L
from torch import nn
from harmony_lightning import EmulatedCluster, HarmonyStrategy

class Wide(L.LightningModule):
    def __init__(self, depth):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(depth)))
    def predict_step(self, batch, batch_idx):
        return self.net(batch)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def predict(depth):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(strategy=HarmonyStrategy(cluster=EmulatedCluster(1, 20 << 20)), accelerator="cpu", **quiet)
    if sys.argv[1] == "meta":
        with torch.device("meta"):
            module = Wide(depth)
    else:
        with trainer.init_module(empty_init=True):
            module = Wide(depth)
    trainer.predict(module, torch.utils.data.DataLoader(torch.zeros(2, 1024)))
    return sum(p.nbytes for p in module.parameters())

predict(4)
before = peak()
nbytes = predict(48)
print(nbytes, peak() - before)
"""


@pytest.mark.parametrize("how", ["meta", "empty"])
def test_the_host_holds_one_copy_at_the_peak(how):
    """192 MiB of weights that were declared: the process grows by those, and by a pack on the way into its arena."""
    done = subprocess.run([sys.executable, "-c", PEAK, how], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    nbytes, grown = map(int, done.stdout.split()[-2:])
    assert nbytes > 190 << 20
    assert grown < 1.2 * nbytes
