"""Plans that are bred for the runtime: they fit, take what they say, and every gene is of use."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_profiles import kind, machine, machines, profile, profiles

from harmony_lightning import CapacityError, ConfigurationError
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.steps import fair_seconds, runtime_seconds
from harmony_lightning.scheduler.search import genetic_runtime
from harmony_lightning.scheduler.search.genetic_runtime import breed_runtime
from harmony_lightning.scheduler.search.runtime import search_runtime

UNEVEN = profile(*[kind(weights=50 * i, seconds=0.5 * i) for i in range(1, 8)])


@pytest.fixture(autouse=True)
def _few_plans(monkeypatch):
    monkeypatch.setattr(genetic_runtime, "MAX_SIMULATED", 60)


def question(**changes):
    return {"minibatch": 4, "mode": "auto", "memory_bytes": 4000, **changes}


def least(costs, **changes):
    """The least memory that any plan needs: of single layers, one slot, stashes on the host, single samples."""
    found = search_runtime(costs, **question(microbatch_size=1, memory_bytes=1e12, **changes)).best.schedule
    packs = tuple((layer, layer) for layer in range(costs.num_layers))
    smallest = replace(found, packs_forward=packs[:-1], packs_backward=packs, prefetch=0, stash="host")
    return runtime_peak_bytes(smallest, costs)


@given(profiles(max_layers=5), machines(), st.sampled_from(("pp", "dp", "auto")), st.integers(1, 5))
@settings(max_examples=8, deadline=None)
def test_what_is_bred_fits_and_takes_what_it_says(layers, server, mode, minibatch):
    costs = Costs(layers, server)
    bred = breed_runtime(costs, **question(mode=mode, minibatch=minibatch, memory_bytes=20_000))
    assert not bred.is_proved
    for candidate in (bred.best, *bred.others):
        assert candidate.peak_bytes == runtime_peak_bytes(candidate.schedule, costs) <= 20_000
        assert candidate.seconds == fair_seconds(candidate.schedule, costs) >= bred.best.seconds
        assert mode in (candidate.schedule.mode, "auto")


def test_the_same_seed_breeds_the_same():
    costs = Costs(UNEVEN, machine())
    first, second, other = (
        replace(breed_runtime(costs, **question(), seed=seed), search_seconds=0.0) for seed in (3, 3, 4)
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("gpus", [1, 3])
def test_it_comes_close_to_the_default_on_a_small_model(gpus, monkeypatch):
    monkeypatch.setattr(genetic_runtime, "MAX_SIMULATED", 250)
    costs = Costs(UNEVEN, machine(gpus=gpus))
    bred, found = (one(costs, **question(minibatch=8)) for one in (breed_runtime, search_runtime))
    assert bred.best.seconds <= 1.05 * found.best.seconds


def test_where_little_fits_genes_of_memory_give_way():
    costs = Costs(UNEVEN, machine())
    ample = breed_runtime(costs, **question(mode="pp", memory_bytes=1e5)).best.schedule
    assert ample.prefetch == 1
    least_bytes = least(costs, mode="pp")
    scarce = breed_runtime(costs, **question(mode="pp", memory_bytes=least_bytes)).best.schedule
    assert (scarce.prefetch, scarce.stash, scarce.microbatch_backward) == (0, "host", 1)
    with pytest.raises(CapacityError, match=r"bred plans fits in .* raise memory, or use the default planner"):
        breed_runtime(costs, **question(mode="pp", memory_bytes=least_bytes - 1))


def test_who_updates_packs_is_bred():
    """The host takes longer than all devices together, and where there is room they have all updates."""
    layers = profile(*[kind(update=20.0) for _ in range(5)])
    costs = Costs(layers, machine())
    movable = {"movable": lambda schedule: list(range(len(schedule.packs_backward)))}
    on_host = breed_runtime(costs, **question(mode="pp", memory_bytes=1e5)).best
    ample = breed_runtime(costs, **question(mode="pp", memory_bytes=1e5), **movable).best
    assert not on_host.schedule.updated_there
    assert ample.schedule.updated_there == ample.schedule.updates_stay
    assert len(ample.schedule.updates_stay) == len(ample.schedule.packs_backward)
    assert ample.seconds < 0.5 * on_host.seconds


def test_what_was_settled_is_no_gene():
    costs = Costs(UNEVEN, machine())
    together = frozenset({2, 3, 4})
    bred = breed_runtime(costs, **question(stashes=("device",), microbatch_size=2, together=(together,)))
    for candidate in (bred.best, *bred.others):
        schedule = candidate.schedule
        assert (schedule.stash, schedule.microbatch_backward) == ("device", 2)
        assert all(first not in (3, 4) for first, _ in schedule.packs_backward)
    with pytest.raises(ConfigurationError, match="at least one sample, got 0"):
        breed_runtime(costs, **question(minibatch=0))


def test_devices_of_dealt_microbatches_are_bred():
    """The first device has more to do than the others, as it has most packs."""
    costs = Costs(profile(*[kind()] * 4), machine(gpus=3, host_link_bytes_per_second=1e6, peer_bytes_per_second=1e6))

    def deal(schedule):
        last = len(schedule.packs_backward) - 1
        return replace(schedule, dealt=(last,), dealt_order=(0,) * 6)  # the worst order that there is

    bred = breed_runtime(costs, **question(minibatch=6, mode="pp", microbatch_size=1, abilities=deal))
    order = bred.best.schedule.dealt_order
    assert len(order) == 6 and len(set(order)) > 1
    usual = replace(bred.best.schedule, dealt_order=(0,) * 6)
    assert bred.best.seconds < fair_seconds(usual, costs)
    few = breed_runtime(costs, **question(mode="pp", abilities=lambda one: replace(deal(one), dealt_order=())))
    assert few.best.schedule.dealt_order == ()  # each device has one: sums are those of one device


def test_what_would_stay_is_judged_and_not_bred():
    costs = Costs(UNEVEN, machine())
    stays = {"resident": (0,), "stash_stays": (0,)}
    bred = breed_runtime(costs, **question(mode="pp", stay=lambda schedule: replace(schedule, **stays)))
    schedule = bred.best.schedule
    assert (schedule.resident, schedule.stash_stays) == ((0,), (0,))
    assert bred.best.seconds == fair_seconds(schedule, costs)
    assert bred.best.peak_bytes == runtime_peak_bytes(replace(schedule, resident=(), stash_stays=()), costs)


def test_the_plan_in_use_stays_unless_another_is_clearly_faster():
    costs = Costs(UNEVEN, machine())
    best = search_runtime(costs, **question()).best.schedule
    again = breed_runtime(costs, **question(in_use=best))
    assert again.best.schedule == best and best not in [other.schedule for other in again.others]
    slow = replace(best, packs_forward=(), packs_backward=((0, costs.num_layers - 1),), dealt=())
    assert breed_runtime(costs, **question(in_use=slow)).best.schedule != slow


def test_the_plan_in_use_does_not_stay_where_it_does_not_fit():
    costs = Costs(UNEVEN, machine())
    fast = search_runtime(costs, **question(memory_bytes=1e12)).best
    memory_bytes = fast.peak_bytes - 1
    bred = breed_runtime(costs, **question(in_use=fast.schedule, memory_bytes=memory_bytes))
    assert all(candidate.peak_bytes <= memory_bytes for candidate in (bred.best, *bred.others))


def test_time_is_bounded_by_what_is_simulated(monkeypatch):
    costs = Costs(UNEVEN, machine())
    largest = 7 * 4 * 2
    monkeypatch.setattr(genetic_runtime, "MAX_COMPUTATIONS", 4 * largest)
    monkeypatch.setattr(genetic_runtime, "MAX_FAIR_COMPUTATIONS", 0)
    bred = breed_runtime(costs, **question(mode="pp", microbatch_size=1))
    assert 4 <= bred.num_simulated < 40
    assert bred.best.seconds == runtime_seconds(bred.best.schedule, costs, 2)
