"""Where tables are printed."""

from rich.console import Console

_WIDTH = 120


def console() -> Console:
    """What is no terminal has room for all columns."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=max(terminal.width, _WIDTH))
