"""Profiles and machines as files: what is read, and what is refused with its place."""

import json

import pytest
from small_profiles import MACHINE, machine, profile

from harmony_lightning import ConfigurationError
from harmony_lightning.profiler import Machine, Profile, at_size, read_machine, read_profile


def edited(record, path, value):
    tree = json.loads(record.to_json())
    place = tree
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(tree)


def test_json_is_the_inverse():
    assert Profile.from_json(profile().to_json()) == profile()
    assert Machine.from_json(MACHINE.to_json()) == MACHINE
    assert hash(Profile.from_json(profile().to_json())) == hash(profile())


def test_what_is_not_known_is_left_aside():
    assert Profile.from_json(edited(profile(), ["colour"], "red")) == profile()
    assert Profile.from_json(edited(profile(), ["layer_kinds", 1, "colour"], "red")) == profile()
    assert Machine.from_json(edited(MACHINE, ["colour"], "red")) == MACHINE


def test_a_machine_shares_its_link_and_releases_for_free_unless_told():
    bare = json.loads(MACHINE.to_json())
    del bare["host_link_shared_by"], bare["release_seconds"], bare["note"], bare["name"]
    revived = Machine.from_json(json.dumps({**bare, "gpus": 8, "memory_bytes": 9e9}))
    assert (revived.host_link_shared_by, revived.release_seconds, revived.memory_bytes) == (8, 0.0, 9_000_000_000)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["layers"], None, "layers is missing"),
        (["layers"], 3, "layers must be a list, got 3"),
        (["layers", 1], 9, r"layers\[1\] is kind 9, but there are 4 layer_kinds"),
        (["layers"], [], "needs at least one layer"),
        (["layers", 0], 0.5, r"layers\[0\] must be a whole number of at least 0, got 0.5"),
        (["microbatch_sizes"], [1, 2], r"microbatch_sizes must be a JSON object, got \[1, 2\]"),
        (["microbatch_sizes", "forward"], [2, 1, 4], "microbatch_sizes.forward must be positive and ascending"),
        (
            ["microbatch_sizes", "backward"],
            [0, 1, 4],
            r"microbatch_sizes.backward\[0\] must be a whole number of at least",
        ),
        (["layer_kinds", 2, "weight_bytes"], None, r"layer_kinds\[2\].weight_bytes is missing"),
        (["layer_kinds", 2, "weight_bytes"], -1, r"layer_kinds\[2\].weight_bytes must be a whole number of at least 0"),
        (["layer_kinds", 2, "weight_bytes"], True, r"layer_kinds\[2\].weight_bytes must be a whole number"),
        (["layer_kinds", 0, "forward_seconds"], [1.0, 2.0], "must hold 3 numbers, one per microbatch size, got 2"),
        (["layer_kinds", 0, "forward_seconds", 1], "2", r"layer_kinds\[0\].forward_seconds\[1\] must be a number"),
        (["layer_kinds", 0, "backward_peak_bytes", 0], float("nan"), "must be a number of at least 0, got nan"),
        (["layer_kinds", 0, "input_bytes"], [1, 2, 3], "must hold 2 numbers, one per size 1 and 2, got 3"),
        (["model"], 7, "model must be text, got 7"),
    ],
)
def test_faulty_profiles_are_refused_with_the_place(path, value, message):
    with pytest.raises(ConfigurationError, match=f"this is not a profile: .*{message}"):
        Profile.from_json(edited(profile(), path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["gpus"], None, "gpus is missing"),
        (["gpus"], 0, "gpus must be a whole number of at least 1, got 0"),
        (["peer_bytes_per_second"], 0, "peer_bytes_per_second must be a number of more than 0, got 0"),
        (
            ["host_link_bytes_per_second"],
            "fast",
            "host_link_bytes_per_second must be a number of more than 0, got 'fast'",
        ),
        (["release_seconds"], -1, "release_seconds must be a number of at least 0, got -1"),
    ],
)
def test_faulty_machines_are_refused_with_the_place(path, value, message):
    with pytest.raises(ConfigurationError, match=f"this is not a machine: {message}"):
        Machine.from_json(edited(MACHINE, path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"profile"', "null"])
def test_what_is_no_record_at_all_is_refused(text):
    with pytest.raises(ConfigurationError, match="this is not a profile: "):
        Profile.from_json(text)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot read a profile from .*absent.json: No such file"):
        read_profile(tmp_path / "absent.json")
    (tmp_path / "faulty.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"faulty.json: this is not a machine: gpus is missing"):
        read_machine(tmp_path / "faulty.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="it is not text"):
        read_profile(tmp_path / "binary.json")


def test_sizes_between_measurements_are_interpolated():
    sizes, values = (2, 4, 8), (1.0, 3.0, 4.0)
    assert [at_size(sizes, values, size) for size in (1, 2, 3, 4, 6, 8)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0]
    with pytest.raises(ConfigurationError, match="microbatches of 9 samples were not profiled; the largest has 8"):
        at_size(sizes, values, 9)


def test_only_gpus_at_work_share_the_link():
    shared = machine(gpus=4, host_link_shared_by=4, host_link_bytes_per_second=400.0)
    assert [shared.host_share(active) for active in (1, 2, 4)] == [400.0, 200.0, 100.0]
    assert machine(gpus=4, host_link_shared_by=1).host_share(4) == MACHINE.host_link_bytes_per_second
