"""Packing on hand-made sizes: no module, no torch."""

import pytest

from harmony_lightning import CapacityError
from harmony_lightning.decomposer.decomposition import Decomposition, Layer, Weight
from harmony_lightning.scheduler import automatic_microbatch_size, make_plan, unit_nbytes

KB = 6400
"""A hundred times the alignment: slots are exactly as large as weights."""


def decomposition(*nbytes, frozen=(), glue=0, tied=()):
    """Layers l0, l1, ... of one weight each; `tied` layers use the weight of l0 too."""
    weights = [Weight(name=f"w{i}", nbytes=n, is_trainable=i not in frozen) for i, n in enumerate(nbytes)]
    layers = tuple(
        Layer(name=f"l{i}", weights=(w.name, "w0") if i in tied else (w.name,)) for i, w in enumerate(weights)
    )
    if glue:
        weights.append(Weight(name="glue", nbytes=glue, is_trainable=True))
    return Decomposition(layers=layers, weights=tuple(weights), has_batch_statistics=False)


def packed(parts, memory_bytes, **options):
    knobs = {"mode": "dp", "num_devices": 1, "microbatch_size": 2, "num_microbatches": 4, "stash": "host"}
    return make_plan(parts, memory_bytes=memory_bytes, **{**knobs, **options})


def layers_of(plan):
    return [" ".join(pack.layers) for pack in plan.packs]


def test_knobs_reach_the_plan():
    plan = packed(decomposition(KB), 100 * KB, mode="pp", num_devices=3, stash="device")
    assert (plan.mode, plan.num_devices, plan.memory_bytes, plan.stash) == ("pp", 3, 100 * KB, "device")
    assert (plan.microbatch_size, plan.num_microbatches) == (2, 4)


def test_layers_are_gathered_greedily_in_order():
    # 33 KB less 1 KB of passing gradients; half of it, in two slots of weights and two of gradients: 4 KB each.
    parts = decomposition(3 * KB // 2, KB, 2 * KB, KB, KB, 2 * KB, 2 * KB)
    assert layers_of(packed(parts, 34 * KB)) == ["l0 l1", "l2 l3 l4", "l5 l6"]


def test_every_layer_may_be_a_pack_of_its_own():
    parts = decomposition(KB, KB, KB)
    assert layers_of(packed(parts, 100 * KB)) == ["l0 l1 l2"]
    assert layers_of(packed(parts, 100 * KB, one_layer_per_pack=True)) == ["l0", "l1", "l2"]


def test_a_pack_knows_its_bytes():
    parts = decomposition(100, 200, 300, frozen={1})
    (pack,) = packed(parts, 1 << 20).packs
    assert pack.parameters == ("w0", "w1", "w2")
    assert (pack.nbytes, pack.trainable_nbytes) == (600, 400)
    assert (pack.slot_nbytes, pack.gradient_slot_nbytes) == (128 + 256 + 320, 128 + 320)


def test_narrow_weights_take_half_and_their_gradients_all():
    parts = decomposition(100, 200, 300, frozen={1}).narrowed({"l0": frozenset({"w0"}), "l1": frozenset({"w1"})})
    (pack,) = packed(parts, 1 << 20, narrow_dtype="bfloat16").packs
    assert pack.narrow == ("w0", "w1")
    assert (pack.nbytes, pack.slot_nbytes) == (50 + 100 + 300, 64 + 128 + 320)
    assert (pack.trainable_nbytes, pack.narrow_trainable_nbytes) == (400, 100)
    assert pack.gradient_slot_nbytes == 128 + 320


def test_a_tied_weight_is_narrow_in_packs_that_use_it_so():
    parts = decomposition(KB, KB, KB, tied={2}).narrowed({"l2": frozenset({"w0", "w2"})})
    options = {"one_layer_per_pack": True, "narrow_dtype": "bfloat16"}
    assert [pack.narrow for pack in packed(parts, 100 * KB, **options).packs] == [(), (), ("w2", "w0")]
    (together,) = packed(parts, 100 * KB, narrow_dtype="bfloat16").packs
    assert together.narrow == ("w2",)
    assert parts.travelling_nbytes == 2.5 * KB


def test_narrow_weights_leave_room_for_more_layers():
    parts = decomposition(*[KB] * 8)
    half = parts.narrowed({f"l{i}": frozenset({f"w{i}"}) for i in range(8)})
    assert len(packed(parts, 13 * KB).packs) > len(packed(half, 13 * KB, narrow_dtype="bfloat16").packs)


def test_a_tied_weight_is_counted_once_in_a_pack():
    parts = decomposition(KB, KB, KB, tied={2})
    assert packed(parts, 100 * KB).packs[0].parameters == ("w0", "w1", "w2")
    # Apart, each pack has it.
    assert [pack.parameters for pack in packed(parts, 10 * KB).packs] == [("w0", "w1"), ("w2", "w0")]


def test_every_layer_is_in_one_pack_and_slots_leave_room_for_activations():
    for memory in range(30, 200, 7):
        plan = packed(decomposition(*[KB, 2 * KB, 3 * KB] * 5), memory * KB)
        assert " ".join(layers_of(plan)).split() == [f"l{i}" for i in range(15)]
        assert plan.arena_nbytes() <= 0.5 * memory * KB


def test_double_buffering_goes_first_when_the_largest_layer_is_large():
    sizes = [KB] * 4 + [4 * KB] + [KB] * 4
    # 4 KB as made, in the slot twice (weights and gradients): (memory - 4) / 2 must hold 8 KB, or 16 KB for two.
    assert packed(decomposition(*sizes), 36 * KB).prefetch == 1
    assert packed(decomposition(*sizes), 35 * KB).prefetch == 0
    assert packed(decomposition(*sizes), 20 * KB).prefetch == 0
    tight = packed(decomposition(*sizes), 13 * KB)
    assert tight.prefetch == 0
    assert tight.arena_nbytes() <= 0.9 * (13 - 4) * KB


def test_what_cannot_fit_is_told_with_layer_and_bytes():
    with pytest.raises(CapacityError) as caught:
        packed(decomposition(1 << 20, 8 << 20, 1 << 20, glue=3 << 19), 24 << 20)
    assert str(caught.value) == (
        "layer l1 needs 24 MiB (weights 8 MiB, gradients 8 MiB and 8 MiB as they are made) beside 3 MiB of weights "
        "outside layers, but each GPU offers 24 MiB, of which 10% is kept for activations; raise memory, or choose "
        "smaller layers with layers=[...]"
    )


def test_frozen_layers_need_no_gradients():
    with pytest.raises(CapacityError, match=r"layer l0 needs 8 MiB \(weights 8 MiB, gradients 0 B and 0 B as"):
        packed(decomposition(8 << 20, frozen={0}), 8 << 20)
    assert packed(decomposition(8 << 20, frozen={0}), 9 << 20).packs[0].gradient_slot_nbytes == 0


def test_glue_weights_take_their_share():
    alone, beside = (packed(decomposition(*[KB] * 8, glue=glue), 20 * KB) for glue in (0, 4 * KB))
    assert len(alone.packs) < len(beside.packs)


def test_glue_alone_that_cannot_fit_is_told_too():
    with pytest.raises(CapacityError):
        packed(decomposition(glue=4 * KB), 2 * KB)


@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_slots_fit_beside_a_large_frozen_layer(mode):
    plan = packed(decomposition(80 * KB, *[KB] * 100, frozen={0}), 100 * KB, mode=mode)
    assert plan.arena_nbytes() <= plan.memory_bytes


def test_the_loop_that_takes_turns_is_one_pack_at_its_first_place():
    parts = decomposition(*[KB] * 6)
    together = (frozenset({"l1", "l4"}),)
    # Packs of one layer, but for the loop.
    assert layers_of(packed(parts, 20 * KB, together=together)) == ["l0", "l1 l4", "l2 l3", "l5"]


def test_a_loop_that_cannot_fit_is_taken_apart_and_smaller_ones_are_not(caplog):
    caplog.set_level("INFO", "harmony_lightning")
    knobs = {"together": (frozenset({"l2", "l0", "l1"}), frozenset({"l3", "l4"})), "one_layer_per_pack": True}
    # The sums of a loop are there beside its slots: three times 3 KB, in nine tenths of the memory.
    assert layers_of(packed(decomposition(*[KB] * 5), 10 * KB, **knobs)) == ["l0 l1 l2", "l3 l4"]
    assert not caplog.messages
    assert layers_of(packed(decomposition(*[KB] * 5), 9 * KB, **knobs)) == ["l0", "l1", "l2", "l3 l4"]
    assert (
        "layers l0 + l1 + l2 take turns, and do not fit a GPU together: they are swapped for each turn" in caplog.text
    )


@pytest.mark.parametrize(("num_devices", "num_packs"), [(1, 1), (2, 4), (3, 6), (6, 12), (12, 24), (40, 24)])
def test_pp_makes_two_packs_per_device_as_far_as_there_are_layers(num_devices, num_packs):
    plan = packed(decomposition(*[KB] * 24), 1000 * KB, mode="pp", num_devices=num_devices)
    assert len(plan.packs) == num_packs
    assert len(packed(decomposition(*[KB] * 24), 1000 * KB, num_devices=num_devices).packs) == 1


def test_pp_does_not_split_more_than_its_largest_layer_asks_for():
    plan = packed(decomposition(8 * KB, *[KB] * 16), 1000 * KB, mode="pp", num_devices=4)
    assert layers_of(plan)[0] == "l0"
    assert [pack.nbytes for pack in plan.packs] == [8 * KB, 8 * KB, 8 * KB]


def test_the_host_as_device_needs_one_pack_and_no_limit():
    plan = packed(decomposition(*[KB] * 5), 1, mode="pp", host_is_device=True)
    assert layers_of(plan) == ["l0 l1 l2 l3 l4"]
    assert plan.prefetch == 0


def test_a_module_without_layers_has_one_empty_pack():
    (pack,) = packed(decomposition(glue=KB), 100 * KB).packs
    assert pack.layers == ()
    assert pack.nbytes == 0


@pytest.mark.parametrize("mode", ["pp", "dp"])
def test_the_same_sizes_give_the_same_plan(mode):
    def make():
        parts = decomposition(*[KB, 3 * KB, 2 * KB] * 6)
        together = (frozenset(f"l{i}" for i in (7, 3, 5)),)
        return packed(parts, 60 * KB, mode=mode, num_devices=3, together=together)

    assert make().to_json() == make().to_json()


@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("num_devices", [1, 3])
def test_more_memory_never_makes_more_packs(mode, num_devices):
    """As long as double buffering is kept."""
    parts = decomposition(*[KB, 3 * KB, 2 * KB, KB, KB] * 6)
    plans = [packed(parts, memory * KB, mode=mode, num_devices=num_devices) for memory in range(30, 600, 3)]
    assert all(plan.prefetch == 1 for plan in plans)
    counts = [len(plan.packs) for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_a_layer_is_at_most_an_eighth_of_the_memory_or_a_quarter_of_the_model():
    assert unit_nbytes(total_nbytes=1 << 30, memory_bytes=8 << 20) == 1 << 20
    assert unit_nbytes(total_nbytes=4 << 20, memory_bytes=1 << 40) == 1 << 20
    assert unit_nbytes(total_nbytes=0, memory_bytes=1 << 20) == 1


@pytest.mark.parametrize(
    ("samples", "devices", "options", "size"),
    [
        (32, 2, {}, 4),
        (33, 2, {}, 5),
        (3, 4, {}, 1),
        (0, 1, {}, 1),
        (3, 4, {"min_samples": 2}, 2),
        (32, 1, {"host_is_device": True}, 32),
        (0, 1, {"host_is_device": True}, 1),
    ],
)
def test_automatic_microbatches_are_four_per_device(samples, devices, options, size):
    assert automatic_microbatch_size(samples, devices, **options) == size


def remembering(parts, *states):
    """With states of these shares of each weight's bytes."""
    return parts.with_states({weight.name: tuple(int(weight.nbytes * n) for n in states) for weight in parts.weights})


def test_devices_that_update_have_room_for_new_weights_and_states():
    parts = remembering(decomposition(KB, KB, KB, KB), 1, 1)
    plan = packed(parts, 42 * KB, update="device")
    assert [pack.update for pack in plan.packs] == ["device"] * 2
    assert [(pack.state_nbytes, pack.update_slot_nbytes) for pack in plan.packs] == [(4 * KB, 6 * KB)] * 2
    assert plan.prefetch == 1
    assert plan.arena_nbytes() == 2 * (2 + 2 + 6) * KB == 0.5 * (42 - 2) * KB  # less what a step makes for a moment
    assert layers_of(packed(parts, 42 * KB)) == ["l0 l1 l2 l3"]


def test_the_host_updates_where_devices_have_no_room(caplog):
    parts = remembering(decomposition(KB, KB), 1, 1)
    assert [pack.update for pack in packed(parts, 6 * KB, update="device").packs] == ["host"] * 2
    assert "for layer l0 to be updated on a device that must offer 47.22 KiB, each has 37.5 KiB" in caplog.text
    enough = int(47.23 * 1024)
    assert [pack.update for pack in packed(parts, enough, update="device").packs] == ["device"] * 2


def test_tied_and_frozen_weights_have_no_states_on_devices():
    parts = remembering(decomposition(KB, KB, KB, KB, frozen={3}, tied={2}), 1)
    plan = packed(parts, 100 * KB, update="device", one_layer_per_pack=True)
    assert [pack.state_nbytes for pack in plan.packs] == [0, KB, KB, 0]
    assert [pack.update for pack in plan.packs] == ["host", "device", "device", "host"]
