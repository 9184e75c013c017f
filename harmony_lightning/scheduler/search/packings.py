"""Ways to cut layers into packs: for every number of packs, packs of about equal seconds and packs of about equal bytes.

A packing never depends on how much memory there is: memory only decides which packings are allowed. So with more memory
the search has all the choices it had before, and more.

The number of packings grows with the square of the number of layers. So packs of a model of very many layers are made of
*units*, a few layers each (`units`).
"""

from collections.abc import Iterable, Iterator, Sequence
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
"""Units of a small first pack. Its backward is the last of a step: what its gradients and its update take is exposed."""
MAX_UNITS = 100
"""Of a model: with so many, packs can be cut nearly as evenly as by layers."""

Table = list[list[int]]
"""`[count][end]`: where the last of `count` packs of the first `end` layers begins."""


class Packings:
    """All packings that are tried for one model. Results are cached: searches ask for the same ones again and again."""

    def __init__(self, costs: Costs, units: Packing | None = None, *, is_thorough: bool = True) -> None:
        """Packs are made of `units`, by default of layers. Unless `is_thorough` only more than `MAX_UNITS` packs are
        tried, the same for forward, with no small first packs, and balanced for one microbatch size."""
        self._costs = costs
        self._units = units or single(range(costs.num_layers))
        counts = tuple(pack_counts(len(self._units), FINE_FORWARD))
        self._counts = {"forward": counts, "backward": tuple(pack_counts(len(self._units), FINE_BACKWARD))}
        if not is_thorough:
            self._counts = {"forward": (), "backward": (*(n for n in counts if n > MAX_UNITS), len(self._units))}
        self._heads = HEADS if is_thorough else ()
        self._num_units = {last + 1: index + 1 for index, (_, last) in enumerate(self._units)}
        """In front of a layer that begins a unit."""
        self._is_thorough = is_thorough
        self._weights = cache(self._make_weights)
        self._tables = cache(lambda *key: tuple(table(weights) for weights in self._weights(*key)))
        self._mirrored = cache(lambda *key: tuple(table(weights[::-1]) for weights in self._weights(*key)))
        self.forward = cache(self._forward)
        self.backward = cache(self._backward)

    def _forward(self, size: int, num_layers: int) -> tuple[Packing, ...]:
        """Packings of the first layers, for forward microbatches of a size; one empty packing of none."""
        if not num_layers:
            return ((),)
        num_units = self._num_units[num_layers]
        counts = [count for count in self._counts["forward"] if count <= num_units]
        tables = self._tables("forward", self._typical(size))
        found = dict.fromkeys(packs_of(starts, count, num_units) for count in counts for starts in tables)
        return self._of_layers(found)

    def _backward(self, size: int) -> tuple[Packing, ...]:
        """Packings of all layers, for backward microbatches of a size."""
        num_units, size = len(self._units), self._typical(size)
        found: dict[Packing, None] = {}
        for count in self._counts["backward"]:
            for starts in self._tables("backward", size):
                found[packs_of(starts, count, num_units)] = None
            for ends in self._mirrored("backward", size) if self._heads else ():
                for head in self._heads:
                    if count > 1 and num_units - head >= count - 1:
                        rest = mirrored(packs_of(ends, count - 1, num_units - head), num_units)
                        found[((0, head - 1), *rest)] = None
        return self._of_layers(found)

    def _typical(self, size: int) -> int:
        """The microbatch size for which packs are balanced; a layer's share hardly depends on it."""
        return size if self._is_thorough else _middle_size(self._costs)

    def _of_layers(self, packings: Iterable[Packing]) -> tuple[Packing, ...]:
        if len(self._units) == self._costs.num_layers:
            return tuple(packings)
        first_of, last_of = zip(*self._units, strict=True)
        return tuple(tuple((first_of[first], last_of[last]) for first, last in packing) for packing in packings)

    def _make_weights(self, direction: str, size: int) -> tuple[list[float], list[float]]:
        costs, units = self._costs, self._units
        seconds = [costs.forward_seconds(size, unit) for unit in units]
        peak = costs.forward_compute_bytes
        if direction == "backward":
            seconds = [s + costs.backward_seconds(size, unit) for s, unit in zip(seconds, units, strict=True)]
            peak = costs.backward_compute_bytes
        # Inside a pack an input is the output of the layer before, which counts already.
        return seconds, [peak(size, unit) - costs.input_bytes(size, unit[0]) for unit in units]


def families(costs: Costs) -> tuple[Packings, ...]:
    """Packings that a search tries, in this order: of few units if there are many layers, and some of single layers, for
    where no pack of more than a few fits."""
    if costs.num_layers <= MAX_UNITS:
        return (Packings(costs),)
    return Packings(costs, units(costs)), Packings(costs, is_thorough=False)


def units(costs: Costs) -> Packing:
    """At most `MAX_UNITS` groups of layers, none with much more seconds, bytes or weights than others have; the first ones
    are single layers, for small first packs."""
    num_layers, size = costs.num_layers, _middle_size(costs)
    heads, layers = max(HEADS), single(range(num_layers))
    if num_layers <= MAX_UNITS:
        return layers
    measures = (
        [costs.forward_seconds(size, one) + costs.backward_seconds(size, one) for one in layers],
        [costs.backward_compute_bytes(size, one) for one in layers],
        [costs.state_bytes(one) for one in layers],
    )
    shares = ([value / (sum(values) or 1.0) for value in values] for values in measures)
    largest = list(map(max, *shares))
    rest = packs_of(table(largest[heads:], MAX_UNITS - heads), MAX_UNITS - heads, num_layers - heads)
    return (*layers[:heads], *((first + heads, last + heads) for first, last in rest))


def _middle_size(costs: Costs) -> int:
    sizes = costs.profile.microbatch_sizes
    return min(sizes.backward[len(sizes.backward) // 2], sizes.forward[-1])


def single(layers: Sequence[int]) -> Packing:
    return tuple((layer, layer) for layer in layers)


def pack_counts(num_layers: int, fine: int) -> Iterator[int]:
    """Numbers of packs worth trying."""
    count = 1
    while count <= num_layers:
        yield count
        count += max(1, count // fine)


def table(weights: Sequence[float], most: int | None = None) -> Table:
    """Packings whose heaviest pack is as light as can be, for all numbers of packs, or up to `most`, and all numbers of
    layers at once."""
    num_layers = len(weights)
    most = num_layers if most is None else min(most, num_layers)
    prefix = np.concatenate(([0.0], np.cumsum(weights)))
    starts = np.zeros((most + 1, num_layers + 1), dtype=np.int64)
    heaviest = prefix
    for count in range(2, most + 1):
        # The later the last pack starts, the lighter it is, and the heavier the packs before: best is where they meet.
        least, ends = count - 1, np.arange(count, num_layers + 1)
        total, before = prefix[ends], heaviest + prefix
        meet = least + np.searchsorted(before[least:], total)
        near = np.clip(meet + np.arange(-2, 2)[:, None], least, ends - 1)  # sums are rounded
        found = np.maximum(heaviest[near], total - prefix[near])
        start = near[np.argmin(found, axis=0), np.arange(len(ends))]
        # The earliest start of all that are best: layers that weigh nothing go with what follows.
        starts[count, count:] = np.maximum(np.searchsorted(prefix, prefix[start]), least)
        heaviest = np.concatenate((np.full(count, np.inf), found.min(axis=0)))
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
