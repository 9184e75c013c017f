"""The search for the runtime's plans: more memory or a faster machine never give a slower one; bounds; what stays."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from small_profiles import kind, machine, profile

from harmony_lightning import CapacityError
from harmony_lightning.plan import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.runtime.levels import Levels
from harmony_lightning.scheduler.runtime.memory import runtime_peak_bytes
from harmony_lightning.scheduler.runtime.sized_plan import named_plan
from harmony_lightning.scheduler.runtime.staying import with_what_stays
from harmony_lightning.scheduler.runtime.steps import fair_seconds
from harmony_lightning.scheduler.search import runtime
from harmony_lightning.scheduler.search.runtime import QUIET_SHARE, search_runtime
from harmony_lightning.scheduler.search.runtime_bounds import runtime_bound
from harmony_lightning.scheduler.search.runtime_family import Placed, deal_last, placements, runtime_families
from harmony_lightning.scheduler.search.runtime_variants import RUNG, Variants

ANOMALY = 1.01
"""List scheduling has anomalies: with faster parts a step may be a little slower. By the rate of host memory it was 0.5 %
in 276 random questions, by that of updates 0.1 %; by links much more where no layer has weights (`search.runtime`)."""


@st.composite
def costs_of(draw, max_layers=5, max_gpus=8):
    """Any profile, some layers frozen, or in part, some whose activations can be kept, on any machine."""
    kinds = []
    for _ in range(draw(st.integers(1, max_layers))):
        activation = draw(st.integers(1, 60))
        weights = 8 * draw(st.integers(0, 50))
        one = kind(weights, draw(st.floats(0.05, 5.0)), activation, update=draw(st.floats(0.0, 3.0)))
        kept = draw(st.sampled_from(((), (3.0 * activation, 6.0 * activation, 12.0 * activation))))
        kinds.append(replace(one, kept_bytes=kept, gradient_bytes=draw(st.sampled_from((None, None, weights // 8, 0)))))
    gpus = draw(st.integers(1, max_gpus))
    rate = st.floats(30.0, 3000.0)
    server = machine(
        gpus=gpus,
        host_link_shared_by=draw(st.sampled_from((1, gpus))),
        host_link_bytes_per_second=draw(rate),
        peer_bytes_per_second=draw(rate),
        peers_by_host=draw(st.booleans()),
    )
    narrow = draw(st.booleans())
    return Costs(profile(*kinds), server, [one.weight_bytes // 2 for one in kinds] if narrow else None)


def any_schedule(draw, costs, minibatch):
    cuts = draw(st.sets(st.integers(1, costs.num_layers - 1))) if costs.num_layers > 1 else set()
    edges = [0, *sorted(cuts), costs.num_layers]
    packs = tuple((first, after - 1) for first, after in pairwise(edges))
    size = draw(st.sampled_from((1, 2)))
    placed = draw(st.sampled_from([*placements("mixed", costs.machine.gpus, deals=False), Placed("dp")]))
    return Schedule(
        mode=placed.mode,
        num_devices=costs.machine.gpus,
        pipelines=placed.pipelines,
        minibatch=minibatch,
        microbatch_forward=size,
        packs_forward=packs[:-1],
        microbatch_backward=size,
        packs_backward=packs,
        prefetch=draw(st.integers(0, 1)),
        stash=draw(st.sampled_from(("host", "device"))),
    )


def with_abilities(draw, schedule):
    """Those that a schedule can have."""
    packs = range(len(schedule.packs_backward))
    there = tuple(sorted(draw(st.sets(st.sampled_from(packs)))))
    is_dealt = schedule.num_copies == 1 and schedule.num_devices > 1 and draw(st.booleans())
    orders = st.lists(st.integers(0, schedule.num_devices - 1), max_size=5)
    joint = draw(st.integers(1, 2))
    return replace(
        schedule,
        updated_there=there,
        updates_stay=tuple(p for p in there if draw(st.booleans())),
        dealt=(len(packs) - 1,) if is_dealt else (),
        dealt_order=tuple(draw(orders)) if is_dealt else (),
        microbatches_per_forward=joint,
    )


def movable_packs(costs):
    """Of a schedule, those that train and are not dealt."""
    return lambda schedule: [
        p for p, span in enumerate(schedule.packs_backward) if costs.gradient_bytes(span) and p not in schedule.dealt
    ]


@given(costs_of(), st.integers(1, 9), st.floats(300.0, 2e4), st.booleans(), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_stays_at_any_memory_is_what_the_runtime_would_let_stay(costs, minibatch, memory_bytes, moves, data):
    schedule = with_abilities(data.draw, any_schedule(data.draw, costs, minibatch))
    expected = with_what_stays(schedule, named_plan(schedule, costs, int(memory_bytes)), costs, moves_stash=moves)
    assert Levels(schedule, costs, moves_stash=moves).at(int(memory_bytes)) == expected


@given(costs_of(), st.integers(1, 9), st.floats(300.0, 2e4), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_step_is_faster_than_its_bound(costs, minibatch, memory_bytes, data):
    schedule = with_abilities(data.draw, any_schedule(data.draw, costs, minibatch))
    settled = Levels(schedule, costs).at(memory_bytes)
    assert runtime_bound(schedule, costs) <= fair_seconds(schedule, costs)
    assert runtime_bound(settled, costs) <= fair_seconds(settled, costs)


def test_a_bound_knows_who_has_which_microbatches_of_a_dealt_pack():
    """They come from the pack before, and go back: two microbatches are on two GPUs, and others wait."""
    costs = Costs(profile(*[kind(8, 1.0)] * 3, kind(8, 9.0)), machine(gpus=4, peer_bytes_per_second=1e6))
    packs = tuple((layer, layer) for layer in range(4))
    for minibatch in (2, 4, 6):
        schedule = Schedule(
            mode="pp",
            num_devices=4,
            minibatch=minibatch,
            microbatch_forward=1,
            packs_forward=packs[:-1],
            microbatch_backward=1,
            packs_backward=packs,
            prefetch=1,
            dealt=(3,),
        )
        assert 0.9 * fair_seconds(schedule, costs) <= runtime_bound(schedule, costs)


@given(costs_of(), st.integers(1, 9), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_is_left_out_for_its_slots_does_not_fit(costs, minibatch, data):
    schedule = with_abilities(data.draw, any_schedule(data.draw, costs, minibatch))
    least_bytes = Variants(costs, ("device", "host")).least_bytes(schedule)
    assert least_bytes <= runtime_peak_bytes(schedule, costs) + 2 * costs.num_layers


@given(costs_of(), st.integers(1, 9), st.booleans(), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_nothing_that_a_schedule_may_look_like_is_below_its_floor_nor_at_lower_rungs(costs, minibatch, stays, data):
    schedule = replace(any_schedule(data.draw, costs, minibatch), prefetch=1, stash="host")
    if schedule.num_copies == 1 < schedule.num_devices and data.draw(st.booleans()):
        schedule = deal_last(schedule, costs)
    # Several devices may take longer to add up what they have of more packs, which floors do not know.
    movable = movable_packs(costs) if schedule.num_copies == 1 else lambda schedule: ()
    variants = Variants(costs, ("device", "host"), 1 / 0.92 if stays else None, False, movable)
    highest = data.draw(st.integers(30, 60)) * variants.step
    floor = variants.floor(schedule)
    for rung in range(highest, 40, -variants.step):
        found, next_floor = variants.on_host(schedule, rung)
        assert next_floor >= floor
        floor = next_floor
        for variant in (*found, *variants.on_devices(schedule, rung)):
            assert variant.bound >= floor
            assert variant.peak_bytes <= RUNG ** (rung + variants.step)


@given(costs_of(max_layers=4), st.integers(1, 6), st.booleans(), st.booleans(), st.booleans(), st.data())
@settings(max_examples=16, deadline=None, derandomize=True)
def test_more_memory_is_never_slower(costs, minibatch, stays, deals, moves, data):
    def deal(schedule):
        is_dealt = deals and schedule.num_copies == 1 and schedule.num_devices > 1
        return replace(schedule, dealt=(len(schedule.packs_backward) - 1,)) if is_dealt else schedule

    in_use = data.draw(st.sampled_from((None, any_schedule(data.draw, costs, minibatch))))
    start = data.draw(st.floats(300.0, 1200.0))
    steps = data.draw(st.lists(st.floats(1.0, 4.0), min_size=4, max_size=4))
    best, memory_bytes = float("inf"), start
    for step in steps:
        try:
            found = search_runtime(
                costs,
                minibatch=minibatch,
                mode="auto",
                memory_bytes=memory_bytes,
                stay_bytes=memory_bytes / 0.92 if stays else None,
                abilities=deal,
                movable=movable_packs(costs) if moves else lambda schedule: (),
                in_use=in_use,
            )
        except CapacityError:
            assert best == float("inf")
        else:
            fastest = min(one.seconds for one in (found.best, *found.others))
            assert fastest <= best and found.best.seconds <= (1 + moves * QUIET_SHARE) * fastest
            best = fastest
        memory_bytes *= step


def test_a_last_pack_that_takes_long_is_dealt():
    """Where the mode leaves that open, and the question does."""
    costs = Costs(profile(*[kind(100, 1.0)] * 6, kind(100, 8.0)), machine(gpus=4))

    def best(mode, **question):
        return search_runtime(costs, minibatch=16, mode=mode, memory_bytes=1e6, **question).best

    dealt = best("auto", pipelines=1)
    assert dealt.schedule.dealt == (len(dealt.schedule.packs_backward) - 1,)
    assert dealt.seconds < 0.6 * best("pp").seconds
    assert best("pp", deals=True) == best("mixed", pipelines=1) == dealt
    assert not any(best(mode, deals=False).schedule.dealt for mode in ("auto", "mixed"))
    assert not best("pp").schedule.dealt


def test_microbatches_and_layers_that_are_one_are_not_dealt():
    few = Costs(profile(kind(100, 1.0)), machine(gpus=2))
    for family in runtime_families(few, 4, "auto", None, None, None, ()):
        assert not any(schedule.dealt for schedule in family)
    many = Costs(profile(kind(100, 1.0), kind(100, 1.0)), machine(gpus=2))
    families = list(runtime_families(many, 4, "auto", None, None, None, ()))
    dealt = [schedule for family in families for schedule in family if schedule.dealt]
    assert {schedule.microbatch_backward for schedule in dealt} == {1, 2}


def test_a_search_that_ends_early_proves_nothing(monkeypatch):
    """Of lower rungs, that is, of which it has seen nothing."""
    costs = Costs(profile(kind(100, 1.0)), machine(gpus=1, host_link_shared_by=1))
    question = {"minibatch": 1, "mode": "pp", "memory_bytes": 4000}
    assert search_runtime(costs, **question).is_proved
    monkeypatch.setattr(runtime, "MAX_TOTAL", -1)
    assert not search_runtime(costs, **question).is_proved


FASTER = {
    "links": lambda server, by: replace(server, host_link_bytes_per_second=by * server.host_link_bytes_per_second),
    "peers": lambda server, by: replace(server, peer_bytes_per_second=by * server.peer_bytes_per_second),
    "memory": lambda server, by: replace(
        server, host_message_bytes_per_second=by * server.host_message_bytes_per_second
    ),
}


@given(
    costs_of(max_layers=4),
    st.integers(1, 6),
    st.sampled_from([*FASTER, "updates", "all"]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
@settings(max_examples=16, deadline=None, derandomize=True)
def test_a_faster_machine_is_hardly_ever_slower(costs, minibatch, what, stays, moves, data):
    by, memory_bytes = data.draw(st.floats(1.0, 4.0)), data.draw(st.floats(800.0, 8e3))
    server, layers = costs.machine, costs.profile
    for name in FASTER if what == "all" else [what]:
        server = FASTER[name](server, by) if name in FASTER else server
    if what in ("updates", "all"):
        kinds = (replace(one, update_cpu_seconds=one.update_cpu_seconds / by) for one in layers.layer_kinds)
        layers = replace(layers, layer_kinds=tuple(kinds))
    question = {"minibatch": minibatch, "mode": "auto", "memory_bytes": memory_bytes}
    question["stay_bytes"] = memory_bytes if stays else None
    question["movable"] = movable_packs(costs) if moves else lambda schedule: ()
    try:
        found = search_runtime(costs, **question).best.seconds
    except CapacityError:
        return
    travelling = [round(costs.weight_bytes((layer, layer))) for layer in range(costs.num_layers)]
    assert search_runtime(Costs(layers, server, travelling), **question).best.seconds <= ANOMALY * found
