"""`harmony profile`: what each layer of a module costs. With --json it prints a profile, as `harmony plan --profile` reads
it."""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.table import Table

from harmony_lightning.cli.command import Commands, add_command
from harmony_lightning.cli.console import console
from harmony_lightning.cli.model import (
    add_model_arguments,
    build_module,
    cluster_for,
    context_of,
    machine_for,
    parse_batch,
    telling,
    trainer_of,
)
from harmony_lightning.profiler import Profile
from harmony_lightning.units import format_nbytes


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = add_command(
        commands,
        "profile",
        run,
        what="what each layer of a LightningModule costs",
        description="Cost each distinct layer of a module, on this machine's GPU or, with --gpus, without any.",
        epilog=__doc__,
        prints="a profile file",
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigurationError, CapacityError or UnsupportedError with what to do."""
    profile = profile_for(arguments)[0].profile
    if arguments.json:
        print(profile.to_json())
    else:
        _show(profile, arguments)
    return 0


def profile_for(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The profile of the module that the arguments name, its decomposition, and the machine."""
    from harmony_lightning.decomposer.discover import decompose
    from harmony_lightning.errors import UnsupportedError
    from harmony_lightning.profiled import profile, step_of, with_narrow_weights
    from harmony_lightning.scheduler import unit_nbytes
    from harmony_lightning.strategy.trainer_aside import step_aside

    batch = parse_batch(arguments.batch)
    machine = machine_for(arguments)
    module = build_module(arguments)
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    decomposition = decompose(module, unit_nbytes(nbytes, machine.memory_bytes))
    trainer = trainer_of(module)
    smallest = 2 if decomposition.has_batch_statistics else 1
    try:
        with _unlogged(), telling(f"profiling {type(module).__name__}") as tell:
            measured, _ = profile(
                module,
                decomposition,
                batch.of,
                step_aside(step_of(context_of(arguments.precision)), trainer),
                cluster_for(arguments, machine),
                machine,
                largest=batch.samples,
                smallest=min(smallest, batch.samples),
                precision=arguments.precision,
                is_fresh=arguments.fresh,
                progress=lambda size: tell(f"microbatches of {size}"),
            )
    except UnsupportedError as error:
        if isinstance(error.__cause__, TypeError | KeyError | IndexError | AttributeError):
            raise UnsupportedError(
                f"{error}. Its batch was {batch}, as --batch says it: give it once for each tensor of a tuple, or with "
                f"names, ids=8,128:int64, for a dict"
            ) from error
        if arguments.gpus is None or "on shapes alone" not in str(error):
            raise
        raise UnsupportedError(
            f"{error}. With --gpus a step is followed so, which torch does not know for every operation and "
            f"dtype: look at the shapes in --batch, try another --precision, or measure on real GPUs without --gpus"
        ) from error
    step = step_aside(step_of(), trainer)
    with _unlogged():
        narrowed = with_narrow_weights(decomposition, module, batch.of(smallest), arguments.precision, step)
    return measured, narrowed, machine


@contextmanager
def _unlogged() -> Iterator[None]:
    """A step that is only followed may log; nobody would read it, and Lightning need not say so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"You are trying to `self\.log\(\)`")
        yield


def _show(profile: Profile, arguments: argparse.Namespace) -> None:
    sizes = profile.microbatch_sizes.forward
    size = sizes[-1]
    table = Table(title=f"{profile.model}, {profile.num_layers} layers, microbatches of {size} on {profile.source}")
    table.add_column("layers")
    for column in ("count", "weights", "forward", "backward", "recompute", "peak", "input", "stash"):
        table.add_column(column, justify="right", overflow="fold")
    for index, kind in enumerate(profile.layer_kinds):
        members = [name for name, one in zip(profile.names, profile.layers, strict=True) if one == index]
        stash = kind.stash_bytes or kind.input_bytes
        table.add_row(
            members[0] if len(members) == 1 else f"{members[0]} ... {members[-1]}",
            str(len(members)),
            format_nbytes(kind.weight_bytes),
            f"{1e3 * kind.forward_seconds[-1]:.4g} ms",
            f"{1e3 * kind.backward_seconds[-1]:.4g} ms",
            f"{1e3 * (kind.recompute_seconds or kind.forward_seconds)[-1]:.4g} ms",
            format_nbytes(kind.backward_peak_bytes[-1]),
            *(format_nbytes(pair[0] + (size - 1) * (pair[1] - pair[0])) for pair in (kind.input_bytes, stash)),
        )
    console().print(table)
    console().print(f"Sizes that were tried and fit: {', '.join(map(str, sizes))}.", highlight=False)
