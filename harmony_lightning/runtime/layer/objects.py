"""Tensors of the autograd graph that a layer finds within the objects it is given: graphs, caches, data classes.

    data.x = self.conv(x)       part of the graph, within an object of the user's
    self.layer(data)            may use it, or leave it alone; may put results into the object

Nothing tells beforehand which of them a layer uses: a key-value cache goes through all layers, and each one looks at its
own entries. So they stay in their places, and the first function within the layer that takes one is given the layer's
own version of it, which is an input of the layer from then on. In the copies of the objects that recompute works on,
stand-ins without memory are in the places of all others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.runtime.segment import Segment, Sink
from harmony_lightning.runtime.structure import Arguments, Put, is_opaque, place_tensors, version_of

Begin = Callable[[torch.Tensor], torch.Tensor]
"""Makes the layer's own version of a tensor from its value on the layer's device."""


class ObjectTensors:
    """Those of one call of a layer.

    Attributes:
        linked: those that belong to the running segment, so that their gradients go to their nodes. Those of others go
            to the engine.
        originals: all, as they are in the user's objects; until the call is over.
        used: indices of those that are used, in the order of their first use.
        edges: of the layer's own versions of these, where its graph begins.
        values, inner, versions: of these, their values on the device, the layer's own versions, and how often those had
            been written at first; until the call is over.
    """

    def __init__(self, layer: str, segment: Segment, arguments: Arguments) -> None:
        self._layer = layer
        self._segment = segment
        self._indices: dict[int, int] = {}
        self._stand_ins: dict[int, tuple[torch.Tensor, int]] = {}
        self._begin: Begin | None = None
        self._sinks: dict[int, Sink] = {}
        """Of those that are used and not linked, by index."""
        self._homes: dict[int, torch.device] = {}
        """Where the gradients of those that are used and linked belong, by index."""
        self._places: dict[int, int] = {}
        """Of those that are linked: index, and place among them."""
        self.linked: list[torch.Tensor] = []
        self.originals: list[torch.Tensor] = []
        self.used: list[int] = []
        self.values: list[torch.Tensor] = []
        self.inner: list[torch.Tensor] = []
        self.versions: list[int] = []
        self.edges: list[GradientEdge] = []
        arguments.place_tensors(self._find)

    def _find(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return self._segment.bring_within(tensor)
        if id(tensor) not in self._indices and self._segment.state.weight_name(tensor) is None:
            index = self._indices[id(tensor)] = len(self.originals)
            self.originals.append(tensor)
            present = self._segment.present(tensor)
            if self._segment.is_own(present):
                self._places[index] = len(self.linked)
                self.linked.append(present)
        return tensor

    def __bool__(self) -> bool:
        return bool(self.originals)

    @property
    def reaches_back(self) -> bool:
        """Whether gradients go to the engine."""
        return bool(self._sinks)

    def is_original(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._indices

    # Within the layer -------------------------------------------------------------------------------------------------

    def opened(self, begin: Begin) -> AbstractContextManager[None]:
        """Within, the layer runs."""
        return self._opened(begin) if self.originals else nullcontext()

    @contextmanager
    def _opened(self, begin: Begin) -> Iterator[None]:
        self._begin, self._segment.state.objects = begin, self
        try:
            yield
        finally:
            self._begin = self._segment.state.objects = None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a function within the layer gets for one of its arguments."""
        index = self._indices.get(id(tensor))
        if index is None or self._begin is None:
            return tensor
        if index not in self.used:
            present = self._segment.present(tensor)
            with torch.no_grad():
                value = self._segment.bring(present)
            if index in self._places:
                self._homes[index] = present.device
            else:
                self._sinks[index] = self._segment.sink(present)
            self.used.append(index)
            self.values.append(value.detach())
            self.inner.append(inner := self._begin(value))
            self.versions.append(version_of(inner))
            if inner.requires_grad:
                self.edges.append(get_gradient_edge(inner))
        return self.inner[self.used.index(index)]

    def forget_uses(self) -> None:
        """The layer's forward is about to run again."""
        self.used, self.edges = [], []
        self.values, self.inner, self.versions = [], [], []
        self._sinks, self._homes = {}, {}

    def let_go(self) -> None:
        """The call is over; its backward needs no tensors."""
        self.linked, self.originals, self.values, self.inner, self.versions = [], [], [], [], []

    def hand_back(self, gradients: Sequence[torch.Tensor | None], *, is_wanted: bool) -> list[torch.Tensor | None]:
        """Takes gradients of those that were used, and returns those of the linked ones. `is_wanted`: a backward for all
        leaves is running, and the engine waits for the others."""
        back: list[torch.Tensor | None] = [None] * len(self._places)
        for index, gradient in zip(self.used, gradients, strict=True):
            if gradient is None:
                continue
            if index in self._places:
                back[self._places[index]] = self._segment.send_home(gradient, self._homes[index]).take()
            elif is_wanted:
                self._sinks[index](gradient)
        return back

    # In copies of the objects -----------------------------------------------------------------------------------------

    def copy(self, arguments: Arguments) -> Arguments:
        """The arguments with copies of the objects, as they are now, for later runs.

        Raises:
            UnsupportedError: one of ours is within an object that cannot be copied.
        """
        twin = arguments.snapshot(self._stand_in)
        for index, tensor in enumerate(self.originals):
            if index not in [known for _, known in self._stand_ins.values()]:
                raise UnsupportedError(
                    f"layer {self._layer} was given an object with a tensor of shape {tuple(tensor.shape)} inside that "
                    f"requires a gradient, and the object, which is made by a __new__ of its own, cannot be copied for the "
                    f"layer's recompute; hand the tensor to the layer as an argument of its own"
                )
        return twin

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """For one of ours, a tensor without memory that tells what it knows of itself; anything else as it is."""
        if (index := self._indices.get(id(tensor))) is None:
            return tensor
        stand_in = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta", requires_grad=True
        )
        self._stand_ins[id(stand_in)] = stand_in, index
        return stand_in

    def original(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a stand-in stands for; anything else as it is."""
        entry = self._stand_ins.get(id(tensor))
        return tensor if entry is None else self.originals[entry[1]]

    def used_again(self, inner: Sequence[torch.Tensor]) -> Put:
        """Puts the layer's own versions, in the order of `used`, in the places of their stand-ins."""
        by_index = dict(zip(self.used, inner, strict=True))

        def put(tensor: torch.Tensor) -> torch.Tensor:
            entry = self._stand_ins.get(id(tensor))
            return tensor if entry is None else by_index.get(entry[1], tensor)

        return put


NO_OBJECTS = ObjectTensors("", cast(Segment, None), Arguments((), {}))
"""Of calls that are given no objects."""


class Surroundings:
    """The tensors within a call's objects in front of a run. What else is there afterwards, or in objects that the layer
    returns, is a result."""

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._objects: list[Any] = []
        """Those that the layer returns."""
        self._before: dict[int, tuple[torch.Tensor, bool]] = {}
        arguments.place_tensors(lambda tensor: self._before.setdefault(id(tensor), (tensor, tensor.requires_grad))[0])

    def reach(self, leaves: Sequence[Any]) -> bool:
        """Whether there are any objects, those among `leaves` included, which are what the layer has returned."""
        self._objects = [leaf for leaf in leaves if is_opaque(leaf)]
        return bool(self._objects) or self._arguments.has_objects or self._arguments.has_containers

    def _visit(self, put: Put) -> None:
        self._arguments.place_tensors(put)
        for found in self._objects:
            place_tensors(found, put)

    def results(self, known: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Those that are not among `known`."""
        seen = {id(tensor) for tensor in known}
        found: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            before = self._before.get(id(tensor))
            if id(tensor) not in seen and (before is None or before[1] != tensor.requires_grad):
                seen.add(id(tensor))
                found.append(tensor)
            return tensor

        self._visit(note)
        return found

    def place(self, outer: Mapping[int, torch.Tensor]) -> None:
        """Put what stands for a tensor outside of the layer in its place."""
        self._visit(lambda tensor: outer.get(id(tensor), tensor))
