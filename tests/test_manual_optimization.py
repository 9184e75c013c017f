"""Manual optimization on GPUs smaller than the model equals plain Lightning to the bit."""

import copy

import pytest
import torch
from chain import WIDTH, Chain, Sam, assert_same_optimizers, harmony, loader, same_weights, trainer
from torch import nn


def train_both(make, num_batches=4, strategy=None, **options):
    torch.manual_seed(0)
    ours = make()
    torch.manual_seed(0)
    reference = make()
    plainly = trainer(limit_train_batches=num_batches, **options)
    torch.manual_seed(1)
    plainly.fit(reference, loader(8))
    strategy = strategy or harmony(2, "150KiB")
    fitted = trainer(strategy, limit_train_batches=num_batches, **options)
    torch.manual_seed(1)
    fitted.fit(ours, loader(8))
    assert len(strategy.plan.packs) > 2
    assert ours.losses == reference.losses
    assert same_weights(ours, reference)
    assert_same_optimizers(fitted.optimizers, plainly.optimizers)
    assert fitted.global_step == plainly.global_step
    memory = sum(p.nbytes for p in ours.parameters())
    assert max(strategy.statistics().peak_device_bytes) < memory
    return ours, reference, strategy.statistics()


class Manual(Chain):
    def __init__(self, **options):
        super().__init__(**{"depth": 12, **options})
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.losses.append(loss.item())
        self.optimize(loss, batch, batch_idx)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foreach": True},
        {"fused": True},
        {"optimizer": torch.optim.SGD, "momentum": 0.9, "foreach": True},
        {"optimizer": torch.optim.Adagrad},
    ],
    ids=str,
)
@pytest.mark.parametrize("raw", [False, True])
def test_optimizers_step_on_the_host(options, raw):
    """Wrapped by Lightning or not: their arithmetic must not move weights to a GPU."""

    class Stepping(Manual):
        def optimize(self, loss, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=not raw)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(self.step(batch).item())  # with the new weights

    train_both(lambda: Stepping(**options))


def test_gradients_are_accumulated_by_hand():
    class Accumulating(Manual):
        def optimize(self, loss, batch, batch_idx):
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    train_both(Accumulating)


def test_several_backwards_in_one_step():
    class Several(Manual):
        def optimize(self, loss, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.manual_backward(self.step(batch) * 0.5)
            hidden = self.net(batch[0])
            first, second = hidden.pow(2).mean(), self.head(hidden).mean()
            self.manual_backward(first, retain_graph=True)
            self.manual_backward(second)
            self.optimizers().step()

    train_both(Several)


def test_the_same_loss_differentiated_twice():
    class Twice(Manual):
        def optimize(self, loss, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)
            self.optimizers().step()

    train_both(Twice)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_by_hand(algorithm):
    class Clipping(Manual):
        def optimize(self, loss, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1e-2, gradient_clip_algorithm=algorithm)
            optimizer.step()

    train_both(lambda: Clipping(optimizer=torch.optim.SGD))


def test_looking_at_and_changing_gradients_and_weights_by_hand():
    class Looking(Manual):
        def optimize(self, loss, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            total = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
            self.losses.append(total.item())
            for parameter in self.parameters():
                parameter.grad = parameter.grad / (total + 1e-6)
            self.optimizers().step()
            with torch.no_grad():
                for parameter in self.head.parameters():
                    parameter.mul_(0.99)

    train_both(Looking)


@pytest.mark.parametrize("how", ["in place", "data", "foreach"])
def test_a_moving_average_by_hand(how):
    class Averaging(Manual):
        def __init__(self):
            super().__init__()
            self.slow = copy.deepcopy(self.net).requires_grad_(False)

        def optimize(self, loss, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            slow, fast = list(self.slow.parameters()), list(self.net.parameters())
            if how == "foreach":
                with torch.no_grad():
                    torch._foreach_lerp_(slow, fast, 0.1)
            for one, other in zip(slow, fast, strict=True):
                if how == "data":
                    one.data = one.data * 0.9 + other.data * 0.1
                elif how == "in place":
                    with torch.no_grad():
                        one.mul_(0.9).add_(other, alpha=0.1)

        def configure_optimizers(self):
            return torch.optim.Adam([*self.net.parameters(), *self.head.parameters()], lr=1e-2)

    train_both(Averaging)


def test_weights_are_clamped_by_hand():
    class Clamping(Manual):
        def optimize(self, loss, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.losses.append(nn.utils.clip_grad_norm_(self.parameters(), 0.1).item())
            self.optimizers().step()
            for parameter in self.parameters():
                parameter.data.clamp_(-0.1, 0.1)

    train_both(Clamping)


def test_gradients_of_two_losses_are_combined_by_hand():
    class Combining(Manual):
        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            outputs = self.head(self.net(inputs)).squeeze(1)
            weights = list(self.parameters())
            one = torch.autograd.grad(outputs.pow(2).mean(), weights, retain_graph=True)
            other = torch.autograd.grad((outputs - targets).abs().mean(), weights)
            overlap = sum((a * b).sum() for a, b in zip(one, other, strict=True))
            length = sum((a * a).sum() for a in one)
            self.losses.append(overlap.item())
            for weight, a, b in zip(weights, one, other, strict=True):
                weight.grad = a + b - overlap / length * a
            self.optimizers().step()

    train_both(Combining)


def test_plain_backward_without_lightning():
    class Plain(Manual):
        def optimize(self, loss, batch, batch_idx):
            optimizer = self.optimizers()
            with optimizer.toggle_model(sync_grad=True):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train_both(Plain)


@pytest.mark.parametrize("how", ["closure", "line search", "methods"])
def test_optimizers_that_evaluate_several_times(how):
    class Closing(Manual):
        def optimize(self, loss, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                loss = self.step(batch)
                self.losses.append(loss.item())
                self.manual_backward(loss)
                return loss

            if how == "methods":
                closure()
                optimizer.optimizer.first_step(zero_grad=True)
                closure()
                optimizer.optimizer.second_step()
            else:
                optimizer.step(closure)

        def configure_optimizers(self):
            if how == "line search":
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")
            return Sam(self.parameters())

    train_both(Closing, num_batches=2)


class Adversaries(Manual):
    """Two networks that train against each other, each with its optimizer and scheduler."""

    toggles = "methods"

    def __init__(self):
        super().__init__(depth=6)
        self.critic = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6)))
        self.judge = nn.Linear(WIDTH, 1)

    def configure_optimizers(self):
        makers = torch.optim.Adam([*self.net.parameters(), *self.head.parameters()], lr=1e-2)
        critics = torch.optim.SGD([*self.critic.parameters(), *self.judge.parameters()], lr=1e-1)
        schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(makers, 0.05, total_steps=20),
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(critics, 0.5), "interval": "epoch", "frequency": 1},
        ]
        return [makers, critics], schedulers

    def score(self, x):
        return self.judge(self.critic(x)).mean()

    def training_step(self, batch, batch_idx):
        inputs, _ = batch
        maker, critic = self.optimizers()
        if self.toggles == "context":
            with self.toggled_optimizer(maker):
                self.make(maker, inputs)
        else:
            if self.toggles == "methods":
                self.toggle_optimizer(maker)
            self.make(maker, inputs)
            if self.toggles == "methods":
                self.untoggle_optimizer(maker)
        if self.toggles == "methods":
            self.toggle_optimizer(critic)
        with torch.no_grad():
            made = self.net(inputs + torch.randn(inputs.shape, device=inputs.device))
        loss = self.score(made.detach()) - self.score(inputs)
        self.losses.append(loss.item())
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        if self.toggles == "methods":
            self.untoggle_optimizer(critic)
        self.lr_schedulers()[0].step()
        if self.trainer.is_last_batch:
            self.lr_schedulers()[1].step()

    def make(self, maker, inputs):
        loss = -self.score(self.net(inputs))
        self.losses.append(loss.item())
        maker.zero_grad()
        self.manual_backward(loss)
        maker.step()


@pytest.mark.parametrize("toggles", ["methods", "context", None])
def test_networks_that_train_against_each_other(toggles):
    class Module(Adversaries):
        pass

    Module.toggles = toggles
    ours, *_ = train_both(Module, max_epochs=2)
    assert all(parameter.requires_grad for parameter in ours.parameters())
