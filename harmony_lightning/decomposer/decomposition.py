"""What a module consists of, as names and bytes. No torch in here: the planner reads it too."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of the module. A tied one appears once, under the first of its names."""

    name: str
    nbytes: int
    is_trainable: bool
    state_nbytes: tuple[int, ...] = ()
    """Bytes of each tensor that the optimizer remembers of it and needs where it steps it; empty as long as unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module that is swapped as a unit."""

    name: str
    weights: tuple[str, ...]
    """Names of its weights, children's included, each once."""
    narrow: tuple[str, ...] = ()
    """Those of them, all float32, of which the layer uses nothing but what autocast casts them to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """Layers in the order in which they are called, as far as that is known, and every weight of the module."""

    layers: tuple[Layer, ...]
    weights: tuple[Weight, ...]
    has_batch_statistics: bool
    """Whether some module needs two samples or more in training (batch normalisation)."""
    narrow_dtype: Literal["bfloat16", "float16"] | None = None
    """What autocast casts narrow weights to, where somebody has told."""
    knows_states: bool = False
    """Whether weights tell what the optimizer remembers of them."""

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    @property
    def travelling_nbytes(self) -> int:
        """Bytes of all weights on the way to a device, those that are narrow in all their layers with half."""
        layered = {name for layer in self.layers for name in layer.weights}
        wide = {name for layer in self.layers for name in layer.weights if name not in layer.narrow}
        narrow = layered - wide
        return sum(weight.nbytes // (2 if weight.name in narrow else 1) for weight in self.weights)

    @property
    def glue(self) -> tuple[str, ...]:
        """Weights that belong to no layer: the user's code between layers uses them directly."""
        layered = {name for layer in self.layers for name in layer.weights}
        return tuple(weight.name for weight in self.weights if weight.name not in layered)

    @property
    def state_nbytes(self) -> list[int] | None:
        """By layer, bytes of what the optimizer remembers; None as long as that is unknown."""
        if not self.knows_states:
            return None
        nbytes = {weight.name: sum(weight.state_nbytes) for weight in self.weights}
        return [sum(nbytes[name] for name in layer.weights) for layer in self.layers]

    @property
    def tied(self) -> tuple[frozenset[int], ...]:
        """Layers that have some weight in common, by their numbers."""
        having: dict[str, set[int]] = {}
        for index, layer in enumerate(self.layers):
            for name in layer.weights:
                having.setdefault(name, set()).add(index)
        return tuple(dict.fromkeys(frozenset(layers) for layers in having.values() if len(layers) > 1))

    def reordered(self, names: tuple[str, ...]) -> "Decomposition":
        """The same with `names` first and in that order; layers that are not named follow in their old order."""
        by_name = {layer.name: layer for layer in self.layers}
        first = [by_name.pop(name) for name in names]
        return replace(self, layers=(*first, *by_name.values()))

    def narrowed(self, narrow: Mapping[str, frozenset[str]]) -> "Decomposition":
        """The same with these weights narrow, by layer."""
        layers = (
            replace(layer, narrow=tuple(name for name in layer.weights if name in narrow.get(layer.name, ())))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def with_states(self, state_nbytes: Mapping[str, tuple[int, ...]]) -> "Decomposition":
        """The same, with what is known by now of the optimizer's states of the weights."""
        weights = (replace(weight, state_nbytes=state_nbytes.get(weight.name, ())) for weight in self.weights)
        return replace(self, weights=tuple(weights), knows_states=True)
