"""Which placement is fastest: pp, with its last pack dealt or not, dp, or several pipelines; `README.md` tells more."""

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from harmony_lightning.cli import main as harmony

sys.path.insert(0, str(Path(__file__).parents[1] / "step_time"))

ROWS = (
    ("gpt2_xl", "8x4090", 16),
    ("gpt2_xl", "8x4090", 128),
    ("llama_8b", "8x4090", 64),
    ("llama_8b", "8x3090", 16),
    ("llama_8b", "4x3090", 32),
    ("gpt2_xl", "4x1080ti", 32),
    ("llama_8b", "8xa100-40", 8),
)
"""Model, GPUs, sequences of 1024 tokens per step."""
HEADER = "| model | GPUs | sequences | pp | last pack dealt | dp | pipelines | this took |\n" + "|---" * 8 + "|"


def estimate(model: str, gpus: str, sequences: int, *arguments: str) -> dict[str, Any]:
    """What `harmony estimate` tells."""
    question = ["estimate", f"models:{model}", "--batch", f"{sequences},1025:int64", "--gpus", gpus]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        harmony([*question, "--precision", "bf16-mixed", "--json", *arguments])
    return json.loads(told.getvalue())


def cell(found: dict[str, Any]) -> str:
    return f"{found['step_seconds']:.3f} s"


def dealt_cell(found: dict[str, Any]) -> str:
    """Of the best plan of one pipeline."""
    return cell(found) if found["dealt"] else "no faster"


def row(model: str, gpus: str, sequences: int) -> str:
    begin = time.perf_counter()
    asked = model, gpus, sequences
    count = int(gpus.split("x")[0])
    numbers = [number for number in range(2, count) if count % number == 0]
    several = {n: estimate(*asked, "--mode", "pp", "--pipelines", str(n)) for n in numbers}
    best = min(numbers, key=lambda n: several[n]["step_seconds"])
    return (
        f"| {model} | {gpus} | {sequences} | {cell(estimate(*asked, '--mode', 'pp'))} | "
        f"{dealt_cell(estimate(*asked, '--mode', 'mixed', '--pipelines', '1'))} | "
        f"{cell(estimate(*asked, '--mode', 'dp'))} | {best}: {cell(several[best])} | "
        f"{time.perf_counter() - begin:.0f} s |"
    )


def main() -> None:
    print(HEADER)
    for asked in ROWS:
        print(row(*asked), flush=True)


if __name__ == "__main__":
    main()
