"""What the commands that look at a module have in common: where it comes from, its batch, the GPUs, the precision.

The module is built on the meta device, so that one of any size takes no memory; its `__init__` must not need numbers.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from harmony_lightning.errors import ConfigurationError, in_one_line
from harmony_lightning.hardware.presets import DEFAULT_HOST, GPUS, HOSTS, host_model
from harmony_lightning.profiler.machine import Machine, parse_gpus, preset_machine
from harmony_lightning.units import parse_nbytes

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """`--gpus`, `--host`, `--memory`."""
    parser.add_argument(
        "--gpus", metavar="NxMODEL", help=f"such as 4x3090; of {', '.join(GPUS)}. Default: this machine's"
    )
    parser.add_argument(
        "--host", default=DEFAULT_HOST, choices=sorted(HOSTS), help=f"of --gpus; default: {DEFAULT_HOST}"
    )
    parser.add_argument("--memory", metavar="SIZE", help="per GPU, such as 11GiB; default: all of it")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the cache")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The module, its batch and its precision; and the machine."""
    parser.add_argument(
        "module",
        metavar="MODULE",
        help="package.module:Class (or a function) that makes a LightningModule, or a Hydra config file with a model",
    )
    parser.add_argument(
        "--init", action="append", default=[], metavar="KEY=VALUE",
        help="an argument of the class, or an override of the config; repeat it",
    )  # fmt: skip
    parser.add_argument(
        "--batch", action="append", default=[], required=True, metavar="SHAPE",
        help="of the minibatch: 8,1025:int64 or images=8,3,224,224; the first number is samples, the dtype float32 if not "
        "given. Repeat it for a tuple, or with names for a dict",
    )  # fmt: skip
    parser.add_argument("--precision", default="32-true", choices=PRECISIONS, help="default: 32-true")
    add_machine_arguments(parser)


@contextmanager
def telling(what: str) -> Iterator[Callable[[str], None]]:
    """A line on the terminal that tells what is going on, as long as it goes on."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(what) as status:
        yield lambda text: status.update(f"{what}: {text}")


def machine_for(arguments: argparse.Namespace) -> Machine:
    """Of presets, or the one at hand.

    Raises:
        ConfigurationError: no such GPUs, or none here.
    """
    memory_bytes = parse_nbytes(arguments.memory) if arguments.memory is not None else None
    if arguments.gpus is not None:
        num_gpus, gpu = parse_gpus(arguments.gpus)
        return preset_machine(num_gpus, gpu, host_model(arguments.host), memory_bytes)
    from dataclasses import replace

    from harmony_lightning.profiler.topology import machine_at_hand

    with telling("measuring this machine") as tell:
        machine, _ = machine_at_hand(is_fresh=arguments.fresh, progress=tell)
    return machine if memory_bytes is None else replace(machine, memory_bytes=memory_bytes)


def cluster_for(arguments: argparse.Namespace, machine: Machine) -> Any:
    """Where layers are costed: emulated GPUs of the preset, or the real ones."""
    from harmony_lightning.hardware.cuda import CudaCluster
    from harmony_lightning.hardware.emulated import EmulatedCluster

    if arguments.gpus is None:
        import torch

        return CudaCluster([torch.device("cuda", 0)], machine.memory_bytes if arguments.memory is not None else None)
    _, gpu = parse_gpus(arguments.gpus)
    return EmulatedCluster(
        machine.gpus, machine.memory_bytes, preset=gpu, host=arguments.host, check_races=False, fake=True
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """Shapes of a minibatch."""

    parts: dict[str, tuple[tuple[int, ...], str]]
    """By name, or by position: shape and dtype."""
    is_dict: bool

    @property
    def samples(self) -> int:
        return next(iter(self.parts.values()))[0][0]

    def __str__(self) -> str:
        if self.is_dict:
            return f"a dict of {', '.join(self.parts)}"
        return "one tensor" if len(self.parts) == 1 else f"a tuple of {len(self.parts)} tensors"

    def of(self, samples: int) -> Any:
        """A batch of so many samples: zeros, of which large ones take no memory."""
        import torch

        tensors = {
            name: torch.zeros((samples, *shape[1:]), dtype=getattr(torch, dtype))
            for name, (shape, dtype) in self.parts.items()
        }
        if self.is_dict:
            return tensors
        values = tuple(tensors.values())
        return values if len(values) > 1 else values[0]


def parse_batch(texts: list[str]) -> Batch:
    """Raises ConfigurationError for what is no shape."""
    parts: dict[str, tuple[tuple[int, ...], str]] = {}
    named = ["=" in text for text in texts]
    if any(named) and not all(named):
        raise ConfigurationError("name all parts of the batch (--batch ids=8,128:int64), or none")
    for index, text in enumerate(texts):
        name, _, rest = text.rpartition("=")
        shape, _, dtype = rest.partition(":")
        sizes = shape.split(",")
        if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
            raise ConfigurationError(f"{text!r} is no shape; write numbers, such as 8,1025:int64")
        if dtype and dtype not in _DTYPES:
            raise ConfigurationError(f"{dtype!r} is no dtype; choose from {', '.join(_DTYPES)}")
        parts[name or str(index)] = tuple(int(size) for size in sizes), dtype or "float32"
    if len({shape[0] for shape, _ in parts.values()}) > 1:
        raise ConfigurationError(f"all parts of a batch must have as many samples, got {', '.join(texts)}")
    return Batch(parts, is_dict=any(named))


_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def build_module(arguments: argparse.Namespace) -> Any:
    """The module, on the meta device where its weights are concerned.

    Raises:
        ConfigurationError: it cannot be found or made, with the reason.
    """
    import torch

    sys.path.insert(0, "")
    make = _from_config if arguments.module.endswith((".yaml", ".yml")) else _from_name
    try:
        with torch.device("meta"):
            module = make(arguments.module, arguments.init)
    except ConfigurationError:
        raise
    except Exception as error:
        what, cause = f"{type(error).__name__}: {in_one_line(error)}", error.__cause__
        if cause is not None:  # Hydra's own errors tell where, not why
            what = f"{what} ({type(cause).__name__}: {in_one_line(cause)})"
        is_missing = isinstance(error, ImportError) or isinstance(cause, ImportError)
        remedy = "is its folder on PYTHONPATH?" if is_missing else "arguments are given by --init KEY=VALUE"
        raise ConfigurationError(f"cannot make {arguments.module}: {what}; {remedy}") from error
    finally:
        sys.path.remove("")
    step = getattr(module, "training_step", None)
    is_inherited = _package_of(getattr(step, "__module__", None)) in _LIGHTNING
    if not isinstance(module, torch.nn.Module) or step is None or is_inherited:
        kind = type(module).__name__
        article = "an" if kind[0] in "aeiouAEIOU" else "a"
        raise ConfigurationError(
            f"{arguments.module} makes {article} {kind}, which has no training_step of its own: there is no step to plan"
        )
    if not getattr(module, "automatic_optimization", True):
        raise ConfigurationError(
            f"{type(module).__name__} steps its optimizers itself (automatic_optimization=False); its minibatches run "
            f"in one piece and are not planned for"
        )
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(arguments.precision)
    return module.train() if dtype is None else module.train().to(dtype)


def trainer_of(module: Any) -> Any:
    """What a module may look at in its step: a trainer that has not begun. None for what is no LightningModule."""
    import importlib

    packages = [package for kind in type(module).__mro__ if (package := _package_of(kind.__module__)) in _LIGHTNING]
    if not packages:
        return None
    logger = logging.getLogger(f"{packages[0]}.pytorch" if packages[0] == "lightning" else packages[0])
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it is not run, so where it would run is no news
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(packages[0]).Trainer(
                accelerator="cpu", logger=False, max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
    finally:
        logger.setLevel(level)


_LIGHTNING = ("lightning", "pytorch_lightning")


def _package_of(name: str | None) -> str:
    return (name or "").partition(".")[0]


def context_of(precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """What is in force around a step."""
    import torch

    if not precision.endswith("-mixed"):
        return nullcontext
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda: torch.autocast(kind, dtype)


def _from_name(name: str, init: list[str]) -> Any:
    import importlib

    place, colon, attribute = name.partition(":")
    if not (place and colon and attribute):
        raise ConfigurationError(f"{name!r} names no class; write package.module:Class, or the path of a .yaml config")
    try:
        made: Any = importlib.import_module(place)
        for part in attribute.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"cannot find {name}: {error}; is its folder on PYTHONPATH?") from error
    return made(**dict(_argument(text) for text in init))


def _argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ConfigurationError(f"--init takes KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _from_config(path: str, overrides: list[str]) -> Any:
    from pathlib import Path

    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigurationError(f"there is no config {path}")
    with initialize_config_dir(config_dir=str(file.parent), version_base="1.3"):
        config = compose(file.stem, overrides=overrides)
    if "model" not in config:
        raise ConfigurationError(f"the config {path} has no model; it has {', '.join(map(str, config))}")
    return instantiate(config.model)
