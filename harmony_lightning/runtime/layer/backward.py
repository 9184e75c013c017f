"""Gradients of one layer call: its graph is differentiated, with a second run that makes again what backward needs."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.runtime.activations import keep_detached, unreachable
from harmony_lightning.runtime.differentiate import gradients_of, keeps_graph
from harmony_lightning.runtime.layer.call import LayerCall
from harmony_lightning.runtime.layer.objects import Surroundings
from harmony_lightning.runtime.layer.written_weights import refuse_other_writes
from harmony_lightning.runtime.structure import clone_with_strides, flatten_result
from harmony_lightning.runtime.thread_state import Autocast
from harmony_lightning.runtime.weights.weight_slot import Weights


def differentiate(
    call: LayerCall, gradients: tuple[torch.Tensor | None, ...], trained: tuple[str, ...]
) -> list[torch.Tensor | None]:
    """Gradients of the input tensors; those of the `trained` weights go to the segment."""
    state, device = call.segment.state, call.segment.device
    is_without_graph = call.site.differentiates or call.is_part
    values = None if is_without_graph else _values(call, gradients, trained)
    if values is None:
        values = state.memory.with_room(device, lambda: _values_by_second_run(call, gradients, trained))
    wide = _wide_names(call, trained)
    num_inputs = len(values) - len(trained) - len(wide)
    if trained:
        of_weights = dict(zip(trained, values[num_inputs:], strict=False))
        for name, other in zip(wide, values[num_inputs + len(trained) :], strict=True):
            if other is not None:
                value = of_weights[name]
                of_weights[name] = other if value is None else value + other
        owned: list[str] = []
        if state.cluster.host_is_device and not state.gradients.has_loose(trained[0], device.index):
            unshared = _unshared(values, gradients)[num_inputs:]
            owned = [name for name, is_ours in zip(trained, unshared, strict=False) if is_ours]
        call.segment.add_gradients(of_weights, call.site.pack, owned, sums_narrow=call.autocast.is_cached)
    by_input = iter(values[:num_inputs])
    return [None if edge is None else next(by_input) for edge in call.input_edges]


_Gradients = tuple[torch.Tensor | None, ...]
"""Of the inputs that have one, of the weights that train, and of float32 versions of narrow ones among these."""


def _wide_names(call: LayerCall, trained: tuple[str, ...]) -> list[str]:
    return [name for name in trained if name in call.wide_edges] if call.wide_edges else []


def _values(call: LayerCall, gradients: _Gradients, trained: tuple[str, ...]) -> _Gradients | None:
    """By the graph of the forward; None if memory was short amid it. Then there is room now, but the graph is used up."""
    roots = [(e, g) for e, g in zip(call.result_edges, gradients, strict=True) if e is not None and g is not None]
    targets = [edge for edge in call.input_edges if edge is not None] + (list(call.weight_edges) if trained else [])
    targets += [call.wide_edges[name] for name in _wide_names(call, trained)]
    if not (roots and targets):
        return (None,) * len(targets)
    state, device = call.segment.state, call.segment.device
    make_room = functools.partial(state.memory.make_room, device)
    call.activations.open(functools.partial(_recompute, call), make_room)
    try:
        edges, seeds = zip(*roots, strict=True)
        return gradients_of(edges, seeds, targets, keeps_graph=keeps_graph())
    except OUT_OF_MEMORY:
        call.activations.close()
        if not make_room():
            raise
        return None
    finally:
        call.activations.close()


def _values_by_second_run(call: LayerCall, gradients: _Gradients, trained: tuple[str, ...]) -> _Gradients:
    run = _run_again(call, saved_tensors_hooks(keep_detached, call.activations.hand_out))
    if len(run.results) != len(gradients):
        raise UnsupportedError(
            f"layer {call.site.name} returned {len(gradients)} tensors first and {len(run.results)} when it was "
            f"recomputed: its forward must do the same when it is called again with the same inputs"
        )
    weights = call.segment.state.weights.of_site(call.site, call.segment.device, call.trained)
    roots = [(t, g) for t, g in zip(run.results, gradients, strict=True) if g is not None and t.requires_grad]
    targets = [leaf for leaf in run.leaves if leaf.requires_grad] + [weights[name] for name in trained]
    call.wide_edges = {name: get_gradient_edge(run.wide[name]) for name in trained if name in run.wide}
    targets += [run.wide[name] for name in _wide_names(call, trained)]
    if not (roots and targets):
        return (None,) * len(targets)
    return torch.autograd.grad([t for t, _ in roots], targets, [g for _, g in roots], allow_unused=True)


def _unshared(values: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]) -> list[bool]:
    """Which gradients nobody else holds and so may be added to in place. Autograd hands one tensor on to several takers
    where an operation's gradient is that of its result, as an addition's is."""
    keys = [None if value is None else storage_key(value) for value in values]
    times = Counter(keys)
    times.update(storage_key(gradient) for gradient in gradients if gradient is not None)
    return [
        value is not None and times[key] == 1 and value.is_contiguous() for key, value in zip(keys, values, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _SecondRun:
    leaves: list[torch.Tensor]
    results: list[torch.Tensor]
    """Tensors in the result, and inputs that the layer has written."""
    wide: Weights
    """Float32 versions of narrow weights that it has asked for."""


def _run_again(call: LayerCall, hooks: saved_tensors_hooks) -> _SecondRun:
    """The layer's forward once more, from the stash, with the random, autocast and buffer state of the first time."""
    if Autocast.capture()[:3] == call.autocast[:3]:  # the cache is off in here
        return _run(call, hooks)
    with call.autocast.in_force():
        torch.set_autocast_cache_enabled(False)
        return _run(call, hooks)


def _run(call: LayerCall, hooks: saved_tensors_hooks) -> _SecondRun:
    site, device = call.site, call.segment.device
    state = call.segment.state
    assert call.stash is not None
    stash = [tensor.to(device.torch_device) for tensor in call.stash()]
    weights = state.weights.of_site(site, device, call.trained)
    buffers = [
        (call.buffers_before[index] if index in call.buffers_before else state.buffers.fetch(place, device)).clone()
        for index, place in enumerate(site.buffer_places)
    ]
    present = None if call.replay is None else call.replay.begin(device)
    copied = site.mutated_inputs or frozenset()
    num_arguments = len(stash) - len(call.objects.used)
    leaves: list[torch.Tensor] = []
    inner: list[torch.Tensor] = []
    try:
        with torch.enable_grad(), hooks:
            leaves = [t.detach().requires_grad_(e is not None) for t, e in zip(stash, call.input_edges, strict=True)]
            inner = [
                clone_with_strides(leaf)
                if (index in copied if index < num_arguments else site.writes_objects)
                else leaf
                for index, leaf in enumerate(leaves)
            ]
            arguments = call.arguments
            if arguments.has_objects:
                arguments = arguments.snapshot(call.objects.used_again(inner[num_arguments:]))
            around = Surroundings(arguments)
            result, wide = call.run(weights, buffers, *arguments.build(inner[:num_arguments]), _as_leaf)
    finally:
        if present is not None:
            present.begin(device)
        if site.writes_weights:  # here, as the run ends as soon as it has saved what is wanted
            refuse_other_writes(site, call.segment, weights)
        if inner:
            _refuse_late_writes(call, leaves, inner)
    arguments.keep_written()
    result_leaves, _ = flatten_result(result)
    results = [leaf for leaf in result_leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
    if around.reach(result_leaves):
        results += around.results(known=[*results, *inner])
    return _SecondRun(leaves, results + [inner[i] for i in call.mutated], wide)


def _refuse_late_writes(call: LayerCall, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
    """Behind a second run that began with inputs as the first one has left them: it must have left them so, too.

    Raises:
        UnsupportedError: it has not.
    """
    for index in call.late_writes:
        if not torch.equal(before[index], after[index]):
            raise UnsupportedError(
                f"layer {call.site.name} writes its input {index} in place, which it did not in its first call, so that "
                "backward, which runs it again, would not be that of its forward; let it write a copy (x = x.clone())"
            )


def _recompute(call: LayerCall, save: Callable[[torch.Tensor], int]) -> None:
    _run_again(call, saved_tensors_hooks(save, unreachable))


def _as_leaf(weight: torch.Tensor, trains: bool) -> torch.Tensor:
    return weight.requires_grad_(trains)
