"""Where user code calls a layer: the call becomes one autograd node, or runs as it is if nothing will be differentiated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.runtime.derivatives import refuse_transforms
from harmony_lightning.runtime.functions import apply_own
from harmony_lightning.runtime.layer.call import CallBuffers, LayerCall
from harmony_lightning.runtime.layer.joint import Join, Waiting
from harmony_lightning.runtime.layer.node import LayerFunction
from harmony_lightning.runtime.layer.written_weights import hand_on_written, versions_of_weights
from harmony_lightning.runtime.running import InsideLayer
from harmony_lightning.runtime.segment import Segment
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.structure import Arguments, unflatten_result, version_of


def call_layer(
    site: Site, segment: Segment, args: Any, kwargs: Any, keeps: bool = False, join: Join | None = None
) -> Any:
    """Run a layer in its segment; the result is part of the microbatch's autograd graph.

    Args:
        join: waits for other microbatches' calls, if the layer may be called for several at once.
        keeps: its activations stay on the device until its backward; in the last pack, whose backward is next, only until
            the microbatch leaves the pack.
    """
    refuse_transforms(site.name)
    arguments = Arguments(args, kwargs)
    originals = arguments.take_tensors()
    with torch._C.DisableTorchFunction():
        taken = [segment.take(segment.state.buffers.come_home(tensor)) for tensor in originals]
        call = LayerCall(site, segment, arguments, is_kept=keeps)
        state, objects = segment.state, call.objects
        tensors = [tensor for tensor, _ in taken]
        needs = [tensor.requires_grad or sink is not None for tensor, sink in taken]
        # Not a look at the weights, which would wait for their updates.
        parameters = state.parameters
        trained = tuple([name for name in site.weight_names if parameters[name].requires_grad])
    if not torch.is_grad_enabled() or not (trained or objects or any(needs)):
        return _run_without_graph(call, arguments, originals, tensors)
    call.trained = trained
    call.given, call.needs = originals, needs
    call.sinks = [sink for _, sink in taken]
    segment.has_graph = True
    if keeps and segment.pack == len(state.plan.packs) - 1:
        segment.on_leave.append(call.activations.drop)
    for name in trained:
        segment.uses[name] += 1
    if join is not None and not objects and _may_join(site):
        call.waiting = Waiting(
            state, site, segment.device, trained, arguments, originals, tensors, needs, call.autocast
        )
        call.joint = join(call.waiting)
        if call.joint is None:
            call.waiting = None  # it holds the inputs
    weighed = _weighed(call, tensors) if _is_weighed(call) else nullcontext()
    with InsideLayer(state, segment.device, is_watched=bool(objects)), weighed:
        results = apply_own(LayerFunction, state.anchor, call, arguments, *tensors, *objects.linked)  # type: ignore[no-untyped-call]
    leaves, call.result_leaves = call.result_leaves, ()
    for position, result in zip(call.tensor_positions, results, strict=False):
        leaves[position] = result
    if call.mutated:
        given = [*originals, *(objects.originals[index] for index in objects.used)]
        for position, value in zip(call.mutated, results[len(results) - len(call.mutated) :], strict=True):
            segment.replaced[id(given[position])] = (given[position], value)
    call.given = ()
    objects.let_go()
    return unflatten_result(leaves, call.result_spec)


def _is_weighed(call: LayerCall) -> bool:
    """Whether somebody wants to know what the layer's operations save."""
    segment, measuring = call.segment, call.segment.state.measuring
    if not segment.is_cut or (measuring.meter is None and measuring.holding is None):
        return False
    is_kept = call.activations.is_kept and segment.pack < len(segment.state.plan.packs) - 1
    return (measuring.meter is not None and measuring.meter.trains) or (measuring.holding is not None and is_kept)


@contextmanager
def _weighed(call: LayerCall, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Tell what the layer's operations save beside its inputs and weights. It is held until the forward is over, as it
    would be if it were kept, and as it will be in backward."""
    segment, layer = call.segment, call.site.name
    meter, holding = segment.state.measuring.meter, segment.state.measuring.holding
    saved = call.activations.weighed = list[torch.Tensor]()
    yield
    call.activations.weighed = None
    if call.site.differentiates or call.joint is not None:
        if meter is not None:
            meter.forget_layer(layer)
        return
    if holding is not None:
        holding.activation(layer, segment, saved)
    if meter is not None:
        known = {storage_key(tensor) for tensor in inputs}
        meter.activation(layer, segment, (tensor for tensor in saved if storage_key(tensor) not in known))


def _may_join(site: Site) -> bool:
    """Whether what the layer was seen to do by itself is all that it must do in a joint call."""
    writes_buffers = bool(site.buffer_places) and site.written_buffers.get(site.training_flags()) != frozenset()
    learned = site.mutated_inputs == frozenset() and not writes_buffers
    return learned and not (site.draws or site.differentiates or site.joins is False)


def _run_without_graph(
    call: LayerCall, arguments: Arguments, originals: Sequence[torch.Tensor], tensors: list[torch.Tensor]
) -> Any:
    state, site, device = call.segment.state, call.site, call.segment.device
    versions = [version_of(tensor) for tensor in tensors]
    args, kwargs = arguments.build(tensors)
    with InsideLayer(state, device, is_watched=bool(call.objects)):
        buffers = CallBuffers(call)
        with call.objects.opened(_as_it_is):
            weights = state.weights.of_site(site, device, call.trained)
            weight_versions = versions_of_weights(site, weights)
            result, wide = call.run(weights, buffers.tensors, args, kwargs, _without_graph)
            hand_on_written(site, call.segment, weights, weight_versions, wide)
        buffers.report_written()
    for original, tensor, version in zip(originals, tensors, versions, strict=True):
        if tensor is not original and version_of(tensor) != version:  # the user's code has that one
            call.segment.replaced[id(original)] = (original, tensor)
    call.objects.let_go()
    arguments.keep_written()
    arguments.place_tensors(state.weights.off_the_arena)
    arguments.hand_over()
    return pytree.tree_map_only(torch.Tensor, state.weights.off_the_arena, result)


def _without_graph(weight: torch.Tensor, trains: bool) -> torch.Tensor:
    return weight


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
