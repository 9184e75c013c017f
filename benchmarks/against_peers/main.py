"""Tokens per second on one GPU whose memory is too small for the model: harmony against what else a user could take.

Each competitor trains the same model in a process of its own, under the same limit of GPU memory and a time limit; all
together take less than ten minutes. Those that are not installed or fail are listed with the reason. `README.md` has more.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bound import Bound, Rates, Work, bound
from training import COMPETITORS, MODELS, SMALL, Report, sizes

from harmony_lightning.units import format_nbytes, parse_nbytes

ON_HOST = ("harmony", "plain", "fsdp2")
"""Competitors of a dry run."""
WARM_UP = 2
"""Reported steps that do not count if there are more: competitors trace, plan and allocate in them."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    if options.competitor:
        return _compete(options)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU here; --dry-run trains a small model on the host instead, for what needs no GPU")
        return 2
    deadline = time.monotonic() + options.total_limit
    report: dict[str, Any] = {"options": vars(options) | {"shape": asdict(options.shape)}}
    report["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    limit = None
    if not options.dry_run:
        lines, reason = _run("rates", arguments, options, time.monotonic() + options.limit)
        measured = next((line for line in lines if "rates" in line), None)
        if measured is None:
            print(f"the machine's rates could not be measured ({reason}), so there is no bound")
        else:
            report |= measured
            limit = bound(_work(options), Rates(**measured["rates"]), options.memory)
            report["bound"] = asdict(limit) | {"seconds": limit.seconds, "bottleneck": limit.bottleneck}
    names = [name for name in options.competitors if not options.dry_run or name in ON_HOST]
    results = report["results"] = []
    for index, name in enumerate(names):
        share = (deadline - time.monotonic()) / (len(names) - index)
        lines, reason = _run(name, arguments, options, time.monotonic() + min(options.limit, share))
        results.append(summary(name, lines, reason, options.sequences * options.length, limit))
        print(f"{name}: {results[-1]['status']}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    if limit is not None:
        print(f"bound: {limit.seconds:.3f} s per step, by {limit.bottleneck}; {report['gpu']}\n")
    print(table(results))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2-xl", choices=sorted(MODELS))
    parser.add_argument("--depth", type=int, help="number of blocks, instead of the model's own")
    parser.add_argument("--memory", type=parse_nbytes, default="12GiB", help="of the GPU, for each competitor")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=32, help="of a step")
    parser.add_argument("--microbatch", type=int, default=4, help="sequences of a microbatch")
    parser.add_argument("--precision", default="bf16-mixed", choices=("bf16-mixed", "32-true"))
    parser.add_argument("--steps", type=int, default=12, help="of each competitor, at most")
    parser.add_argument("--competitors", nargs="+", default=list(COMPETITORS), choices=list(COMPETITORS))
    parser.add_argument("--limit", type=float, default=100, help="seconds for each competitor, at most")
    parser.add_argument("--total-limit", type=float, default=570, help="seconds for all")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--verbose", action="store_true", help="show what the competitors print")
    parser.add_argument("--dry-run", action="store_true", help="a small model on the host, to see whether it works")
    parser.add_argument("--competitor", choices=("rates", *COMPETITORS), help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sequences % options.microbatch:
        parser.error(f"--sequences {options.sequences} is not a multiple of --microbatch {options.microbatch}")
    options.shape = (
        MODELS[options.model] if options.depth is None else replace(MODELS[options.model], depth=options.depth)
    )
    options.accelerator = "gpu"
    if options.dry_run:
        options.shape, options.accelerator, options.length = SMALL, "cpu", 16
    return options


def _compete(options: argparse.Namespace) -> int:
    """In a process of its own: train, or measure the machine, and write the report."""
    report = Report(options.report)
    try:
        if options.competitor == "rates":
            from rates import measure

            dtype = torch.bfloat16 if options.precision.startswith("bf16") else torch.float32
            report.write(rates=asdict(measure(dtype)), gpu=torch.cuda.get_device_name())
            return 0
        if options.accelerator == "gpu" and options.competitor != "plain-uncapped":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory / total))
        torch.manual_seed(0)
        COMPETITORS[options.competitor](options, report)
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        report.write(failed=f"{type(error).__name__}: {first}"[:200])
        raise
    return 0


def _run(
    name: str, arguments: Sequence[str], options: argparse.Namespace, deadline: float
) -> tuple[list[dict[str, Any]], str | None]:
    """What a competitor reported, and why it ended early."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report"
        path.touch()
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, __file__, *arguments, "--competitor", name, "--report", str(path)]
        output = None if options.verbose else subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
            reason = None if process.returncode == 0 else f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = "time limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # The process may have been stopped within its last line.
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return lines, next((line["failed"] for line in lines if "failed" in line), reason)


def summary(
    name: str, lines: Sequence[dict[str, Any]], reason: str | None, tokens: int, limit: Bound | None
) -> dict[str, Any]:
    """One row of results: of the steps that were reported, those after the warm-up."""
    steps = [line for line in lines if "seconds" in line]
    counted = steps[WARM_UP:] or steps
    result: dict[str, Any] = {"name": name, "num_steps": len(counted), "status": reason or "ok"}
    result |= {key: value for line in lines for key, value in line.items() if key == "statistics"}
    if counted:
        seconds = sum(step["seconds"] for step in counted) / len(counted)
        result |= {
            "seconds_per_step": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_nbytes": max(step["peak_nbytes"] for step in steps),
            "losses": [step["loss"] for step in steps],
            "share_of_bound": limit.seconds / seconds if limit is not None else None,
        }
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| competitor | tokens/s | s per step | steps | peak GPU memory | of the bound | status |",
        "|" + "---|" * 7,
    ]
    for result in results:
        cells = ["", "", "0", "", ""]
        if "tokens_per_second" in result:
            share = result["share_of_bound"]
            cells = [
                f"{result['tokens_per_second']:.0f}",
                f"{result['seconds_per_step']:.3f}",
                str(result["num_steps"]),
                format_nbytes(result["peak_nbytes"]) if result["peak_nbytes"] else "",
                f"{share:.0%}" if share is not None else "",
            ]
        rows.append(f"| {result['name']} | {' | '.join(cells)} | {result['status'].replace('|', '/')} |")
    return "\n".join(rows)


def _work(options: argparse.Namespace) -> Work:
    return Work(
        **sizes(options.shape),
        tokens=options.sequences * options.length,
        length=options.length,
        depth=options.shape.depth,
        width=options.shape.width,
        wire_nbytes=2 if options.precision.startswith("bf16") else 4,
    )


if __name__ == "__main__":
    sys.exit(main())
