"""`harmony plan`: the fastest schedule for a profile on a machine.

With --json it prints one object. Its fields tell the best plan under Harmony's rules with overlap; `own` holds the same
fields for the best plan under our runtime's rules:

    step_seconds         of one step, simulated
    peak_bytes           the most that any GPU holds
    mode                 "pp" or "dp"
    microbatch_forward, microbatch_backward
                         samples
    packs_forward, packs_backward
                         [first layer, last layer] of each pack, both included, in layer order. The last backward pack runs
                         forward and backward together, so the forward packs end before it
    prefetch             packs whose weights come ahead of the running one
    search_seconds       what the search took
    is_proved            whether nothing in the searched family is better
    bound_seconds        all computation shared equally by all GPUs: with full recompute at the top, with none in `own`
"""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from harmony_lightning.profiler import read_machine, read_profile
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.explain import bound_seconds, describe, explain
from harmony_lightning.scheduler.search import Found, search
from harmony_lightning.scheduler.simulate import Rules
from harmony_lightning.units import format_nbytes, parse_nbytes


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "plan",
        help="the fastest schedule for a profile on a machine",
        description="Search the fastest schedule for a profiled model on a machine, under Harmony's rules and our own.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", required=True, metavar="FILE", help="JSON: costs of each layer by microbatch size")
    parser.add_argument("--machine", required=True, metavar="FILE", help="JSON: GPUs, memory, links")
    parser.add_argument("--minibatch", required=True, type=int, metavar="D", help="samples per step, all GPUs together")
    parser.add_argument("--mode", choices=("auto", "pp", "dp"), default="auto", help="default: the faster of both")
    parser.add_argument("--memory", metavar="SIZE", help="per GPU, such as 9e9 or 11GiB; default: the machine's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--explain", action="store_true", help="tell what binds, why others lost, and what would help")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search and print. Raises ConfigurationError for faulty files and sizes, CapacityError if nothing fits."""
    machine = read_machine(arguments.machine)
    memory = parse_nbytes(arguments.memory) if arguments.memory is not None else machine.memory_bytes
    costs = Costs(read_profile(arguments.profile), machine)
    question: dict[str, Any] = {"minibatch": arguments.minibatch, "mode": arguments.mode, "memory_bytes": memory}
    found = {rules: search(costs, rules=rules, **question) for rules in (Rules.HARMONY, Rules.OWN)}
    reasons = {
        rules: list(explain(answer, costs, **question)) if arguments.explain else [] for rules, answer in found.items()
    }
    if arguments.json:
        answer = _fields(found[Rules.HARMONY], costs, arguments.minibatch, reasons[Rules.HARMONY])
        answer["own"] = _fields(found[Rules.OWN], costs, arguments.minibatch, reasons[Rules.OWN])
        print(json.dumps(answer))
        return 0
    _show(found, costs, question, reasons)
    return 0


def _fields(found: Found, costs: Costs, minibatch: int, reasons: list[str]) -> dict[str, Any]:
    schedule = found.best.schedule
    fields = {
        "rules": found.rules,
        "mode": schedule.mode,
        "step_seconds": found.best.seconds,
        "bound_seconds": bound_seconds(costs, minibatch, recompute=found.rules != Rules.OWN),
        "peak_bytes": round(found.best.peak_bytes),
        "microbatch_forward": schedule.microbatch_forward,
        "packs_forward": schedule.packs_forward,
        "microbatch_backward": schedule.microbatch_backward,
        "packs_backward": schedule.packs_backward,
        "prefetch": schedule.prefetch,
        "num_schedules": found.num_schedules,
        "num_simulated": found.num_simulated,
        "is_proved": found.is_proved,
        "search_seconds": found.search_seconds,
    }
    return {**fields, "reasons": reasons} if reasons else fields


def _show(found: dict[Rules, Found], costs: Costs, question: dict[str, Any], reasons: dict[Rules, list[str]]) -> None:
    console = Console()
    machine = costs.machine
    table = Table(
        title=f"{costs.profile.model}, {question['minibatch']} samples per step, {machine.gpus} GPUs of "
        f"{format_nbytes(question['memory_bytes'])}",
    )
    for column in ("rules", "plan"):
        table.add_column(column)
    for column in ("step", "samples/s", "bound", "peak per GPU", "search"):
        table.add_column(column, justify="right")
    for rules, answer in found.items():
        best = answer.best
        bound = bound_seconds(costs, question["minibatch"], recompute=rules is not Rules.OWN)
        table.add_row(
            rules,
            describe(best.schedule),
            f"{best.seconds:.3f} s",
            f"{question['minibatch'] / best.seconds:.3g}",
            f"{bound:.3f} s",
            format_nbytes(best.peak_bytes),
            f"{answer.search_seconds:.2f} s",
        )
    console.print(table)
    for rules, answer in found.items():
        console.print(f"[bold]{rules}[/bold]: forward {_packs(answer.best.schedule.packs_forward)}")
        console.print(f"{' ' * len(rules)}  backward {_packs(answer.best.schedule.packs_backward)}")
        if not answer.is_proved:
            console.print("The search ended at its limit; a slightly better schedule may exist.")
        for reason in reasons[rules]:
            console.print(f"- {reason}", highlight=False)


def _packs(packs: tuple[tuple[int, int], ...]) -> str:
    return " ".join(f"{first}-{last}" for first, last in packs) or "(none)"
