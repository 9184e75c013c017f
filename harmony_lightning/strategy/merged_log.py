"""Merges the `self.log` calls of the microbatches of one step into the calls of one whole minibatch.

Lightning's result collection takes every call for a whole minibatch: of M calls under one key it shows the last as the
step's value, and weighs each with the full batch size in the epoch's mean, which is wrong for uneven microbatches. So
during the step a stand-in takes the collection's place. It buffers, and on success makes one call per key:

    microbatch 0 (3 samples)   log("loss", 1.0) --.
    microbatch 1 (3 samples)   log("loss", 2.0) ---+-> log("loss", 1.714, batch_size=None)
    microbatch 2 (1 sample)    log("loss", 3.0) --'

Without the user's own `batch_size` none is passed: Lightning then reads it from the whole batch, as it always does.

A `torchmetrics.Metric` is one object that all microbatches have updated; `merged_metrics` sees to the step's value. Wrong
arguments are reported by Lightning when the step ends, in its own words. A value logged with `sum` is summed over the
microbatches, a constant too.

A step that is one microbatch has nothing to merge: what it logs is in the collection at once, where it may read it.
Steps that share a pass but are no microbatches of one minibatch are not merged: what each logs is held back until its turn
(`held_log`).

Nothing of Lightning is imported, so both of its packages are served.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmony_lightning.runtime.derivatives import Uncuttable

_SUM, _MEAN, _MAX, _MIN = "sum", "mean", "max", "min"
_REDUCTIONS: dict[Any, str] = {
    torch.mean: _MEAN,
    torch.sum: _SUM,
    torch.max: _MAX,
    torch.min: _MIN,
    sum: _SUM,
    max: _MAX,
    min: _MIN,
    "mean": _MEAN,
    "avg": _MEAN,
    "sum": _SUM,
    "max": _MAX,
    "min": _MIN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    microbatch: int
    fx: str
    name: str
    value: Any
    num_samples: int
    kwargs: dict[str, Any]
    forward_cache: Any = None
    """Of a Metric: its value for this call."""


class MergedLog:
    """Stands in for the training loop's result collection; everything but `log` is the collection's own.

    What is read within the step is what the collection would hold if the step ended there: what the microbatches have
    logged so far, merged.

    Args:
        results: the collection, which must hold the whole minibatch as its `batch`.
        microbatch: gives (index, number of samples) of the microbatch that is running, for microbatches that interleave;
            without it `set_microbatch` tells.
        bring: takes logged values to where they are wanted; None leaves them where they are.
        aside: makes code within no code between layers.
    """

    __slots__ = ("_aside", "_bring", "_calls", "_current", "_losses", "_microbatch", "_results")

    _aside: "Aside"
    _results: Any
    _microbatch: Callable[[], tuple[int, int]] | None
    _bring: Callable[[Tensor], Tensor] | None
    _current: tuple[int, int]
    _calls: list[_Call]
    _losses: "Losses | None"

    def __init__(
        self,
        results: Any,
        microbatch: Callable[[], tuple[int, int]] | None = None,
        bring: Callable[[Tensor], Tensor] | None = None,
        aside: "Aside" = nullcontext,
    ) -> None:
        for name, value in (
            ("_aside", aside),
            ("_results", results),
            ("_microbatch", microbatch),
            ("_bring", bring),
            ("_current", (0, 1)),
            ("_calls", []),
            ("_losses", None),
        ):
            object.__setattr__(self, name, value)

    def set_microbatch(self, index: int, num_samples: int) -> None:
        """Whose calls come next."""
        object.__setattr__(self, "_current", (index, num_samples))

    def know_losses(self, losses: "Losses") -> None:
        """What equals the loss in each microbatch is the loss, and is logged as that of the minibatch."""
        object.__setattr__(self, "_losses", losses)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(self, fx: str, name: str, value: Any, **kwargs: Any) -> None:
        """Buffers what the collection's own `log` takes."""
        index, num_samples = self._current if self._microbatch is None else self._microbatch()
        if isinstance(value, Tensor):
            if not kwargs.get("enable_graph", False):
                value = value.detach()  # a graph kept here would keep the microbatch's activations
            brought = value if self._bring is None else self._bring(value)
            value = brought.clone() if brought is value else brought  # the user's code may go on to write the tensor
        call = _Call(
            microbatch=index,
            fx=fx,
            name=name,
            value=value,
            num_samples=num_samples,
            kwargs=kwargs,
            forward_cache=getattr(value, "_forward_cache", None),
        )
        self._calls.append(call)

    def replay(self) -> None:
        """Makes the merged calls on the collection, keys in the order in which they came first, and forgets them."""
        groups = self._groups()
        self._calls.clear()
        self._make(groups)

    def _groups(self) -> list[list[_Call]]:
        """Calls that belong together. A key may be logged several times within one step: the n-th calls of all microbatches
        do."""
        groups: dict[tuple[str, str, int], list[_Call]] = {}
        seen: Counter[tuple[int, str, str]] = Counter()
        for call in self._calls:
            nth = seen[call.microbatch, call.fx, call.name]
            seen[call.microbatch, call.fx, call.name] += 1
            groups.setdefault((call.fx, call.name, nth), []).append(call)
        return list(groups.values())

    def _make(self, groups: list[list[_Call]]) -> None:
        for calls in groups:
            for call in _merge(calls, self._losses):
                self._results.log(call.fx, call.name, call.value, **call.kwargs)

    def _as_if_ended(self, read: Callable[[Any], Any]) -> Any:
        before = _state_of(self._results)
        try:
            with self._aside():
                self._make(self._groups())
                return read(self._results)
        finally:
            _restore(self._results, before)

    def metrics(self, *args: Any, **kwargs: Any) -> Any:
        """The collection's own, for those who read metrics within the step."""
        return self._as_if_ended(lambda results: results.metrics(*args, **kwargs))

    def replay_of(self, microbatch: int) -> None:
        """Makes the calls of one microbatch on the collection, as they were."""
        for call in self._calls:
            if call.microbatch != microbatch:
                continue
            if not isinstance(call.value, Tensor):
                call.value._forward_cache = call.forward_cache
            self._results.log(call.fx, call.name, call.value, **call.kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._results, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._results, name, value)

    # The collection is a dict, and Lightning asks for its truth. Python looks such methods up on the type.
    def __len__(self) -> int:
        return len(self._results) or len(self._calls)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._results)

    def __contains__(self, key: object) -> bool:
        return key in self._results

    def __getitem__(self, key: Any) -> Any:
        return self._as_if_ended(lambda results: copy.copy(results[key]))


Aside = Callable[[], AbstractContextManager[Any]]


def _state_of(results: Any) -> dict[str, dict[str, Any] | None]:
    """What `_restore` needs; None for entries that have no attributes. Logging replaces tensors and never writes them."""
    return {key: dict(vars(result)) if hasattr(result, "__dict__") else None for key, result in results.items()}


def _restore(results: Any, state: dict[str, dict[str, Any] | None]) -> None:
    for key in results.keys() - state.keys():
        del results[key]
    for key, attributes in state.items():
        if attributes is not None:
            vars(results[key]).update(attributes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Of a step whose losses do not count by samples."""

    parts: dict[int, Tensor]
    """By microbatch, without those that have none."""
    total: Tensor
    """Of the minibatch."""


@contextmanager
def merged_log(
    loop: Any,
    microbatch: Callable[[], tuple[int, int]] | None = None,
    bring: Callable[[Tensor], Tensor] | None = None,
    aside: Aside = nullcontext,
) -> Iterator[MergedLog]:
    """Merges what is logged within, for one step of a loop that holds a result collection as `_results`.

    The real collection is back on every exit. After an exception nothing is replayed.
    """
    with held_log(loop, microbatch, bring, aside) as merged:
        yield merged
    merged.replay()


@contextmanager
def held_log(
    loop: Any,
    microbatch: Callable[[], tuple[int, int]] | None,
    bring: Callable[[Tensor], Tensor] | None = None,
    aside: Aside = nullcontext,
) -> Iterator[MergedLog]:
    """Holds back what is logged within. The real collection is back on every exit; `replay_of` then gives it the calls."""
    results = loop._results
    held = MergedLog(results, microbatch, bring, aside)
    loop._results = held
    try:
        yield held
    finally:
        loop._results = results


@contextmanager
def direct_log(loop: Any, bring: Callable[[Tensor], Tensor], aside: Aside) -> Iterator[None]:
    """For a step that is one microbatch: what it logs goes into the loop's collection at once.

    Args:
        loop: holds a result collection as `_results`.
        bring: takes logged values to where the collection computes.
        aside: makes code within no code between layers.
    """
    results = loop._results
    log = results.log
    before = _state_of(results)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log_beside(fx: str, name: str, value: Any, **kwargs: Any) -> None:
        if isinstance(value, Tensor):
            value = bring(value)
        with aside():
            log(fx, name, value, **kwargs)

    results.log = log_beside
    try:
        yield
    except Uncuttable:  # the step will be run again
        _restore(results, before)
        raise
    finally:
        del results.log


@contextmanager
def unlogged(loop: Any) -> Iterator[None]:
    """Within, what is logged is dropped."""
    with held_log(loop, lambda: (0, 1)):
        yield


def _merge(calls: list[_Call], losses: Losses | None) -> list[_Call]:
    """One call for all; unmerged where Lightning has to judge them: unlike arguments, a reduction it does not know."""
    first, last = calls[0], calls[-1]
    if len(calls) == 1:
        return calls
    arguments = {key: value for key, value in first.kwargs.items() if key != "batch_size"}
    if any({key: value for key, value in call.kwargs.items() if key != "batch_size"} != arguments for call in calls):
        return calls
    if not any(isinstance(call.value, Tensor) for call in calls):
        return [last]  # a Metric: one object that all microbatches have updated
    reduce_fx = first.kwargs.get("reduce_fx", _MEAN)
    reduction = _REDUCTIONS.get(reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx)
    if reduction is None or not all(isinstance(call.value, Tensor) for call in calls):
        return calls

    sizes = [call.kwargs.get("batch_size") for call in calls]
    known = [size for size in sizes if size is not None]
    is_explicit = len(known) == len(sizes)
    value = _reduce(reduction, [call.value for call in calls], known if is_explicit else [c.num_samples for c in calls])
    if losses is not None and reduction == _MEAN and {call.microbatch for call in calls} == set(losses.parts):
        logged = torch.stack([call.value.to(value) for call in calls])
        found = torch.stack([losses.parts[call.microbatch].to(value) for call in calls])
        is_loss = ((logged == found) | (logged.isnan() & found.isnan())).all()
        value = torch.where(is_loss, losses.total.to(value), value)
    batch_size = sum(known) if is_explicit else None
    return [dataclasses.replace(first, value=value, kwargs={**first.kwargs, "batch_size": batch_size})]


def _reduce(reduction: str, values: list[Tensor], weights: list[int]) -> Tensor:
    stacked = torch.stack([value.to(values[0].device) for value in values])
    if reduction == _SUM:
        return stacked.sum(0)
    if reduction == _MAX:
        return stacked.amax(0)
    if reduction == _MIN:
        return stacked.amin(0)
    # Lightning keeps logged values in float32 or float64; half precision would round them before it does so.
    if stacked.dtype not in (torch.float32, torch.float64):
        default = torch.get_default_dtype()
        stacked = stacked.to(default if default == torch.float64 else torch.float32)
    total = sum(weights)
    shares = [weight / total for weight in weights] if total else [1 / len(weights)] * len(weights)
    mean = sum(share * value for share, value in zip(shares, stacked.unbind(0), strict=True))
    # Constants (an epoch, a learning rate) keep their bits, and the device is not waited for to find out.
    return torch.where((stacked == stacked[0]).all(0), stacked[0], torch.as_tensor(mean))
