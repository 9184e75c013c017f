import dataclasses
import json

import pytest

from harmony_lightning import ConfigurationError, Pack, Plan
from harmony_lightning.plan import aligned


def pack(name, nbytes, trainable=None):
    trainable = nbytes if trainable is None else trainable
    return Pack(
        layers=(name,),
        parameters=(f"{name}.weight",),
        nbytes=nbytes,
        trainable_nbytes=trainable,
        slot_nbytes=aligned(nbytes),
        gradient_slot_nbytes=aligned(trainable),
    )


def plan(*packs, **options):
    """Packs of 100, 200, 400 bytes on two devices, three microbatches."""
    knobs = {
        "mode": "pp",
        "num_devices": 2,
        "memory_bytes": 10_000,
        "microbatch_size": 2,
        "num_microbatches": 3,
        "stash": "host",
        "prefetch": 1,
    }
    packs = packs or (pack("a", 100), pack("b", 200), pack("c", 400))
    return Plan(**{**knobs, "packs": packs, **options})


@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_json_is_the_inverse(mode):
    original = plan(mode=mode, stash="device", prefetch=0)
    revived = Plan.from_json(original.to_json())
    assert revived == original
    assert hash(revived) == hash(original)
    assert isinstance(revived.packs[0], Pack)
    assert isinstance(revived.packs[0].layers, tuple)
    assert Pack.from_json(original.packs[1].to_json()) == original.packs[1]


def test_json_can_be_written_by_hand():
    record = json.loads(plan().to_json())
    record["packs"].reverse()
    assert [p.layers for p in Plan.from_json(json.dumps(record)).packs] == [("c",), ("b",), ("a",)]


def edited(**changes):
    return json.dumps({**json.loads(plan().to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        edited(color="red"),
        edited(packs=3),
        edited(packs=[{}]),
        edited(packs=[{"layers": ["a"]}]),
        edited(packs=[]),
        edited(mode="tp"),
        edited(num_devices=0),
        edited(num_devices="2"),
        "[]",
        "3",
        "null",
        edited(packs=["a"]),
    ],
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ConfigurationError, match="this is no Plan in JSON"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "auto"}, "mode must be 'pp' or 'dp', got 'auto'"),
        ({"stash": "auto"}, "stash must be 'device' or 'host', got 'auto'"),
        ({"prefetch": 2}, "prefetch must be 0 or 1, got 2"),
        ({"num_devices": 0}, "num_devices must be at least 1, got 0"),
        ({"memory_bytes": -1}, "memory_bytes must be at least 1, got -1"),
        ({"microbatch_size": 0}, "microbatch_size must be at least 1"),
        ({"num_microbatches": 0}, "num_microbatches must be at least 1"),
        ({"packs": ()}, "a plan needs at least one pack"),
        ({"resident": (1, 3)}, "resident names pack 3, but packs are 0 to 2"),
        ({"stash_stays": (-1,)}, "stash_stays names pack -1"),
        ({"keep": ("a", "d")}, "keep names layer 'd', which is in no pack"),
    ],
)
def test_impossible_plans_cannot_be_made(change, message):
    with pytest.raises(ConfigurationError, match=message):
        dataclasses.replace(plan(), **change)


def test_pp_deals_packs_and_dp_deals_microbatches():
    pp, dp = plan(), plan(mode="dp")
    assert [[pp.device(p, m) for m in range(3)] for p in range(3)] == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert [[dp.device(p, m) for m in range(3)] for p in range(3)] == [[0, 1, 0]] * 3
    assert [pp.visitors(p) for p in range(3)] == [(0,), (1,), (0,)]
    assert [dp.visitors(p) for p in range(3)] == [(0, 1)] * 3


def test_some_devices_may_have_nothing_to_do():
    assert plan(num_devices=8).num_active_devices == 3
    assert plan(num_devices=8, mode="dp", num_microbatches=5).num_active_devices == 5
    assert plan(num_devices=2).num_active_devices == 2
    assert plan(mode="dp", num_devices=8).visitors(0) == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "swap_in"),
    [
        # Two slots hold a and c of gpu0, and b of gpu1.
        ({}, 100 + 200 + 400),
        # With one slot, c is the last pack of gpu0, b that of gpu1: once each; a twice.
        ({"prefetch": 0}, 2 * 100 + 200 + 400),
        ({"prefetch": 0, "resident": (0,)}, 100 + 200 + 400),
        # Two slots hold b and c when backward begins.
        ({"num_devices": 1}, 2 * 100 + 200 + 400),
        ({"num_devices": 1, "prefetch": 0}, 2 * (100 + 200) + 400),
        ({"num_devices": 1, "prefetch": 0, "resident": (0,)}, 100 + 2 * 200 + 400),
        ({"num_devices": 1, "prefetch": 0, "resident": (2,)}, 2 * 100 + 200 + 400),
        ({"num_devices": 1, "prefetch": 0, "resident": (1, 2)}, 100 + 200 + 400),
        ({"num_devices": 1, "resident": (0,)}, 100 + 200 + 400),
        ({"num_devices": 3, "prefetch": 0}, 100 + 200 + 400),
        ({"num_devices": 8, "prefetch": 0}, 100 + 200 + 400),
        # Both devices run all packs.
        ({"mode": "dp"}, 2 * (2 * 100 + 200 + 400)),
        ({"mode": "dp", "prefetch": 0}, 2 * (2 * (100 + 200) + 400)),
        # Three microbatches keep three of eight devices busy.
        ({"mode": "dp", "num_devices": 8}, 3 * (2 * 100 + 200 + 400)),
    ],
)
def test_swapped_bytes_of_a_step(options, swap_in):
    made = plan(**options)
    assert made.swap_in_bytes_per_step == swap_in
    assert made.swap_out_bytes_per_step == 700


def test_frozen_weights_come_in_but_have_no_gradients_to_bring_out():
    partly = plan(pack("a", 100, trainable=0), pack("b", 200, trainable=64))
    assert partly.swap_in_bytes(is_first=True) == 300
    assert partly.swap_in_bytes_per_step == 64  # nobody writes the rest, and nobody takes its slots
    assert partly.swap_out_bytes_per_step == 64


def test_frozen_packs_stay_as_long_as_nobody_takes_their_slots():
    def frozen(*trainable, **options):
        packs = [pack(name, 100, trainable=100 * (name in trainable)) for name in "abcd"]
        made = plan(*packs, num_devices=1, **options)
        return made.swap_in_bytes(is_first=True), made.swap_in_bytes_per_step

    assert frozen("d") == (400, 400)  # no backward but that of d: c and d are left, and d is updated
    assert frozen("d", resident=(0, 1, 2)) == (400, 100)
    assert frozen("c", prefetch=0) == (500, 500)
    assert frozen("c", resident=(3,)) == (400, 200)  # b is found by the next step, d always
    assert frozen("a", resident=(1, 2, 3)) == (400, 100)


def test_of_packs_that_are_still_there_only_what_trains_comes_again():
    def partly(**options):
        made = plan(*(pack(name, 100, trainable=30) for name in "abcd"), num_devices=1, **options)
        return made.swap_in_bytes(is_first=True), made.swap_in_bytes_per_step

    assert partly(resident=(0, 1, 2, 3)) == (400, 120)
    assert partly(resident=(1, 2, 3)) == (400, 120)  # nobody takes the slot of a either
    assert partly(prefetch=0) == (700, 630)  # backward ends with a, which is found there
    assert partly(prefetch=0, resident=(2,)) == (600, 100 + 130 + 100 + 200 - 70)
    there = [dataclasses.replace(updated_there(name, 100, 8), trainable_nbytes=30) for name in "abcd"]
    assert plan(*there, num_devices=1, updates_stay=(0, 1, 2, 3), prefetch=0).swap_in_bytes_per_step == 6 * 70


def test_slots_are_aligned_and_with_prefetch_two_packs_are_there_at_once():
    assert [aligned(nbytes) for nbytes in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert plan(prefetch=0).arena_nbytes() == 448 + 448
    assert plan(prefetch=1).arena_nbytes() == 2 * (128 + 448)  # of a and c, both on one device
    assert (
        plan(pack("a", 400, trainable=0), pack("b", 100), prefetch=0).arena_nbytes() == 448
    )  # the other device takes 256


def test_a_plan_follows_the_order_of_calls():
    two = Pack.from_json(pack("a", 100).to_json())
    two = dataclasses.replace(two, layers=("a", "b"))
    planned = plan(two, pack("c", 400))
    assert planned.follows(("a", "b", "c"), ())
    assert planned.follows(("a", "c"), ())  # b was not called
    assert planned.follows((), ())
    assert not planned.follows(("b", "a", "c"), ())
    assert not planned.follows(("a", "b", "c", "d"), ())


def test_layers_that_take_turns_share_a_pack():
    two = dataclasses.replace(pack("a", 100), layers=("a", "b"))
    planned = plan(two, pack("c", 400))
    assert planned.follows(("a", "b", "c"), (frozenset("ab"),))
    assert not planned.follows(("a", "b", "c"), (frozenset("bc"),))
    assert not planned.follows(("a", "b", "c"), (frozenset("ab"), frozenset("ac")))


def test_updates_come_as_the_next_forward_wants_them():
    """Those in the middle as their gradients arrive, which others wait to take the place of."""
    many = plan(*(pack(f"p{index}", 100) for index in range(12)), num_devices=2)
    assert many.gradient_buffers == {"first": 2, "next": 2 + 3, "last": 12 // 3} and many.num_gradient_buffers == 11
    assert [many.urgency(index)[0] for index in range(12)] == [*"ffl", *"nnl" * 3]
    assert [many.update_priority(index) for index in range(12)] == [-12, -11, 3, 0, 0, 6, 0, 0, 9, 0, 0, 12]


def updated_there(name, nbytes, states):
    return dataclasses.replace(
        pack(name, nbytes), update="device", state_nbytes=states, state_slot_nbytes=aligned(states)
    )


def test_states_come_in_and_leave_where_devices_update():
    there = plan(updated_there("a", 100, 130), pack("b", 200), updated_there("c", 400, 0))
    on_host = plan()
    # Forward finds new weights of both where they were updated; backward of a does, too, while c lies in its own slot.
    assert there.swap_in_bytes_per_step == on_host.swap_in_bytes_per_step + 130 - 100 - 400
    assert there.swap_out_bytes_per_step == on_host.swap_out_bytes_per_step + 130
    assert there.shared_update_slot_nbytes(0) == 448  # of c; a takes 128 for its weights and 192 for states
    assert there.arena_nbytes() == on_host.arena_nbytes() + 2 * 448
    only_c = plan(pack("a", 100), pack("b", 200), there.packs[2])
    assert only_c.arena_nbytes() == on_host.arena_nbytes() + 448 and not only_c.shared_update_slot_nbytes(1)
    assert Plan.from_json(there.to_json()) == there


@pytest.mark.parametrize(
    "changes", [{"update": "gpu"}, {"state_nbytes": 65, "state_slot_nbytes": 64}, {"state_nbytes": -1}]
)
def test_impossible_updates_are_refused(changes):
    with pytest.raises(ConfigurationError, match=r"must be 'host' or 'device', got 'gpu'|bytes of optimizer states"):
        dataclasses.replace(pack("a", 100), **changes)
