"""Profiles and machines for planning tests: hand-made, random, and the published ones where they are at hand."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import strategies as st

from harmony_lightning.plan import Schedule
from harmony_lightning.profiler import LayerKind, Machine, MicrobatchSizes, Profile, read_machine, read_profile
from harmony_lightning.scheduler.simulate import Rules

SCHEDULED = (Rules.HARMONY, Rules.HARMONY_SERIAL, Rules.OWN)
"""Rules under which any schedule can be carried out."""

MACHINE = Machine(
    name="small",
    gpus=2,
    memory_bytes=1000,
    host_link_bytes_per_second=200.0,
    host_link_shared_by=2,
    peer_bytes_per_second=100.0,
    host_message_bytes_per_second=400.0,
    release_seconds=0.5,
)


def kind(weights=100, seconds=1.0, activation=10, update=0.1, sizes=(1, 2, 4)):
    """A layer whose times and activations are proportional to the microbatch."""
    return LayerKind(
        weight_bytes=weights,
        buffer_bytes=0,
        optimizer_state_bytes=2 * weights,
        input_bytes=(activation, 2 * activation),
        forward_seconds=tuple(seconds * size for size in sizes),
        backward_seconds=tuple(3 * seconds * size for size in sizes),
        forward_peak_bytes=tuple(weights + 2 * activation * size for size in sizes),
        backward_peak_bytes=tuple(2 * weights + 4 * activation * size for size in sizes),
        update_cpu_seconds=update,
    )


def profile(*kinds, sizes=(1, 2, 4)):
    kinds = kinds or (kind(), kind(200, 2.0), kind(), kind(50, 0.5))
    return Profile(
        model="small",
        microbatch_sizes=MicrobatchSizes(forward=sizes, backward=sizes),
        layer_kinds=kinds,
        layers=tuple(range(len(kinds))),
    )


def machine(**changes):
    return replace(MACHINE, **changes)


@st.composite
def profiles(draw, max_layers=7):
    """Layers that share nothing, of any proportions between compute, weights and activations."""
    number = st.floats(0.05, 5.0)
    layers = draw(st.integers(1, max_layers))
    kinds = [
        kind(draw(st.integers(0, 400)), draw(number), draw(st.integers(0, 60)), draw(st.floats(0.0, 3.0)))
        for _ in range(layers)
    ]
    return profile(*kinds)


@st.composite
def machines(draw):
    return machine(
        gpus=(gpus := draw(st.integers(1, 8))),
        host_link_shared_by=draw(st.sampled_from((1, gpus))),
        host_link_bytes_per_second=draw(st.floats(20.0, 5000.0)),
        peer_bytes_per_second=draw(st.floats(20.0, 5000.0)),
        release_seconds=draw(st.sampled_from((0.0, 0.5))),
    )


FOLDER = Path(os.environ.get("HARMONY_PROFILES", Path(__file__).parents[1] / ".." / "shared" / "profiles"))
published = pytest.mark.skipif(not (FOLDER / "machine.json").exists(), reason=f"no published profiles in {FOLDER}")


def published_profile(name):
    return read_profile(FOLDER / f"{name}.json")


def published_machine(**changes):
    return replace(read_machine(FOLDER / "machine.json"), **changes)


def published_schedules():
    """(row, Schedule, seconds without overlap, seconds with overlap)."""
    if not (FOLDER / "published_schedules.json").exists():
        return []
    schedules = json.loads((FOLDER / "published_schedules.json").read_text())["schedules"]
    return [
        (
            row,
            Schedule(
                mode=row.split()[2].lower(),
                num_devices=4,
                minibatch=int(row.split()[1]),
                microbatch_forward=entry["microbatch_forward"],
                packs_forward=tuple(map(tuple, entry["packs_forward"])),
                microbatch_backward=entry["microbatch_backward"],
                packs_backward=tuple(map(tuple, entry["packs_backward"])),
            ),
            entry["step_seconds_no_overlap"],
            entry["step_seconds_overlap"],
        )
        for row, entry in schedules.items()
    ]
