"""Forward of several microbatches in one call of a layer, backward of each by itself."""

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, trainer
from torch import nn

from harmony_lightning import ConfigurationError, EmulatedCluster, HarmonyStrategy
from harmony_lightning.hardware.presets import GpuModel

STEPS = 5


def fit(strategy=None, make=Chain, num_microbatches=4, **options):
    torch.manual_seed(0)
    module = make()
    accumulate = {} if strategy else {"accumulate_grad_batches": num_microbatches}
    trainer(strategy or "auto", **accumulate, **options).fit(module, loader(8 if strategy else 8 // num_microbatches))
    return module


def joint(num_gpus=2, memory="160KiB", **options):
    return harmony(num_gpus, memory, **{"microbatches_per_forward": 2, **options})


def difference(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs)


def is_bitwise_equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"mode": "pp"}, {"mode": "dp"}, {"one_layer_per_pack": True}, {"stash": "device"}])
def test_training_is_the_same_but_for_rounding(options):
    strategy = joint(memory="250KiB", **options)
    ours = fit(strategy)
    assert difference(ours, fit()) < 1e-4
    counts = strategy.statistics()
    assert counts.joint_forwards > 0 and counts.num_microbatches == 4


def test_all_layers_but_those_of_the_last_pack_are_called_once_per_group():
    strategy = joint(one_layer_per_pack=True)
    fit(strategy)
    # Each layer is watched in its first calls and tried in the next group's.
    num_groups, num_layers = 2, 8
    assert strategy.statistics().joint_forwards == num_layers * num_groups * STEPS - num_layers * num_groups
    assert strategy.plan.microbatches_per_forward == 2


def test_a_group_may_be_of_any_size():
    for size in (3, 4, 7):
        assert difference(fit(joint(memory="250KiB", microbatches_per_forward=size)), fit()) < 1e-4


class Wordy(Chain):
    """Blocks of many small operations."""

    def __init__(self):
        super().__init__()
        for block in self.net:
            block.extend(nn.Tanh() for _ in range(20))


def test_forward_takes_less_time_where_launches_are_dear():
    gpu = GpuModel(
        name="slow to launch",
        memory_bytes=250 * 1024,
        flops_per_second={"float32": 1e12},
        memory_bytes_per_second=1e12,
        link_bytes_per_second=1e12,
        launch_seconds=1e-3,
    )

    def forward_seconds(size, num_steps):
        strategy = HarmonyStrategy(
            microbatch_size=2, microbatches_per_forward=size, cluster=EmulatedCluster(1, preset=gpu), stash="device"
        )
        fit(strategy, Wordy, limit_train_batches=num_steps)
        spans = strategy.timeline().lane(0, "compute")
        return sum(span.end - span.start for span in spans if span.name.startswith("forward of pack 0"))

    joint_step, single_step = (forward_seconds(size, 5) - forward_seconds(size, 4) for size in (4, 1))
    assert joint_step < 0.4 * single_step


class Swell(nn.Module):
    """Its forward needs much more for a moment than goes in and out."""

    def forward(self, x):
        return nn.functional.gelu(x.repeat(1, 64)).unflatten(1, (64, WIDTH)).mean(1)


class Swelling(Chain):
    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(Swell())


@pytest.mark.parametrize(("memory", "told_sizes"), [("140KiB", [4, 2]), ("206KiB", [4]), ("400KiB", [])])
def test_fewer_microbatches_go_together_where_memory_is_short(memory, told_sizes, caplog):
    """A call for one swells to 64 times its input, and one for several does for each. With 400 KiB weights
    stay, and these go first."""
    strategy = joint(memory=memory, microbatches_per_forward=4)
    ours = fit(strategy, Swelling)
    assert difference(ours, fit(make=Swelling)) < 1e-4
    assert (strategy.statistics().joint_forwards == 0) == (told_sizes == [4, 2])
    told = [record.args[1] for record in caplog.records if "go together" in record.msg]
    assert told == told_sizes


class Dropping(Chain):
    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(nn.Dropout(0.3))


class Normalising(Chain):
    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(nn.BatchNorm1d(WIDTH))


class Centring(nn.Module):
    """Couples samples without keeping anything."""

    def forward(self, x):
        return x - x.mean(0)


class Coupling(Chain):
    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(Centring())


class Router(nn.Module):
    """Lets half of the samples through: which ones depends on who else is there, though rarely for these inputs."""

    def forward(self, x):
        best = x.norm(dim=1).topk(x.shape[0]).indices
        return x.index_select(0, best).index_select(0, best.argsort())


class Routing(Chain):
    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(Router())


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x), len(x)


class Counting(Chain):
    """Its layers tell how many samples there are."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList(Counted() for _ in range(8))

    def step(self, batch):
        hidden, targets = batch
        for layer in self.net:
            (hidden, num), before = layer(hidden), len(hidden)
            assert num == before
        return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)


class Gate(nn.Module):
    """Goes another way where one sample is far out, as none of the first ones is."""

    def forward(self, x):
        return x if float(x.abs().max()) < 1e3 else x / 2


class Gating(Chain):
    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(Gate())


class Paired(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mixture):
        return self.linear(mixture @ x)


class Pairing(Chain):
    """What is given to its layers has as many rows as there are samples, and as many columns."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList(Paired() for _ in range(8))

    def step(self, batch):
        hidden, targets = batch
        for layer in self.net:
            hidden = layer(hidden, torch.eye(len(hidden), device=hidden.device))
        return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)


class Writing(nn.Module):
    def forward(self, x):
        return x.clamp_(min=0.1)


class InPlace(Chain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(Writing(), nn.Linear(WIDTH, WIDTH)) for _ in range(8)))


@pytest.mark.parametrize("make", [Dropping, Normalising, Coupling, Routing, Counting, Gating, Pairing, InPlace])
def test_layers_that_must_not_be_joined_are_not(make):
    strategy, alone = joint(1, "300KiB", one_layer_per_pack=True), harmony(1, "300KiB", one_layer_per_pack=True)
    assert is_bitwise_equal(fit(strategy, make), fit(alone, make))
    assert strategy.statistics().joint_forwards == 0


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x, inputs):
        self.mean.lerp_(inputs.mean(0), 0.5)
        return self.linear(x)


class Remembers(Chain):
    """A layer between others that are joined writes down what the step was given."""

    def __init__(self):
        super().__init__()
        self.memory = Remembering()

    def step(self, batch):
        inputs, targets = batch
        hidden = self.net[3:](self.memory(self.net[:3](inputs), inputs))
        return nn.functional.mse_loss(self.head(hidden).squeeze(1), targets)


def test_buffers_are_written_in_the_order_of_microbatches_on_several_gpus():
    strategy = joint(2, "300KiB", mode="dp")
    ours = fit(strategy, Remembers)
    assert strategy.statistics().joint_forwards > 0
    assert torch.equal(ours.memory.mean, fit(make=Remembers).memory.mean)


def test_evaluation_steps_that_share_a_pass_call_layers_alone():
    found = []
    for strategy in ("auto", joint(evaluation_batches=4)):
        torch.manual_seed(0)
        fitted = trainer(strategy)
        found.append(fitted.validate(Chain(), loader(8), verbose=False))
    assert found[0] == found[1]
    assert strategy.statistics().joint_forwards == 0


class Skipping(nn.Module):
    """Takes several tensors, a number and a shared one, and gives several."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, first, scale, *, shift):
        return self.linear(x) * scale + first + shift, x


class Skips(Chain):
    """With code between layers, and a tensor of the module's own that all microbatches share."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList(Skipping() for _ in range(8))
        self.net[3].linear.weight.requires_grad_(False)
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH))

    def step(self, batch):
        x, targets = batch
        first, total = x, 0
        for index, layer in enumerate(self.net):
            x, kept = layer(torch.relu(x), first, 0.5 if index % 2 else 0.25, shift=self.shift)
            x.mul_(0.9)
            total = total + kept.square().mean()
        return nn.functional.mse_loss(self.head(x).squeeze(1), targets) + 0.01 * total


def test_layers_with_many_arguments_and_results():
    strategy = joint(memory="300KiB", one_layer_per_pack=True)
    assert difference(fit(strategy, Skips), fit(make=Skips)) < 1e-4
    assert strategy.statistics().joint_forwards > 0


class Ragged(Chain):
    """Microbatches of different lengths."""

    def step(self, batch):
        x, targets = batch
        length = 2 + int(x[0, 0] > 0)
        repeated = x.unsqueeze(1).expand(-1, length, -1)
        return nn.functional.mse_loss(self.head(self.net(repeated)).mean(1).squeeze(1), targets)


def test_microbatches_of_another_kind_go_alone():
    strategy = joint(memory="250KiB", one_layer_per_pack=True)
    assert difference(fit(strategy, Ragged), fit(make=Ragged)) < 1e-4
    assert 0 < strategy.statistics().joint_forwards < 8 * 2 * (STEPS - 1)


class Turning(Chain):
    """Begins to draw random numbers when it has long been joined."""

    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(nn.Dropout(0.3).eval())

    def on_train_batch_start(self, batch, batch_idx):
        for block in self.net:
            block[-1].train(self.global_step >= 3)


def test_a_layer_that_begins_to_draw_random_numbers_goes_alone_from_then_on():
    strategy, alone = joint(1, "300KiB", one_layer_per_pack=True), harmony(1, "300KiB", one_layer_per_pack=True)
    assert difference(fit(strategy, Turning), fit(alone, Turning)) < 1e-4
    assert strategy.statistics().joint_forwards > 0


class Failing(Chain):
    """One of its blocks refuses so many samples, or more."""

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.net[2].register_forward_pre_hook(self.look)

    def look(self, module, args):
        if len(args[0]) >= self.least and self.global_step == 2:
            raise ValueError("too many")


def test_an_error_in_a_layer_that_was_joined_names_it():
    with pytest.raises(ValueError, match="too many") as caught:
        fit(joint(memory="250KiB"), lambda: Failing(2))
    assert any("net.2" in note for note in caught.value.__notes__)


def test_a_layer_that_refuses_a_joint_call_is_called_alone():
    assert difference(fit(joint(memory="250KiB"), lambda: Failing(3)), fit()) < 1e-4


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ConfigurationError, match="microbatches_per_forward"):
        HarmonyStrategy(microbatches_per_forward=size)


class Late(Swell):
    """It drops, and swells, from the third step on."""

    is_on = False

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.3)) if self.is_on else x


class SwellingLate(Chain):
    def __init__(self):
        super().__init__()
        for block in self.net:
            block.append(Late())

    def training_step(self, batch, batch_idx):
        for module in self.modules():
            if isinstance(module, Late):
                module.is_on = self.trainer.global_step >= 2
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("memory", "stash"), [("140KiB", "auto"), ("200KiB", "host")])
def test_layers_that_need_more_memory_later_than_the_plan_knows(memory, stash):
    """What they keep goes, if that is all that can; what they draw in a call that fails is drawn again."""
    options = {"memory": memory, "stash": stash, "one_layer_per_pack": True}
    joint_fit, alone = (fit(joint(microbatches_per_forward=size, **options), SwellingLate) for size in (4, 1))
    assert difference(joint_fit, alone) < 1e-4


def test_a_backward_that_needs_more_memory_than_the_forward_has_told():
    """The sums of gradients go, too, for as long as a layer is differentiated, and come back as they were."""
    short, roomy = (joint(memory=memory, microbatches_per_forward=1) for memory in ("170KiB", "1MiB"))
    assert is_bitwise_equal(fit(short, SwellingLate), fit(roomy, SwellingLate))
    assert short.statistics().short_of_memory == 1
