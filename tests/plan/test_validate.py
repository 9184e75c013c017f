"""Plans that somebody wrote by hand: what is wrong is told before the first step, with its place."""

import dataclasses
import json

import pytest

from harmony_lightning import CapacityError, ConfigurationError, Pack, Plan
from harmony_lightning.decomposer.decomposition import Decomposition, Layer, Weight
from harmony_lightning.plan import aligned, check_plan, order_fault
from harmony_lightning.plan.grid import grid

SIZES = {"embed": 100, "block": 200, "head": 100}


def decomposition():
    return Decomposition(
        layers=tuple(Layer(name=name, weights=(f"{name}.weight",)) for name in SIZES),
        weights=tuple(Weight(name=f"{name}.weight", nbytes=size, is_trainable=True) for name, size in SIZES.items()),
        has_batch_statistics=False,
    )


def plan(**changes):
    packs = [
        Pack(
            layers=(name,),
            parameters=(f"{name}.weight",),
            nbytes=size,
            trainable_nbytes=size,
            slot_nbytes=aligned(size),
            gradient_slot_nbytes=aligned(size),
        )
        for name, size in SIZES.items()
    ]
    knobs = {"mode": "pp", "num_devices": 2, "memory_bytes": 10_000, "microbatch_size": 2, "num_microbatches": 4}
    return Plan(**{**knobs, "packs": tuple(packs), "stash": "host", "prefetch": 1, **changes})


def with_pack(index, **changes):
    packs = list(plan().packs)
    packs[index] = dataclasses.replace(packs[index], **changes)
    return plan(packs=tuple(packs), narrow_dtype="float16")


def test_a_sound_plan_passes():
    check_plan(plan(), decomposition(), 2, 10_000)
    check_plan(plan(mode="dp"), decomposition(), 2, 10_000)
    check_plan(with_pack(1, gradient_slot_nbytes=0, trainable_nbytes=0), decomposition(), 2, 10_000)


@pytest.mark.parametrize(
    ("faulty", "what"),
    [
        (with_pack(1, layers=("bolck",)), "the plan names layer 'bolck'"),
        (with_pack(1, layers=("block", "head")), "layer 'head' in one pack, it has it in 2"),
        (with_pack(1, parameters=("head.weight",)), "pack 1 must have the weights of its layers"),
        (with_pack(1, narrow=("head.weight",), nbytes=200), "weight head.weight is narrow"),
        (with_pack(1, nbytes=5), "pack 1 says 5 bytes of weights, its layers have 200"),
        (with_pack(1, slot_nbytes=64), "pack 1 has slot_nbytes of 64, its weights need 256"),
        (with_pack(1, gradient_slot_nbytes=128), "pack 1 has gradient_slot_nbytes of 128, its weights need 256"),
    ],
)
def test_the_faulty_cell_is_marked(faulty, what):
    with pytest.raises(ConfigurationError, match=what) as caught:
        check_plan(faulty, decomposition(), 2, 10_000)
    marked = [line for line in str(caught.value).splitlines() if line.startswith(">")]
    pack, cells = (2, ["[0-3]", "."]) if "'head'" in what else (1, [".", "[0-3]"])
    assert len(marked) == 1 and marked[0].split()[1] == str(pack) and marked[0].split()[-2:] == cells


@pytest.mark.parametrize(("told", "offered"), [(10_000, 500), (500, 10_000)])
def test_slots_that_do_not_fit_are_told_with_their_device(told, offered):
    with pytest.raises(CapacityError, match=r"take 512 B of gpu0, .*; make packs smaller") as caught:
        check_plan(plan(memory_bytes=told, prefetch=0, mode="dp"), decomposition(), 2, offered)
    assert ">  1     block   200 B    [0,2]  1,3" in str(caught.value).splitlines()


def test_the_grid_shows_who_meets_where():
    mixed = plan(dealt=(2,), num_microbatches=12)
    assert grid(mixed, 2, 0).splitlines() == [
        "   pack  layers  weights  gpu0          gpu1",
        "   0     embed   100 B    0-11          .",
        "   1     block   200 B    .             0-11",
        ">  2     head    100 B    [0,2 ... 10]  1,3 ... 11",
    ]
    long = plan(packs=tuple(dataclasses.replace(plan().packs[0], layers=(f"net.{i}",)) for i in range(20)))
    lines = grid(long, 9).splitlines()
    assert len(lines) == 10 and "... 6 before" in lines[1] and "... 7 behind" in lines[-1]


def test_packs_out_of_the_order_of_calls_are_told():
    assert order_fault(plan(), ["embed", "block", "head"]) is None
    told = order_fault(plan(), ["embed", "head", "block"])
    assert "layer 'block' of pack 1 is called behind 'head' of pack 2" in told and ">  1     block" in told


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prefetch": None}, "prefetch must be a whole number, got None"),
        ({"num_devices": "2"}, "num_devices must be a whole number, got '2'"),
        ({"num_devices": True}, "num_devices must be a whole number, got True"),
        ({"resident": 3}, "resident must be a list, got 3"),
        ({"keep": [1]}, r"keep\[0\] must be text, got 1"),
        ({"color": "red"}, "color is no field of a Plan, which has mode"),
        ({"packs": [{"layers": ["a"]}]}, r"packs\[0\].parameters is missing"),
        ({"packs": ["a"]}, r"packs\[0\] must be an object, got 'a'"),
    ],
)
def test_faults_of_a_file_are_told_with_their_place(change, what):
    with pytest.raises(ConfigurationError, match=f"this is no Plan in JSON: {what}"):
        Plan.from_json(json.dumps({**json.loads(plan().to_json()), **change}))
    faulty = json.loads(plan().to_json())
    faulty["packs"][1]["update"] = "gpu"
    with pytest.raises(ConfigurationError, match=r"packs\[1\]: update must be 'host' or 'device', got 'gpu'"):
        Plan.from_json(json.dumps(faulty))


def test_whole_numbers_may_be_written_as_others_write_them():
    revived = Plan.from_json(json.dumps({**json.loads(plan().to_json()), "num_devices": 2.0, "memory_bytes": 1e4}))
    assert revived == plan() and isinstance(revived.num_devices, int)
