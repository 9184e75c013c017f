"""The genetic searcher: what it breeds can be carried out, fits, and is about as good as the default's."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_profiles import (
    SCHEDULED,
    kind,
    machine,
    machines,
    profile,
    profiles,
    published,
    published_machine,
    published_profile,
)

from harmony_lightning import CapacityError
from harmony_lightning.plan import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.search.breeding import stages
from harmony_lightning.scheduler.search.genetic import breed
from harmony_lightning.scheduler.search.schedules import search
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds


def question(**changes):
    return {"minibatch": 4, "mode": "pp", "memory_bytes": 2000, "rules": Rules.HARMONY, **changes}


@given(
    profiles(max_layers=5),
    machines(),
    st.sampled_from(("pp", "dp", "auto")),
    st.sampled_from(SCHEDULED),
    st.integers(1, 5),
)
@settings(max_examples=8, deadline=None)
def test_what_is_bred_fits_and_takes_what_it_says(layers, server, mode, rules, minibatch):
    costs = Costs(layers, server)
    bred = breed(costs, **question(mode=mode, rules=rules, minibatch=minibatch, memory_bytes=20_000))
    for candidate in (bred.best, *bred.others):
        assert candidate.peak_bytes == peak_bytes(candidate.schedule, costs, rules) <= 20_000
        assert candidate.seconds == seconds(candidate.schedule, costs, rules) >= bred.best.seconds
    assert not bred.is_proved


def test_the_same_seed_breeds_the_same():
    costs = Costs(profile(*[kind()] * 6), machine())
    first, second, other = (replace(breed(costs, **question(), seed=seed), search_seconds=0.0) for seed in (3, 3, 4))
    assert first == second
    assert first.num_schedules != other.num_schedules


def test_it_comes_close_to_the_default_on_small_models():
    costs = Costs(profile(*[kind(weights=50 * i, seconds=0.5 * i) for i in range(1, 8)]), machine())
    for rules in SCHEDULED:
        bred, found = (one(costs, **question(rules=rules, minibatch=8)) for one in (breed, search))
        assert bred.best.seconds <= 1.02 * found.best.seconds


@pytest.mark.parametrize(("mode", "boundaries"), [("pp", {"device"}), ("dp", {"device", "host"})])
def test_where_little_fits_genes_of_memory_give_way(mode, boundaries):
    """From single layers and single samples up; under Harmony's rules there are no such genes."""
    costs = Costs(profile(*[kind(activation=40)] * 6), machine())
    packs = tuple((layer, layer) for layer in range(6))
    smallest = Schedule(
        mode=mode, num_devices=2, minibatch=8, microbatch_forward=1, packs_forward=packs[:-1], microbatch_backward=1,
        packs_backward=packs, boundary="host",
    )  # fmt: skip
    least = peak_bytes(smallest, costs, Rules.OWN)
    bred = [
        breed(costs, **question(mode=mode, minibatch=8, rules=Rules.OWN, memory_bytes=memory)).best.schedule
        for memory in (least, 1e6)
    ]
    assert [schedule.prefetch for schedule in bred] == [0, 1]
    assert {schedule.boundary for schedule in bred} == boundaries and bred[1].boundary == "device"
    plain = breed(costs, **question(mode=mode, minibatch=8, memory_bytes=1e6)).best.schedule
    assert (plain.prefetch, plain.boundary) == (0, "device")


def test_many_samples_are_preceded_by_few(monkeypatch):
    monkeypatch.setattr("harmony_lightning.scheduler.search.genetic.MAX_COMPUTATIONS", 60_000)
    assert (stages(15), stages(63), stages(64), stages(250)) == ([15], [63], [16, 64], [62, 250])
    costs = Costs(profile(*[kind(weights=50 * i, seconds=0.5 * i) for i in range(1, 8)]), machine())
    wanted = question(minibatch=64, memory_bytes=4000)
    bred = breed(costs, **wanted).best
    assert bred.schedule.minibatch == 64
    assert bred.seconds <= 1.05 * search(costs, **wanted).best.seconds


def test_nothing_bred_may_fit():
    with pytest.raises(CapacityError, match="bred schedules fits in 100 bytes per GPU; raise memory"):
        breed(Costs(profile(), machine()), **question(memory_bytes=100))


@published
def test_it_comes_close_to_the_default_on_a_published_profile():
    costs = Costs(published_profile("gpt2_xl"), published_machine())
    wanted = question(minibatch=16, memory_bytes=9e9)
    assert breed(costs, **wanted).best.seconds <= 1.05 * search(costs, **wanted).best.seconds
