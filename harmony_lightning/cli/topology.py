"""`harmony topology`: what a machine offers. With --json it prints a machine file, as `harmony plan --machine` reads it."""

import argparse

from rich.table import Table

from harmony_lightning.cli.command import Commands, add_command
from harmony_lightning.cli.console import console
from harmony_lightning.cli.model import add_machine_arguments, machine_for
from harmony_lightning.profiler import Machine
from harmony_lightning.units import format_nbytes


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = add_command(
        commands,
        "topology",
        run,
        what="GPUs, links and host of this machine, or of presets",
        description="Tell what this machine offers, measured once and then in the cache, or what GPUs of a preset do.",
        epilog=__doc__,
        prints="a machine file",
    )
    add_machine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigurationError if there is no such machine."""
    machine = machine_for(arguments)
    if arguments.json:
        print(machine.to_json())
        return 0
    table = Table(title=machine.name, show_header=False)
    for name, value in _rows(machine):
        table.add_row(name, value)
    console().print(table)
    return 0


def _rows(machine: Machine) -> list[tuple[str, str]]:
    def rate(value: float) -> str:
        return f"{value / 1e9:.4g} GB/s"

    rows = [
        ("GPUs", f"{machine.gpus} x {machine.gpu or 'of an unknown model'}"),
        ("memory of each", format_nbytes(machine.memory_bytes)),
        ("host link of one GPU alone", rate(machine.host_share(1))),
        ("of each when all copy", rate(machine.host_share(machine.gpus))),
        ("GPU to GPU", rate(machine.peer_bytes_per_second) + (" by the host" if machine.peers_by_host else "")),
        *(
            [("memory of a GPU", rate(machine.gpu_memory_bytes_per_second))]
            if machine.gpu_memory_bytes_per_second
            else []
        ),
        ("copies in host memory", rate(machine.host_message_bytes_per_second)),
    ]
    if machine.host_memory_bytes:
        rows.append(("host memory", format_nbytes(machine.host_memory_bytes)))
    if machine.update_parameters_per_second:
        rows.append(("updates on the host", f"{machine.update_parameters_per_second / 1e9:.4g} billion weights/s"))
    return [*rows, ("source", machine.note)]
