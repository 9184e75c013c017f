"""One call of a layer by one microbatch, from its forward to its backward, and the buffers that it may write."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.runtime.activations import Activations
from harmony_lightning.runtime.layer.joint import Joint, Waiting
from harmony_lightning.runtime.layer.objects import NO_OBJECTS, ObjectTensors
from harmony_lightning.runtime.layer.watching import Begin, run_layer
from harmony_lightning.runtime.randomness import Replay
from harmony_lightning.runtime.segment import Segment, Sink
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.structure import Arguments, version_of
from harmony_lightning.runtime.thread_state import Autocast
from harmony_lightning.runtime.weights.weight_slot import Weights


class LayerCall:
    """One call of a layer by one microbatch, from its forward to its backward."""

    # Class attributes: most calls need but a few, and there are as many as microbatches times layers.
    given: Sequence[torch.Tensor] = ()
    """The user's tensors, while the layer's forward runs."""
    needs: Sequence[bool] = ()
    """Which of these get a gradient."""
    sinks: Sequence[Sink | None] = ()
    """What takes the gradients of these, where they do not go on within the segment."""
    trained: tuple[str, ...] = ()
    """Weights that get a gradient from this call."""
    replay: Replay | None = None
    """None if nothing was drawn."""
    buffers_before: Mapping[int, torch.Tensor] = MappingProxyType({})
    """Values of written buffers in front of the forward, by place."""
    input_edges: Sequence[GradientEdge | None] = ()
    weight_edges: Sequence[GradientEdge] = ()
    wide_edges: Mapping[str, GradientEdge] = MappingProxyType({})
    """Of float32 versions of narrow weights, where the layer's code has asked for them."""
    result_edges: Sequence[GradientEdge | None] = ()
    """Where the layer's own graph begins and ends; None for tensors that are not part of it."""
    result_spec: Any = None
    result_leaves: Any = ()
    tensor_positions: Sequence[int] = ()
    mutated: Sequence[int] = ()
    """Input tensors that the layer writes; their new values follow the results."""
    late_writes: Sequence[int] = ()
    """Those of them that it has written for the first time: they need no gradient, and the stash has their new values."""
    waiting: Waiting | None = None
    joint: Joint | None = None
    """The call for several microbatches that this one is part of, until its part is taken."""
    is_part = False
    """The joint call has given the results, so there is no graph of the forward."""
    stash: Callable[[], tuple[torch.Tensor, ...]] | None = None
    """The inputs, during backward."""
    is_over = False
    """Backward has been here, for good."""

    def __init__(self, site: Site, segment: Segment, arguments: Arguments, *, is_kept: bool) -> None:
        self.site = site
        self.segment = segment
        state, device = segment.state, segment.device
        self.activations = Activations(site.name, is_kept=is_kept, refer=state.refer[device.index])
        if is_kept:
            state.memory.kept[device.index].add(self.activations)
        self.autocast = Autocast.capture()
        self.weight_versions = self._read_weight_versions()
        self.objects, self.arguments = NO_OBJECTS, arguments
        if arguments.has_objects:
            self.objects = ObjectTensors(site.name, segment, arguments)
            self.arguments = self.objects.copy(arguments)

    def run(
        self, weights: Weights, buffers: list[torch.Tensor], args: Any, kwargs: Any, begin: Begin
    ) -> tuple[Any, Any]:
        """The layer's own code on these weights: what it returns, and float32 versions of narrow weights by name, which
        `begin` has made."""
        segment = self.segment
        return run_layer(
            segment.state,
            self.site,
            segment.device,
            weights,
            buffers,
            args,
            kwargs,
            begin,
            sums_narrow=self.autocast.is_cached,
        )

    def _read_weight_versions(self) -> tuple[int, ...]:
        parameters = self.segment.state.parameters
        # While a microbatch is cut its weights cannot change: updates follow backward.
        return () if self.segment.is_cut else tuple(parameters[name]._version for name in self.site.weight_names)

    def end(self) -> None:
        """Nobody will differentiate the call again. Whoever keeps its results, as a metric does, keeps the node, but no
        slot with it: leaves of the layer's own graph are weights that lie there."""
        self.is_over = True
        self.input_edges, self.result_edges, self.weight_edges, self.wide_edges, self.sinks = (), (), (), {}, ()

    def check(self) -> None:
        """In front of backward.

        Raises:
            RuntimeError: there was one before, as torch tells it.
            UnsupportedError: weights are not those of the forward any more.
        """
        if self.is_over:
            raise RuntimeError(
                f"layer {self.site.name} has been differentiated, and what its backward needs is gone: give "
                f"retain_graph=True to the first of several backwards through it"
            )
        if self._read_weight_versions() != self.weight_versions:
            raise UnsupportedError(
                f"weights of layer {self.site.name} were changed between its forward and its backward (by an optimizer's "
                f"step?), so its gradient cannot be computed; torch refuses that, too. Call backward before the step, or "
                f"the layer again behind it"
            )


class CallBuffers:
    """A layer's buffers around one forward: which ones it wrote, and what was in them before.

    Version counters do not tell: torch's own batch normalisation writes its statistics without counting. So the first
    call in each combination of training flags compares values, and what was written then counts as written always.
    """

    def __init__(self, call: LayerCall) -> None:
        self._site = call.site
        self.tensors: list[torch.Tensor] = []
        self._before: dict[int, torch.Tensor] = {}
        if not call.site.buffer_places:
            return  # as most layers
        self._store = call.segment.state.buffers
        self._device = call.segment.device
        self.tensors = [self._store.fetch(place, self._device) for place in self._site.buffer_places]
        self._held, self._versions = list(self.tensors), [version_of(tensor) for tensor in self.tensors]
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
        if not self._site.buffer_places:
            return self._before
        written = set(self._known or ())
        for index, (before, version, after) in enumerate(zip(self._held, self._versions, self.tensors, strict=True)):
            is_replaced = after is not before or version_of(after) != version
            if is_replaced or (self._known is None and not _are_equal(self._before[index], after)):
                written.add(index)
        for index in written:
            self._store.written(self._site.buffer_places[index], self._device, self.tensors[index].detach())
        self._site.written_buffers[self._flags] = frozenset(written)
        return {index: value for index, value in self._before.items() if index in written}


def _are_equal(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Of sparse tensors, which torch does not compare, counters tell."""
    return after.layout is not torch.strided or torch.equal(before, after)
