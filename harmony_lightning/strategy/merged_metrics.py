"""`torchmetrics` objects within a step: they live on the root device, and their value is that of the whole minibatch.

A metric is no code between layers: its states are small, outlive the step, and are read by code that knows no GPU but the
root device. So what it is given comes to it, and it computes where it is, with the code of the runtime out of its way.

Every microbatch updates the metric, so what it has gathered over an epoch is right by itself. But `metric(x)` also keeps
the value of this one call, which Lightning logs as the step's. A twin therefore gathers what the calls of one minibatch
were given, and its value is kept in the end. `metric(x)` itself returns the value of the microbatch.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torchmetrics import Metric

_METHODS = ("forward", "update", "compute", "reset")
Aside = Callable[[], AbstractContextManager[Any]]
"""Within, calls of torch are not those of code between layers."""


class Twins:
    """For each metric, one that gathers over the microbatches of one minibatch only."""

    def __init__(self) -> None:
        self._twins: dict[int, tuple[Metric, Metric]] = {}
        """By identity of the metric, which is held so that its identity stays taken."""

    def of(self, metric: Metric) -> Metric:
        if id(metric) not in self._twins:
            with _emptied(metric):
                twin = copy.deepcopy(metric)
            for inner in twin.modules():
                for method in ("forward", "reset"):  # what the step has put before them
                    vars(inner).pop(method, None)
            self._twins[id(metric)] = metric, twin
        return self._twins[id(metric)][1]


@contextmanager
def _emptied(metric: Metric) -> Iterator[None]:
    """Within, the metric has gathered nothing: what it has may be large, or part of a graph, which cannot be copied."""
    inner = [module for module in metric.modules() if isinstance(module, Metric)]
    before = [{name: vars(m)[name] for name in (*m._defaults, "_forward_cache", "_computed")} for m in inner]
    try:
        for module in inner:
            vars(module).update({**module._defaults, "_forward_cache": None, "_computed": None})
        yield
    finally:
        for module, values in zip(inner, before, strict=True):
            vars(module).update(values)


class _Instead:
    """A callable in the place of a method; for all else it is the method, which may be somebody's own object."""

    def __init__(self, call: Callable[..., Any], method: Callable[..., Any]) -> None:
        self._call, self._method = call, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Instead":
        return self  # of no copy's business: `Twins` takes it away


@contextmanager
def merged_metrics(metrics: Sequence[Metric], aside: Aside, twins: Twins | None) -> Iterator[None]:
    """Within, the metrics compute where they are. Their methods are back on every exit.

    Args:
        metrics: of the module.
        aside: makes code within no code between layers.
        twins: None where the step is one microbatch, so that the last call's value is the minibatch's.
    """
    gathering: dict[int, tuple[Metric, Metric]] = {}

    def beside(metric: Metric, name: str) -> Callable[..., Any]:
        method = getattr(metric, name)

        def moved(*args: Any, **kwargs: Any) -> Any:
            home = metric.device
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(home), (args, kwargs))
            with aside():
                result = method(*args, **kwargs)
                if name == "forward" and twins is not None:
                    twin = twins.of(metric)
                    if id(metric) not in gathering:
                        twin.reset()
                    gathering[id(metric)] = metric, twin
                    twin.update(*args, **kwargs)
                return result

        return _Instead(moved, method)

    before = [(metric, {name: vars(metric)[name] for name in _METHODS if name in vars(metric)}) for metric in metrics]
    try:
        for metric in metrics:
            vars(metric).update({name: beside(metric, name) for name in _METHODS})
        yield
        for metric, twin in gathering.values():
            metric._forward_cache = twin.compute()
    finally:
        for metric, methods in before:
            for name in _METHODS:
                vars(metric).pop(name, None)
            vars(metric).update(methods)
