"""Schedules as data: what they imply, and which cannot be."""

from dataclasses import replace

import pytest

from harmony_lightning import ConfigurationError
from harmony_lightning.plan import Schedule
from harmony_lightning.plan.schedule import sources, split

SCHEDULE = Schedule(
    mode="pp",
    num_devices=2,
    minibatch=10,
    microbatch_forward=4,
    packs_forward=((0, 2), (3, 4)),
    microbatch_backward=2,
    packs_backward=((0, 1), (2, 4), (5, 6)),
)


def test_json_is_the_inverse():
    schedule = replace(SCHEDULE, boundary="host", prefetch=1)
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_packs_go_round_the_devices_and_backward_continues_the_round():
    assert [SCHEDULE.device_forward(pack) for pack in range(2)] == [0, 1]
    assert [SCHEDULE.device_backward(pack) for pack in (2, 1, 0)] == [0, 1, 0]
    assert SCHEDULE.order_of_devices() == (0, 1, 0, 1, 0)
    assert replace(SCHEDULE, mode="dp").order_of_devices() == (0,) * 5


def test_microbatches_cut_what_one_device_has():
    assert (SCHEDULE.sizes_forward, SCHEDULE.sizes_backward) == ((4, 4, 2), (2,) * 5)
    shared = replace(SCHEDULE, mode="dp", num_devices=4)
    assert (shared.samples, shared.sizes_forward, shared.sizes_backward) == (3, (3,), (2, 1))


@pytest.mark.parametrize(
    ("mode", "devices", "minibatch", "active"), [("pp", 2, 1, 2), ("pp", 8, 1, 5), ("dp", 8, 3, 3), ("dp", 2, 3, 2)]
)
def test_some_devices_may_have_nothing_to_do(mode, devices, minibatch, active):
    assert replace(SCHEDULE, mode=mode, num_devices=devices, minibatch=minibatch).num_active_devices == active


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "auto"}, "mode must be 'pp' or 'dp', got 'auto'"),
        ({"minibatch": 0}, "minibatch must be at least 1, got 0"),
        ({"microbatch_backward": -1}, "microbatch_backward must be at least 1, got -1"),
        ({"prefetch": 2}, "prefetch must be 0 or 1, got 2"),
        ({"packs_backward": ()}, "packs_backward needs at least one pack"),
        ({"packs_backward": ((1, 4), (5, 6))}, r"packs_backward\[0\] is layers 1 to 4; it must begin with layer 0"),
        ({"packs_forward": ((0, 2), (4, 4))}, r"packs_forward\[1\] is layers 4 to 4; it must begin with layer 3"),
        (
            {"packs_forward": ((0, 2), (3, 2))},
            r"packs_forward\[1\] is layers 3 to 2; it must begin with layer 3 and not",
        ),
        (
            {"packs_forward": ((0, 2),)},
            "cover the layers before 3, but the last backward pack, .*, begins with layer 5",
        ),
        ({"packs_forward": ()}, "cover the layers before 0"),
        ({"boundary": "peer"}, "boundary must be 'device' or 'host', got 'peer'"),
    ],
)
def test_impossible_schedules_cannot_be_made(change, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(SCHEDULE, **change)


def test_a_single_pack_needs_no_forward_packs():
    single = replace(SCHEDULE, packs_forward=(), packs_backward=((0, 6),))
    assert (single.num_layers, single.order_of_devices()) == (7, (0,))


def test_cuts_of_the_same_samples_complete_each_other():
    assert split(10, 4) == (4, 4, 2)
    assert split(3, 4) == (3,)
    assert sources((4, 4, 2), (2,) * 5) == (0, 0, 1, 1, 2)
    assert sources((2,) * 5, (4, 4, 2)) == (1, 3, 4)
    assert sources((4, 4, 4, 1), (3, 3, 3, 3, 1)) == (0, 1, 2, 2, 3)
