"""Forward and backward of one layer as a single autograd node that keeps no weights and no activations.

Forward runs the module with the weights that are on the device now and stashes its inputs. The operations inside build
a graph of their own, which holds no tensors (`activations`). Backward differentiates that graph; what it needs of the
forward's values comes from a second run, from the stash, with the random state, autocast state and written buffers of
the first.

    stash -> [ begin -> ... the layer's own graph ... -> end ] -> results
                 ^                                        |
                 '---- gradients, taken by the node ------'

A layer whose forward takes derivatives by itself needs what it saves at once. The graph of its forward is thrown away, and
backward differentiates that of the second run.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.runtime.activations import TakesDerivative, keep_detached, unreachable
from harmony_lightning.runtime.derivatives import first_derivative_only
from harmony_lightning.runtime.differentiate import edge_of, keeps_graph, kept_edge_of
from harmony_lightning.runtime.functions import apply_own
from harmony_lightning.runtime.layer.backward import differentiate
from harmony_lightning.runtime.layer.call import CallBuffers, LayerCall
from harmony_lightning.runtime.layer.graph import follow_kept_results, outlive_slots, refuse_strangers
from harmony_lightning.runtime.layer.joint import Part
from harmony_lightning.runtime.layer.objects import Surroundings
from harmony_lightning.runtime.layer.written_weights import hand_on_written, versions_of_weights
from harmony_lightning.runtime.randomness import Replay
from harmony_lightning.runtime.running import Recomputing
from harmony_lightning.runtime.segment import Import, Sink, add_place, reaches_weights
from harmony_lightning.runtime.structure import Arguments, clone_with_strides, flatten_result, version_of

_REFUSES_TO_WRITE = "is being modified inplace"
"""What torch says of an input that the layer's graph begins with, and that is no copy."""


class LayerFunction(torch.autograd.Function):
    """The autograd node of a `LayerCall`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, anchor: torch.Tensor, call: LayerCall, arguments: Arguments, *given: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        site, device, objects = call.site, call.segment.device, call.objects
        state = call.segment.state
        tensors = given[: len(call.given)]
        ctx.set_materialize_grads(False)
        ctx.call = call

        # Which inputs a layer writes is learned from its first call, which therefore gets copies of all.
        copied = site.mutated_inputs
        if call.joint is not None and call.waiting is not None:
            fetched = [state.buffers.fetch(place, device) for place in site.buffer_places]
            if (part := call.joint.part_of(call.waiting, fetched)) is not None:
                return _take_part(ctx, call, arguments, tensors, part)

        def begin(value: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return _begin(value, True, state.anchor, site.writes_objects is not False)

        def begin_weight(weight: torch.Tensor, trains: bool) -> torch.Tensor:
            may_be_written = not torch.is_grad_enabled()  # its gradient may be asked for all the same
            with torch.enable_grad():
                return _begin(weight, trains, state.anchor, may_be_written)

        start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        while True:
            buffers = CallBuffers(call)
            replay = Replay(device)
            try:
                with torch.enable_grad(), _saving(call), objects.opened(begin):
                    inner = [
                        _begin(tensor, needs, state.anchor, copied is None or index in copied)
                        for index, (tensor, needs) in enumerate(zip(tensors, call.needs, strict=True))
                    ]
                    call.input_edges = [edge_of(t) if t.requires_grad else None for t in inner]
                    inner_versions = [version_of(tensor) for tensor in inner]
                    around = Surroundings(arguments)
                    args, kwargs = arguments.build(inner)
                    weights = state.weights.of_site(site, device, call.trained)
                    call.weight_edges = weights.edges(call.trained)
                    weight_versions = versions_of_weights(site, weights)
                    result, wide = call.run(weights, buffers.tensors, args, kwargs, begin_weight)
                break
            except (TakesDerivative, RuntimeError, *OUT_OF_MEMORY) as reason:
                if isinstance(reason, TakesDerivative):
                    site.differentiates = True
                elif not isinstance(reason, OUT_OF_MEMORY):
                    if copied is None or _REFUSES_TO_WRITE not in str(reason):
                        raise
                    copied = site.writes_objects = None
                else:
                    kept, call.activations.is_kept = call.activations.is_kept, False  # else each try had that to let go
                    if not (state.memory.make_room(device) or kept):
                        raise
                call.activations.restart()
                buffers.take_back()
                replay.keep_what_was_drawn(device)
                replay.begin(device)
                arguments = call.arguments.snapshot(objects.original)
                objects.forget_uses()
        hand_on_written(site, call.segment, weights, weight_versions, wide)
        site.saved_kinds = call.activations.share_kinds(site.saved_kinds)
        replay.keep_what_was_drawn(device)
        if not replay.is_empty:
            call.replay, site.draws = replay, True
        if wide:
            call.wide_edges = {name: get_gradient_edge(wide[name]) for name in call.trained if name in wide}

        call.buffers_before = buffers.report_written()
        inner += objects.inner
        inner_versions += objects.versions
        call.input_edges += objects.edges
        mutated = [i for i, (t, v) in enumerate(zip(inner, inner_versions, strict=True)) if version_of(t) != v]
        site.mutated_inputs = (copied or frozenset()) | frozenset(i for i in mutated if i < len(tensors))
        if objects.used:
            site.writes_objects = bool(site.writes_objects) or any(i >= len(tensors) for i in mutated)
        call.mutated = mutated
        call.late_writes = [] if copied is None else [i for i in mutated if i < len(tensors) and i not in copied]

        leaves, call.result_spec = flatten_result(result)
        del result
        call.tensor_positions = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and not objects.is_original(leaf)
        ]
        results = [leaves[i] for i in call.tensor_positions]
        arguments.keep_written()
        has_objects = around.reach(leaves)
        if has_objects:
            results += around.results(known=[*results, *inner, *objects.originals])
        results += [inner[i] for i in mutated]
        if not site.differentiates:
            call.result_edges = [kept_edge_of(result) if result.requires_grad else None for result in results]
            refuse_strangers(results, call, start)
            outlive_slots(results, call)
        detached = [state.weights.off_the_arena(result.detach()) for result in results]
        ctx.mark_non_differentiable(
            *(d for d, result in zip(detached, results, strict=True) if not result.requires_grad)
        )
        if call.joint is not None and call.waiting is not None:
            call.joint.compare(call.waiting, detached, leaves, call.tensor_positions)
            call.joint = call.waiting = None
        for position in call.tensor_positions:
            leaves[position] = None
        call.result_leaves = leaves
        ctx.save_for_backward(*tensors, *objects.values)
        ctx.reaches_back = objects.reaches_back or any(call.sinks)
        if has_objects:
            users = [*call.given, *(objects.originals[index] for index in objects.used)]
            outer = {id(inner[i]): users[i] for i in range(len(inner)) if i not in mutated}
            outer |= {id(results[i]): detached[i] for i in reversed(range(len(results)))}
            around.place(outer)
        arguments.hand_over()
        follow_kept_results(call, results, detached)
        return tuple(detached)

    @staticmethod
    @first_derivative_only  # the inner graph is not part of the outer: a second derivative must fail, not be wrong
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        call: LayerCall = ctx.call
        is_for_all = reaches_weights(ctx)
        trained = call.trained if is_for_all else ()
        call.stash = lambda: ctx.saved_tensors
        state, device = call.segment.state, call.segment.device
        try:
            call.check()
            with Recomputing(state, device):
                if call.activations.is_kept:  # else the second run asks for them
                    state.memory.with_room(device, lambda: state.weights.of_site(call.site, device, call.trained))
                values = differentiate(call, gradients, trained)
                num_arguments = len(call.needs)
                with torch._C.DisableTorchFunction():
                    linked = call.objects.hand_back(values[num_arguments:], is_wanted=is_for_all)
                    given = _send_back(values[:num_arguments], call.sinks, is_wanted=is_for_all)
                if not keeps_graph():
                    call.end()
                return (None, None, None, *given, *linked)
        except Exception as error:
            add_place(error, f"in backward of layer {call.site.name}", call.segment)
            raise
        finally:
            call.stash = None


def _send_back(
    gradients: Sequence[torch.Tensor | None], sinks: Sequence[Sink | None], *, is_wanted: bool
) -> list[torch.Tensor | None]:
    """Hands gradients of inputs from elsewhere to the engine, if it waits for them, the last one first as autograd would.
    Returns those of the other inputs."""
    back = list(gradients)
    for index in reversed(range(len(back))):
        if (sink := sinks[index]) is not None:
            gradient, back[index] = back[index], None
            if is_wanted and gradient is not None:
                sink(gradient)
    return back


def _take_part(
    ctx: Any, call: LayerCall, arguments: Arguments, tensors: Sequence[torch.Tensor], part: Part
) -> tuple[torch.Tensor, ...]:
    """The results, where a joint call has made them."""
    call.joint, call.waiting, call.is_part = None, None, True
    some_edge = get_gradient_edge(call.segment.state.anchor)
    call.input_edges = [some_edge if needs else None for needs in call.needs]
    call.result_spec, call.tensor_positions, call.result_leaves = part.spec, part.positions, part.leaves
    results = part.results
    for position in part.positions:
        part.leaves[position] = None
    ctx.mark_non_differentiable(*(r for r, needs in zip(results, part.need_gradient, strict=True) if not needs))
    ctx.save_for_backward(*tensors)
    ctx.reaches_back = any(call.sinks)
    arguments.hand_over()
    return tuple(results)


def _begin(tensor: torch.Tensor, needs: bool, anchor: torch.Tensor, is_copied: bool) -> torch.Tensor:
    """An input as the layer's own graph begins with it, if it `needs` a gradient. The graph does not hold the tensor, as a
    leaf would."""
    source = tensor.detach()
    if needs:
        return apply_own(Import, anchor, source, unreachable, is_copied)  # type: ignore[no-any-return,no-untyped-call]
    return clone_with_strides(source) if is_copied else source


def _saving(call: LayerCall) -> AbstractContextManager[Any]:
    """What happens to tensors that operations of the forward save."""
    activations = call.activations
    return saved_tensors_hooks(keep_detached, activations.hand_out) if call.site.differentiates else activations
