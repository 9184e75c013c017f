"""What a module consists of, as names and bytes. No torch in here: the planner reads it too."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of the module. A tied one appears once, under the first of its names."""

    name: str
    nbytes: int
    is_trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module that is swapped as a unit."""

    name: str
    weights: tuple[str, ...]
    """Names of its weights, children's included, each once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """Layers in the order in which they are called, as far as that is known, and every weight of the module."""

    layers: tuple[Layer, ...]
    weights: tuple[Weight, ...]
    has_batch_statistics: bool
    """Whether some module needs two samples or more in training (batch normalisation)."""

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    @property
    def glue(self) -> tuple[str, ...]:
        """Weights that belong to no layer: the user's code between layers uses them directly."""
        layered = {name for layer in self.layers for name in layer.weights}
        return tuple(weight.name for weight in self.weights if weight.name not in layered)

    def reordered(self, names: tuple[str, ...]) -> "Decomposition":
        """The same with `names` first and in that order; layers that are not named follow in their old order."""
        by_name = {layer.name: layer for layer in self.layers}
        first = [by_name.pop(name) for name in names]
        return Decomposition(
            layers=(*first, *by_name.values()),
            weights=self.weights,
            has_batch_statistics=self.has_batch_statistics,
        )
