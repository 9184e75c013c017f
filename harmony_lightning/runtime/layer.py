"""Forward and backward of one layer as a single autograd node that keeps no weights and no activations.

Forward runs the module with the weights that are on the device now and stashes its inputs; backward runs it again from
the stash, with the random state, autocast state and written buffers of the forward, and differentiates that.

Forward runs with gradients enabled although its graph is thrown away (its saved tensors are never kept): user code and
torch itself choose other paths, kernels and results when gradients are off.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.runtime.randomness import Replay
from harmony_lightning.runtime.segment import Segment, add_place, reaches_weights
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.structure import Arguments
from harmony_lightning.runtime.thread_state import Autocast

_DROPPED = object()


class LayerCall:
    """One call of a layer by one microbatch, from its forward to its backward."""

    def __init__(self, site: Site, segment: Segment, arguments: Arguments) -> None:
        self.site = site
        self.segment = segment
        self.arguments = arguments
        self.autocast = Autocast.capture()
        self.replay: Replay | None = None
        self.buffers_before: dict[int, torch.Tensor] = {}
        """Values of written buffers in front of the forward, by place."""
        self.trained: tuple[str, ...] = ()
        """Weights that get a gradient from this call."""
        self.result_spec: Any = None
        self.result_leaves: list[Any] = []
        self.tensor_positions: list[int] = []
        self.mutated: list[int] = []
        """Input tensors that the layer writes; their new values follow the results."""


def call_layer(site: Site, segment: Segment, args: Any, kwargs: Any) -> Any:
    """Run a layer in its segment; the result is part of the microbatch's autograd graph."""
    arguments = Arguments(args, kwargs)
    originals = arguments.take_tensors()
    with torch._C.DisableTorchFunction():
        tensors = [segment.bring(tensor) for tensor in originals]
    state = segment.state
    trained = tuple(name for name in site.weight_names if state.parameters[name].requires_grad)
    call = LayerCall(site, segment, arguments.snapshot())
    if not torch.is_grad_enabled() or not (trained or any(tensor.requires_grad for tensor in tensors)):
        return _run_without_graph(call, arguments, tensors)
    call.trained = trained
    segment.has_graph = True
    for name in trained:
        segment.uses[name] += 1
    with state.inside_layer(segment.device):
        results = LayerFunction.apply(state.anchor, call, arguments, *tensors)  # type: ignore[no-untyped-call]
    leaves = call.result_leaves
    call.result_leaves = []
    for position, result in zip(call.tensor_positions, results, strict=False):
        leaves[position] = result
    for position, value in zip(call.mutated, results[len(call.tensor_positions) :], strict=True):
        segment.replaced[id(originals[position])] = (originals[position], value)
    return pytree.tree_unflatten(leaves, call.result_spec)


def _run_without_graph(call: LayerCall, arguments: Arguments, tensors: list[torch.Tensor]) -> Any:
    state, site, device = call.segment.state, call.site, call.segment.device
    args, kwargs = arguments.build(tensors)
    with state.inside_layer(device):
        buffers = _Buffers(call)
        result = site.run(state.weights_of(site, device, call.trained), buffers.tensors, args, kwargs)
        buffers.report_written()
    return pytree.tree_map_only(torch.Tensor, state.off_the_arena, result)


def _versions(buffers: list[torch.Tensor]) -> list[int]:
    return [0 if buffer.is_inference() else buffer._version for buffer in buffers]


class _Buffers:
    """A layer's buffers around one forward: which ones it wrote, and what was in them before.

    Version counters do not tell: torch's own batch normalisation writes its statistics without counting. So the first
    call in each combination of training flags compares values, and what was written then counts as written always.
    """

    def __init__(self, call: LayerCall) -> None:
        self._call = call
        self._site = call.site
        self._store = call.segment.state.buffers
        self._device = call.segment.device
        self.tensors = [self._store.fetch(place, self._device) for place in self._site.buffer_places]
        self._held, self._versions = list(self.tensors), _versions(self.tensors)
        self._flags = self._site.training_flags()
        self._known = self._site.written_buffers.get(self._flags)
        self._before = {i: b.clone() for i, b in enumerate(self.tensors) if self._known is None or i in self._known}

    def report_written(self) -> dict[int, torch.Tensor]:
        """Tell the store what the forward wrote; returns the values in front of it, by place."""
        written = set(self._known or ())
        for index, (before, version, after) in enumerate(zip(self._held, self._versions, self.tensors, strict=True)):
            is_replaced = after is not before or _versions([after]) != [version]
            if is_replaced or (self._known is None and not torch.equal(self._before[index], after)):
                written.add(index)
        for index in written:
            self._store.written(self._site.buffer_places[index], self._device, self.tensors[index].detach())
        self._site.written_buffers[self._flags] = frozenset(written)
        return {index: value for index, value in self._before.items() if index in written}


def _follow_kept_results(call: LayerCall, results: list[torch.Tensor], detached: list[torch.Tensor]) -> None:
    """A hook that ran inside the layer may have kept a result; glue that uses it means the layer's real result."""
    replaced = call.segment.replaced
    for index, outer in enumerate(detached):
        # Held by the list of results and by getrefcount itself; by anybody else it was kept.
        if sys.getrefcount(results[index]) > 2:
            replaced[id(results[index])] = (results[index], outer)


def _drop(tensor: torch.Tensor) -> object:
    return _DROPPED


def _refuse(site: Site) -> Callable[[object], torch.Tensor]:
    def unpack(_: object) -> torch.Tensor:
        raise UnsupportedError(
            f"a tensor computed inside layer {site.name} was used outside of it other than through its result (was "
            f"it kept in an attribute?); its gradient is not available. Choose smaller layers, so that it becomes "
            f"the result of one: HarmonyStrategy(layers=[...])"
        )

    return unpack


class LayerFunction(torch.autograd.Function):
    """The autograd node of a `LayerCall`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, anchor: torch.Tensor, call: LayerCall, arguments: Arguments, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        site, device = call.site, call.segment.device
        state = call.segment.state
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.needs = [tensor.requires_grad for tensor in tensors]

        buffers = _Buffers(call)

        # Which inputs a layer writes is learned from its first call, which therefore gets copies of all.
        copied = site.mutated_inputs
        with torch.enable_grad(), saved_tensors_hooks(_drop, _refuse(site)):
            inner = [
                _leaf(tensor, needs, copied is None or index in copied)
                for index, (tensor, needs) in enumerate(zip(tensors, ctx.needs, strict=True))
            ]
            inner_versions = _versions(inner)
            args, kwargs = arguments.build(inner)
            replay = Replay(device)
            result = site.run(state.weights_of(site, device, call.trained), buffers.tensors, args, kwargs)
            replay.keep_what_was_drawn(device)
            call.replay = replay

        call.buffers_before = buffers.report_written()
        mutated = [i for i, (t, v) in enumerate(zip(inner, inner_versions, strict=True)) if _versions([t]) != [v]]
        site.mutated_inputs = (copied or frozenset()) | frozenset(mutated)
        call.mutated = mutated

        leaves, call.result_spec = pytree.tree_flatten(result)
        del result
        call.tensor_positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        results = [leaves[i] for i in call.tensor_positions] + [inner[i] for i in mutated]
        detached = [state.off_the_arena(result.detach()) for result in results]
        ctx.mark_non_differentiable(
            *(d for d, result in zip(detached, results, strict=True) if not result.requires_grad)
        )
        for position in call.tensor_positions:
            leaves[position] = None
        call.result_leaves = leaves
        ctx.save_for_backward(*tensors)
        _follow_kept_results(call, results, detached)
        return tuple(detached)

    @staticmethod
    @once_differentiable  # the recompute is not part of any graph: a second derivative must fail, not be wrong
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        call: LayerCall = ctx.call
        stash = ctx.saved_tensors
        trained = call.trained if reaches_weights(ctx) else ()
        state = call.segment.state
        try:
            with state.recomputing(call.segment.device):
                return (None, None, None, *_differentiate(call, stash, ctx.needs, gradients, trained))
        except Exception as error:
            add_place(error, f"in backward of layer {call.site.name}", call.segment)
            raise


def _leaf(tensor: torch.Tensor, needs_gradient: bool, is_copied: bool) -> torch.Tensor:
    leaf = tensor.detach()
    if needs_gradient:
        leaf.requires_grad_()
    return leaf.clone() if is_copied else leaf


def _differentiate(
    call: LayerCall,
    stash: tuple[torch.Tensor, ...],
    needs: list[bool],
    gradients: tuple[torch.Tensor | None, ...],
    trained: tuple[str, ...],
) -> list[torch.Tensor | None]:
    """Gradients of the input tensors; those of the `trained` weights go to the segment."""
    site, segment = call.site, call.segment
    state, device = segment.state, segment.device
    stash = tuple(tensor.to(device.torch_device) for tensor in stash)
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(stash, needs, strict=True)]
    weights = state.weights_of(site, device, call.trained)
    buffers = [
        (call.buffers_before[index] if index in call.buffers_before else state.buffers.fetch(place, device)).clone()
        for index, place in enumerate(site.buffer_places)
    ]
    assert call.replay is not None
    autocast = Autocast.capture()
    call.autocast.apply()
    torch.set_autocast_cache_enabled(False)
    present = call.replay.begin(device)
    try:
        # A checkpoint within the layer runs parts of it once more while it is differentiated, on the same weights.
        with torch.enable_grad(), site.hung(weights, buffers):
            copied = site.mutated_inputs or frozenset()
            inner = [leaf.clone() if index in copied else leaf for index, leaf in enumerate(leaves)]
            args, kwargs = call.arguments.snapshot().build(inner)
            result = site.run_plain(args, kwargs)
            found = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            found += [inner[i] for i in call.mutated]
            if len(found) != len(gradients):
                raise UnsupportedError(
                    f"layer {site.name} returned {len(gradients)} tensors in forward and {len(found)} when it was "
                    f"recomputed: its forward must do the same when it is called again with the same inputs"
                )
            roots = [(t, g) for t, g in zip(found, gradients, strict=True) if g is not None and t.requires_grad]
            targets = [leaf for leaf in leaves if leaf.requires_grad] + [weights[name] for name in trained]
            values: tuple[torch.Tensor | None, ...] = (
                torch.autograd.grad([t for t, _ in roots], targets, [g for _, g in roots], allow_unused=True)
                if roots and targets
                else (None,) * len(targets)
            )
    finally:
        present.begin(device)
        autocast.apply()
    num_inputs = sum(needs)
    ours = _unshared(values, gradients) if state.cluster.host_is_device else [False] * len(values)
    for name, value, is_ours in zip(trained, values[num_inputs:], ours[num_inputs:], strict=True):
        segment.add_gradient(name, site.pack, value, is_ours)
    by_input = iter(values[:num_inputs])
    return [next(by_input) if need else None for need in needs]


def _unshared(values: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]) -> list[bool]:
    """Which gradients nobody else holds and so may be added to in place. Autograd hands one tensor on to several takers
    where an operation's gradient is that of its result, as an addition's is."""
    memory = Counter(storage_key(tensor) for tensor in (*values, *gradients) if tensor is not None)
    return [value is not None and memory[storage_key(value)] == 1 and value.is_contiguous() for value in values]
