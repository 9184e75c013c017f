"""`harmony estimate` and `harmony explain`: whether a module trains on some GPUs, how fast, and what limits it.

With --json one object is printed:

    step_seconds, samples_per_second
                         predicted for the best plan, when its steps have settled and what fits stays on the GPUs
    peak_bytes, memory_bytes
                         the most that any GPU needs, and what each offers; the rest is filled with what stays
    updated_there, updates_stay
                         packs that GPUs update, and those of them whose states stay there; the host updates the others.
                         The optimizer is taken to be a fused Adam
    resident, stash_stays, kept_layers
                         what stays: packs whose weights do, packs whose stashes do, layers that keep their activations
    host_bytes           weights, optimizer states, gradients and stashes on the host
    parameters           of the module
    mode, pipelines, num_packs, packs, microbatch_size, prefetch, stash, dealt
                         the plan; packs as [first layer, last layer], both included, in the order of calls; `pipelines`
                         side by side, or `dealt` packs whose microbatches go round the GPUs, make pp mixed
    binds                what the step's critical path is made of, largest first
    is_proved            whether nothing in the searched family is better, by bounds
    planner, search_seconds
                         which search, and what it took; with --planner genetic, `default` holds the default planner's
                         step_seconds and search_seconds, and tells mixed_step_seconds and what would help
    reasons              with `explain`: what binds, why others lost, what would help
"""

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from harmony_lightning.cli.command import Commands, add_command
from harmony_lightning.cli.console import console
from harmony_lightning.cli.model import add_model_arguments, parse_batch
from harmony_lightning.cli.profile import profile_for
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.scheduler.explain import break_down, describe, explain
from harmony_lightning.scheduler.simulate import Rules
from harmony_lightning.units import format_nbytes

if TYPE_CHECKING:
    from harmony_lightning.scheduler.costs import Costs
    from harmony_lightning.scheduler.search.found import Found


def add(commands: Commands) -> None:
    """Add both commands and their arguments."""
    for name, what in (
        ("estimate", "whether a LightningModule fits some GPUs, and how fast it trains"),
        ("explain", "the same, with what limits it and what would help"),
    ):
        description = f"Tell {what}. With --gpus no GPU is needed."
        parser = add_command(commands, name, run, what=what, description=description, epilog=__doc__)
        add_model_arguments(parser)
        parser.add_argument(
            "--mode", choices=("auto", "pp", "dp", "mixed"), default="auto", help="default: the fastest"
        )
        parser.add_argument("--pipelines", type=int, metavar="N", help="side by side; default: the fastest")
        parser.add_argument("--microbatch", type=int, metavar="SAMPLES", help="default: what the search finds best")
        parser.add_argument("--planner", choices=("bounds", "genetic"), default="bounds", help="default: bounds")
        parser.set_defaults(is_explained=name == "explain")


def run(arguments: argparse.Namespace) -> int:
    """Raises CapacityError if nothing fits; ConfigurationError or UnsupportedError with what to do."""
    from harmony_lightning.profiled import Question, find_plan, host_bytes

    minibatch = parse_batch(arguments.batch).samples
    microbatch_size = arguments.microbatch
    if microbatch_size is not None and microbatch_size < 1:
        raise ConfigurationError(f"--microbatch must be at least 1, got {microbatch_size}")
    measured, decomposition, machine = profile_for(arguments)
    question = Question(
        minibatch=minibatch,
        memory_bytes=machine.memory_bytes,
        mode=arguments.mode,
        pipelines=arguments.pipelines,
        microbatch_size=None if microbatch_size is None else min(microbatch_size, minibatch),
        stays=True,
        update="auto",
        planner=arguments.planner,
    )
    planned = find_plan(measured, machine, decomposition, question)
    question = replace(question, planner="bounds")  # what is asked beside: a bred plan takes seconds each
    best, schedule = planned.found.best, planned.found.best.schedule
    parts = break_down(schedule, planned.costs, Rules.RUNTIME).parts
    reasons = []
    if arguments.is_explained:

        def again(costs: "Costs", samples: int, memory_bytes: float) -> "Found":
            asked = replace(question, minibatch=samples, memory_bytes=round(memory_bytes))
            return find_plan(measured, costs.machine, decomposition, asked).found

        asked: dict[str, Any] = {"minibatch": minibatch, "mode": arguments.mode, "memory_bytes": machine.memory_bytes}
        reasons = list(explain(planned.found, planned.costs, **asked, search_again=again, default=planned.default))
    fields = {
        "step_seconds": best.seconds,
        "samples_per_second": minibatch / best.seconds,
        "peak_bytes": round(best.peak_bytes),
        "memory_bytes": machine.memory_bytes,
        "host_bytes": round(host_bytes(planned)),
        "parameters": measured.num_parameters,
        "mode": schedule.mode,
        "num_packs": len(schedule.packs_backward),
        "packs": schedule.packs_backward,
        "microbatch_size": schedule.microbatch_backward,
        "prefetch": schedule.prefetch,
        "stash": schedule.stash,
        "pipelines": schedule.pipelines,
        "dealt": schedule.dealt,
        "updated_there": schedule.updated_there,
        "updates_stay": schedule.updates_stay,
        "resident": schedule.resident,
        "stash_stays": schedule.stash_stays,
        "kept_layers": len({*schedule.keep, schedule.num_layers - 1}),
        "binds": [name for name, seconds in parts if seconds > 0],
        "is_proved": planned.found.is_proved,
        "planner": arguments.planner,
        "search_seconds": planned.found.search_seconds,
        "machine": machine.name,
    }
    if (default := planned.default) is not None:
        fields["default"] = {"step_seconds": default.best.seconds, "search_seconds": default.search_seconds}
    if arguments.json:
        print(json.dumps({**fields, **({"reasons": reasons} if reasons else {})}))
        return 0
    table = Table(title=f"{measured.profile.model} on {machine.name}", show_header=False)
    table.add_row("weights", _count(measured.num_parameters))
    table.add_row("plan", describe(schedule) + f", stashes on the {schedule.stash}")
    table.add_row(
        "stays",
        f"weights of {len(schedule.resident)} packs, stashes of {len(schedule.stash_stays)}, activations of "
        f"{fields['kept_layers']} layers",
    )
    table.add_row("step", f"{best.seconds:.4g} s for {minibatch} samples")
    if default is not None:
        table.add_row("by default", f"{default.best.seconds:.4g} s, {describe(default.best.schedule)}")
    table.add_row("samples/s", f"{minibatch / best.seconds:.4g}")
    table.add_row("peak per GPU", f"{format_nbytes(best.peak_bytes)} of {format_nbytes(machine.memory_bytes)}")
    table.add_row("host memory", format_nbytes(host_bytes(planned)))
    table.add_row("what binds", ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts if seconds > 0))
    output = console()
    output.print(table)
    for sentence in reasons:
        output.print(f"- {sentence}", highlight=False)
    return 0


def _count(number: int) -> str:
    """Four digits, and a word."""
    for factor, word in ((10**9, " billion"), (10**6, " million")):
        if number >= factor:
            return f"{number / factor:.4g}{word}"
    return f"{number:,}"
