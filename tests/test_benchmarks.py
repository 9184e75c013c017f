"""The benchmarks that need no GPU, or that must say so: their formulas, their bounds, and that they start."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_profiles import FOLDER, published

from harmony_lightning import HarmonyError
from harmony_lightning.plan.timeline import Span, Timeline
from harmony_lightning.strategy.overrides import looks_back, observer_of_gradients

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """Imports modules of one benchmark's folder, which is on the path only when its own script runs."""
    before = set(sys.modules)

    def load(folder, *names):
        monkeypatch.syspath_prepend(str(BENCHMARKS / folder))
        return [importlib.import_module(name) for name in names]

    yield load
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def run(folder, *arguments):
    command = [sys.executable, str(BENCHMARKS / folder / "main.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_scripts_tell_how_to_use_them(modules, capsys):
    done = run("swap_bytes", "--help")
    assert done.returncode == 0 and "usage:" in done.stdout
    (main,) = modules("against_peers", "main")
    with pytest.raises(SystemExit, match="0"):
        main.main(["--help"])
    assert "usage:" in capsys.readouterr().out


def test_the_runtime_moves_what_the_formulas_say(modules):
    """m = 3 on each of 2 GPUs; `rows` itself compares each count with the plan."""
    main, formulas = modules("swap_bytes", "main", "formulas")
    shape = main.Shape(4, 64, 4, 4, 256, 512, is_gated=False)
    runs = {mode: main.run(shape, mode, 2, 3, "1MiB", 4) for mode in ("dp", "pp")}
    table = dict(main.rows(runs, 2, 3, "1MiB"))
    packs = runs["pp"].plan.packs
    weights, met = sum(pack.nbytes for pack in packs), sum(pack.nbytes for pack in packs[-2:])
    assert len(packs) > 2 and {run.statistics.num_microbatches for run in runs.values()} == {6}
    assert table["ours pp, measured"] == formulas.Moved(into_gpus=2 * weights - met, out_of_gpus=weights)
    assert table["Harmony PP"] == formulas.Moved(into_gpus=2 * weights, out_of_gpus=weights)
    assert table["Harmony DP"] == formulas.Moved(into_gpus=4 * weights, out_of_gpus=2 * weights)
    # 3 x (2 GPUs x 2 gathers + 1 share of gradients from the other), 3 x (2 gathers to the other + 2 GPUs' gradients)
    sharded = formulas.Moved(into_gpus=3 * 5 * weights, out_of_gpus=3 * 4 * weights)
    assert table["ZeRO-3 offload, FSDP2 CPU offload"] == sharded


def test_paging_moves_everything_that_is_touched_where_one_page_fits(modules):
    (formulas,) = modules("swap_bytes", "formulas")
    setting = formulas.Setting(weight_nbytes=40, gradient_nbytes=40, num_gpus=2, num_microbatches=3)
    moved = formulas.virtual_memory([(10, 10)] * 4, setting, states=2, memory_bytes=20)
    # Each GPU: weights for 3 forwards, 3 backwards and the update, gradients for 2 additions and the update, states once.
    # Where the order turns round, a page is still there: the last weights 3 times, then the first ones twice, and the
    # first gradients once.
    assert moved.into_gpus == 2 * (7 * 40 - 3 * 10 - 2 * 10 + 3 * 40 - 10 + 80)
    # Gradients after each backward, weights and states after the update.
    assert moved.out_of_gpus == 2 * (3 * 40 + 40 + 80)


def test_paging_moves_nothing_where_all_fits(modules):
    (formulas,) = modules("swap_bytes", "formulas")
    setting = formulas.Setting(weight_nbytes=40, gradient_nbytes=40, num_gpus=1, num_microbatches=3)
    moved = formulas.virtual_memory([(10, 10)] * 4, setting, states=2, memory_bytes=160)
    assert moved == formulas.Moved(into_gpus=0, out_of_gpus=0)


def test_the_bound_is_the_longest_of_what_has_to_be_done(modules):
    (bounds,) = modules("against_peers", "bound")
    work = bounds.Work(
        block_parameters=80,
        head_parameters=20,
        num_parameters=110,
        tokens=10,
        length=4,
        depth=2,
        width=3,
        wire_nbytes=2,
    )
    rates = bounds.Rates(
        flops_per_second=100.0, in_bytes_per_second=20.0, out_bytes_per_second=10.0, updates_per_second=1.0
    )
    assert work.flops == 10 * (8 * 80 + 4 * 2 * 4 * 3 * 2 + 6 * 20)
    swapped = bounds.bound(work, rates, memory_bytes=100)
    assert (swapped.link_in, swapped.link_out) == ((220 + 120) / 20, 220 / 10)
    assert (swapped.seconds, swapped.bottleneck) == (110, "update")
    resident = bounds.bound(work, rates, memory_bytes=16 * 110)
    assert (resident.seconds, resident.bottleneck) == (work.flops / 100, "compute")


def test_competitors_that_fail_are_listed_with_the_reason(modules):
    (main,) = modules("against_peers", "main")
    steps = [{"seconds": seconds, "peak_nbytes": 2**30, "loss": 1.0} for seconds in (9.0, 9.0, 1.0, 3.0)]
    done = main.summary("harmony", steps, None, 1000, None)
    failed = main.summary("deepspeed", [], "ModuleNotFoundError: No module named 'deepspeed'", 1000, None)
    cut = main.summary("fsdp2", steps[:1], "time limit", 1000, None)
    assert (done["tokens_per_second"], done["num_steps"]) == (500, 2)
    rows = main.table([done, failed, cut]).splitlines()
    assert rows[2] == "| harmony | 500 | 2.000 | 2 | 1 GiB |  | ok |"
    assert rows[3] == "| deepspeed |  |  | 0 |  |  | ModuleNotFoundError: No module named 'deepspeed' |"
    assert rows[4] == "| fsdp2 | 111 | 9.000 | 1 | 1 GiB |  | time limit |"


def test_competitors_train_the_same_model_on_the_same_data(tmp_path):
    """With one microbatch all report the same loss: that of the whole minibatch."""
    results = tmp_path / "results.json"
    sizes = ("--sequences", "2", "--microbatch", "2", "--steps", "2", "--precision", "32-true")
    competitors = ("--competitors", "plain", "harmony", "fsdp2")
    done = run("against_peers", "--dry-run", *sizes, *competitors, "--json", str(results))
    assert done.returncode == 0, done.stderr
    losses = {result["name"]: result.get("losses") for result in json.loads(results.read_text())["results"]}
    assert losses["harmony"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["fsdp2"] == pytest.approx(losses["plain"], rel=1e-5)


def test_who_takes_the_time_of_steps_does_not_hold_up_updates(modules):
    (training,) = modules("against_peers", "training")
    module = training.LanguageModel(training.SMALL)
    module.trainer = training.L.Trainer(callbacks=[training._StepEnds(None)], logger=False, enable_checkpointing=False)
    package = sys.modules[training.L.__name__ + ".pytorch"] if training.L.__name__ == "lightning" else training.L
    assert not looks_back(module, package)
    assert observer_of_gradients(module, module.trainer.precision_plugin, package) is None


def test_without_a_gpu_it_says_so(modules, capsys, monkeypatch):
    (main,) = modules("against_peers", "main")
    monkeypatch.setattr(main.torch.cuda, "is_available", lambda: False)
    assert main.main([]) == 2
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "no CUDA GPU" in told


def test_the_automatic_plan_is_nearly_the_best_of_a_sweep(modules, monkeypatch):
    (cases,) = modules("automatic_plan", "cases")
    monkeypatch.setattr(cases, "MARGIN", 1.03)
    case = cases.Case("small", (2, 1), 2, "3090", "server", "24GiB", minibatch=4)
    planned, layers = cases.automatic(case)
    taken = cases.train(case, planned.found.best.schedule, layers)
    seconds, best, count, tried = cases.best_of_sweep(case, layers, planned.costs)
    assert best is not None and 0 < tried < count
    assert taken <= 1.05 * seconds


def test_memory_buys_throughput(modules):
    (main,) = modules("memory_curve", "main")
    arguments = main.argparse.Namespace(depth=3, width=256, length=128, minibatch=8, gpu="3090", host="server")
    main.FACTORS = (1, 2, 3, 4, 6, 8)
    curve = main.measure(arguments)
    seconds, shares = ([row[key] for row in curve["rows"]] for key in ("seconds", "share"))
    assert all(less >= 0.99 * more for more, less in itertools.pairwise(seconds)) and seconds[-1] > seconds[0]
    assert 0 < min(shares) <= max(shares) < 1
    assert all(row["peak_bytes"] <= row["memory_bytes"] for row in curve["rows"])


def test_the_model_s_own_kernels_are_those_that_run(modules):
    import lightning as L

    from harmony_lightning import EmulatedCluster, HarmonyStrategy
    from harmony_lightning.hardware.presets import gpu_model

    breakdowns, models, own, plans = modules("step_time", "breakdown", "models", "own", "plans")
    shape, num_microbatches = models.Shape(3, 256, 4, 4, 1024, 512, is_gated=False), 4
    module = models.LanguageModel(shape)
    plan = plans.travelling(
        module,
        mode="mixed",
        num_gpus=2,
        memory_bytes=2**30,
        microbatch_size=1,
        num_microbatches=num_microbatches,
        stash="device",
    )
    plan = plans.first_on_devices(plan, module)
    assert not (plan.resident or plan.updates_stay) and plan.prefetch == 1
    assert [pack.update for pack in plan.packs[1:3]] == ["device", "host"]
    cluster = EmulatedCluster(2, preset="3090", fake=True, check_races=False)
    strategy = HarmonyStrategy(plan=plan, layers=plans.LAYERS, cluster=cluster)
    breakdown = breakdowns.Breakdown(1)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=2,
        callbacks=[breakdown],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with breakdown.counting():
        trainer.fit(module, models.batches([num_microbatches, 1], 512, 512))
    sums = breakdown.seconds.pop("gradient sums")
    one = own.own_kernels(shape, (1, 513), gpu_model("3090"), "bf16-mixed")
    expected = one.per_step(num_microbatches, [f"blocks.{i}" for i in range(3)])
    # The runtime adds a few: seeds of backward, inputs that are brought in.
    assert 0.9 < expected / sum(breakdown.seconds.values()) <= 1
    assert 0.98 < one.sums_per_step(own.num_sums(strategy.plan)) / sums <= 1


@pytest.mark.parametrize(
    ("depth", "num_gpus", "num_microbatches", "dealt"),
    [(5, 3, 12, (4, 5, 6)), (5, 3, 11, (6,)), (6, 3, 12, (7,))],
    ids=["two left over", "few microbatches", "none left over"],
)
def test_blocks_that_are_left_over_are_dealt_with_the_head(modules, depth, num_gpus, num_microbatches, dealt):
    models, plans = modules("step_time", "models", "plans")
    module = models.LanguageModel(models.Shape(depth, 64, 4, 4, 128, 256, is_gated=False))
    plan = plans.travelling(
        module,
        mode="mixed",
        num_gpus=num_gpus,
        memory_bytes=2**30,
        microbatch_size=1,
        num_microbatches=num_microbatches,
        stash="host",
    )
    assert plan.dealt == dealt
    taken = [len([p for p in range(1, dealt[0]) if plan.device(p, 0) == d]) for d in range(num_gpus)]
    assert (len(set(taken)) == 1) == (num_microbatches == 12)
    assert {plan.device(p, m) for p in dealt for m in range(num_microbatches)} == set(range(num_gpus))


def test_eight_gpus_get_more_microbatches_than_twice_four(modules):
    """As they wait for each other in more turns."""
    (sweep,) = modules("step_time", "sweep")
    assert [next(sweep.attempts(count, 4, 1 << 30))[0] for count in (8, 32, 128)] == [1, 4, 8]
    assert [next(sweep.attempts(count, 8, 1 << 30))[0] for count in (8, 32, 128, 512)] == [1, 1, 4, 8]


def test_rows_of_a_sweep_are_measured_once(modules, tmp_path, monkeypatch):
    """What is in the file is not measured again; what did not fit in one step is not tried in a larger one."""
    sweep, bounds, main = modules("step_time", "sweep", "bound", "main")
    tried = []

    def measure(arguments, num_tokens):
        size = num_tokens // sweep.LENGTH // arguments.microbatches
        tried.append((num_tokens, size, arguments.update))
        if size > 2 or arguments.model == "llama-70b":
            raise HarmonyError("layer embedding needs 9 GiB (weights 3 GiB), but each GPU offers 8 GiB")
        bound = bounds.Bound(1.5, kernels=2.0, sums=0.1, link_in=0.1, link_out=0.1, update=1.0, host_memory=1.0)
        return main.Measured(3.0, bound, "a of b", "travel", updated_there=4, peak_bytes=2**30, took=1.0, breakdown="")

    monkeypatch.setattr(sweep, "measure", measure)
    for tokens in ([8192], [8192, 32768, 65536]):
        sweep.sweep(["4x3090"], ["llama-8b", "llama-70b"], tokens, tmp_path / "rows")
    assert tried == [
        *[(8192, 1, "first"), (8192, 1, "first"), (8192, 1, "host")],
        *[(32768, 4, "first"), (32768, 2, "first"), (65536, 2, "first")],
    ]
    table = sweep.table(tmp_path / "rows").splitlines()
    assert (
        table[2] == "| 4x3090 | llama-8b | 8192 | a of b | 4 | 3.000 s | 2.000 s (kernels) | 1.500 | 1.579 | 1.0 GiB |"
    )
    assert table[-1].endswith("65536 | does not fit: layer embedding needs 9 GiB | | | | | | |") and len(table) == 8


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_a_step_starts_with_its_second_pack(modules, num_gpus):
    """On one GPU, too, where the first pack's forward comes between."""
    (bounds,) = modules("step_time", "bound")
    names = [f"forward of pack {p}, microbatch {m}" for p in (0, 1, 2) for m in (0, 1)]
    names += [f"backward of pack {p}, microbatch {m}" for p in (1, 0) for m in (0, 1)]
    spans = tuple(
        Span(
            device=int(name.split()[3][0]) % num_gpus, lane="compute", name=name, start=t, end=t + 1, nbytes=0, flops=0
        )
        for t, name in enumerate(3 * names)
    )
    assert bounds.starts(Timeline(spans=spans)) == [2, 12, 22]


@published
def test_published_schedules_and_ours_are_told():
    done = run("published_schedules", "--folder", str(FOLDER))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| gpt2_xl ", "| bert_96 "))]
    assert len(rows) == 3 * 12  # agreement, the search under Harmony's rules, and under ours
