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

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.runtime.activations import Activations, TakesDerivative
from harmony_lightning.runtime.derivatives import first_derivative_only, refuse_transforms
from harmony_lightning.runtime.joint import Join, Joint, Part, Waiting
from harmony_lightning.runtime.objects import ObjectTensors, Surroundings
from harmony_lightning.runtime.randomness import Replay
from harmony_lightning.runtime.segment import Import, Segment, add_place, reaches_weights
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.structure import Arguments, clone_with_strides
from harmony_lightning.runtime.thread_state import Autocast


class LayerCall:
    """One call of a layer by one microbatch, from its forward to its backward."""

    def __init__(self, site: Site, segment: Segment, arguments: Arguments, *, is_kept: bool) -> None:
        self.site = site
        self.segment = segment
        self.activations = Activations(site.name, is_kept=is_kept)
        self.autocast = Autocast.capture()
        self.replay: Replay | None = None
        self.buffers_before: dict[int, torch.Tensor] = {}
        """Values of written buffers in front of the forward, by place."""
        self.weight_versions = self._read_weight_versions()
        self.trained: tuple[str, ...] = ()
        """Weights that get a gradient from this call."""
        self.stash: Callable[[], tuple[torch.Tensor, ...]] | None = None
        """The inputs, during backward."""
        self.input_edges: list[GradientEdge | None] = []
        self.weight_edges: dict[str, GradientEdge] = {}
        self.result_edges: list[GradientEdge | None] = []
        """Where the layer's own graph begins and ends; None for tensors that are not part of it."""
        self.result_spec: Any = None
        self.result_leaves: list[Any] = []
        self.tensor_positions: list[int] = []
        self.objects = ObjectTensors(site.name, segment, arguments)
        self.arguments = self.objects.copy(arguments)
        self.given: list[torch.Tensor] = []
        """The user's tensors, while the layer's forward runs."""
        self.waiting: Waiting | None = None
        self.joint: Joint | None = None
        """The call for several microbatches that this one is part of, until its part is taken."""
        self.is_part = False
        """The joint call has given the results, so there is no graph of the forward."""
        self.mutated: list[int] = []
        """Input tensors that the layer writes; their new values follow the results."""

    def _read_weight_versions(self) -> tuple[int, ...]:
        parameters = self.segment.state.parameters
        # While a microbatch is cut its weights cannot change: updates follow backward.
        return () if self.segment.is_cut else tuple(parameters[name]._version for name in self.site.weight_names)

    def check_weights(self) -> None:
        """In front of backward.

        Raises:
            UnsupportedError: weights are not those of the forward any more.
        """
        if self._read_weight_versions() != self.weight_versions:
            raise UnsupportedError(
                f"weights of layer {self.site.name} were changed between its forward and its backward (by an optimizer's "
                f"step?), so its gradient cannot be computed; torch refuses that, too. Call backward before the step, or "
                f"the layer again behind it"
            )


def call_layer(
    site: Site, segment: Segment, args: Any, kwargs: Any, keeps: bool = False, join: Join | None = None
) -> Any:
    """Run a layer in its segment; the result is part of the microbatch's autograd graph.

    Args:
        join: waits for other microbatches' calls, if the layer may be called for several at once.
        keeps: its activations stay on the device until its backward, or until the microbatch leaves the pack.
    """
    refuse_transforms(site.name)
    arguments = Arguments(args, kwargs)
    originals = arguments.take_tensors()
    with torch._C.DisableTorchFunction():
        tensors = [segment.bring(segment.state.buffers.come_home(tensor)) for tensor in originals]
        call = LayerCall(site, segment, arguments, is_kept=keeps)
        state, objects = segment.state, call.objects
        # Not a look at the weights, which would wait for their updates.
        trained = tuple(name for name in site.weight_names if state.parameters[name].requires_grad)
    if not torch.is_grad_enabled() or not (trained or objects or any(tensor.requires_grad for tensor in tensors)):
        return _run_without_graph(call, arguments, tensors)
    call.trained = trained
    call.given = originals
    segment.has_graph = True
    if keeps:
        segment.on_leave.append(call.activations.drop)
    for name in trained:
        segment.uses[name] += 1
    if join is not None and not objects and _may_join(site):
        call.waiting = Waiting(state, site, segment.device, trained, arguments, originals, tensors, call.autocast)
        call.joint = join(call.waiting)
    with state.inside_layer(segment.device, is_watched=bool(objects)):
        results = LayerFunction.apply(state.anchor, call, arguments, *tensors, *objects.linked)  # type: ignore[no-untyped-call]
    leaves, given = call.result_leaves, [*originals, *(objects.originals[index] for index in objects.used)]
    call.result_leaves, call.given = [], []
    objects.let_go()
    for position, result in zip(call.tensor_positions, results, strict=False):
        leaves[position] = result
    for position, value in zip(call.mutated, results[len(results) - len(call.mutated) :], strict=True):
        segment.replaced[id(given[position])] = (given[position], value)
    return pytree.tree_unflatten(leaves, call.result_spec)


def _may_join(site: Site) -> bool:
    """Whether what the layer was seen to do by itself is all that it must do in a joint call."""
    writes_buffers = site.written_buffers.get(site.training_flags()) != frozenset()
    learned = site.mutated_inputs == frozenset() and not writes_buffers
    return learned and not (site.draws or site.differentiates or site.joins is False)


def _run_without_graph(call: LayerCall, arguments: Arguments, tensors: list[torch.Tensor]) -> Any:
    state, site, device = call.segment.state, call.site, call.segment.device
    args, kwargs = arguments.build(tensors)
    with state.inside_layer(device, is_watched=bool(call.objects)):
        buffers = _Buffers(call)
        with call.objects.opened(_as_it_is):
            result = site.run(state.weights_of(site, device, call.trained), buffers.tensors, args, kwargs)
        buffers.report_written()
    call.objects.let_go()
    arguments.keep_written()
    arguments.place_tensors(state.off_the_arena)
    arguments.hand_over()
    return pytree.tree_map_only(torch.Tensor, state.off_the_arena, result)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


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

    def take_back(self) -> None:
        """The forward will run again: let buffers have their values in front of it."""
        with torch.no_grad():
            for index, value in self._before.items():
                self._held[index].copy_(value)

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


def _outlive_slots(results: Sequence[torch.Tensor], call: LayerCall) -> None:
    """Autograd functions of the user's may hold weights as attributes. Their slot will be overwritten, so they get copies
    of their own. Whether a layer has such functions is learned from its first call."""
    site, state = call.site, call.segment.state
    if state.cluster.host_is_device or site.has_functions is False:
        return
    site.has_functions = False
    for function in _functions(results):
        site.has_functions = True
        for name, held in vars(function).items():
            setattr(function, name, pytree.tree_map_only(torch.Tensor, state.off_the_arena, held))


def _refuse_strangers(results: Sequence[torch.Tensor], call: LayerCall, start: int) -> None:
    """The layer's own graph must end at its inputs and weights: beyond, gradients would be lost. Looked for in the first
    calls, and where objects were given, into which not everybody can look.

    Raises:
        UnsupportedError: it goes on to nodes from before `start`, or to weights of others.
    """
    site, state = call.site, call.segment.state
    if site.num_checked >= _NUM_CHECKED and not call.objects:
        return
    site.num_checked += 1
    for node in _nodes(results):
        variable = getattr(node, "variable", None)
        name = None if variable is None else state.weight_name(variable)
        if name is not None and name not in call.trained:
            what = f"weight {name}"
        elif variable is None and node._sequence_nr() < start:
            what = f"a result of {node.name()}"
        else:
            continue
        raise UnsupportedError(
            f"layer {site.name} used {what}, which requires a gradient and is neither an argument nor a weight of the "
            f"layer (is it kept in an attribute or a closure?); that gradient would be lost. Hand it to the layer as an "
            f"argument, or make a module that contains both one layer: HarmonyStrategy(layers=[...])"
        )


_NUM_CHECKED = 4
"""Calls of each layer whose graph is looked at; what it does then, it is taken to do always."""


def _nodes(results: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Of the graph of these tensors."""
    nodes, seen = [result.grad_fn for result in results], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes += [following for following, _ in node.next_functions]


def _functions(results: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Nodes of Python autograd functions in the graph of these tensors."""
    return (node for node in _nodes(results) if isinstance(node, torch.autograd.function.BackwardCFunction))


def _unreachable(_: Any) -> Any:
    raise AssertionError("gradients of a layer's inputs are taken where its graph begins, and a second run has none")


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
                return _begin(value.detach().requires_grad_(), state.anchor, site.writes_objects is not False)

        start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        while True:
            buffers = _Buffers(call)
            replay = Replay(device)
            try:
                with torch.enable_grad(), _saving(call), objects.opened(begin):
                    inner = [
                        _begin(tensor, state.anchor, copied is None or index in copied)
                        for index, tensor in enumerate(tensors)
                    ]
                    call.input_edges = [get_gradient_edge(t) if t.requires_grad else None for t in inner]
                    inner_versions = _versions(inner)
                    around = Surroundings(arguments)
                    args, kwargs = arguments.build(inner)
                    weights = state.weights_of(site, device, call.trained)
                    call.weight_edges = {name: weights.edge(name) for name in call.trained}
                    result = site.run(weights, buffers.tensors, args, kwargs)
                break
            except TakesDerivative:
                site.differentiates = True
                buffers.take_back()
                replay.keep_what_was_drawn(device)
                replay.begin(device)
                arguments = call.arguments.snapshot(objects.original)
                objects.forget_uses()
        replay.keep_what_was_drawn(device)
        call.replay = replay
        site.draws |= not replay.is_empty

        call.buffers_before = buffers.report_written()
        inner += objects.inner
        inner_versions += objects.versions
        call.input_edges += objects.edges
        mutated = [i for i, (t, v) in enumerate(zip(inner, inner_versions, strict=True)) if _versions([t]) != [v]]
        site.mutated_inputs = (copied or frozenset()) | frozenset(i for i in mutated if i < len(tensors))
        if objects.used:
            site.writes_objects = bool(site.writes_objects) or any(i >= len(tensors) for i in mutated)
        call.mutated = mutated

        leaves, call.result_spec = pytree.tree_flatten(result)
        del result
        call.tensor_positions = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and not objects.is_original(leaf)
        ]
        results = [leaves[i] for i in call.tensor_positions]
        arguments.keep_written()
        results += around.results(leaves, known=[*results, *inner, *objects.originals])
        results += [inner[i] for i in mutated]
        if not site.differentiates:
            call.result_edges = [get_gradient_edge(result) if result.requires_grad else None for result in results]
            _refuse_strangers(results, call, start)
            _outlive_slots(results, call)
        detached = [state.off_the_arena(result.detach()) for result in results]
        ctx.mark_non_differentiable(
            *(d for d, result in zip(detached, results, strict=True) if not result.requires_grad)
        )
        if call.joint is not None and call.waiting is not None:
            call.joint.compare(call.waiting, detached)
            call.joint = call.waiting = None
        for position in call.tensor_positions:
            leaves[position] = None
        call.result_leaves = leaves
        ctx.save_for_backward(*tensors, *objects.values)
        ctx.reaches_back = objects.reaches_back
        users = [*call.given, *(objects.originals[index] for index in objects.used)]
        outer = {id(inner[i]): users[i] for i in range(len(inner)) if i not in mutated}
        outer |= {id(results[i]): detached[i] for i in reversed(range(len(results)))}
        around.place(leaves, outer)
        arguments.hand_over()
        _follow_kept_results(call, results, detached)
        return tuple(detached)

    @staticmethod
    @first_derivative_only  # the inner graph is not part of the outer: a second derivative must fail, not be wrong
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        call: LayerCall = ctx.call
        trained = call.trained if reaches_weights(ctx) else ()
        call.stash = lambda: ctx.saved_tensors
        try:
            call.check_weights()
            with call.segment.state.recomputing(call.segment.device):
                values = _differentiate(call, gradients, trained)
                num_arguments = len(values) - len(call.objects.used)
                with torch._C.DisableTorchFunction():
                    linked = call.objects.hand_back(values[num_arguments:], is_wanted=reaches_weights(ctx))
                return (None, None, None, *values[:num_arguments], *linked)
        except Exception as error:
            add_place(error, f"in backward of layer {call.site.name}", call.segment)
            raise
        finally:
            call.stash = None


def _take_part(
    ctx: Any, call: LayerCall, arguments: Arguments, tensors: Sequence[torch.Tensor], part: Part
) -> tuple[torch.Tensor, ...]:
    """The results, where a joint call has made them."""
    call.joint, call.waiting, call.is_part = None, None, True
    state, device = call.segment.state, call.segment.device
    call.replay = Replay(device)
    call.replay.keep_what_was_drawn(device)
    some_edge = get_gradient_edge(state.anchor)
    call.input_edges = [some_edge if tensor.requires_grad else None for tensor in tensors]
    call.result_spec, call.tensor_positions, call.result_leaves = part.spec, part.positions, part.leaves
    results = part.results
    for position in part.positions:
        part.leaves[position] = None
    ctx.mark_non_differentiable(*(r for r, needs in zip(results, part.need_gradient, strict=True) if not needs))
    ctx.save_for_backward(*tensors)
    ctx.reaches_back = False
    arguments.hand_over()
    return tuple(results)


def _begin(tensor: torch.Tensor, anchor: torch.Tensor, is_copied: bool) -> torch.Tensor:
    """An input as the layer's own graph begins with it. The graph does not hold the tensor, as a leaf would."""
    source = tensor.detach()
    if tensor.requires_grad:
        return Import.apply(anchor, source, _unreachable, is_copied)  # type: ignore[no-any-return,no-untyped-call]
    return clone_with_strides(source) if is_copied else source


def _saving(call: LayerCall) -> AbstractContextManager[Any]:
    """What happens to tensors that operations of the forward save."""
    return saved_tensors_hooks(_keep, _hand_out) if call.site.differentiates else call.activations.in_forward()


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()  # an operation that saves its own result would hold itself alive for ever


def _hand_out(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def is_layer_hook(pack: Any) -> bool:
    """Whether a saved-tensor hook is that of a layer's forward, which may be taken off the thread.

    Raises:
        TakesDerivative: it is, but without it the layer's graph would hold weights.
    """
    if isinstance(getattr(pack, "__self__", None), Activations):
        raise TakesDerivative
    return pack is _keep


@dataclass(frozen=True, slots=True)
class _SecondRun:
    leaves: list[torch.Tensor]
    results: list[torch.Tensor]
    """Tensors in the result, and inputs that the layer has written."""


def _run_again(call: LayerCall, hooks: saved_tensors_hooks) -> _SecondRun:
    """The layer's forward once more, from the stash, with the random, autocast and buffer state of the first time."""
    site, device = call.site, call.segment.device
    state = call.segment.state
    assert call.stash is not None and call.replay is not None
    stash = [tensor.to(device.torch_device) for tensor in call.stash()]
    weights = state.weights_of(site, device, call.trained)
    buffers = [
        (call.buffers_before[index] if index in call.buffers_before else state.buffers.fetch(place, device)).clone()
        for index, place in enumerate(site.buffer_places)
    ]
    autocast = Autocast.capture()
    call.autocast.apply()
    torch.set_autocast_cache_enabled(False)
    present = call.replay.begin(device)
    copied = site.mutated_inputs or frozenset()
    num_arguments = len(stash) - len(call.objects.used)
    try:
        with torch.enable_grad(), hooks:
            leaves = [t.detach().requires_grad_(e is not None) for t, e in zip(stash, call.input_edges, strict=True)]
            inner = [
                clone_with_strides(leaf)
                if (index in copied if index < num_arguments else site.writes_objects)
                else leaf
                for index, leaf in enumerate(leaves)
            ]
            arguments = call.arguments.snapshot(call.objects.used_again(inner[num_arguments:]))
            around = Surroundings(arguments)
            result = site.run(weights, buffers, *arguments.build(inner[:num_arguments]))
    finally:
        present.begin(device)
        autocast.apply()
    arguments.keep_written()
    result_leaves = pytree.tree_leaves(result)
    results = [leaf for leaf in result_leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
    results += around.results(result_leaves, known=[*results, *inner])
    return _SecondRun(leaves, results + [inner[i] for i in call.mutated])


def _recompute(call: LayerCall, save: Callable[[torch.Tensor], int]) -> None:
    _run_again(call, saved_tensors_hooks(save, _unreachable))


def _differentiate(
    call: LayerCall, gradients: tuple[torch.Tensor | None, ...], trained: tuple[str, ...]
) -> list[torch.Tensor | None]:
    """Gradients of the input tensors; those of the `trained` weights go to the segment."""
    is_without_graph = call.site.differentiates or call.is_part
    values = (_values_by_second_run if is_without_graph else _values)(call, gradients, trained)
    is_on_host = call.segment.state.cluster.host_is_device
    ours = _unshared(values, gradients) if is_on_host else [False] * len(values)
    num_inputs = len(values) - len(trained)
    for name, value, is_ours in zip(trained, values[num_inputs:], ours[num_inputs:], strict=True):
        call.segment.add_gradient(name, call.site.pack, value, is_ours)
    by_input = iter(values[:num_inputs])
    return [None if edge is None else next(by_input) for edge in call.input_edges]


_Gradients = tuple[torch.Tensor | None, ...]
"""Of the inputs that have one, and of the weights that train."""


def _values(call: LayerCall, gradients: _Gradients, trained: tuple[str, ...]) -> _Gradients:
    roots = [(e, g) for e, g in zip(call.result_edges, gradients, strict=True) if e is not None and g is not None]
    targets = [edge for edge in call.input_edges if edge is not None] + [call.weight_edges[name] for name in trained]
    is_last = not torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
    if not (roots and targets):
        return (None,) * len(targets)
    call.activations.open(functools.partial(_recompute, call))
    try:
        edges, seeds = zip(*roots, strict=True)
        return torch.autograd.grad(edges, targets, seeds, allow_unused=True, retain_graph=not is_last)
    finally:
        call.activations.close()


def _values_by_second_run(call: LayerCall, gradients: _Gradients, trained: tuple[str, ...]) -> _Gradients:
    run = _run_again(call, saved_tensors_hooks(_keep, _hand_out))
    if len(run.results) != len(gradients):
        raise UnsupportedError(
            f"layer {call.site.name} returned {len(gradients)} tensors first and {len(run.results)} when it was "
            f"recomputed: its forward must do the same when it is called again with the same inputs"
        )
    weights = call.segment.state.weights_of(call.site, call.segment.device, call.trained)
    roots = [(t, g) for t, g in zip(run.results, gradients, strict=True) if g is not None and t.requires_grad]
    targets = [leaf for leaf in run.leaves if leaf.requires_grad] + [weights[name] for name in trained]
    if not (roots and targets):
        return (None,) * len(targets)
    return torch.autograd.grad([t for t, _ in roots], targets, [g for _, g in roots], allow_unused=True)


def _unshared(values: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]) -> list[bool]:
    """Which gradients nobody else holds and so may be added to in place. Autograd hands one tensor on to several takers
    where an operation's gradient is that of its result, as an addition's is."""
    memory = Counter(storage_key(tensor) for tensor in (*values, *gradients) if tensor is not None)
    return [value is not None and memory[storage_key(value)] == 1 and value.is_contiguous() for value in values]
