"""Manual optimization with what usually surrounds it: loss scalers, gradients of gradients, hooks."""

import copy

import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer

from harmony_lightning import HarmonyStrategy, UnsupportedError

STRATEGIES = pytest.mark.parametrize(
    "strategy",
    [lambda: harmony(2, "200KiB", 8, layers=["net.*", "head"]), lambda: HarmonyStrategy()],
    ids=["swapped", "host"],
)


class ByHand(Chain):
    def __init__(self):
        super().__init__(depth=4, optimizer=torch.optim.SGD)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.update(self.step(batch), optimizer)


def both(kind, strategy):
    torch.manual_seed(0)
    reference = kind()
    ours = copy.deepcopy(reference)
    trainer(limit_train_batches=3).fit(reference, loader(8))
    trainer(strategy, limit_train_batches=3).fit(ours, loader(8))
    return ours, reference


@STRATEGIES
@pytest.mark.parametrize("clips", [False, True])
def test_a_loss_scaler_of_the_user_s_own(strategy, clips):
    class Scaled(ByHand):
        def on_fit_start(self):
            self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10, growth_interval=1)
            self.scales = []

        def update(self, loss, optimizer):
            if len(self.scales) == 1:
                loss = loss * float("inf")  # the scaler leaves this step out, and is careful from then on
            self.scaler.scale(loss).backward()
            if clips:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            self.scaler.step(optimizer)
            self.scaler.update()
            self.scales.append(self.scaler.get_scale())

    ours, reference = both(Scaled, strategy())
    assert ours.scales == reference.scales == [2048, 1024, 2048]
    assert same_weights(ours, reference)


@STRATEGIES
@pytest.mark.parametrize("of_weights", [False, True])
def test_gradients_that_keep_a_graph_can_be_used_but_not_differentiated(strategy, of_weights):
    class Penalised(ByHand):
        differentiates = True

        def update(self, loss, optimizer):
            options = {"inputs": list(self.parameters())} if of_weights else {}
            loss.backward(create_graph=True, **options)
            penalty = sum(p.grad.pow(2).sum() for p in self.parameters())
            if self.differentiates:
                optimizer.zero_grad()
                penalty.backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(UnsupportedError, match="second derivative"):
        trainer(strategy(), limit_train_batches=1).fit(Penalised(), loader(8))
    Penalised.differentiates = False
    ours, reference = both(Penalised, strategy())
    assert same_weights(ours, reference)


@STRATEGIES
def test_hooks_behind_the_accumulation_of_gradients_are_called(strategy):
    class Watched(ByHand):
        def on_fit_start(self):
            self.seen = []
            for name, parameter in self.named_parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, name=name: self.seen.append((name, parameter.grad.sum().item()))
                )

        def update(self, loss, optimizer):
            loss.backward()
            optimizer.step()

    ours, reference = both(Watched, strategy())
    assert sorted(ours.seen) == sorted(reference.seen)
    assert len(ours.seen) == 3 * len(list(ours.parameters()))
