"""What stays, from sizes alone: no module, no torch."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmony_lightning.plan import Held, Pack, Plan, Seen, Usage, VisitPeak
from harmony_lightning.scheduler import let_stay
from harmony_lightning.scheduler.residency import peaks

KB = 6400
"""A hundred times the alignment: slots are exactly as large as weights."""
SCARCE, AMPLE = 20 * KB, 1000 * KB


def plan(*nbytes, **options):
    packs = tuple(
        Pack(
            layers=(f"l{i}",),
            parameters=(f"w{i}",),
            nbytes=n,
            trainable_nbytes=n,
            slot_nbytes=n,
            gradient_slot_nbytes=n,
        )
        for i, n in enumerate(nbytes)
    )
    knobs = {"mode": "pp", "num_devices": 1, "memory_bytes": SCARCE, "microbatch_size": 1, "num_microbatches": 4}
    return Plan(**{**knobs, "stash": "host", "prefetch": 1, "packs": packs, **options})


def usage(of, stash=KB, activations=2 * KB, peak=5 * KB):
    """All packs alike; each device has but its own in pp."""
    num, devices = len(of.packs), range(of.num_devices)

    def here(pack, nbytes):
        return tuple(nbytes if pack in of.packs_on(device) else 0 for device in devices)

    return Usage(
        visits=tuple(VisitPeak(pack=p, nbytes=(peak,) * of.num_devices) for p in (*range(num), *reversed(range(num)))),
        held=(
            *(Held(stashes=(p,), nbytes=here(p, stash)) for p in range(num - 1)),
            *(Held(layers=(f"l{p}",), nbytes=here(p, activations)) for p in range(num)),
        ),
        resting=(0,) * of.num_devices,
    )


def stays(memory_bytes, *nbytes, stash=KB, activations=2 * KB, **options):
    base = plan(*nbytes, memory_bytes=memory_bytes, **options)
    return let_stay(base, usage(base, stash, activations))


def test_nothing_stays_where_nothing_fits():
    base = plan(KB, KB, KB, KB, memory_bytes=7 * KB)
    assert let_stay(base, usage(base)) == dataclasses.replace(base, peak_bytes=(7 * KB,))


def test_everything_stays_where_everything_fits():
    made = stays(AMPLE, KB, KB, KB, KB)
    assert made.resident == (0, 1, 2, 3)
    assert made.stash_stays == (0, 1, 2)
    assert sorted(made.keep) == ["l0", "l1", "l2", "l3"]
    # Four slots, the peak of the last pack, three stashes, activations of all layers.
    assert made.peak_bytes == (4 * KB + 5 * KB + 3 * KB + 4 * 2 * KB,)
    assert made.swap_in_bytes_per_step == 4 * KB


def test_the_order_is_the_last_layer_then_stashes_then_weights_then_other_layers():
    ample = plan(KB, KB, KB, KB, memory_bytes=AMPLE)
    steps = []
    for memory in range(7 * KB, 40 * KB, KB // 8):
        made = stays(memory, KB, KB, KB, KB)
        state = made.keep, made.stash_stays, made.resident
        if not steps or steps[-1] != state:
            steps.append(state)
    assert steps == [
        ((), (), ()),
        (("l3",), (), ()),
        (("l3",), (2,), ()),
        (("l3",), (1, 2), ()),
        (("l3",), (0, 1, 2), ()),
        (("l3",), (0, 1, 2), (0,)),
        (("l3",), (0, 1, 2), (0, 1, 2, 3)),  # two slots are shared; the last two packs have them
        (("l3", "l2"), (0, 1, 2), (0, 1, 2, 3)),
        (("l3", "l2", "l1"), (0, 1, 2), (0, 1, 2, 3)),
        (("l3", "l2", "l1", "l0"), (0, 1, 2), (0, 1, 2, 3)),
    ]
    assert ample.resident == ()


def test_a_device_that_is_full_does_not_keep_others_from_taking_more():
    made = stays(14 * KB, 8 * KB, KB, 8 * KB, KB, 8 * KB, KB, num_devices=2, prefetch=0)
    assert made.resident == (1, 3, 5)


def test_a_dealt_pack_has_its_place_where_it_fits_though_it_does_not_stay():
    """It takes three on the first device: with more memory it stays, and nothing need leave the second one for it."""
    knobs = {"num_devices": 2, "prefetch": 0, "stash": 0, "activations": 0, "dealt": (6,)}
    less, more = (
        stays((5 + beside) * KB * 32 // 31 + 1, *(n * KB for n in (15, 1, 15, 8, 15, 8, 3)), **knobs)
        for beside in (17, 18)
    )
    assert (less.resident, more.resident) == ((1,), (1, 6))


def test_in_dp_all_devices_have_the_same_resident_packs():
    base = plan(KB, KB, KB, KB, mode="dp", num_devices=2, memory_bytes=AMPLE)
    measured = usage(base)
    assert let_stay(base, measured).resident == (0, 1, 2, 3)
    tight = dataclasses.replace(measured, visits=(VisitPeak(pack=3, nbytes=(5 * KB, AMPLE)),))
    assert let_stay(base, tight).resident == ()


def test_what_others_have_taken_since_is_left_to_them():
    base = plan(KB, KB, KB, KB, memory_bytes=AMPLE)
    assert let_stay(base, usage(base), (AMPLE - 12 * KB - AMPLE // 32,)).keep == ("l3",)


def test_stashes_and_what_needs_them_leave_if_the_user_says_so():
    base = plan(KB, KB, KB, KB, memory_bytes=AMPLE)
    made = let_stay(base, usage(base), moves_stash=True)
    assert (made.stash_stays, made.keep, made.resident) == ((), ("l3",), (0, 1, 2, 3))
    joint = plan(KB, KB, KB, KB, memory_bytes=AMPLE, microbatches_per_forward=2)
    assert let_stay(joint, usage(joint)).keep == ("l3",)
    on_device = plan(KB, KB, KB, KB, memory_bytes=AMPLE, stash="device")
    assert let_stay(on_device, usage(on_device)).keep == ("l3", "l2", "l1", "l0")


def test_a_step_that_trains_nothing_lets_weights_stay():
    base = plan(KB, KB, KB, KB, memory_bytes=12 * KB)
    whole = Usage(visits=(VisitPeak(pack=-1, nbytes=(5 * KB,)),), resting=(0,))
    made = let_stay(base, whole)
    assert (made.resident, made.stash_stays, made.keep) == ((0, 1, 2, 3), (), ())


def test_what_several_hold_waits_once_and_from_the_first_of_them_on():
    base = plan(KB, KB, KB, memory_bytes=AMPLE)
    shared = Held(stashes=(1,), layers=("l0",), nbytes=(7 * KB,))
    measured = dataclasses.replace(usage(base), held=(shared,))
    made = let_stay(base, measured)
    assert made.peak_bytes == (3 * KB + 5 * KB + 7 * KB,)
    # The first pack has the peak.
    early = dataclasses.replace(measured, visits=(VisitPeak(pack=0, nbytes=(9 * KB,)), *measured.visits))
    assert let_stay(base, early).peak_bytes == (3 * KB + 9 * KB + 7 * KB,)


sizes = st.lists(st.integers(1, 20), min_size=1, max_size=8)


@given(
    sizes,
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from([{"mode": "pp"}, {"mode": "dp"}, {"mode": "pp", "dealt": True}]),
    st.integers(1, 3),
    st.integers(0, 1),
    st.lists(st.integers(0, 400), min_size=2, max_size=6),
)
def test_more_memory_only_adds_to_what_stays(nbytes, stash, activations, placement, num_devices, prefetch, memories):
    placement |= {"dealt": (len(nbytes) - 1,)} if "dealt" in placement else {}
    made = [
        stays(
            memory * 64 + 1,
            *(n * 64 for n in nbytes),
            stash=stash * 64,
            activations=activations * 64,
            num_devices=num_devices,
            prefetch=prefetch,
            **placement,
        )
        for memory in sorted(memories)
    ]
    for less, more in itertools.pairwise(made):
        assert set(less.resident) <= set(more.resident)
        assert set(less.stash_stays) <= set(more.stash_stays)
        assert set(less.keep) <= set(more.keep)
        assert less.swap_in_bytes_per_step >= more.swap_in_bytes_per_step
        # Nothing stays that would make a device exceed its memory, though it may be too small for the step as it is.
        for limit, before, after in zip(
            [more.memory_bytes] * num_devices, made[0].peak_bytes, more.peak_bytes, strict=True
        ):
            assert after <= max(limit, before)


@pytest.mark.parametrize("record", [usage(plan(KB, KB)), let_stay(plan(KB, KB), usage(plan(KB, KB)))])
def test_json_is_the_inverse(record):
    assert type(record).from_json(record.to_json()) == record


def test_what_was_seen_to_stay_counts_as_it_was_seen():
    """Copies of stashes on their way out are gone when these stay; what of that fits, stays beside them."""
    base = plan(KB, KB, KB, KB, memory_bytes=12 * KB)
    guessed = usage(base)
    first = let_stay(base, guessed)
    assert (first.keep, first.stash_stays, first.resident) == (("l3",), (1, 2), ())
    assert first.peak_bytes == (2 * KB + 5 * KB + 2 * KB + 2 * KB,)
    waits = (0, KB, 2 * KB, 4 * KB, 2 * KB, KB, 0)
    visits = tuple(
        VisitPeak(pack=pack, nbytes=(4 * KB + more,)) for pack, more in zip((0, 1, 2, 3, 2, 1, 0), waits, strict=True)
    )
    seen = Seen(resident=(), stash_stays=(1, 2), keep=("l3",), visits=visits)
    known = dataclasses.replace(guessed, seen=seen)
    second = let_stay(base, known)
    assert (second.keep, second.stash_stays, second.resident) == (("l3",), (0, 1, 2), ())
    assert second.peak_bytes == (2 * KB + 4 * KB + 2 * KB + 3 * KB,)
    # Less memory, so some of it has to go: what is in flight then was seen only in the first step.
    assert let_stay(base, known, (2 * KB,)).stash_stays == ()
    assert peaks(dataclasses.replace(base, stash_stays=(2,)), known, base) == [2 * KB + 5 * KB + KB]
    assert Usage.from_json(known.to_json()) == known


def test_a_pack_that_is_entered_again_waits_through_all_that_lies_between():
    base = plan(KB, KB, KB, memory_bytes=AMPLE)
    order = zip((0, 1, 2, 0, 2, 1, 0), (1, 1, 1, 9, 1, 1, 1), strict=True)
    looping = dataclasses.replace(usage(base), visits=tuple(VisitPeak(pack=p, nbytes=(n * KB,)) for p, n in order))
    assert peaks(dataclasses.replace(base, stash_stays=(1,)), looping, base) == [2 * KB + 9 * KB + KB]
