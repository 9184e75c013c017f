"""Seconds and bytes of schedules: by hand, by the published scores, and as invariants."""

from dataclasses import replace
from itertools import pairwise

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
    published_schedules,
)

from harmony_lightning import ConfigurationError
from harmony_lightning.plan import Kind, Lane, Schedule
from harmony_lightning.plan.graph import NUM_LANES
from harmony_lightning.scheduler.clock import Clock
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.rules.own import OwnSteps
from harmony_lightning.scheduler.search.packings import Packings
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, score, seconds, simulate, task_graph

ROWS = published_schedules()


def schedule(forward=((0, 1),), backward=((0, 1), (2, 3)), **options):
    knobs = {"mode": "pp", "num_devices": 1, "minibatch": 2, "microbatch_forward": 1, "microbatch_backward": 1}
    return Schedule(packs_forward=forward, packs_backward=backward, **{**knobs, **options})


# By hand ----------------------------------------------------------------------------------------------------------------


def test_one_device_without_overlap_is_the_sum_of_its_parts():
    costs = Costs(profile(*[kind(seconds=1.0, weights=100, activation=10)] * 4), machine(gpus=1, host_link_shared_by=1))
    # 200 bytes of weights or 20 of activations: 1 s, 0.05 s each way. Release 0.5 s; the update of a pack 0.2 s.
    forward = 1.0 + 2 * (0.05 + 0.05 + 2.0 + 0.05) + 0.5  # input in, stash out, compute, output out
    fused = 1.0 + 2 * (0.05 + 6.0 + 0.05) + 1.0 + 0.5
    backward = 1.0 + 2 * (0.05 + 0.05 + 6.0) + 1.0 + 0.5
    expected = forward + fused + backward
    # All is at 10 bytes: 0.05 s. The last update ends before the release, which the step includes.
    assert seconds(schedule(), costs, Rules.HARMONY_SERIAL) == pytest.approx(expected)


def test_overlap_hides_activations_but_not_weights():
    costs = Costs(profile(*[kind()] * 4), machine(gpus=1, host_link_shared_by=1))
    # Weights of the first two turns (1 s each), the first input, compute (4 + 12 + 12 s), and after each backward its
    # gradients and the release: 1.5 s, in which the next weights come. The fused pack's last input gradient goes first.
    assert seconds(schedule(), costs, Rules.HARMONY) == pytest.approx(1 + 0.05 + 4 + 1 + 12 + 1.55 + 12 + 1.5)


def test_our_rules_hide_weights_too():
    costs = Costs(profile(*[kind()] * 4), machine(gpus=1, host_link_shared_by=1))
    # The first weights, the first input, compute without a gap, the last gradients (1 s) and their update (0.2 s).
    expected = 1 + 0.05 + 4 + 12 + 12 + 1 + 0.2
    assert seconds(schedule(prefetch=1), costs, Rules.OWN) == pytest.approx(expected)
    # Weights in the way of the next two turns, and of the first stash; the fused pack's gradients leave meanwhile.
    assert seconds(schedule(), costs, Rules.OWN) == pytest.approx(expected + 2.05)


def test_all_gpus_share_the_host_link():
    for gpus, expected in ((1, 1.0), (2, 2.0), (4, 4.0)):
        costs = Costs(profile(kind(), kind()), machine(gpus=gpus, host_link_shared_by=gpus))
        dp = schedule(forward=(), backward=((0, 1),), mode="dp", num_devices=gpus, minibatch=4)
        (weights,) = [t for t in task_graph(dp, costs, Rules.HARMONY).tasks if t.kind == Kind.WEIGHTS_IN]
        assert weights.seconds == pytest.approx(expected)


def test_peak_bytes_by_hand():
    costs = Costs(profile(*[kind(weights=100, activation=10)] * 4), machine())
    # Backward of a pack computes in 2 x (200 + 40) - 10 bytes: an input inside it counts once. Beside that two more inputs,
    # and the gradient of the first pack's output, or of the last one's input.
    assert peak_bytes(schedule(num_devices=2), costs, Rules.HARMONY) == 470 + 30
    # Device 0 has forward (260) and backward of the first pack: weights of the latter arrive beside the former.
    assert peak_bytes(schedule(num_devices=2, prefetch=1), costs, Rules.OWN) == 500
    # One device: 20 bytes of 2 samples wait between packs; the fused pack's gradients leave beside the other backward.
    assert peak_bytes(schedule(num_devices=1), costs, Rules.OWN) == 500 + 20
    assert peak_bytes(schedule(num_devices=1, boundary="host"), costs, Rules.OWN) == 500
    assert peak_bytes(schedule(num_devices=1, prefetch=1), costs, Rules.OWN) == 500 + 20 + 200


def test_microbatches_that_were_not_profiled_are_refused():
    costs = Costs(profile(), machine())
    with pytest.raises(ConfigurationError, match="microbatches of 8 samples were not profiled; the largest has 4"):
        score(schedule(microbatch_forward=8, microbatch_backward=8, minibatch=8), costs, Rules.HARMONY)


# Published scores -------------------------------------------------------------------------------------------------------


@published
@pytest.mark.parametrize("row", [row for row, *_ in ROWS])
def test_published_schedules_take_what_was_published(row):
    (_, planned, serial, overlapping) = next(entry for entry in ROWS if entry[0] == row)
    costs = Costs(published_profile(row.split()[0]), published_machine())
    # Published to a millisecond.
    assert seconds(planned, costs, Rules.HARMONY_SERIAL) == pytest.approx(serial, abs=6e-4)
    assert seconds(planned, costs, Rules.HARMONY) == pytest.approx(overlapping, abs=6e-4)
    assert seconds(replace(planned, prefetch=1), costs, Rules.OWN) < overlapping


@published
@pytest.mark.parametrize(
    ("mode", "gpus", "expected"),
    [(mode, gpus, s) for mode, row in (("dp", (371, 201, 127, 110)), ("pp", (371, 192, 102, 58)))
     for gpus, s in zip((1, 2, 4, 8), row, strict=True)],
)  # fmt: skip
def test_published_hand_made_schedules_of_ten_billion_parameters(mode, gpus, expected):
    costs = Costs(published_profile("gpt2_10b"), published_machine(gpus=gpus, host_link_shared_by=gpus))
    packs = tuple((first, first + 1) for first in range(0, 54, 2))
    planned = schedule(packs[:-1], packs, mode=mode, num_devices=gpus, minibatch=32)
    assert round(seconds(planned, costs, Rules.HARMONY)) == expected


# Invariants -------------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    costs = Costs(draw(profiles()), draw(machines()))
    mode = draw(st.sampled_from(("pp", "dp")))
    packings = Packings(costs)
    backward = draw(st.sampled_from(packings.backward(1)))
    forward = draw(st.sampled_from(packings.forward(1, backward[-1][0])))
    sizes = st.sampled_from((1, 2, 4))
    planned = Schedule(
        mode=mode,
        num_devices=costs.machine.gpus,
        minibatch=draw(st.integers(1, 9)),
        microbatch_forward=draw(sizes),
        packs_forward=forward,
        microbatch_backward=draw(sizes),
        packs_backward=backward,
        prefetch=draw(st.integers(0, 1)),
        boundary=draw(st.sampled_from(("device", "host"))),
    )
    return planned, costs, draw(st.sampled_from(SCHEDULED))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_the_graph_takes_what_the_clock_says(case):
    planned, costs, rules = case
    graph = task_graph(planned, costs, rules)
    timeline = simulate(graph)
    assert timeline.seconds == pytest.approx(seconds(planned, costs, rules))
    # One lane does one thing at a time, in order, and nothing starts before what it waits for.
    ends = dict.fromkeys(range(NUM_LANES * planned.num_devices), 0.0)
    for task, start, end in zip(graph.tasks, timeline.starts, timeline.ends, strict=True):
        assert start >= max([ends[lane] for lane in task.lanes] + [timeline.ends[a] for a in task.after]) - 1e-9
        ends.update(dict.fromkeys(task.lanes, end))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_layer_is_computed_for_every_sample_once_and_differentiated_once(case):
    planned, costs, rules = case
    graph = task_graph(planned, costs, rules)
    share = len({lane // NUM_LANES for task in graph.tasks for lane in task.lanes if task.kind == Kind.UPDATE})
    assert share >= 1
    total = sum(task.seconds for task in graph.tasks if task.kind == Kind.FORWARD)
    spans = [(size, span) for size in planned.sizes_forward for span in planned.packs_forward]
    assert total == pytest.approx(sum(costs.forward_seconds(size, span) for size, span in spans))
    total = sum(task.seconds for task in graph.tasks if task.kind == Kind.BACKWARD)
    spans = [(size, span) for size in planned.sizes_backward for span in planned.packs_backward]
    assert total == pytest.approx(sum(costs.backward_seconds(size, span) for size, span in spans))


@given(cases(), st.sampled_from(("host_link_bytes_per_second", "peer_bytes_per_second")))
@settings(max_examples=60, deadline=None)
def test_a_faster_link_never_takes_longer(case, link):
    planned, costs, rules = case
    faster = Costs(costs.profile, replace(costs.machine, **{link: 2 * getattr(costs.machine, link)}))
    assert seconds(planned, faster, rules) <= seconds(planned, costs, rules) + 1e-9


@given(cases())
@settings(max_examples=60, deadline=None)
def test_bringing_weights_early_takes_hardly_longer(case):
    """On a lane that serves its copies in order, one that is needed now may come behind one that is early."""
    planned, costs, _ = case
    late, early = (seconds(replace(planned, prefetch=prefetch), costs, Rules.OWN) for prefetch in (0, 1))
    assert early <= 1.2 * late


@given(cases())
@settings(max_examples=60, deadline=None)
def test_handing_over_on_the_device_never_takes_longer(case):
    planned, costs, _ = case
    far, near = (seconds(replace(planned, boundary=boundary), costs, Rules.OWN) for boundary in ("host", "device"))
    assert near <= far + 1e-9


@given(cases())
@settings(max_examples=60, deadline=None)
def test_no_step_takes_longer_than_the_first(case):
    planned, costs, _ = case
    clock = Clock(planned.num_devices)
    steps = OwnSteps(planned, costs, clock)
    ends = [0.0]
    for _ in range(4):
        steps.step()
        ends.append(clock.seconds)
    assert max(b - a for a, b in pairwise(ends)) <= ends[1] + 1e-9


def test_lanes_of_peer_copies_are_those_of_both_devices():
    costs = Costs(profile(), machine())
    graph = task_graph(schedule(num_devices=2), costs, Rules.HARMONY)
    copies = [task.lanes for task in graph.tasks if task.kind == Kind.OUTPUT_PEER]
    assert copies == [(Lane.PEER_OUT, NUM_LANES + Lane.PEER_IN)] * 2
