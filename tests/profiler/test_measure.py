"""Profiles of modules: costs are the runtime's, distinct layers are run once, and no trace is left."""

import pytest
import torch
from chain import WIDTH, Chain, loader, trainer
from torch import nn
from torchmetrics import MeanMetric

from harmony_lightning import CapacityError, EmulatedCluster, HarmonyStrategy, UnsupportedError
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.profiler import Profile, measure, visits
from harmony_lightning.profiler.measure import fingerprint_of, measure_profile
from harmony_lightning.profiler.twin import make_twin


def cluster_of(memory="1GiB", fake=True):
    return EmulatedCluster(1, memory, preset="3090", fake=fake)


def step(module, batch):
    out = module.training_step(batch, 0)
    return out["loss"] if isinstance(out, dict) else out


def chain_batch(size):
    return torch.zeros(size, WIDTH), torch.zeros(size)


def profile_of(module, batch_of=chain_batch, *, cluster=None, unit=2**14 + 2**9, **options):
    arguments = {"largest": 4, "update_seconds": lambda count: count / 4e9, **options}
    return measure_profile(module, decompose(module, unit), batch_of, step, cluster or cluster_of(), **arguments)


@pytest.mark.parametrize("fake", [False, True])
def test_layers_cost_what_they_cost_the_runtime(fake):
    torch.manual_seed(0)
    module = Chain(depth=6)
    plan_cluster = EmulatedCluster(2, "200KiB", preset="3090")
    strategy = HarmonyStrategy(microbatch_size=2, one_layer_per_pack=True, cluster=plan_cluster)
    trainer(strategy, max_steps=1).fit(module, loader(8, 8))
    profile = profile_of(Chain(depth=6), cluster=cluster_of(fake=fake)).profile
    assert profile.names == tuple(layer for pack in strategy.plan.packs for layer in pack.layers)
    at = profile.microbatch_sizes.forward.index(2)

    def seconds(pack, way):
        name = f"{way} of pack {pack}, microbatch 2"  # the first ones copy gradients that later ones add
        return sum(span.end - span.start for span in strategy.timeline().spans if span.name == name)

    for index in range(1, profile.num_layers - 1):  # in front of the first, the input is brought in
        kind = profile.kind(index)
        assert seconds(index, "forward") == pytest.approx(kind.forward_seconds[at], rel=0.02)
        assert seconds(index, "backward") == pytest.approx(kind.backward_seconds[at], rel=0.02)


def test_equal_layers_are_costed_once(monkeypatch):
    runs = []
    original = visits.run_call
    monkeypatch.setattr(visits, "run_call", lambda *args: runs.append(args[2]) or original(*args))
    profile = profile_of(Chain(depth=20), largest=2).profile
    assert profile.num_layers == 21 and len(profile.layer_kinds) <= 3
    assert len(runs) == 2 * 3  # at two sizes: the first block, whose input needs no gradient, another one, and the head
    assert profile.layers[1:20] == (profile.layers[1],) * 19


def test_layers_run_again_on_the_thread_that_knows_autocast():
    """On GPUs autograd has threads of its own otherwise, in which autocast's type is another one."""
    seen = set()

    class Looks(torch.nn.Linear):
        def forward(self, inputs):
            seen.add((torch._C._current_graph_task_id() >= 0, torch._C._is_multithreading_enabled()))
            return super().forward(inputs)

    module = Chain(depth=2)
    module.net[1][0] = Looks(WIDTH, WIDTH)
    profile_of(module, largest=1)
    assert seen == {(False, False), (True, False)}


def test_nothing_happens_to_the_module():
    module = Chain(depth=3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    profile_of(module)
    assert module.losses == [] and all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert "forward" not in vars(module.head) and not any(p.is_meta for p in module.parameters())


def test_bytes_are_those_of_the_layer():
    profile = profile_of(Chain(depth=3)).profile
    kind = profile.kind(1)
    weights = 4 * (WIDTH * WIDTH + WIDTH)
    assert (kind.weight_bytes, kind.gradient_bytes, kind.optimizer_state_bytes) == (weights, weights, 2 * weights)
    assert kind.input_bytes == (4 * WIDTH, 8 * WIDTH) == kind.stash_bytes
    for size, forward, backward in zip(
        profile.microbatch_sizes.forward, kind.forward_peak_bytes, kind.backward_peak_bytes, strict=True
    ):
        row = size * WIDTH * 4
        assert forward == weights + 3 * row  # input, product, result
        assert backward >= 2 * weights + 3 * row
    assert Profile.from_json(profile.to_json()) == profile


def test_the_largest_size_that_fits_is_found():
    sizes = []
    limited = profile_of(Chain(depth=3), cluster=cluster_of("60KiB"), largest=1024, progress=sizes.append).profile
    most = limited.microbatch_sizes.forward[-1]
    assert (
        1 < most < 1024 and sizes[: len(sizes) - measure.NUM_BISECTIONS] == [1, 2, 4, 8, 16, 32, 64][: len(sizes) - 3]
    )
    assert all(peak <= 60 * 1024 for kind in limited.layer_kinds for peak in kind.backward_peak_bytes)
    with pytest.raises(CapacityError, match="a single layer does not fit with a microbatch of 1"):
        profile_of(Chain(depth=3), cluster=cluster_of("20KiB"))


class _Loops(Chain):
    def step(self, batch):
        inputs, targets = batch
        x = self.net[1](self.net[0](self.net[1](self.net[0](inputs))))
        return nn.functional.mse_loss(self.head(self.net[2](x)).squeeze(1), targets)


def test_layers_that_take_turns_are_told():
    measured = profile_of(_Loops(depth=3))
    assert measured.loops == (("net.0", "net.1"),)
    plain = profile_of(Chain(depth=3))
    assert plain.loops == ()
    kind, once = measured.profile.kind(1), plain.profile.kind(1)
    assert kind.forward_seconds[0] == pytest.approx(2 * once.forward_seconds[0])


def test_the_code_behind_a_layer_counts_with_it():
    profile = profile_of(Chain(depth=2)).profile
    head = profile.layer_kinds[profile.layers[-1]]
    assert head.stash_bytes[0] > head.input_bytes[0]  # the loss saves its operands
    assert head.recompute_seconds[0] < head.forward_seconds[0]


def test_a_step_that_fails_says_what_failed():
    class Broken(Chain):
        def step(self, batch):
            raise KeyError("labels")

    with pytest.raises(UnsupportedError, match="cannot be profiled: KeyError: 'labels'"):
        profile_of(Broken(depth=2))


def test_fingerprints_tell_structure_and_code_apart():
    class Other(Chain):
        def training_step(self, batch, batch_idx):
            return 2 * self.step(batch)

    def of(module, *more):
        return fingerprint_of(module, decompose(module, 2**15), *more)

    assert of(Chain(depth=3)) == of(Chain(depth=3))
    different = {
        of(Chain(depth=3)),
        of(Chain(depth=4)),
        of(Other(depth=3)),
        of(Chain(depth=3), "bf16"),
        of(Chain(3).half()),
    }
    assert len(different) == 5


def _activated(activation, **settings):
    class Activated(Chain):
        def step(self, batch):
            return super().step(batch) + settings.get("times", 1) * self.net[0](batch[0]).mean()

    module = Activated(depth=2)
    module.net[1].activation = activation
    vars(module.net[1]).update(settings)
    return module


def _doubled(depth):
    class Activated(Chain):
        def step(self, batch):
            return 2 * super().step(batch)

    return Activated(depth=depth)


def test_fingerprints_tell_settings_and_all_methods_apart():
    def of(module):
        return fingerprint_of(module, decompose(module, 2**15))

    modules = (
        lambda: _activated(torch.nn.functional.gelu),
        lambda: _activated(torch.nn.functional.silu),
        lambda: _activated(lambda x: x * x),
        lambda: _activated(torch.nn.functional.silu, heads=2),
        lambda: _activated(torch.nn.functional.silu, heads=4),
        lambda: _doubled(2),
    )
    found = [of(make()) for make in modules]
    assert [of(make()) for make in modules] == found  # and objects that are made anew do not
    assert len(set(found)) == len(found)


def test_metrics_and_generators_of_the_step_are_left_as_they_were():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()

    class Watched(Chain):
        def __init__(self):
            super().__init__(depth=3)
            self.mean = MeanMetric()
            self.register_buffer("seen", torch.zeros(()))

        def step(self, batch):
            noise = torch.rand(WIDTH, generator=generator, device="cpu").to(batch[0].device)
            loss = super().step((batch[0] + noise, batch[1]))
            self.mean(loss)
            self.seen += loss.detach()
            return loss

    module = Watched()
    profile_of(module, largest=1, cluster=cluster_of(fake=False))
    assert torch.equal(generator.get_state(), before)
    assert module.mean.update_count == 0 and module.seen == 0


def test_what_is_large_and_no_part_of_the_step_is_not_copied():
    module = Chain(depth=2)
    module.held = [module.configure_optimizers()]
    module.data = {"train": loader(4), "set": loader(4).dataset}
    twin = make_twin(module, has_numbers=False)
    assert twin.held == [None] and twin.data == module.data and twin.data is not module.data
