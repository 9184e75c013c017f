"""The command line: `harmony topology | profile | plan | estimate | explain`.

Each command is a module with `add` (its arguments) and `run` (its exit code)."""

import argparse
import os
import sys
from collections.abc import Sequence

from harmony_lightning.cli import estimate, plan, profile, topology
from harmony_lightning.errors import CapacityError, HarmonyError

CAPACITY = 1
"""Exit code: the question was understood, but nothing fits."""
FAULT = 2
"""Exit code: arguments or files are faulty."""
UNREAD = 141
"""Exit code: nobody reads on, as for `| head`; a shell's own for what ends by SIGPIPE."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors go to stderr as one line. Returns the exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        return UNREAD


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="harmony", description="Plan training that is larger than the GPUs.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (topology, profile, plan, estimate):
        command.add(commands)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except HarmonyError as error:
        print(f"harmony: {error}", file=sys.stderr)
        return CAPACITY if isinstance(error, CapacityError) else FAULT
