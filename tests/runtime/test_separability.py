"""The probe: which optimizers may update pack by pack."""

import functools
import inspect
import pickle
import random
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from harmony_lightning.runtime.updates.separability import Separability, probe
from harmony_lightning.runtime.updates.update import JustInTimeUpdate


def make_net():
    return nn.Sequential(nn.Linear(8, 6), nn.Conv1d(3, 4, 2), nn.Linear(6, 6), nn.LayerNorm(6))


ALL = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
NOT_SEPARABLE = {"LBFGS", "SparseAdam"}
"""One needs a closure; the other refuses the dense gradients that the probe has."""
SWITCHES = ("foreach", "fused", "capturable", "maximize", "amsgrad", "nesterov", "centered", "decoupled_weight_decay")
CASES = [
    (name, switch)
    for name in ALL
    for switch in (None, *SWITCHES)
    if switch is None or switch in inspect.signature(getattr(torch.optim, name).__init__).parameters
]


@pytest.mark.parametrize(("name", "switch"), CASES)
def test_all_of_torch(name, switch):
    parameters = [p for p in make_net().parameters() if name != "Muon" or p.dim() == 2]
    options = {} if switch is None else {switch: True}
    if switch == "nesterov" and name == "SGD":
        options["momentum"] = 0.9
    reason = probe(getattr(torch.optim, name)(parameters, lr=1e-2, **options))
    assert (reason is None) == (name not in NOT_SEPARABLE), reason


class Scaled(torch.optim.SGD):
    """Base of small optimizers: changes gradients, then does what SGD does."""

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        self.change([p for group in self.param_groups for p in group["params"] if p.grad is not None])
        super().step()
        return loss


class GlobalClip(Scaled):
    def change(self, parameters):
        if parameters:
            nn.utils.clip_grad_norm_(parameters, 10.0)


class Counting(Scaled):
    """Counts its steps in an attribute; that of a pack is none."""

    calls = 0

    def change(self, parameters):
        self.calls += 1


class CountingInState(Scaled):
    """Counts its calls where packs are seen: there are more of them."""

    def change(self, parameters):
        self.state["common"]["calls"] = self.state["common"].get("calls", 0) + 1


class GroupStep(Scaled):
    """Counts steps in its groups, and uses the count: the same for every pack of one step."""

    def change(self, parameters):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / group["step"])


class AveragedRate(Scaled):
    """What group-level adaptive rates do: a sum over all gradients of the group decides."""

    def change(self, parameters):
        for group in self.param_groups:
            group["sum"] = group.get("sum", 0.0) + sum(
                p.grad.norm().item() for p in group["params"] if p.grad is not None
            )
            for parameter in parameters:
                parameter.grad.mul_(1 / (1 + group["sum"]))


class Noisy(Scaled):
    def change(self, parameters):
        for parameter in parameters:
            parameter.grad.add_(torch.randn_like(parameter.grad))


class NoisyByPython(Scaled):
    def change(self, parameters):
        for parameter in parameters:
            parameter.grad.mul_(random.random())


class First(Scaled):
    """The first parameter is a special one."""

    def change(self, parameters):
        if parameters:
            parameters[0].grad.mul_(2)


class NeedsAll(Scaled):
    def change(self, parameters):
        if len(parameters) == 1:
            raise ValueError("I need them all")


class Around(torch.optim.Optimizer):
    """A wrapper with an optimizer inside, as look-ahead and the like are built."""

    def __init__(self, parameters, **options):
        self.inner = torch.optim.Adam(parameters, **options)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


class Slow(torch.optim.Adam):
    """Every second step goes half-way back: counted for each parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        super().step()
        for parameter in stepped:
            state = self.state[parameter]
            if "slow" not in state:
                state["slow"] = parameter.detach().clone()
            if state["step"] % 2 == 0:
                parameter.lerp_(state["slow"], 0.5)
                state["slow"].copy_(parameter)
        return loss


@pytest.mark.parametrize("kind", [GlobalClip, CountingInState, AveragedRate, Noisy, NoisyByPython, First])
def test_what_depends_on_all_parameters_is_found(kind):
    assert probe(kind(make_net().parameters(), lr=0.1)) in (
        "its update of one parameter depends on the others",
        "it remembers something of all parameters together",
    )


@pytest.mark.parametrize("kind", [GroupStep, Slow, Counting])
def test_what_depends_on_one_parameter_is_separable(kind):
    assert probe(kind(make_net().parameters(), lr=0.1)) is None


@pytest.mark.parametrize("how", ["twice", "moved"])
def test_an_optimizer_that_does_more_with_its_closure_is_not_separable(how):
    class Eager(torch.optim.SGD):
        def step(self, closure=None):
            if closure is not None and how == "twice":
                closure()
            if closure is not None and how == "moved":
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1)
            return super().step(closure)

    assert "closure" in probe(Eager(make_net().parameters(), lr=0.1))


def test_a_failing_trial_means_no_and_says_why():
    assert "ValueError: I need them all" in probe(NeedsAll(make_net().parameters(), lr=0.1))


def test_a_wrapper_that_steps_another_optimizer_is_not_trusted():
    """The inner one steps everything that has a gradient, not only the pack."""
    assert probe(Around(make_net().parameters(), lr=0.1)) is not None


def test_what_is_real_is_not_touched():
    net = make_net()
    optimizer = torch.optim.Adagrad(net.parameters(), lr=0.1)  # makes its state at once
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = {key: {k: v.clone() for k, v in value.items()} for key, value in optimizer.state.items()}
    streams = torch.get_rng_state(), random.getstate()
    assert probe(optimizer) is None
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(value[k], state[key][k]) for key, value in optimizer.state.items() for k in value)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert all(parameter.grad is None for parameter in net.parameters())


def test_large_tensors_are_never_copied():
    """The optimizer may hold references to the whole model in any attribute."""
    net = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.model = list(net.parameters())

    class Untouchable(nn.Parameter):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    net.weight.__class__ = Untouchable
    assert probe(optimizer) is None


def test_a_warm_up_that_begins_with_nothing_hides_nothing():
    assert probe(GlobalClip(make_net().parameters(), lr=0.0)) is not None


def test_one_group_of_many_that_is_not_separable_is_found():
    net = make_net()

    class ClipsSome(GlobalClip):
        def change(self, parameters):
            chosen = [p for g in self.param_groups if g.get("clips") for p in g["params"] if p.grad is not None]
            super().change(chosen)

    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "clips": True}]
    assert probe(ClipsSome(groups, lr=0.1)) is not None
    groups[1]["clips"] = False
    assert probe(ClipsSome(groups, lr=0.1)) is None


def test_options_that_change_are_probed_again():
    class Optional(torch.optim.Optimizer):
        def step(self, closure=None):
            loss = closure() if closure is not None else None
            for group in self.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None]
                if parameters and group["clips"]:
                    nn.utils.clip_grad_norm_(parameters, 10.0)
                for parameter in parameters:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])
            return loss

    optimizer = Optional(make_net().parameters(), {"lr": 0.1, "clips": False})
    known = Separability()
    assert known.reason_against(optimizer) is None
    optimizer.param_groups[0]["clips"] = True
    assert known.reason_against(optimizer) is not None
    optimizer.param_groups[0].update(clips=False, lr=0.01)
    assert known.reason_against(optimizer) is None


def test_a_step_around_that_of_an_optimizer_of_torch_is_not_tried():
    calls = []

    class Recording(torch.optim.AdamW):
        def step(self, closure=None):
            calls.append(closure)
            return super().step(closure)

    assert "goes around" in Separability().reason_against(Recording(make_net().parameters()))
    optimizer = torch.optim.SGD(make_net().parameters(), lr=0.1)
    for options in ({}, {"autospec": True}):
        with mock.patch.object(torch.optim.SGD, "step", **options) as step:
            assert "goes around" in Separability().reason_against(optimizer)
        step.assert_not_called()
    assert not calls
    assert Separability().reason_against(torch.optim.AdamW(make_net().parameters())) is None


def test_what_is_known_is_not_pickled():
    known = Separability()
    assert known.reason_against(torch.optim.SGD(make_net().parameters(), lr=0.1)) is None
    assert pickle.loads(pickle.dumps(known)).reason_against(torch.optim.LBFGS(make_net().parameters())) is not None


def test_hooks_on_the_step_speak_against_and_may_go_again():
    optimizer = torch.optim.SGD(make_net().parameters(), lr=0.1)
    known = Separability()
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        torch_optimizer.register_optimizer_step_pre_hook,
        torch_optimizer.register_optimizer_step_post_hook,
    ):
        handle = register(lambda *_: None)
        assert "hooks" in known.reason_against(optimizer)
        handle.remove()
        assert known.reason_against(optimizer) is None


def test_a_replaced_step_speaks_against_unless_a_scheduler_did_it():
    optimizer = torch.optim.SGD(make_net().parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert Separability().reason_against(optimizer) is None
    optimizer.step = lambda closure=None: None
    assert "replaced" in Separability().reason_against(optimizer)


def test_lists_with_one_entry_per_parameter_speak_against():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": list(net.parameters()), "scales": [2.0, 3.0]}], lr=0.1)
    assert "'scales'" in Separability().reason_against(optimizer)
    named = torch.optim.SGD(net.named_parameters(), lr=0.1)
    assert Separability().reason_against(named) is None


def test_only_weights_at_hand_are_stepped_and_freed():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(list(net[0].parameters()), lr=1.0)
    for parameter in net.parameters():
        parameter.data.zero_()
        parameter.grad = torch.ones_like(parameter)
    JustInTimeUpdate(optimizer, dict(net.named_parameters()))(["0.bias", "1.bias"])
    assert torch.equal(net[0].bias, -torch.ones(2))
    assert net[0].bias.grad is None
    assert torch.equal(net[0].weight, torch.zeros(2, 2))
    assert net[0].weight.grad is not None
    assert torch.equal(net[1].bias, torch.zeros(2))
    assert net[1].bias.grad is not None


def test_hyper_parameters_are_those_of_the_moment_when_the_update_was_made():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    update = JustInTimeUpdate(optimizer, dict(net.named_parameters()))
    optimizer.param_groups[0]["lr"] = 100.0
    net.bias.data.zero_()
    net.bias.grad = torch.ones(2)
    update(["bias"])
    assert torch.equal(net.bias, -torch.ones(2))


def test_weights_are_prepared_before_their_step_and_get_their_gradients_back():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    update = JustInTimeUpdate(
        optimizer,
        dict(net.named_parameters()),
        prepare=lambda weights: torch.nn.utils.clip_grad_value_(weights, 0.5),
        keeps_gradients=True,
    )
    net.bias.data.zero_()
    net.bias.grad = torch.tensor([3.0, -3.0])
    update(["bias"])
    assert net.bias.grad is None
    assert torch.equal(net.bias, torch.tensor([-0.5, 0.5]))
    update.finish()
    assert torch.equal(net.bias.grad, torch.tensor([0.5, -0.5]))


EXTRAS = {
    "schedulefree": {"AdamWScheduleFree": True, "SGDScheduleFree": True, "RAdamScheduleFree": True},
    "prodigyopt": {"Prodigy": False},
    "lion_pytorch": {"Lion": True},
    "pytorch_optimizer": {"Lamb": True, "CAME": True, "DAdaptAdam": False, "AdaGC": False, "SOAP": True},
}


@pytest.mark.parametrize("package", EXTRAS)
def test_optimizers_from_elsewhere(package):
    module = pytest.importorskip(package)
    for name, is_separable in EXTRAS[package].items():
        optimizer = getattr(module, name)(make_net().parameters(), lr=1e-2)
        if package == "schedulefree":
            optimizer.train()
        reason = probe(optimizer)
        assert (reason is None) == is_separable, (name, reason)


def test_clipping_by_value_of_a_pack_without_gradients():
    """torch's own function wants one at least."""
    net = nn.Linear(2, 2)
    clip = functools.partial(nn.utils.clip_grad_value_, clip_value=1e-3)
    JustInTimeUpdate(torch.optim.SGD(net.parameters()), dict(net.named_parameters()), prepare=clip)(["weight", "bias"])
    assert net.weight.grad is None
