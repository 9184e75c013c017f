"""Every precision computes the numbers of the default strategy with the same precision."""

import copy

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, assert_same_optimizers, harmony, loader, same_weights, trainer, twins
from lightning.pytorch import plugins
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from harmony_lightning import ConfigurationError
from harmony_lightning.strategy import precision

TRUE = ["32-true", "bf16-true", "16-true", "64-true"]
PRECISIONS = [*TRUE, "bf16-mixed", "16-mixed"]


def with_precision(name, scaler=None):
    """On a host, Lightning turns "16-mixed" into "bf16-mixed" unless the plugin is given."""
    if name != "16-mixed":
        return {"precision": name}
    scaler = scaler or torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


class Careful(Chain):
    """AdamW's usual epsilon is zero in float16."""

    def __init__(self):
        super().__init__(eps=1e-3)


def train_both(name, kind=Careful, microbatch_size=8, num_batches=4, memory="120KiB", scalers=(None, None), **options):
    torch.manual_seed(0)
    ours = kind()
    torch.manual_seed(0)
    reference = kind()
    parts = 8 // microbatch_size
    plain = {"accumulate_grad_batches": parts} if parts > 1 else {}
    plainly = trainer(
        limit_train_batches=num_batches * parts, **{**options, **plain}, **with_precision(name, scalers[0])
    )
    plainly.fit(reference, loader(microbatch_size))
    strategy = harmony(2, memory, microbatch_size)
    fitted = trainer(strategy, limit_train_batches=num_batches, **options, **with_precision(name, scalers[1]))
    fitted.fit(ours, loader(8))
    assert len(strategy.plan.packs) > 2
    return ours, reference, fitted, plainly


@pytest.mark.parametrize("microbatch_size", [2, 8])
@pytest.mark.parametrize("name", PRECISIONS)
def test_same_numbers_as_the_default_strategy(name, microbatch_size):
    memory = {"64-true": "240KiB", "bf16-true": "60KiB", "16-true": "60KiB"}.get(name, "120KiB")
    ours, reference, fitted, plainly = train_both(name, microbatch_size=microbatch_size, memory=memory)
    assert sorted(ours.losses) == sorted(reference.losses)
    assert same_weights(ours, reference)
    assert [p.dtype for p in ours.parameters()] == [p.dtype for p in reference.parameters()]
    statistics = fitted.strategy.statistics()
    assert (statistics.updates_whole == 0) == (name != "16-mixed")
    assert fitted.precision_plugin.state_dict() == plainly.precision_plugin.state_dict()


@pytest.mark.parametrize("name", PRECISIONS)
def test_accumulation_and_clipping(name):
    """A third has another rounding in every type of number."""
    ours, reference, *_ = train_both(
        name, num_batches=6, memory="240KiB", accumulate_grad_batches=3, gradient_clip_val=0.1
    )
    assert same_weights(ours, reference)


class InFull(Careful):
    """Its last lines are computed in float32."""

    def step(self, batch):
        inputs, targets = batch
        hidden = self.net(inputs)
        with torch.autocast("cpu", enabled=False):
            mixed = hidden.float() @ self.head.weight.float().mT
        return nn.functional.mse_loss(mixed.squeeze(1), targets)


def test_backward_is_not_cast_where_forward_was_not():
    """The last segment's is run where autocast is still on."""
    ours, reference, *_ = train_both("bf16-mixed", InFull)
    assert same_weights(ours, reference)


class Noise(nn.Module):
    """Makes numbers of the default type, which is that of the step alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        noise = torch.randn(x.shape, device=x.device)
        assert noise.dtype == x.dtype
        return x + self.scale * noise


class Noisy(Careful):
    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(Noise())

    def on_train_start(self):
        torch.manual_seed(2)


@pytest.mark.parametrize("name", ["64-true", "bf16-true"])
def test_a_layer_runs_again_with_the_default_type_of_the_step(name):
    """While the worker makes the optimizer's states, whose type depends on it, too."""
    ours, reference, *fitted = train_both(name, Noisy, memory="240KiB" if name == "64-true" else "60KiB")
    assert same_weights(ours, reference)
    assert_same_optimizers(*([one.optimizers[0]] for one in fitted))


class Overflowing(Chain):
    """Some gradient of the third minibatch does not fit into its type."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


class Observing(L.Callback):
    """The weights and the scale behind each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, *args):
        scaler = trainer.precision_plugin.scaler
        self.rows.append((module.head.weight.sum().item(), scaler.get_scale(), scaler._get_growth_tracker()))


@pytest.mark.parametrize("microbatch_size", [2, 8])
@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_skips_a_step_with_infinite_gradients(microbatch_size, fused):
    class Module(Overflowing):
        def __init__(self):
            super().__init__(optimizer=torch.optim.AdamW, fused=fused)

    rows = []

    def run(strategy, **options):
        torch.manual_seed(0)
        observing = Observing()
        fitted = trainer(strategy, limit_train_batches=5, callbacks=[observing], **with_precision("16-mixed"))
        module = Module()
        fitted.fit(module, loader(8))
        rows.append(observing.rows)
        return module, fitted

    reference, _ = run("auto")
    ours, fitted = run(harmony(2, microbatch_size=microbatch_size))
    scales = [scale for _, scale, _ in rows[1]]
    assert scales == [1024, 2048, 1024, 1024, 2048]
    assert [row[1:] for row in rows[1]] == [row[1:] for row in rows[0]]
    weights = [weight for weight, *_ in rows[1]]
    assert weights[1] == weights[2] != weights[3]
    if microbatch_size == 8:
        assert rows[1] == rows[0]
        assert same_weights(ours, reference)
    assert all(torch.isfinite(parameter).all() for parameter in ours.parameters())
    assert fitted.strategy.statistics().updates_whole == 5


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
def test_gradients_of_a_fused_optimizer_are_not_clipped_in_mixed_precision(name, algorithm):
    """As in plain training, in front of the first step."""
    clipping = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    messages = []
    for module, strategy in zip(twins(fused=True), ("auto", harmony(microbatch_size=4)), strict=True):
        before = copy.deepcopy(module)
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping") as caught:
            trainer(strategy, **clipping, **with_precision(name)).fit(module, loader(8))
        messages.append(str(caught.value))
        assert same_weights(module, before)
    assert messages[0] == messages[1]


def test_the_scaler_in_manual_optimization():
    class Manual(Overflowing):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    ours, reference, fitted, plainly = train_both("16-mixed", Manual)
    assert same_weights(ours, reference)
    assert fitted.precision_plugin.state_dict() == plainly.precision_plugin.state_dict()


def test_the_scale_lives_on_the_host_and_is_saved(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision.keep_scaler_on_host(scaler)
    assert scaler._scale.device.type == "cpu"
    assert scaler.get_scale() == 8.0
    scaler._scale = scaler._scale.to("meta")  # as left behind on another device
    scaler.get_scale = lambda: 4.0
    precision.keep_scaler_on_host(scaler)
    assert scaler._scale == 4.0
    precision.keep_scaler_on_host(None)
    precision.keep_scaler_on_host(torch.amp.GradScaler("cpu", enabled=False))


def test_resuming_takes_the_scale_up_again(tmp_path):
    def fit(strategy, epochs, path=None):
        torch.manual_seed(0)
        module = Chain()
        fitted = trainer(strategy, max_epochs=epochs, limit_train_batches=3, **with_precision("16-mixed"))
        fitted.fit(module, loader(8), ckpt_path=path, weights_only=False)
        return module, fitted

    _, first = fit(harmony(2, microbatch_size=8), 1)
    first.save_checkpoint(tmp_path / "it.ckpt")
    resumed, second = fit(harmony(1, microbatch_size=8), 2, tmp_path / "it.ckpt")
    straight, plain = fit("auto", 2)
    assert same_weights(resumed, straight)
    assert second.precision_plugin.state_dict() == plain.precision_plugin.state_dict()


@pytest.mark.parametrize("name", sorted(precision._REFUSED))
def test_plugins_that_cannot_work_are_refused_with_a_reason(name):
    """By name: most of them cannot even be made without their packages and devices."""

    class Derived(type(name, (plugins.Precision,), {})):
        pass

    module = Chain()
    strategy = harmony(2, precision_plugin=Derived())
    with pytest.raises(ConfigurationError, match=r"cannot use Derived: .*'bf16-mixed'"):
        trainer(strategy).fit(module, loader(8))
    assert module.losses == []


def test_user_s_own_plugins_that_handle_gradients_find_all_of_them():
    class Negating(plugins.Precision):
        def clip_grad_by_value(self, optimizer, clip_val):
            for parameter in self.main_params(optimizer):
                parameter.grad.neg_()

    torch.manual_seed(0)
    ours = Chain()
    torch.manual_seed(0)
    reference = Chain()
    options = {
        "gradient_clip_val": 1.0,
        "gradient_clip_algorithm": "value",
        "limit_train_batches": 2,
    }
    trainer(plugins=[Negating()], **options).fit(reference, loader(8))
    fitted = trainer(harmony(2, microbatch_size=8), plugins=[Negating()], **options)
    fitted.fit(ours, loader(8))
    assert same_weights(ours, reference)
    assert fitted.strategy.statistics().updates_just_in_time == 0


def test_half_precision_of_a_part_of_the_model():
    class Mixed(Chain):
        def __init__(self):
            super().__init__(depth=6)
            self.net[2:4].to(torch.bfloat16)

        def step(self, batch):
            inputs, targets = batch
            hidden = self.net[4:](self.net[2:4](self.net[:2](inputs).bfloat16()).float())
            return torch.nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)

    ours, reference, *_ = train_both("32-true", Mixed)
    assert same_weights(ours, reference)
    assert {p.dtype for p in ours.parameters()} == {torch.float32, torch.bfloat16}
    assert ours.net[2][0].in_features == WIDTH


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.MultiheadAttention])
def test_layers_whose_evaluation_is_one_kernel(kind):
    """Of operations that autocast casts."""

    class Attentive(Chain):
        def __init__(self):
            super().__init__(depth=2)
            self.attention = kind(WIDTH, 2, batch_first=True)

        def step(self, batch):
            hidden = self.net(batch[0])[:, None]
            hidden = self.attention(*[hidden] * (1 if kind is nn.TransformerEncoderLayer else 3))
            hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
            return torch.nn.functional.mse_loss(self.head(hidden[:, 0]).squeeze(1), batch[1])

    torch.manual_seed(0)
    module, losses = Attentive(), []
    for strategy in ("auto", harmony(2, "4MiB", 8, layers=["net.*", "attention", "head"], one_layer_per_pack=True)):
        (found,) = trainer(strategy, precision="bf16-mixed").validate(module, loader(8), verbose=False)
        losses.append(found["val_loss"])
    assert losses[0] == losses[1]
