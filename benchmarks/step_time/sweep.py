"""Rows of models, machines and tokens per step; each is kept in a file as it comes, so that a sweep can be gone on with.

    python benchmarks/step_time/sweep.py --machines 4x3090 8x4090 4x1080ti
    python benchmarks/step_time/sweep.py --table

Weights travel, stashes wait on the host, first packs are updated on GPUs where there is room. Microbatches are as large as
fits, up to 8 sequences, but there are at least 8 on four GPUs and 32 on eight, if there are so many sequences. A minibatch
has at most 32 of them: a step of more is one of several minibatches, whose gradients are accumulated.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path

from main import argument_parser, be_quiet, measure
from models import MODELS

from harmony_lightning import HarmonyError

MACHINES = ("4x3090", "8x4090", "4x1080ti")
TOKENS = (2048, 8192, 32768, 131072, 524288)
LENGTH = 1024
MOST_SEQUENCES = 8
"""Of a microbatch. Larger ones have fewer sums, which are few by then, and leave no memory for what is on its way: with 16
of 1024 tokens a step of the 30B model on 3090s takes 5 % longer."""
MOST_MICROBATCHES = 32
"""Of a minibatch: what they leave for the next pack waits until a GPU comes to that, and takes memory meanwhile."""
ROWS = Path(__file__).parent / "rows.jsonl"

Row = dict[str, object]


def least_microbatches(num_gpus: int) -> int:
    """As far as there are sequences. In the turns of a pipeline N GPUs wait for N (N - 1) / (2 M L) of the time in L
    blocks, which is about 1 / L with so many."""
    return max(2, num_gpus**2 // 2)


def attempts(num_sequences: int, num_gpus: int, largest: int) -> Iterator[tuple[int, str]]:
    """Sequences per microbatch, and where first packs are updated, best first."""
    size = 1
    while size < min(largest, MOST_SEQUENCES) and 2 * size * least_microbatches(num_gpus) <= num_sequences:
        size *= 2
    while size:
        yield size, "first"
        size //= 2
    yield 1, "host"


def measure_row(machine: str, model: str, num_tokens: int, largest: int) -> Row:
    num_gpus, gpu = machine.split("x", 1)
    reason = ""
    for size, update in attempts(num_tokens // LENGTH, int(num_gpus), largest):
        options = f"--travelling --stash host --model {model} --gpu {gpu} --num-gpus {num_gpus} --update {update}"
        count = -(-num_tokens // LENGTH // size)
        accumulate = -(-count // MOST_MICROBATCHES)
        options += f" --microbatches {count // accumulate} --accumulate {accumulate}"
        arguments = argument_parser().parse_args(options.split())
        try:
            found = measure(arguments, num_tokens)
        except HarmonyError as error:
            reason = str(error)
            continue
        finally:
            gc.collect()
        return {
            "seconds": found.seconds,
            "microbatches": found.microbatches,
            "size": size,
            "updated_there": found.updated_there,
            "peak_bytes": found.peak_bytes,
            "took": found.took,
            "bound": found.least.seconds,
            "resource": found.least.resource,
            "without_sums": found.least.seconds_without_sums,
            **vars(found.least),
        }
    return {"does_not_fit": reason, "size": 1}


def sweep(machines: list[str], models: list[str], tokens: list[int], path: Path) -> None:
    """Rows that are not in the file."""
    known = read(path)
    for machine in machines:
        for num_tokens in sorted(tokens):
            for model in models:
                if (machine, model, num_tokens) in known:
                    continue
                mine = [row for key, row in known.items() if key[:2] == (machine, model)]
                failed = next((row for row in mine if "does_not_fit" in row), None)
                # What did not fit with fewer tokens in microbatches of that size does not fit with more.
                largest = min((int(str(row["limit"])) for row in mine if row.get("limit")), default=1 << 30)
                row = failed or measure_row(machine, model, num_tokens, largest)
                wanted = next(attempts(num_tokens // LENGTH, int(machine.split("x")[0]), largest))[0]
                limit = row["size"] if int(str(row["size"])) < wanted else None
                row = {**row, "machine": machine, "model": model, "tokens": num_tokens, "limit": limit}
                known[machine, model, num_tokens] = row
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(line(row), flush=True)


def read(path: Path) -> dict[tuple[str, str, int], Row]:
    rows = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    return {(row["machine"], row["model"], row["tokens"]): row for row in rows}


HEADER = (
    "| GPUs | model | tokens per step | microbatches | updated on GPUs | step | bound | ratio | without sums | "
    "peak per GPU |\n|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    begin = f"| {row['machine']} | {row['model']} | {row['tokens']} |"
    if "does_not_fit" in row:
        return f"{begin} does not fit: {str(row['does_not_fit']).split(' (')[0]} | | | | | | |"
    seconds, bound, without = (float(str(row[name])) for name in ("seconds", "bound", "without_sums"))
    return (
        f"{begin} {row['microbatches']} | {row['updated_there'] or 'none'} | {seconds:.3f} s | {bound:.3f} s "
        f"({str(row['resource']).replace('_', ' ')}) | {seconds / bound:.3f} | {seconds / without:.3f} | "
        f"{float(str(row['peak_bytes'])) / 2**30:.1f} GiB |"
    )


def table(path: Path) -> str:
    order = (list(MACHINES), list(MODELS))
    rows = read(path)
    keys = sorted(rows, key=lambda key: (order[0].index(key[0]), order[1].index(key[1]), key[2]))
    return "\n".join([HEADER, *(line(rows[key]) for key in keys)])


def draw(path: Path, picture: Path) -> None:
    """Ratios over tokens; filled where kernels are what binds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = read(path)
    machines = [machine for machine in MACHINES if any(key[0] == machine for key in rows)]
    figure, panels = pyplot.subplots(1, len(machines), figsize=(4 * len(machines), 3.5), sharey=True, squeeze=False)
    for axes, machine in zip(panels[0], machines, strict=True):
        for color, model in zip(("C0", "C1", "C2", "C3"), MODELS, strict=True):
            mine = [rows[key] for key in sorted(rows) if key[:2] == (machine, model) and "seconds" in rows[key]]
            tokens = [row["tokens"] for row in mine]
            ratios = [float(str(row["seconds"])) / float(str(row["bound"])) for row in mine]
            axes.plot(tokens, ratios, color=color, label=model)
            for row, ratio in zip(mine, ratios, strict=True):
                face = color if row["resource"] == "kernels" else "white"
                axes.plot(row["tokens"], ratio, "o", color=color, markerfacecolor=face)
        axes.set(title=machine, xlabel="tokens per step", xscale="log", ylim=(1, 1.3))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("step / bound")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", nargs="+", default=list(MACHINES), help="number and preset of GPUs")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--picture", type=Path, help="draw what is there; needs matplotlib")
    arguments = parser.parse_args()
    if arguments.picture is not None:
        draw(arguments.rows, arguments.picture)
        return
    if arguments.table:
        print(table(arguments.rows))
        return
    be_quiet()
    print(HEADER)
    sweep(arguments.machines, arguments.models, arguments.tokens, arguments.rows)


if __name__ == "__main__":
    main()
