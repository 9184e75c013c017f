"""What all commands have in common: how they are declared, and `--json`."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    what: str,
    description: str,
    epilog: str | None,
    prints: str = "one JSON object",
) -> argparse.ArgumentParser:
    """A command that tells `what`; with `--json` it `prints` that in place of text. Its own arguments are still to come."""
    parser = commands.add_parser(
        name,
        help=what,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help=f"print {prints}")
    parser.set_defaults(run=run)
    return parser
