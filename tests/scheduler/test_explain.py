"""What would help: samples that a step needs, against formulas and against the simulator."""

from dataclasses import replace

import pytest
from small_profiles import MACHINE, kind, machine, profile

from harmony_lightning.plan import Schedule
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.explain import break_down, describe, explain, find, samples_to_hide
from harmony_lightning.scheduler.runtime.steps import fair_seconds
from harmony_lightning.scheduler.simulate import Rules

MINIBATCH = 8


def costs(machine=MACHINE, **layer):
    return Costs(profile(*[kind(**layer)] * 6), machine)


def found(costs, mode="pp", minibatch=MINIBATCH):
    return find(costs, minibatch=minibatch, mode=mode, memory_bytes=1500, rules=Rules.OWN)


def advice(costs):
    told = explain(found(costs), costs, minibatch=MINIBATCH, mode="pp", memory_bytes=1500)
    return next(sentence for sentence in told if sentence.startswith("Samples that a step needs"))


@pytest.mark.parametrize(
    ("mode", "weights", "gradients"),
    # 600 bytes of weights, 200 bytes a second for both GPUs together, 24 GPU seconds a sample.
    [("pp", 2 * 600 / 200, 600 / 200), ("dp", 2 * 2 * 600 / 200, 600 / 200)],
)
def test_samples_are_those_that_take_as_long(mode, weights, gradients):
    schedule = found(costs(), mode).best.schedule
    needs = samples_to_hide(costs(), schedule, Rules.OWN)
    by_host = costs(replace(MACHINE, peers_by_host=True))
    for one, sent in ((costs(), 1), (by_host, 2 if mode == "dp" else 1)):  # passed on from one to the other
        told = samples_to_hide(one, schedule, Rules.RUNTIME)
        assert told["gradients"] == pytest.approx(sent * needs["gradients"])
    assert needs == pytest.approx({"weights": weights / 12, "gradients": gradients / 12, "updates": 0.3 / 12})


@pytest.mark.parametrize(
    ("slow", "ending"),
    [
        ({}, "it has 8, which is enough."),
        (
            {"update": 80.0},
            "updates 20, weights 0.5, gradients 0.25; it has 8: accumulate 3 minibatches (accumulate_grad_batches=3), or "
            "make them as much larger.",
        ),
        (
            {"machine": machine(host_link_bytes_per_second=5.0)},
            "weights 20, gradients 10, updates 0.025; it has 8: make minibatches 3 times as large (accumulated ones would "
            "bring the weights each).",
        ),
    ],
)
def test_the_advice_is_what_helps(slow, ending):
    assert advice(costs(**slow)).endswith(ending)


def test_a_step_with_as_many_samples_hides_its_updates():
    slow, fast = costs(update=80.0), costs()
    needed = round(samples_to_hide(slow, found(slow).best.schedule, Rules.OWN)["updates"])

    def times_as_long(minibatch):
        return found(slow, minibatch=minibatch).best.seconds / found(fast, minibatch=minibatch).best.seconds

    assert times_as_long(needed // 4) > 3
    assert times_as_long(4 * needed) < 1.3


@pytest.mark.parametrize(("update", "resident"), [(80.0, ()), (0.1, (0, 1, 2))])
def test_the_parts_of_a_settled_step_are_as_long_as_the_step(update, resident):
    """Weights that stay are no part of it, though the first step brings them."""
    slow, packs = costs(update=update), ((0, 1), (2, 3), (4, 5))
    schedule = Schedule(
        mode="pp", num_devices=2, minibatch=8, microbatch_forward=2, packs_forward=packs[:-1], microbatch_backward=2,
        packs_backward=packs, prefetch=1, resident=resident,
    )  # fmt: skip
    parts = break_down(schedule, slow, Rules.RUNTIME).parts
    assert sum(seconds for _, seconds in parts) == pytest.approx(fair_seconds(schedule, slow))
    needs = samples_to_hide(slow, schedule, Rules.RUNTIME)
    assert needs["weights"] == pytest.approx((1 if resident else 2) * 600 / 200 / 12)
    moved = replace(schedule, updated_there=(0, 1, 2), updates_stay=(0, 1, 2))
    assert set(samples_to_hide(slow, moved, Rules.RUNTIME).values()) == {0}
    partly = [replace(one, gradient_bytes=one.weight_bytes // 4) for one in slow.profile.layer_kinds]
    partly = Costs(replace(slow.profile, layer_kinds=tuple(partly)), slow.machine)
    told = [samples_to_hide(partly, one, Rules.RUNTIME)["weights"] for one in (schedule, moved)]
    assert told == pytest.approx(
        [needs["weights"] / 4, 0] if resident else [needs["weights"], needs["weights"] * 3 / 4]
    )
    assert describe(moved).endswith(", all updated on GPUs")
    assert describe(replace(moved, updates_stay=(0,))).endswith(", all updated on GPUs, states of 2 come and go")
