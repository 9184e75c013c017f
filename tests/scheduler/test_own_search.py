"""The search with all that the runtime can do: never slower than under our own rules alone, and within memory."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_profiles import (
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
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.residency import HEADROOM
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.unmeasured import completed
from harmony_lightning.scheduler.search.own import costs_under, search_own
from harmony_lightning.scheduler.search.schedules import search
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds

SLOW = Costs(profile(*[kind()] * 6), machine(host_link_bytes_per_second=20.0))
"""Six layers on two GPUs: weights of one take as long to come as it computes on ten samples."""


def test_a_completed_profile_keeps_no_less_than_is_there_at_the_peak():
    layer = kind(weights=100, activation=10, sizes=(1, 2))
    given = profile(replace(layer, buffer_bytes=7), sizes=(1, 2))
    (found,) = completed(given).layer_kinds
    assert found.kept_bytes == (2 * 100 + 40 - 107 - 10, 2 * 100 + 80 - 107 - 20)
    assert (found.weight_bytes, found.buffer_bytes, found.gradient_bytes) == (107, 0, 100)
    assert completed(completed(given)) == completed(given)
    measured = profile(replace(layer, kept_bytes=(3.0, 6.0)), sizes=(1, 2))
    assert completed(measured).layer_kinds[0].kept_bytes == (3.0, 6.0)


@pytest.mark.parametrize("minibatch", [4, 8])
@pytest.mark.parametrize("link", [20.0, 200.0])
def test_more_memory_lets_more_stay_and_is_never_slower(link, minibatch):
    costs = Costs(SLOW.profile, machine(host_link_bytes_per_second=link))
    former = float("inf")
    for memory in (600, 1000, 4000):
        question = {"minibatch": minibatch, "mode": "pp", "memory_bytes": memory}
        found, own = search_own(costs, **question), search(costs, rules=Rules.OWN, **question)
        assert found.best.seconds <= own.best.seconds
        assert found.best.seconds <= former
        assert found.best.peak_bytes <= memory
        former = found.best.seconds
        rules, schedule = Rules(found.rules), found.best.schedule
        known = costs_under(rules, costs, memory)
        assert found.best.seconds == seconds(schedule, known, rules)
        if rules is Rules.OWN:
            assert found.best == own.best
            assert found.best.peak_bytes == peak_bytes(schedule, known, rules)
        else:
            assert runtime_peak_bytes(schedule, known) <= found.best.peak_bytes
            assert not found.is_proved
    assert found.rules == Rules.RUNTIME


def test_weights_and_activations_stay_where_links_are_slow():
    tight, wide = (search_own(SLOW, minibatch=4, mode="pp", memory_bytes=memory) for memory in (1000, 4000))
    assert wide.best.schedule.resident == tuple(range(6))
    assert wide.best.schedule.keep == tuple(range(6))
    assert wide.best.seconds < tight.best.seconds < search(
        SLOW, minibatch=4, mode="pp", memory_bytes=4000, rules=Rules.OWN
    ).best.seconds  # fmt: skip


def test_what_stays_counts():
    """All of a step's activations, and slots of their own, beside what the step needs in any case."""
    found = search_own(SLOW, minibatch=4, mode="pp", memory_bytes=4000)
    schedule, costs = found.best.schedule, costs_under(found.rules, SLOW, 4000)
    last = schedule.packs_backward[-1][0]
    by_device = [0.0, 0.0]
    for pack, (layer, _) in enumerate(schedule.packs_backward):
        if layer < last and layer in schedule.keep:
            kept = costs.kept_bytes(schedule.microbatch_backward, layer)
            by_device[pack % 2] += kept * len(schedule.sizes_backward)
    assert min(by_device) > 0
    assert max(by_device) + 3 * 100 < found.best.peak_bytes <= (1 - HEADROOM) * 4000


def test_microbatches_of_the_last_pack_are_dealt_where_that_is_faster():
    costs = Costs(profile(*[kind()] * 6), machine())
    found = search_own(costs, minibatch=4, mode="pp", memory_bytes=2000)
    schedule = found.best.schedule
    assert schedule.dealt == (len(schedule.packs_backward) - 1,)
    assert set(range(*schedule.packs_backward[-1])) <= set(schedule.keep)


def test_dp_is_as_under_our_own_rules():
    question = {"minibatch": 4, "mode": "dp", "memory_bytes": 4000}
    found, own = search_own(SLOW, **question), search(SLOW, rules=Rules.OWN, **question)
    assert (found.rules, found.best, found.is_proved) == (own.rules, own.best, own.is_proved)


def seconds_or_inf(costs, memory_bytes, **options):
    try:
        return search_own(costs, memory_bytes=memory_bytes, **options).best.seconds
    except CapacityError:
        return float("inf")


@given(profiles(), machines(), st.integers(1, 8), st.integers(100, 2000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_more_memory_is_never_slower_nor_is_auto(layers, server, minibatch, little):
    costs, options = Costs(layers, server), {"minibatch": minibatch}
    ladder = [little * factor for factor in (1, 1.03, 1.2, 1.7, 3, 10)]
    taken = {
        mode: [seconds_or_inf(costs, memory_bytes, mode=mode, **options) for memory_bytes in ladder]
        for mode in ("auto", "pp", "dp")
    }
    assert all(found == sorted(found, reverse=True) for found in taken.values())
    assert taken["auto"] == list(map(min, taken["pp"], taken["dp"]))


@given(profiles(), machines(), st.integers(1, 8), st.integers(300, 4000), st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_faster_links_are_hardly_ever_slower(layers, server, minibatch, memory_bytes, data):
    """Under the runtime's rules a step of one plan may take a little longer when something is faster."""
    options, taken = {"minibatch": minibatch, "mode": "auto", "memory_bytes": memory_bytes}, float("inf")
    for factor in (1.0, *sorted(data.draw(st.lists(st.floats(1.0, 10.0), min_size=3, max_size=3)))):
        rates = {
            link: factor * getattr(server, link) for link in ("host_link_bytes_per_second", "peer_bytes_per_second")
        }
        found = seconds_or_inf(Costs(layers, replace(server, **rates)), **options)
        assert found <= 1.01 * taken
        taken = min(taken, found)


@published
def test_memory_that_misled_a_search_that_kept_to_it():
    costs = Costs(published_profile("gpt2_xl"), published_machine())
    little, more = (search_own(costs, minibatch=32, mode="pp", memory_bytes=memory) for memory in (6e9, 7e9))
    assert more.best.seconds <= little.best.seconds


@published
def test_what_stays_makes_a_published_profile_faster():
    costs = Costs(published_profile("gpt2_xl"), published_machine())
    found = search_own(costs, minibatch=16, mode="pp", memory_bytes=9e9)
    assert found.rules == Rules.RUNTIME
    assert found.best.seconds < 10.6  # 10.778 under our own rules, 12.327 as published
    assert found.best.peak_bytes <= 9e9
    assert found.best.schedule.dealt and len(found.best.schedule.keep) > 1
