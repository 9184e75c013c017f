"""The strategy end to end on a small module: results, bytes, memory."""

import dataclasses
import gc
import resource

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_numbers, same_weights, stays_within, trainer, twins
from torch import nn

from harmony_lightning import CapacityError, ConfigurationError, Plan

pytestmark = pytest.mark.usefixtures("devices")


def train_both(strategy, microbatch_size=2, batch_size=8, plain=None, both=None, **options):
    ours, reference = twins(**options)
    both = both or {}
    accumulate = batch_size // microbatch_size
    trainer(accumulate_grad_batches=accumulate, **(plain or {}), **both).fit(reference, loader(microbatch_size))
    fitted = trainer(strategy, **both)
    fitted.fit(ours, loader(batch_size))
    return ours, reference, fitted.strategy


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_pp_equals_one_device_to_the_bit(num_gpus, optimizer):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    ours, reference, strategy = train_both(harmony(num_gpus), optimizer=optimizer, **options)
    assert same_weights(ours, reference)
    assert same_numbers(sorted(ours.losses), sorted(reference.losses))
    assert len(strategy.plan.packs) >= 4


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_dp_equals_one_device_up_to_the_order_of_additions(num_gpus):
    """Each GPU adds up its own microbatches before the sums are added: another order than one after the other."""
    ours, reference, _ = train_both(harmony(num_gpus, mode="dp"), optimizer=torch.optim.SGD)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_one_microbatch_equals_plain_training_to_the_bit():
    ours, reference, _ = train_both(harmony(microbatch_size=8), microbatch_size=8)
    assert same_weights(ours, reference)
    assert same_numbers(ours.losses, reference.losses)


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("num_gpus", [1, 2, 3])
@pytest.mark.parametrize("memory", ["120KiB", "200KiB", "300KiB"])
def test_swapped_bytes_are_the_plan_s_exactly(mode, num_gpus, memory):
    """Each weight in twice per visited GPU, once if a slot holds it still when its backward comes; sums of gradients out
    once."""
    module, _ = twins()
    fitted = trainer(harmony(num_gpus, memory, mode=mode))
    fitted.fit(module, loader(8, 24))
    statistics, plan = fitted.strategy.statistics(), fitted.strategy.plan
    weights = sum(p.nbytes for p in module.parameters())
    met, num_slots = 0, 1 + plan.prefetch
    for device in range(num_gpus):
        here = plan.packs[device::num_gpus] if mode == "pp" else plan.packs
        met += sum(pack.nbytes for pack in here[-num_slots:])
    copies = num_gpus if mode == "dp" else 1
    assert statistics.steps == 3
    assert statistics.swap_in_bytes == 3 * (2 * copies * weights - met) == 3 * plan.swap_in_bytes_per_step
    assert statistics.swap_out_bytes == 3 * weights == 3 * plan.swap_out_bytes_per_step
    assert stays_within(statistics, plan.memory_bytes)


def test_a_model_twelve_times_larger_than_a_gpu_trains():
    module = Chain(depth=60)
    weights = sum(p.nbytes for p in module.parameters())
    fitted = trainer(harmony(2, weights // 12), limit_train_batches=2)
    fitted.fit(module, loader(8))
    statistics = fitted.strategy.statistics()
    assert weights >= 12 * fitted.strategy.plan.memory_bytes
    assert stays_within(statistics, weights // 12)


def test_a_ragged_minibatch_counts_each_sample_once():
    """Microbatches of 3, 3 and 1 samples against the whole minibatch of 7 at once."""
    ours, reference = twins(optimizer=torch.optim.SGD)
    trainer(limit_train_batches=2).fit(reference, loader(7))
    trainer(harmony(microbatch_size=3), limit_train_batches=2).fit(ours, loader(7))
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "both",
    [{"gradient_clip_val": 0.05}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}],
    ids=["norm", "value"],
)
def test_clipping_sees_all_gradients(both):
    ours, reference, _ = train_both(harmony(), both=both)
    assert same_weights(ours, reference)


def test_gradient_accumulation_over_minibatches():
    """Gradients of two minibatches meet on the host, those of microbatches on the GPU: additions are grouped."""
    ours, reference = twins(optimizer=torch.optim.SGD)
    trainer(accumulate_grad_batches=8).fit(reference, loader(2))
    trainer(harmony(), accumulate_grad_batches=2).fit(ours, loader(8))
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_hooks_that_see_gradients_get_complete_ones():
    norms = []

    class Watching(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            norms.append([p.grad.norm().item() for p in module.parameters()])

    ours, reference = twins()
    trainer(accumulate_grad_batches=4, callbacks=[Watching()]).fit(reference, loader(2))
    trainer(harmony(), callbacks=[Watching()]).fit(ours, loader(8))
    assert same_numbers(norms[:5], norms[5:])
    assert same_weights(ours, reference)


def test_learning_rates_are_those_of_the_step():
    class Scheduled(Chain):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(0)
    ours = Scheduled()
    torch.manual_seed(0)
    reference = Scheduled()
    trainer(accumulate_grad_batches=4).fit(reference, loader(2))
    trainer(harmony()).fit(ours, loader(8))
    assert same_weights(ours, reference)


def test_an_optimizer_that_is_not_separable_steps_the_whole_model():
    ours, reference = twins(optimizer=torch.optim.LBFGS, max_iter=3)
    trainer(limit_train_batches=2).fit(reference, loader(8))
    trainer(harmony(microbatch_size=8), limit_train_batches=2).fit(ours, loader(8))
    assert same_weights(ours, reference)


def test_the_host_as_only_device_needs_no_swapping():
    ours, reference, strategy = train_both("harmony", microbatch_size=8, both={"accelerator": "cpu"})
    assert same_weights(ours, reference)
    statistics = strategy.statistics()
    assert (statistics.swap_in_bytes, statistics.swap_out_bytes, statistics.num_packs) == (0, 0, 1)


@pytest.mark.usefixtures("nothing_stays")
def test_evaluation_and_prediction_swap_too():
    module, reference = twins()
    fitted = trainer(harmony(2))
    plain = trainer()
    expected = plain.validate(reference, loader(8), verbose=False)
    assert fitted.validate(module, loader(8), verbose=False) == expected
    ours, theirs = fitted.predict(module, loader(8)), plain.predict(reference, loader(8))
    assert all(torch.equal(a, b) and type(a) is torch.Tensor for a, b in zip(ours, theirs, strict=True))
    weights = sum(p.nbytes for p in module.parameters())
    assert fitted.strategy.statistics().swap_in_bytes == 5 * weights


def test_fit_with_validation_in_between():
    ours, reference = twins()
    plain, fitted = trainer(accumulate_grad_batches=4), trainer(harmony())
    plain.fit(reference, loader(2), loader(8))
    fitted.fit(ours, loader(8), loader(8))
    assert same_weights(ours, reference)
    assert fitted.callback_metrics["val_loss"] == plain.callback_metrics["val_loss"]
    torch.testing.assert_close(fitted.callback_metrics["loss_epoch"], plain.callback_metrics["loss_epoch"])


def test_manual_optimization_runs_in_one_piece(caplog):
    class Manual(Chain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second):
                loss = self.step(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.Adam(self.head.parameters())

    torch.manual_seed(0)
    ours = Manual()
    torch.manual_seed(0)
    reference = Manual()
    trainer().fit(reference, loader(8))
    trainer(harmony(2)).fit(ours, loader(8))
    assert same_weights(ours, reference)
    assert sum("manual optimization" in record.message for record in caplog.records) == 1


def test_a_given_plan_is_carried_out(tmp_path):
    module, reference = twins()
    first = trainer(harmony(2), limit_train_batches=1)
    first.fit(module, loader(8))
    path = tmp_path / "plan.json"
    path.write_text(first.strategy.plan.to_json())
    assert Plan.from_json(path.read_text()) == first.strategy.plan
    again = trainer(harmony(2, plan=path), limit_train_batches=1)
    again.fit(reference, loader(8))
    assert again.strategy.plan == first.strategy.plan
    assert same_weights(module, reference)


def test_what_a_given_plan_has_wrong_is_told_before_the_first_step_or_behind_it(caplog):
    first = trainer(harmony(2), limit_train_batches=1)
    first.fit(Chain(), loader(8))
    plan, module = first.strategy.plan, Chain()
    for memory, error, what in (
        ("10KiB", CapacityError, "make packs smaller"),
        ("64MiB", ConfigurationError, "names layer 'other', which this module does not have"),
    ):
        if error is ConfigurationError:
            plan = dataclasses.replace(
                plan, packs=(dataclasses.replace(plan.packs[0], layers=("other",)), *plan.packs[1:])
            )
        with pytest.raises(error, match=what) as caught:
            trainer(harmony(2, memory=memory, plan=plan)).fit(module, loader(8))
        assert any(line.startswith(">") for line in str(caught.value).splitlines())
    assert module.losses == []
    turned = dataclasses.replace(first.strategy.plan, packs=first.strategy.plan.packs[::-1])
    for num_steps in (1, 3):
        caplog.clear()
        trainer(harmony(2, plan=turned), limit_train_batches=num_steps).fit(Chain(), loader(8))
        told = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(told) == 1 and "in another order" in told[0]


def test_what_cannot_fit_is_told_before_the_first_step():
    module = Chain()
    with pytest.raises(CapacityError, match=r"layer net\.0\.0 needs 48\.75 KiB .* each GPU offers 20 KiB"):
        trainer(harmony(memory="20KiB")).fit(module, loader(8))
    assert module.losses == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tp"}, "mode must be"),
        ({"microbatch_size": 0}, "microbatch_size must be"),
        ({"stash": "disk"}, "stash must be"),
        ({"layers": "net.*"}, None),
        ({"layers": ["nothing.*"]}, "matches no module"),
    ],
)
def test_bad_knobs_are_refused(options, message):
    if message is None:
        trainer(harmony(**options), limit_train_batches=1).fit(Chain(), loader(8))
    else:
        with pytest.raises(ConfigurationError, match=message):
            trainer(harmony(**options), limit_train_batches=1).fit(Chain(), loader(8))


def test_a_hundred_steps_leave_memory_where_ten_left_it():
    cluster_bytes, host_bytes = [], []

    class Sampling(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step in (10, 100):
                gc.collect()
                cluster_bytes.append([d.allocated_bytes() for d in trainer.strategy._require_engine().cluster.devices])
                host_bytes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    fitted = trainer(harmony(2), max_epochs=-1, max_steps=100, callbacks=[Sampling()])
    fitted.fit(Chain(), loader(8))
    assert cluster_bytes[0] == cluster_bytes[1]
    # The interpreter's own allocator moves in arenas of 1 MiB.
    assert host_bytes[1] - host_bytes[0] < 4 << 20


def test_host_holds_the_weights_once():
    """16 MiB of weights: setting up and evaluating a step must not add another 16 MiB."""
    rss = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()  # noqa: E731, SIM115

    class Wide(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(512, 512) for _ in range(64)))

        def predict_step(self, batch, batch_idx):
            sizes.append(rss())
            return self.net(batch)

    sizes = []
    module = Wide()
    weights = sum(p.nbytes for p in module.parameters())
    assert weights > 64 << 20
    memory = 8 << 20
    batches = torch.utils.data.DataLoader(torch.zeros(4, 512), batch_size=2)
    trainer(harmony(1, memory)).predict(module, batches)  # warm up: code and allocator
    before = rss()
    trainer(harmony(1, memory)).predict(module, batches)
    assert max(sizes[2:]) - before < memory + weights // 4


def test_bare_parameters_and_views_of_them_work_in_inference_mode():
    class Positions(Chain):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(2, WIDTH))

        def step(self, batch):
            inputs, targets = batch
            shifted = inputs + self.position[:1]
            return nn.functional.mse_loss(self.head(self.net(shifted)).squeeze(1), targets)

    torch.manual_seed(0)
    ours = Positions()
    torch.manual_seed(0)
    reference = Positions()
    trainer(accumulate_grad_batches=4).fit(reference, loader(2), loader(4))
    trainer(harmony()).fit(ours, loader(8), loader(4))
    assert same_weights(ours, reference)


def test_glue_results_that_no_loss_uses_leave_no_memory_behind():
    """relu saves its own result: were that held by its own node, nothing would ever free it."""

    class Idle(Chain):
        def step(self, batch):
            inputs, targets = batch
            outputs = self.head(self.net(inputs)).squeeze(1)
            outputs.relu()
            return nn.functional.mse_loss(outputs, targets)

    sizes = []

    class Sampling(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            gc.collect()
            sizes.append([d.allocated_bytes() for d in trainer.strategy._require_engine().cluster.devices])

    trainer(harmony(2), callbacks=[Sampling()]).fit(Idle(), loader(8))
    assert sizes[1] == sizes[-1]
