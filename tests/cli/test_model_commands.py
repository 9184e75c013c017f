"""`harmony topology`, `profile`, `estimate` and `explain`: for GPUs that are not there, of modules of any size."""

import json
import resource
import subprocess
import sys
import warnings

import lightning as L
import pytest
import torch
from chain import WIDTH, Chain
from torch import nn
from wide import on_meta

from harmony_lightning.cli import main
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.profiled import with_narrow_weights
from harmony_lightning.profiler import Machine, Profile
from harmony_lightning.scheduler.search.genetic_runtime import breed_runtime

CHAIN = ["chain:Chain", "--batch", f"32,{WIDTH}", "--batch", "32", "--gpus", "2x3090", "--memory", "300KiB"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path))


def told(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_topology_of_presets(capsys):
    machine = Machine.from_json(told(capsys, "topology", "--gpus", "4x3090", "--host", "desktop", "--json"))
    assert (machine.gpus, machine.gpu, machine.host_link_shared_by) == (4, "3090", 4)
    assert "4 x 3090" in told(capsys, "topology", "--gpus", "4x3090")


def test_profile_and_topology_make_what_plan_reads(capsys, tmp_path):
    text = told(capsys, "profile", *CHAIN, "--init", "depth=6", "--json")
    profile = Profile.from_json(text)
    assert profile.num_layers == 7 and profile.names[-1] == "head"
    (tmp_path / "profile.json").write_text(text)
    (tmp_path / "machine.json").write_text(told(capsys, "topology", *CHAIN[5:], "--json"))
    files = ["--profile", str(tmp_path / "profile.json"), "--machine", str(tmp_path / "machine.json")]
    plan = json.loads(told(capsys, "plan", *files, "--minibatch", "32", "--json"))
    assert plan["own"]["step_seconds"] <= plan["step_seconds"]
    assert "net.0" in told(capsys, "profile", *CHAIN)


@pytest.mark.parametrize("init", [(), ("--init", "depth=12")])
def test_estimate_tells_whether_it_fits_and_how_fast(capsys, init):
    answer = json.loads(told(capsys, "estimate", *CHAIN, *init, "--json"))
    assert answer["peak_bytes"] <= answer["memory_bytes"] == 300 * 1024
    assert answer["samples_per_second"] == pytest.approx(32 / answer["step_seconds"])
    assert answer["packs"][0][0] == 0 and answer["packs"][-1][1] == (12 if init else 8)
    assert answer["parameters"] == (12 if init else 8) * (WIDTH * WIDTH + WIDTH) + WIDTH + 1
    assert answer["host_bytes"] > 3 * 4 * answer["parameters"]
    assert "reasons" not in answer


def test_under_autocast_weights_travel_in_half_the_bytes(capsys):
    """The chain's are all for matrix products; the host has both kinds, and two states and gradients in four bytes."""
    root = on_meta(lambda: Chain(depth=6))
    decomposition = decompose(root, 2**14)
    batch = torch.zeros(4, WIDTH), torch.zeros(4)
    narrow = with_narrow_weights(decomposition, root, batch, "bf16-mixed")
    assert 2 * narrow.travelling_nbytes == decomposition.travelling_nbytes == narrow.nbytes
    assert narrow.narrow_dtype == "bfloat16"
    assert with_narrow_weights(decomposition, root, batch, "32-true") is decomposition
    answer = json.loads(told(capsys, "estimate", *CHAIN, "--mode", "dp", "--json", "--precision", "bf16-mixed"))
    assert answer["host_bytes"] > (4 + 2 + 2 * 4) * answer["parameters"]


class Looking(Chain):
    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("loss", loss)
        return loss * (1 + self.current_epoch / self.trainer.max_epochs)


class ByName(Chain):
    """Takes its batch apart by names; what Python says of that begins with many lines, which print the module."""

    def training_step(self, batch, batch_idx):
        return self(**batch)

    def forward(self, inputs):
        return self.net(inputs).mean()


class Manual(Looking):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Stepless(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_modules_that_look_at_their_trainer_are_estimated_in_silence(precision, capsys):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        plain, looking = (
            json.loads(
                told(
                    capsys, "estimate", f"{name}:{kind}", *CHAIN[1:], "--mode", "pp", "--precision", precision, "--json"
                )
            )
            for name, kind in (("chain", "Chain"), (__name__, "Looking"))
        )
    assert looking["packs"] == plain["packs"] and capsys.readouterr().err == ""
    assert not warned


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((f"{__name__}:Stepless",), "makes a Stepless, which has no training_step of its own"),
        ((f"{__name__}:Manual",), "Manual steps its optimizers itself"),
        (("chain:Chain", "--microbatch", "0"), "--microbatch must be at least 1, got 0"),
        (("chain:Chain", "--pipelines", "0"), "pipelines must be a positive number"),
        (("chain:Chain", "--pipelines", "2", "--mode", "dp"), "are of pp and mixed, got 2 in mode 'dp'"),
        (("chain:Chain", "--pipelines", "3"), "pipelines must divide the 2 devices"),
    ],
)
def test_steps_that_cannot_be_planned_are_refused(capsys, arguments, what):
    assert main(["estimate", *arguments, *CHAIN[1:]]) == 2
    assert what in capsys.readouterr().err


def test_so_many_pipelines_as_are_asked_for(capsys):
    asked = [*CHAIN[:-4], "--gpus", "4x3090", "--memory", "300KiB", "--pipelines", "2", "--json"]
    found = json.loads(told(capsys, "estimate", *asked))
    assert (found["mode"], found["pipelines"]) == ("pp", 2)


def test_microbatches_are_not_larger_than_the_minibatch_and_tables_whole(capsys):
    assert json.loads(told(capsys, "estimate", *CHAIN, "--microbatch", "100", "--json"))["microbatch_size"] <= 32
    assert "\u2026" not in told(capsys, "profile", *CHAIN)
    reasons = told(capsys, "explain", *CHAIN)
    assert "0.000 s" not in reasons and "billion" not in reasons


class Shared(Chain):
    """Layers that are called twice, and a weight of two layers, one of which does more with it."""

    def __init__(self):
        super().__init__(depth=3)
        self.table = nn.Embedding(WIDTH, WIDTH)
        self.table.weight = self.net[0][0].weight

    def training_step(self, batch, batch_idx):
        x = self.net(self.net(self.table(batch[0])))
        return self.head(x).mean() + self.head.bias.sum()  # for which code between layers fetches it


def test_layers_that_share_weights_use_them_each_in_its_way():
    root = on_meta(Shared)
    layers = decompose(root, 2**10)
    narrow = with_narrow_weights(layers, root, (torch.zeros(4, dtype=torch.long), torch.zeros(4)), "bf16-mixed")
    wide = {(layer.name, name) for layer in narrow.layers for name in layer.weights if name not in layer.narrow}
    assert wide == {("table", "net.0.0.weight")}


def test_a_bred_plan_is_told_beside_the_default(capsys, monkeypatch):
    monkeypatch.setattr("harmony_lightning.scheduler.search.genetic_runtime.MAX_SIMULATED", 40)
    bounds = json.loads(told(capsys, "estimate", *CHAIN, "--mode", "pp", "--json"))
    bred = json.loads(told(capsys, "estimate", *CHAIN, "--mode", "pp", "--json", "--planner", "genetic"))
    assert (bounds["planner"], bred["planner"]) == ("bounds", "genetic") and "default" not in bounds
    assert bred["default"]["step_seconds"] == bounds["step_seconds"] and not bred["is_proved"]
    assert bred["step_seconds"] <= 1.1 * bounds["step_seconds"] and bred["peak_bytes"] <= 300 * 1024
    assert "by default" in told(capsys, "estimate", *CHAIN, "--mode", "pp", "--planner", "genetic")


def test_what_would_help_is_asked_of_the_default_planner(capsys, monkeypatch):
    """A bred plan takes seconds, and may be a little slower or faster whatever changes."""
    bred = []

    def breed(*args, **options):
        bred.append(breed_runtime(*args, **options))
        return bred[-1]

    monkeypatch.setattr("harmony_lightning.scheduler.search.genetic_runtime.MAX_SIMULATED", 40)
    monkeypatch.setattr("harmony_lightning.profiled.breed_runtime", breed)
    bounds, genetic = (
        json.loads(told(capsys, "explain", *CHAIN, "--json", "--planner", planner)) for planner in ("bounds", "genetic")
    )
    assert len(bred) == 1 and genetic["step_seconds"] == bred[0].best.seconds
    helping = [reason for reason in bounds["reasons"] if reason.startswith("With ")]
    assert helping and [reason for reason in genetic["reasons"] if reason.startswith("With ")] == helping
    assert genetic.get("mixed_step_seconds") == bounds.get("mixed_step_seconds")
    (said,) = (reason for reason in genetic["reasons"] if "default planner" in reason)
    assert said.endswith(f"whose present one takes {bounds['step_seconds']:.4g} s.")


def test_explain_tells_what_binds_and_what_would_help(capsys):
    answer = json.loads(told(capsys, "explain", *CHAIN, "--json"))
    assert any("binds" in reason for reason in answer["reasons"])
    assert any("twice the memory (600 KiB per GPU)" in reason for reason in answer["reasons"])
    assert "samples/s" in told(capsys, "explain", *CHAIN)


def test_more_memory_is_never_slower(capsys):
    seconds = [
        json.loads(told(capsys, "estimate", *CHAIN[:-1], memory, "--json"))["step_seconds"]
        for memory in ("200KiB", "400KiB", "4MiB")
    ]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["estimate", *CHAIN[:-1], "30KiB"], 1, "raise memory"),
        (["estimate", "chain", *CHAIN[1:]], 2, "write package.module:Class"),
        (["estimate", "chain:Nothing", *CHAIN[1:]], 2, "cannot find chain:Nothing"),
        (["estimate", *CHAIN, "--init", "depth"], 2, "--init takes KEY=VALUE"),
        (["estimate", *CHAIN, "--init", "depth=none"], 2, "cannot make chain:Chain"),
        (["estimate", "chain:Chain", "--batch", "8,a", "--gpus", "3090"], 2, "is no shape"),
        (["estimate", "chain:Chain", "--batch", "8,4:int3", "--gpus", "3090"], 2, "is no dtype"),
        (["estimate", "chain:Chain", "--batch", "8,4", "--batch", "7", "--gpus", "3090"], 2, "as many samples"),
        (["estimate", "chain:Chain", "--batch", "8,9", "--batch", "8", "--gpus", "3090"], 2, "cannot be profiled"),
        (["estimate", "chain:Chain", "--batch", "8,4", "--gpus", "9x9090"], 2, "no GPU is called"),
        (["estimate", "chain:trainer", "--batch", "8,4", "--gpus", "3090"], 2, "has no training_step"),
        (["estimate", "builtins:int", "--batch", "8,4", "--gpus", "3090"], 2, "makes an int, which"),
        (
            ["estimate", f"{__name__}:ByName", "--batch", "8,4", "--gpus", "3090"],
            2,
            "TypeError: ByName(...) argument after ** must be a mapping, not EmulatedTensor. Its batch was one tensor",
        ),
        (["estimate", "none.yaml", "--batch", "8,4", "--gpus", "3090"], 2, "there is no config none.yaml"),
    ],
)
def test_faults_are_one_line_with_the_remedy(capsys, arguments, code, message):
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("harmony: ") and message in captured.err


def test_a_config_whose_class_is_not_found_names_what_is_missing(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("model:\n  _target_: nowhere.Chain\n")
    assert main(["estimate", str(tmp_path / "run.yaml"), *CHAIN[1:]]) == 2
    told = capsys.readouterr().err
    assert "No module named 'nowhere'" in told and "PYTHONPATH" in told and told.count("\n") == 1


def test_a_config_names_the_module(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("model:\n  _target_: chain.Chain\n  depth: 3\n")
    answer = json.loads(
        told(capsys, "estimate", str(tmp_path / "run.yaml"), "--init", "model.depth=5", *CHAIN[1:], "--json")
    )
    assert answer["packs"][-1][1] == 5


def _seconds_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_seventy_billion_weights_take_seconds_and_no_memory():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks/step_time')\n"
        "from harmony_lightning.cli import main\n"
        "sys.exit(main(['estimate', 'models:llama_70b', '--batch', '32,1025:int64', '--precision', 'bf16-mixed', "
        "'--gpus', '4x3090', '--json']))\n"
    )
    begin = _seconds_of_children()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["parameters"] > 70e9 and answer["peak_bytes"] < 24 * 2**30
    assert _seconds_of_children() - begin < 60  # of processors; alone on a machine it takes about 8 s
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # KiB


def test_planning_from_files_needs_no_torch():
    code = (
        "import sys\n"
        "from harmony_lightning.cli import main\n"
        "try: main(['estimate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert main(['topology', '--gpus', '4x3090', '--json']) == 0\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
