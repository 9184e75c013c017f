"""`harmony plan`: the fastest schedule for a profile on a machine.

With --json it prints one object. Its fields tell the best plan under Harmony's rules with overlap; `own` holds the same
fields for the best plan with what our runtime can do: under our own rules, which prefetch and leave packs as free as
Harmony's, or under those by which the runtime carries plans out now, where what these let stay and deal is faster.

    rules                "harmony"; in `own` "own" or "runtime"
    step_seconds         of one step, simulated
    peak_bytes           the most that any GPU holds
    mode                 "pp" or "dp"
    microbatch_forward, microbatch_backward
                         samples
    packs_forward, packs_backward
                         [first layer, last layer] of each pack, both included, in layer order. The last backward pack runs
                         forward and backward together, so the forward packs end before it
    prefetch             packs whose weights come ahead of the running one, and whose gradients leave behind it
    boundary             where packs hand over in dp: "device" or "host"
    keep                 layers that keep their activations from forward to backward
    resident             backward packs whose weights stay on their devices
    stash, stash_stays   where inputs of layers wait from forward to backward: "device" or "host", and in the latter case
                         backward packs whose inputs stay on the devices nevertheless
    pipelines            side by side, over which microbatches are dealt in pp; 1 under Harmony's rules and our own
    dealt                backward packs whose microbatches are dealt over the GPUs in pp, as all are in dp ("mixed")
    search_seconds       what the search took
    is_proved            whether nothing in the searched family is better
    planner              "bounds", which proves its plan the best of its family, or "genetic", which breeds plans
    bound_seconds        all computation shared equally by all GPUs: with full recompute at the top, with none in `own` and
                         where the plan needs so little recompute that its step is shorter than the former

With --planner genetic, `default` holds the default planner's step_seconds and search_seconds beside each, and the table
shows both.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from harmony_lightning.cli.command import Commands, add_command
from harmony_lightning.cli.console import console
from harmony_lightning.profiler import read_machine, read_profile
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.explain import bound_seconds, describe, explain
from harmony_lightning.scheduler.search.found import Found
from harmony_lightning.scheduler.search.genetic import breed
from harmony_lightning.scheduler.search.own import costs_under, search_own
from harmony_lightning.scheduler.search.schedules import search
from harmony_lightning.scheduler.simulate import Rules
from harmony_lightning.units import format_nbytes, parse_nbytes


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = add_command(
        commands,
        "plan",
        run,
        what="the fastest schedule for a profile on a machine",
        description="Search the fastest schedule for a profiled model on a machine, under Harmony's rules and our own.",
        epilog=__doc__,
    )
    parser.add_argument("--profile", required=True, metavar="FILE", help="JSON: costs of each layer by microbatch size")
    parser.add_argument("--machine", required=True, metavar="FILE", help="JSON: GPUs, memory, links")
    parser.add_argument("--minibatch", required=True, type=int, metavar="D", help="samples per step, all GPUs together")
    parser.add_argument("--mode", choices=("auto", "pp", "dp"), default="auto", help="default: the faster of both")
    parser.add_argument("--memory", metavar="SIZE", help="per GPU, such as 9e9 or 11GiB; default: the machine's")
    parser.add_argument("--planner", choices=("bounds", "genetic"), default="bounds", help="default: bounds")
    parser.add_argument("--explain", action="store_true", help="tell what binds, why others lost, and what would help")


def run(arguments: argparse.Namespace) -> int:
    """Search and print. Raises ConfigurationError for faulty files and sizes, CapacityError if nothing fits."""
    machine = read_machine(arguments.machine)
    memory = parse_nbytes(arguments.memory) if arguments.memory is not None else machine.memory_bytes
    costs = Costs(read_profile(arguments.profile), machine)
    question: dict[str, Any] = {"minibatch": arguments.minibatch, "mode": arguments.mode, "memory_bytes": memory}
    default = {
        Rules.HARMONY: search(costs, rules=Rules.HARMONY, **question),
        Rules.OWN: search_own(costs, **question),
    }
    found = default
    if arguments.planner == "genetic":
        found = {rules: breed(costs, rules=rules, **question) for rules in default}
    reasons = {
        rules: list(_explained(rules, answer, costs, question, None if found is default else default[rules]))
        if arguments.explain
        else []
        for rules, answer in found.items()
    }
    if arguments.json:
        of_harmony, of_own = (
            {**_fields(found[rules], costs, arguments.minibatch), "planner": arguments.planner} for rules in found
        )
        for rules, fields in zip(found, (of_harmony, of_own), strict=True):
            if found is not default:
                best = default[rules]
                fields["default"] = {"step_seconds": best.best.seconds, "search_seconds": best.search_seconds}
            if reasons[rules]:
                fields["reasons"] = reasons[rules]
        print(json.dumps({**of_harmony, "own": of_own}))
        return 0
    rows = [
        (str(rules) if answer.rules == rules else f"{rules}, {answer.rules}'s rules", answer)
        for rules, answer in default.items()
    ]
    if found is not default:
        rows += [(f"{rules}, genetic", answer) for rules, answer in found.items()]
    _show(rows, costs, question, {str(rules): reasons[rules] for rules in found})
    return 0


def _explained(
    rules: Rules, found: Found, costs: Costs, question: dict[str, Any], default: Found | None
) -> Iterator[str]:
    """Sentences on a plan, under the rules that it was found under; `default`: the default planner's, if it was bred."""
    if found.rules == rules and (default is None or default.rules == rules):
        return explain(found, costs, **question, default=default)

    def again(changed: Costs, minibatch: int, memory_bytes: float) -> Found:
        with_original = costs.on(changed.machine)
        return search_own(with_original, minibatch=minibatch, mode=question["mode"], memory_bytes=memory_bytes)

    under = costs_under(found.rules, costs, question["memory_bytes"])
    return explain(found, under, **question, search_again=again, default=default)


def _fields(found: Found, costs: Costs, minibatch: int) -> dict[str, Any]:
    schedule = found.best.schedule
    first, last = schedule.packs_backward[-1]
    kept = {*schedule.keep, last} if found.rules == Rules.RUNTIME else range(first, last + 1)
    return {
        "rules": found.rules,
        "mode": schedule.mode,
        "step_seconds": found.best.seconds,
        "bound_seconds": _bound(found, costs, minibatch),
        "peak_bytes": round(found.best.peak_bytes),
        "microbatch_forward": schedule.microbatch_forward,
        "packs_forward": schedule.packs_forward,
        "microbatch_backward": schedule.microbatch_backward,
        "packs_backward": schedule.packs_backward,
        "prefetch": schedule.prefetch,
        "boundary": schedule.boundary if found.rules == Rules.OWN or schedule.mode == "pp" else "host",
        "keep": sorted(kept),
        "resident": schedule.resident,
        "stash": schedule.stash,
        "stash_stays": schedule.stash_stays,
        "pipelines": schedule.pipelines,
        "dealt": schedule.dealt,
        "num_schedules": found.num_schedules,
        "num_simulated": found.num_simulated,
        "is_proved": found.is_proved,
        "search_seconds": found.search_seconds,
    }


def _bound(found: Found, costs: Costs, minibatch: int) -> float:
    """Seconds. The last pack runs forward and backward together, so the larger it is, the less there is to recompute."""
    full = bound_seconds(costs, minibatch, recompute=True)
    is_full = found.rules == Rules.HARMONY and full <= found.best.seconds
    return full if is_full else bound_seconds(costs, minibatch, recompute=False)


def _show(
    rows: Sequence[tuple[str, Found]], costs: Costs, question: dict[str, Any], reasons: dict[str, list[str]]
) -> None:
    output = console()
    machine, minibatch = costs.machine, question["minibatch"]
    memory = format_nbytes(question["memory_bytes"])
    table = Table(title=f"{costs.profile.model}, {minibatch} samples per step, {machine.gpus} GPUs of {memory}")
    table.add_column("rules")
    table.add_column("plan")
    for column in ("step", "samples/s", "bound", "peak per GPU", "search"):
        table.add_column(column, justify="right")
    for name, found in rows:
        table.add_row(
            name,
            describe(found.best.schedule),
            f"{found.best.seconds:.3f} s",
            f"{minibatch / found.best.seconds:.3g}",
            f"{_bound(found, costs, minibatch):.3f} s",
            format_nbytes(found.best.peak_bytes),
            f"{found.search_seconds:.2f} s",
        )
    output.print(table)
    for name, found in rows:
        output.print(f"[bold]{name}[/bold]: forward {_packs(found.best.schedule.packs_forward)}")
        output.print(f"{' ' * len(name)}  backward {_packs(found.best.schedule.packs_backward)}")
        if not found.is_proved:
            output.print("A better schedule may exist: nothing proves this one the best.")
    for rules, sentences in reasons.items():
        for sentence in sentences:
            output.print(f"- {rules}: {sentence}", highlight=False)


def _packs(packs: tuple[tuple[int, int], ...]) -> str:
    return " ".join(f"{first}-{last}" for first, last in packs) or "(none)"
