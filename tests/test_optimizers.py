"""Every optimizer, scheduler, clipping and accumulation in automatic optimization: plain training to the bit, and the tier
of the update that each allows."""

import inspect

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain, Sam, assert_same_optimizers, harmony, loader, same_weights, trainer
from torch import nn
from torch.optim import lr_scheduler

JUST_IN_TIME, WHOLE = "just in time", "whole"


def tier(statistics):
    assert statistics.updates_just_in_time == 0 or statistics.updates_whole == 0
    return JUST_IN_TIME if statistics.updates_just_in_time else WHOLE


def train_both(make, microbatch_size=8, num_batches=3, strategy=None, callbacks=lambda: [], **options):
    """Returns (ours, reference, statistics), weights and optimizer state compared to the bit."""
    torch.manual_seed(0)
    ours = make()
    torch.manual_seed(0)
    reference = make()
    parts = 8 // microbatch_size
    plain = {"accumulate_grad_batches": parts} if parts > 1 else {}
    plainly = trainer(limit_train_batches=num_batches * parts, callbacks=callbacks(), **{**options, **plain})
    plainly.fit(reference, loader(microbatch_size))
    fitted = trainer(
        strategy or harmony(2, microbatch_size=microbatch_size),
        limit_train_batches=num_batches,
        callbacks=callbacks(),
        **options,
    )
    fitted.fit(ours, loader(8))
    assert len(fitted.strategy.plan.packs) > 2
    assert same_weights(ours, reference)
    assert_same_optimizers(fitted.optimizers, plainly.optimizers)
    assert fitted.global_step == plainly.global_step
    return ours, reference, fitted.strategy.statistics()


ALL = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


@pytest.mark.parametrize(
    ("name", "microbatch_size"),
    [*((name, 2) for name in ALL if name not in ("LBFGS", "SparseAdam", "Muon")), ("AdamW", 8)],
)
def test_all_of_torch_update_just_in_time(name, microbatch_size):
    *_, statistics = train_both(lambda: Chain(optimizer=getattr(torch.optim, name)), microbatch_size)
    assert tier(statistics) == JUST_IN_TIME
    assert statistics.updates_just_in_time == 3


class Matrices(Chain):
    def configure_optimizers(self):
        return torch.optim.Muon([p for p in self.net.parameters() if p.dim() == 2], lr=0.1)


def test_muon_trains_the_matrices_and_the_rest_stays():
    ours, _, statistics = train_both(Matrices)
    assert tier(statistics) == JUST_IN_TIME
    assert ours.head.weight.grad is not None  # as in plain training: nobody steps it, nobody frees it


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"fused": True}, {"maximize": True}, {"amsgrad": True}, {"weight_decay": 0.1}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_adam(options):
    *_, statistics = train_both(lambda: Chain(optimizer=torch.optim.AdamW, **options))
    assert tier(statistics) == JUST_IN_TIME


@pytest.mark.parametrize("observed", [False, True])
def test_options_for_a_gpu_do_no_harm_to_steps_on_the_host(observed):
    """`capturable=True` is refused by torch for weights on the host, so there is no plain run of it there."""
    ours, reference = Chain(optimizer=torch.optim.Adam, capturable=True), Chain(optimizer=torch.optim.Adam)
    reference.load_state_dict(ours.state_dict())
    options = {"limit_train_batches": 3, "gradient_clip_val": 1e-2 if observed else None}
    trainer(**options).fit(reference, loader(8))
    fitted = trainer(harmony(2, microbatch_size=8), **options)
    fitted.fit(ours, loader(8))
    assert same_weights(ours, reference)
    assert fitted.optimizers[0].param_groups[0]["capturable"] is True


def test_lbfgs_runs_forward_and_backward_several_times_per_step():
    ours, reference, statistics = train_both(
        lambda: Chain(optimizer=torch.optim.LBFGS, lr=0.1, max_iter=4, line_search_fn="strong_wolfe"), num_batches=2
    )
    assert len(ours.losses) == len(reference.losses) > 4
    assert ours.losses == reference.losses
    assert tier(statistics) == WHOLE
    assert statistics.steps > statistics.updates_whole == 2


class Sparse(Chain):
    """An embedding whose gradient holds the rows in use only."""

    def __init__(self):
        super().__init__(depth=4, optimizer=torch.optim.SGD)
        self.rows = nn.Embedding(100, WIDTH, sparse=True)

    def step(self, batch):
        inputs, targets = batch
        indices = (inputs[:, 0].abs() * 30).long().clamp(max=99)
        return nn.functional.mse_loss(self.head(self.net(self.rows(indices) + inputs)).squeeze(1), targets)


def test_sparse_gradients_where_the_host_is_the_device():
    """Emulated GPUs hold dense tensors only, and say so."""
    torch.manual_seed(0)
    ours = Sparse()
    torch.manual_seed(0)
    reference = Sparse()
    trainer(limit_train_batches=3).fit(reference, loader(8))
    fitted = trainer("harmony", limit_train_batches=3)
    fitted.fit(ours, loader(8))
    assert same_weights(ours, reference)
    assert tier(fitted.strategy.statistics()) == JUST_IN_TIME


def test_sparse_adam():
    class Manual(Sparse):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            dense = [*self.net.parameters(), *self.head.parameters()]
            return torch.optim.SparseAdam(self.rows.parameters()), torch.optim.AdamW(dense)

    torch.manual_seed(0)
    ours = Manual()
    torch.manual_seed(0)
    reference = Manual()
    trainer(limit_train_batches=3).fit(reference, loader(8))
    trainer("harmony", limit_train_batches=3).fit(ours, loader(8))
    assert same_weights(ours, reference)


@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_a_two_step_optimizer_with_a_closure(microbatch_size):
    class Sharp(Chain):
        def __init__(self):
            super().__init__(optimizer=Sam)

    if microbatch_size == 8:
        ours, reference, statistics = train_both(Sharp)
        assert ours.losses == reference.losses
        assert tier(statistics) == WHOLE
        assert statistics.steps == 6
    else:  # plain accumulation would call the closure for the last microbatch only
        torch.manual_seed(0)
        ours = Sharp()
        torch.manual_seed(0)
        reference = Sharp()
        trainer(limit_train_batches=3).fit(reference, loader(8))
        trainer(harmony(), limit_train_batches=3).fit(ours, loader(8))
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_two_step_optimizer_in_an_overridden_optimizer_step():
    class Sharp(Chain):
        def __init__(self):
            super().__init__(optimizer=Sam)

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer_closure()
            optimizer.optimizer.first_step(zero_grad=True)
            optimizer_closure()
            optimizer.optimizer.second_step()

    train_both(Sharp)


class ScheduleFree(torch.optim.Optimizer):
    """Averages its iterates; how much the present one weighs is kept for the whole group, and eval mode swaps weights."""

    def __init__(self, parameters, lr=0.1, counts_calls=False):
        super().__init__(parameters, {"lr": lr, "k": 0, "weight_sum": 0.0, "mode": True})
        self.counts_calls = counts_calls

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.counts_calls:
            self.state["all"]["calls"] = self.state["all"].get("calls", 0) + 1
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2
            share = group["lr"] ** 2 / group["weight_sum"]
            if self.counts_calls:
                share = 1 / self.state["all"]["calls"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                z = state.setdefault("z", parameter.clone())
                parameter.lerp_(z, share)
                z.sub_(parameter.grad, alpha=group["lr"])
        return loss


@pytest.mark.parametrize(("counts_calls", "expected"), [(False, JUST_IN_TIME), (True, WHOLE)])
@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_an_optimizer_with_state_of_the_whole_group(counts_calls, expected, microbatch_size):
    class Free(Chain):
        def configure_optimizers(self):
            return ScheduleFree(self.parameters(), counts_calls=counts_calls)

    *_, statistics = train_both(Free, microbatch_size)
    assert tier(statistics) == expected


EXTRAS = [
    ("schedulefree", "AdamWScheduleFree", JUST_IN_TIME),
    ("schedulefree", "SGDScheduleFree", JUST_IN_TIME),
    ("prodigyopt", "Prodigy", WHOLE),
    ("lion_pytorch", "Lion", JUST_IN_TIME),
    ("pytorch_optimizer", "Lamb", JUST_IN_TIME),
    ("pytorch_optimizer", "DAdaptAdam", WHOLE),
    ("pytorch_optimizer", "StableSPAM", JUST_IN_TIME),
    ("pytorch_optimizer", "SOAP", JUST_IN_TIME),
    ("torch_optimizer", "DiffGrad", JUST_IN_TIME),
]


@pytest.mark.parametrize(("package", "name", "expected"), EXTRAS)
def test_optimizers_from_elsewhere(package, name, expected):
    kind = getattr(pytest.importorskip(package), name)

    class Module(Chain):
        def configure_optimizers(self):
            optimizer = kind(self.parameters(), lr=1e-2)
            if package == "schedulefree":
                optimizer.train()
            return optimizer

    *_, statistics = train_both(Module)
    assert tier(statistics) == expected


def test_hooks_on_the_step_see_one_step_with_all_gradients():
    class Hooked(Chain):
        def configure_optimizers(self):
            self.seen = []
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_pre_hook(lambda *_: self.look("before"))
            optimizer.register_step_post_hook(lambda *_: self.look("behind"))
            return optimizer

        def look(self, when):
            """Forward and backward run inside the step: before it, the gradients are those of the step before."""
            norms = [None if p.grad is None else p.grad.norm().item() for p in self.parameters()]
            self.seen.append((when, norms, self.head.bias.item()))

    ours, reference, statistics = train_both(Hooked)
    assert ours.seen == reference.seen
    assert len(ours.seen) == 6
    assert tier(statistics) == WHOLE


# Parameters and groups --------------------------------------------------------------------------------------------------


class Groups(Chain):
    """Groups with different options; one block is frozen, the head is in no group."""

    def configure_optimizers(self):
        self.net[2].requires_grad_(False)
        return torch.optim.AdamW(
            [
                {"params": list(self.net[0].parameters()), "lr": 0.1, "weight_decay": 0.0},
                {"params": list(self.net[1].parameters()), "betas": (0.5, 0.9), "maximize": True},
                {"params": [p for block in self.net[2:] for p in block.parameters()], "amsgrad": True},
            ],
            lr=1e-2,
        )


@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_parameter_groups_frozen_weights_and_weights_in_no_group(microbatch_size):
    ours, reference, statistics = train_both(Groups, microbatch_size)
    assert tier(statistics) == JUST_IN_TIME
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) or torch.allclose(mine.grad, theirs.grad)
    assert ours.head.weight.grad is not None
    assert ours.net[2][0].weight.grad is None


class Unfreezing(L.Callback):
    """Lets another block train, in a group of its own, from the second step on."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 1 and len(trainer.optimizers[0].param_groups) == 1:
            module.net[0].requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": list(module.net[0].parameters()), "lr": 0.05})


@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_groups_that_are_added_in_between(microbatch_size):
    class Frozen(Chain):
        def configure_optimizers(self):
            self.net[0].requires_grad_(False)
            rest = [*self.net[1:].parameters(), *self.head.parameters()]
            return torch.optim.Adam(rest, lr=1e-2)

    *_, statistics = train_both(Frozen, microbatch_size, callbacks=lambda: [Unfreezing()])
    assert tier(statistics) == JUST_IN_TIME


def test_weights_without_gradient_in_some_steps():
    class Sometimes(Chain):
        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            hidden = self.net(inputs) if batch_idx % 2 else self.net[2:](inputs)
            return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)

    *_, statistics = train_both(Sometimes, num_batches=5)
    assert tier(statistics) == JUST_IN_TIME


@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}], ids=["", "clip"]
)
def test_weights_whose_gradient_came_with_an_earlier_minibatch_only(clip):
    """They are complete before the last backward, and stepped behind it."""

    class Earlier(Chain):
        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            hidden = self.net[2:](inputs) if batch_idx % 2 else self.net(inputs)
            return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)

    *_, statistics = train_both(Earlier, num_batches=5, accumulate_grad_batches=2, **clip)
    assert tier(statistics) == JUST_IN_TIME


def test_no_optimizer_at_all():
    class Untrained(Chain):
        def configure_optimizers(self):
            return None

    module = Untrained()
    before = module.head.weight.clone()
    trainer(harmony(2), limit_train_batches=2).fit(module, loader(8))
    assert torch.equal(module.head.weight, before)
    assert module.head.weight.grad is not None


def test_a_step_without_loss_steps_nothing():
    class Skipping(Chain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    train_both(Skipping)


# Schedulers -------------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 4),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_schedulers(name, interval):
    class Scheduled(Chain):
        def __init__(self):
            super().__init__(depth=4)
            self.rates = []

        def on_train_batch_start(self, batch, batch_idx):
            (group,) = self.trainer.optimizers[0].param_groups
            self.rates.append((group["lr"], group["betas"]))

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            scheduler = SCHEDULERS[name](optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "loss", "strict": False},
            }

    ours, reference, statistics = train_both(
        Scheduled, num_batches=2, strategy=harmony(2, microbatch_size=8, mode="pp"), max_epochs=2
    )
    assert ours.rates == reference.rates
    assert len(set(ours.rates)) > 1 or name == "ReduceLROnPlateau" or interval == "epoch"
    assert tier(statistics) == JUST_IN_TIME


def test_a_scheduler_every_second_step():
    class Rarely(Chain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.1), "interval": "step", "frequency": 2}
            return [optimizer], [scheduler]

    train_both(Rarely, num_batches=5)


# Accumulation and clipping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_over_minibatches(accumulate):
    """The last one of an epoch steps however few it has. A third rounds otherwise in each type of number."""
    *_, statistics = train_both(Chain, num_batches=5, accumulate_grad_batches=accumulate)
    assert tier(statistics) == JUST_IN_TIME
    assert statistics.updates_just_in_time == -(-5 // accumulate)


def test_accumulation_that_changes_with_the_epoch():
    *_, statistics = train_both(
        Chain,
        num_batches=4,
        max_epochs=3,
        callbacks=lambda: [L.pytorch.callbacks.GradientAccumulationScheduler(scheduling={0: 1, 1: 2, 2: 4})],
    )
    assert statistics.updates_just_in_time == 4 + 2 + 1


CLIPPINGS = {
    "norm": ({"gradient_clip_val": 0.01}, WHOLE),
    "named norm": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "norm"}, WHOLE),
    "value": ({"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}, JUST_IN_TIME),
    "none": ({"gradient_clip_val": 0}, JUST_IN_TIME),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("microbatch_size", [2, 8])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_clipping(name, microbatch_size, accumulate):
    if microbatch_size == 2 and accumulate == 2:
        pytest.skip("plain training would group the additions otherwise")
    options, expected = CLIPPINGS[name]
    if accumulate > 1:
        options = {**options, "accumulate_grad_batches": accumulate}
    *_, statistics = train_both(lambda: Chain(optimizer=torch.optim.SGD), microbatch_size, 4, **options)
    assert tier(statistics) == expected


def test_the_reason_for_an_update_in_one_go_is_told_once(caplog):
    caplog.set_level("INFO", "harmony_lightning")
    train_both(Chain, gradient_clip_val=0.01)
    (message,) = [r.message for r in caplog.records if "in one go" in r.message]
    assert "AdamW" in message
    assert "common norm" in message
