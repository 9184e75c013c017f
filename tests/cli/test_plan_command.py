"""`harmony plan`: what it prints, and how it fails."""

import json
import os
import subprocess
import sys

import pytest
from small_profiles import kind, machine, profile, published

from harmony_lightning.cli import main
from harmony_lightning.plan import Schedule
from harmony_lightning.profiler import read_machine, read_profile
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.search.own import costs_under
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds


@pytest.fixture
def files(tmp_path):
    """Arguments that name a small profile and machine; six layers and two GPUs of 1000 bytes."""
    (tmp_path / "profile.json").write_text(profile(*[kind()] * 6).to_json())
    (tmp_path / "machine.json").write_text(machine().to_json())
    return ["plan", "--profile", str(tmp_path / "profile.json"), "--machine", str(tmp_path / "machine.json")]


def answer(capsys, *arguments):
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("mode", ["pp", "dp", "auto"])
def test_json_tells_a_schedule_that_takes_what_it_says(files, capsys, mode):
    printed = answer(capsys, *files, "--minibatch", "8", "--mode", mode, "--memory", "1500", "--json")
    costs = Costs(read_profile(files[2]), read_machine(files[4]))
    for fields in (printed, printed["own"]):
        rules = Rules(fields["rules"])
        known = costs_under(rules, costs, 1500)
        planned = Schedule(
            mode=fields["mode"],
            num_devices=2,
            minibatch=8,
            microbatch_forward=fields["microbatch_forward"],
            packs_forward=tuple(map(tuple, fields["packs_forward"])),
            microbatch_backward=fields["microbatch_backward"],
            packs_backward=tuple(map(tuple, fields["packs_backward"])),
            prefetch=fields["prefetch"],
            boundary=fields["boundary"],
            keep=tuple(fields["keep"]),
            **{name: tuple(fields[name]) for name in ("resident", "stash_stays", "dealt")},
            stash=fields["stash"],
        )
        assert fields["step_seconds"] == seconds(planned, known, rules)
        assert round(peak_bytes(planned, known, rules)) <= fields["peak_bytes"] <= 1500
        assert fields["is_proved"] == (rules is not Rules.RUNTIME) and fields["search_seconds"] > 0
        assert mode in (fields["mode"], "auto")
    # Six layers of 1 s forward and 3 s backward a sample, 8 samples, 2 GPUs; in dp one pack has most of the layers, and
    # computes them once.
    repeated = 1 if mode == "pp" else 0
    assert printed["bound_seconds"] == pytest.approx(6 * (repeated + 3) * 8 / 2)
    assert printed["bound_seconds"] < printed["step_seconds"]
    assert printed["own"]["bound_seconds"] == pytest.approx(6 * 3 * 8 / 2)


def test_memory_is_the_machines_unless_told(files, capsys):
    told = answer(capsys, *files, "--minibatch", "4", "--memory", "1kB", "--json")
    assert {**answer(capsys, *files, "--minibatch", "4", "--json"), "own": 0, "search_seconds": 0} == {
        **told, "own": 0, "search_seconds": 0,
    }  # fmt: skip


def test_a_table_tells_both_plans(files, capsys):
    assert main([*files, "--minibatch", "8", "--memory", "1500"]) == 0
    printed = capsys.readouterr().out
    assert "harmony: forward" in printed and "own: forward" in printed and "backward 0-" in printed


def test_the_genetic_planner_is_told_beside_the_default(files, capsys):
    options = ("--minibatch", "4", "--memory", "1500", "--mode", "dp")
    default = answer(capsys, *files, *options, "--json")
    bred = answer(capsys, *files, *options, "--json", "--planner", "genetic")
    assert (default["planner"], bred["planner"], bred["own"]["planner"]) == ("bounds", "genetic", "genetic")
    assert bred["default"]["step_seconds"] == default["step_seconds"]
    assert bred["own"]["default"]["step_seconds"] == default["own"]["step_seconds"]
    assert bred["step_seconds"] <= 1.05 * default["step_seconds"]
    assert main([*files, *options, "--planner", "genetic"]) == 0
    assert "own, genetic: forward" in capsys.readouterr().out


def test_what_would_help_a_bred_plan_is_told_by_plans_of_the_default_planner(files, capsys):
    options = (*files, "--minibatch", "4", "--memory", "1500", "--mode", "dp", "--json", "--explain")
    by_bounds, bred = answer(capsys, *options), answer(capsys, *options, "--planner", "genetic")
    for default, fields in ((by_bounds, bred), (by_bounds["own"], bred["own"])):
        helping, told = (
            [reason for reason in one["reasons"] if reason.startswith("With ")] for one in (default, fields)
        )
        assert told == helping != []
        assert any("default planner" in reason for reason in fields["reasons"])


def test_reasons_are_told_when_asked_for(files, capsys):
    printed = answer(capsys, *files, "--minibatch", "8", "--memory", "1500", "--json", "--explain")
    for fields in (printed, printed["own"]):
        reasons = " ".join(fields["reasons"])
        assert "What binds is compute" in reasons
        assert "s more:" in reasons
        assert "With twice the memory (2.93 KiB per GPU)" in reasons
    assert main([*files, "--minibatch", "8", "--memory", "1500", "--explain"]) == 0
    assert "What binds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--minibatch", "4", "--memory", "200"], 1, "layer 1 needs 280 B, but each GPU offers 200 B"),
        (["--minibatch", "0"], 2, "the minibatch must have at least one sample, got 0"),
        (["--minibatch", "4", "--memory", "much"], 2, "'much' is not a memory size"),
        (["--minibatch", "4", "--profile", "absent.json"], 2, "cannot read a profile from absent.json: No such file"),
        (["--minibatch", "4", "--machine", __file__], 2, "this is not a machine: not JSON"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(files, capsys, options, code, message):
    assert main([*files, *options]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("harmony: ") and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_wrong_arguments_are_told_by_the_parser(files, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*files, "--minibatch", "four"])
    assert ended.value.code == 2
    assert "invalid int value: 'four'" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--json", "--explain"])
def test_it_ends_quietly_where_nobody_reads_on(files, form):
    reads, writes = os.pipe()
    os.close(reads)
    arguments = [*files, "--minibatch", "4", form]
    with os.fdopen(writes, "w") as pipe:
        done = subprocess.run([sys.executable, "-m", "harmony_lightning.cli", *arguments], stdout=pipe, stderr=-1)
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_planning_needs_no_torch(files):
    arguments = [*files, "--minibatch", "4", "--json"]
    code = f"import sys, harmony_lightning.cli as cli; cli.main({arguments!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@published
def test_published_profiles_are_planned_in_both_modes(capsys):
    from small_profiles import FOLDER

    files = ["plan", "--profile", str(FOLDER / "gpt2_10b.json"), "--machine", str(FOLDER / "machine.json")]
    printed = answer(capsys, *files, "--minibatch", "32", "--memory", "9e9", "--json")
    assert printed["step_seconds"] < 102
    assert printed["own"]["step_seconds"] < printed["step_seconds"]
