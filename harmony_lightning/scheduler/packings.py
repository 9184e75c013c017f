"""Ways to cut layers into packs: for every number of packs, packs of about equal seconds and packs of about equal bytes.

A packing never depends on how much memory there is: memory only decides which packings are allowed. So with more memory
the search has all the choices it had before, and more.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from harmony_lightning.plan.schedule import Span
from harmony_lightning.scheduler.costs import Costs

Packing = tuple[Span, ...]

FINE_FORWARD = 4
FINE_BACKWARD = 16
"""Up to so many packs every number is tried; beyond twice that, numbers in growing steps. Forward is the smaller part of a
step, and its number of packs matters less."""
HEADS = (1, 2, 3, 5, 8)
"""Layers of a small first pack. Its backward is the last of a step: what its gradients and its update take is exposed."""

Table = list[list[int]]
"""`[count][end]`: where the last of `count` packs of the first `end` layers begins."""


class Packings:
    """All packings that are tried for one model. Results are cached: searches ask for the same ones again and again."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._weights = cache(self._make_weights)
        self._tables = cache(lambda *key: tuple(table(weights) for weights in self._weights(*key)))
        self._mirrored = cache(lambda *key: tuple(table(weights[::-1]) for weights in self._weights(*key)))
        self.forward = cache(self._forward)
        self.backward = cache(self._backward)

    def _forward(self, size: int, num_layers: int) -> tuple[Packing, ...]:
        """Packings of the first layers, for forward microbatches of a size; one empty packing of none."""
        if not num_layers:
            return ((),)
        counts = pack_counts(num_layers, FINE_FORWARD)
        tables = self._tables("forward", size)
        return tuple(dict.fromkeys(packs_of(t, count, num_layers) for count in counts for t in tables))

    def _backward(self, size: int) -> tuple[Packing, ...]:
        """Packings of all layers, for backward microbatches of a size."""
        num_layers = self._costs.num_layers
        found: dict[Packing, None] = {}
        for count in pack_counts(num_layers, FINE_BACKWARD):
            for starts in self._tables("backward", size):
                found[packs_of(starts, count, num_layers)] = None
            for ends in self._mirrored("backward", size):
                for head in HEADS:
                    if count > 1 and num_layers - head >= count - 1:
                        rest = mirrored(packs_of(ends, count - 1, num_layers - head), num_layers)
                        found[((0, head - 1), *rest)] = None
        return tuple(found)

    def _make_weights(self, direction: str, size: int) -> tuple[list[float], list[float]]:
        costs, layers = self._costs, range(self._costs.num_layers)
        seconds = [costs.forward_seconds(size, (layer, layer)) for layer in layers]
        peak = costs.forward_compute_bytes
        if direction == "backward":
            seconds = [s + costs.backward_seconds(size, (layer, layer)) for layer, s in enumerate(seconds)]
            peak = costs.backward_compute_bytes
        # Inside a pack an input is the output of the layer before, which counts already.
        return seconds, [peak(size, (layer, layer)) - costs.input_bytes(size, layer) for layer in layers]


def pack_counts(num_layers: int, fine: int) -> Iterator[int]:
    """Numbers of packs worth trying."""
    count = 1
    while count <= num_layers:
        yield count
        count += max(1, count // fine)


def table(weights: Sequence[float]) -> Table:
    """Packings whose heaviest pack is as light as can be, for all numbers of packs and of layers at once."""
    num_layers = len(weights)
    prefix = np.concatenate(([0.0], np.cumsum(weights)))
    # [start, end]: the weight of layers from start to end; an empty pack is no pack.
    packs = prefix[None, :] - prefix[:, None]
    packs[np.tril_indices(num_layers + 1)] = np.inf
    starts = np.zeros((num_layers + 1, num_layers + 1), dtype=np.int64)
    heaviest = packs[0]
    for count in range(2, num_layers + 1):
        choices = np.maximum(heaviest[:, None], packs)
        # The earliest start of all that are best: what is light stays in front.
        starts[count] = np.argmin(choices, axis=0)
        heaviest = choices[starts[count], np.arange(num_layers + 1)]
    table_of_starts: Table = starts.tolist()
    return table_of_starts


def packs_of(starts: Table, count: int, num_layers: int) -> Packing:
    """The packing of the first layers that a table holds."""
    packing: list[Span] = []
    end = num_layers
    for left in range(count, 0, -1):
        start = starts[left][end]
        packing.append((start, end - 1))
        end = start
    return tuple(reversed(packing))


def mirrored(packing: Packing, num_layers: int) -> Packing:
    """The same packs, counted from the last layer."""
    return tuple((num_layers - 1 - last, num_layers - 1 - first) for first, last in reversed(packing))
