"""Where tables are printed."""

from rich.console import Console
from typing_extensions import override

_WIDTH = 120


class _Output(Console):
    @override
    def on_broken_pipe(self) -> None:
        raise  # rich would end with 1, which means something else here


def console() -> Console:
    """What is no terminal has room for all columns."""
    terminal = _Output()
    return terminal if terminal.is_terminal else _Output(width=max(terminal.width, _WIDTH))
