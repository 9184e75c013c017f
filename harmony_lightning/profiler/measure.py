"""From a module and a batch to a `Profile`: on the GPU at hand, or on an emulated one without numbers.

Both ways are one: the user's step is run at a few microbatch sizes on a device that counts its bytes and takes its time
(`visits`); sizes double until one does not fit, and the largest that does is found by bisection. On an emulated device with
fake data nothing is computed, so that a model of any size takes seconds and no memory.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import CapacityError, UnsupportedError, in_one_line
from harmony_lightning.hardware.device import Cluster
from harmony_lightning.hardware.emulated import EmulatedCluster
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY, told_by_type
from harmony_lightning.profiler.cache import fingerprint
from harmony_lightning.profiler.profile import LayerKind, MicrobatchSizes, Profile
from harmony_lightning.profiler.stopwatch import stopwatch_of
from harmony_lightning.profiler.twin import describe, make_twin
from harmony_lightning.profiler.visits import CallCache, Step, Visit, visit_layers
from harmony_lightning.record import Record
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

NUM_BISECTIONS = 3
"""Sizes that are tried between the largest that fit and the one that did not."""

Progress = Callable[[int], None]
"""Called with each microbatch size before it is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Record):
    """A profile, and what the run has shown beside the costs."""

    profile: Profile
    loops: tuple[tuple[str, ...], ...]
    """Layers that take turns."""
    num_parameters: int = 0


def measure_profile(
    root: nn.Module,
    decomposition: Decomposition,
    batch_of: Callable[[int], Any],
    step: Step,
    cluster: Cluster,
    *,
    largest: int,
    update_seconds: Callable[[int], float],
    smallest: int = 1,
    state_bytes_per_weight: float = 2.0,
    source: str = "",
    progress: Progress = lambda size: None,
) -> Measured:
    """Cost all layers of a module.

    Args:
        root: stays as it is; a copy is run.
        decomposition: its layers.
        batch_of: a microbatch of so many samples.
        step: the user's training step.
        cluster: its first device is used.
        largest: samples of the largest microbatch that is of interest.
        update_seconds: what the optimizer's step takes on the host, by number of weights.
        smallest: samples that the module needs at least.
        state_bytes_per_weight: of the optimizer, in terms of the weights' own bytes.

    Raises:
        CapacityError: even the smallest microbatch does not fit.
        UnsupportedError: the step cannot be run so; the message says why.
    """
    is_fake = isinstance(cluster, EmulatedCluster) and cluster.fake
    device = cluster.devices[0]
    stopwatch = stopwatch_of(cluster, device)
    twin = make_twin(root, has_numbers=not is_fake)
    for module in twin.modules():
        if isinstance(vars(module).get("_device"), torch.device):
            vars(module)["_device"] = device.torch_device  # where Lightning's modules and metrics say that they are
    names = [layer.name for layer in decomposition.layers]
    cache = CallCache()
    refused: list[str] = []

    def attempt(size: int) -> list[Visit] | None:
        """None if it does not fit."""
        progress(size)
        try:
            batch = _to_device(batch_of(size), device.torch_device)
            return told_by_type(visit_layers, twin, names, batch, step, device, stopwatch, cache)
        except OUT_OF_MEMORY as error:
            refused.append(str(error).splitlines()[0])
            log.info("harmony profile: microbatches of %d do not fit: %s", size, refused[-1])
        except Exception as error:
            what = (
                str(error) if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {in_one_line(error)}"
            )
            raise UnsupportedError(f"the training step cannot be profiled: {what}") from error
        gc.collect()
        return None

    with torch.random.fork_rng(devices=[]), cluster.activate():
        by_size = _at_sizes(attempt, smallest, largest)
    if not by_size:
        raise CapacityError(
            f"a single layer does not fit with a microbatch of {smallest}: {device.name} offers "
            f"{format_nbytes(device.memory_bytes)}; raise memory, or split the layer ({refused[-1]})"
        )
    order = list(dict.fromkeys(visit.layer for visit in by_size[min(by_size)]))
    ordered = decomposition.reordered(tuple(order))
    profile = _build(type(root).__name__, ordered, by_size, root, update_seconds, state_bytes_per_weight, source)
    return Measured(
        profile=profile,
        loops=_loops(by_size[min(by_size)]),
        num_parameters=sum(parameter.numel() for parameter in root.parameters()),
    )


def fingerprint_of(root: nn.Module, decomposition: Decomposition, *more: str) -> str:
    """The same for modules that cost the same, as far as can be seen from outside: structure, settings, methods, layers,
    torch.

    `more` is what else counts: the device, the shapes of the batch, precision.
    """
    layers = [f"{layer.name}: {layer.weights}" for layer in decomposition.layers]
    return fingerprint(
        "profile 5", torch.__version__, describe(root), *_settings(root), *_methods(root), *layers, *more
    )


def _settings(root: nn.Module) -> Iterator[str]:
    """Plain attributes, such as a number of heads, and functions, such as an activation."""
    for name, module in root.named_modules():
        for key, value in sorted(vars(module).items()):
            if key.startswith("_"):
                continue
            if isinstance(value, FunctionType):
                yield f"{name}.{key}={_code_text(value.__code__)}"
            elif isinstance(value, BuiltinFunctionType):
                yield f"{name}.{key}={value.__qualname__}"
            elif isinstance(value, bool | int | float | str):
                yield f"{name}.{key}={value!r}"


def _methods(root: nn.Module) -> list[str]:
    """Code of all classes but those of torch and Lightning, which their versions tell."""
    kinds = {kind for module in root.modules() for kind in type(module).__mro__}
    values = [
        value
        for kind in kinds
        if kind.__module__.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning", "builtins")
        for value in vars(kind).values()
    ]
    functions = (getattr(value, "__func__", getattr(value, "fget", value)) for value in values)
    return sorted(_code_text(function.__code__) for function in functions if isinstance(function, FunctionType))


def _code_text(code: CodeType) -> str:
    inner = [_code_text(constant) if isinstance(constant, CodeType) else repr(constant) for constant in code.co_consts]
    return "|".join((code.co_qualname, code.co_code.hex(), *code.co_names, *inner))


def _at_sizes(attempt: Callable[[int], list[Visit] | None], smallest: int, largest: int) -> dict[int, list[Visit]]:
    found: dict[int, list[Visit]] = {}
    size, too_large = min(smallest, largest), largest + 1
    while size < too_large:
        visits = attempt(size)
        if visits is None:
            too_large = size
            break
        found[size] = visits
        if size == largest:
            return found
        size = min(2 * size, largest)
    for _ in range(NUM_BISECTIONS if found else 0):
        size = (max(found) + too_large) // 2
        if size in found:
            break
        visits = attempt(size)
        if visits is None:
            too_large = size
        else:
            found[size] = visits
    return dict(sorted(found.items()))


def _build(
    name: str,
    decomposition: Decomposition,
    by_size: dict[int, list[Visit]],
    root: nn.Module,
    update_seconds: Callable[[int], float],
    state_bytes_per_weight: float,
    source: str,
) -> Profile:
    sizes = tuple(by_size)
    nbytes = {weight.name: weight.nbytes for weight in decomposition.weights}
    trained = {weight.name for weight in decomposition.weights if weight.is_trainable}
    numel = {name: parameter.numel() for name, parameter in root.named_parameters()}
    modules = dict(root.named_modules())
    kinds: dict[LayerKind, int] = {}
    layers: list[int] = []
    for layer in decomposition.layers:
        rows = [[visit for visit in visits if visit.layer == layer.name] for visits in by_size.values()]
        weight_bytes = sum(nbytes[weight] for weight in layer.weights)
        trained_bytes = sum(nbytes[weight] for weight in layer.weights if weight in trained)
        kind = LayerKind(
            weight_bytes=weight_bytes,
            buffer_bytes=sum(buffer.nbytes for buffer in modules[layer.name].buffers()),
            optimizer_state_bytes=round(state_bytes_per_weight * trained_bytes),
            input_bytes=_at_one_and_two(sizes, [sum(v.input_nbytes for v in row) for row in rows]),
            forward_seconds=tuple(sum(v.cost.forward_seconds + v.glue.forward_seconds for v in row) for row in rows),
            backward_seconds=tuple(sum(v.cost.backward_seconds + v.glue.backward_seconds for v in row) for row in rows),
            forward_peak_bytes=tuple(max([weight_bytes, *map(_forward_peak, row)]) for row in rows),
            backward_peak_bytes=tuple(max([weight_bytes, *map(_backward_peak, row)]) for row in rows),
            update_cpu_seconds=update_seconds(sum(numel[w] for w in layer.weights if w in trained)),
            recompute_seconds=tuple(sum(v.cost.recompute_seconds for v in row) for row in rows),
            stash_bytes=_at_one_and_two(
                sizes, [sum(v.input_nbytes + sum(v.glue.saved.values()) for v in row) for row in rows]
            ),
            gradient_bytes=trained_bytes,
            largest_weight_bytes=max((nbytes[weight] for weight in layer.weights if weight in trained), default=0),
            kept_bytes=tuple(sum(v.cost.kept_bytes for v in row) for row in rows),
        )
        layers.append(kinds.setdefault(kind, len(kinds)))
    return Profile(
        model=name,
        source=source,
        microbatch_sizes=MicrobatchSizes(forward=sizes, backward=sizes),
        layer_kinds=tuple(kinds),
        layers=tuple(layers),
        names=tuple(layer.name for layer in decomposition.layers),
        glue_bytes=sum(nbytes[weight] for weight in decomposition.glue),
    )


def _forward_peak(visit: Visit) -> int:
    return visit.cost.forward_peak_bytes + visit.glue.forward_bytes


def _backward_peak(visit: Visit) -> int:
    return max(visit.cost.backward_peak_bytes, visit.cost.forward_peak_bytes + visit.glue.backward_bytes)


def _at_one_and_two(sizes: tuple[int, ...], nbytes: Sequence[int]) -> tuple[float, float]:
    """Affine through the two smallest sizes."""
    if len(sizes) == 1:
        return nbytes[0] / sizes[0], 2 * nbytes[0] / sizes[0]
    slope = (nbytes[1] - nbytes[0]) / (sizes[1] - sizes[0])
    one = nbytes[0] + (1 - sizes[0]) * slope
    return max(0.0, one), max(0.0, one + slope)


def _loops(visits: Sequence[Visit]) -> tuple[tuple[str, ...], ...]:
    """Sets of layers between the first and the last call of one that is called again later."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, visit in enumerate(visits):
        first.setdefault(visit.layer, index)
        last[visit.layer] = index
    spans = sorted((first[name], last[name]) for name in first if last[name] > first[name])
    loops: list[tuple[str, ...]] = []
    end = -1
    members: set[str] = set()
    for begin, until in spans:
        if begin > end:
            if len(members) > 1:
                loops.append(tuple(sorted(members)))
            members, end = set(), until
        end = max(end, until)
        members |= {visit.layer for visit in visits[begin : end + 1]}
    if len(members) > 1:
        loops.append(tuple(sorted(members)))
    return tuple(loops)


def _to_device(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to") and not isinstance(batch, torch.Tensor):
        return batch.to(device)
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)
