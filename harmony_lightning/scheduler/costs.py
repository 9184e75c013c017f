"""What packs cost on a machine: sums over a profile's layers, looked up in constant time.

Sums follow Harmony: times of layers add up; of peak bytes, the input of a layer inside a pack is the output of the one
before and counts once.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

from harmony_lightning.plan.schedule import Span
from harmony_lightning.profiler import Machine, Profile, at_size

FUSED_ACCESSES = 8
"""Of memory in a step of a fused Adam: four values are read, and written as far as torch tells, though the gradient is
not."""

_CAST_ACCESSES = 1.5
"""Of memory, in terms of a float32 weight's bytes, in a cast of it to two bytes, or of its gradient from there."""
_NARROW_SAVES = 0.5
"""When its gradient is added to others as it is made."""


class Costs:
    """Costs of packs of one profile. Sizes are samples, results seconds or bytes."""

    def __init__(
        self,
        profile: Profile,
        machine: Machine,
        travelling: Sequence[int] | None = None,
        states: Sequence[int] | None = None,
        weights: Sequence[int] | None = None,
        operations: float = 1.0,
        accesses: float = 0.0,
    ) -> None:
        """`travelling` are bytes of each layer's weights as they travel, where some of them are narrow; `states` of what
        the optimizer remembers of each layer, where another one is known than the profile tells of; `weights` how many
        of each layer train; `operations` by which a device steps one of them, and how often these access as many bytes as
        it has, where that is more than for the fused Adam that profiles tell of."""
        self.profile = profile
        self.machine = machine
        self.num_layers = profile.num_layers
        kinds = [profile.kind(layer) for layer in range(self.num_layers)]
        travelling = travelling or [kind.weight_bytes for kind in kinds]
        self.weight_prefix = _prefix(travelling)
        self.narrow_prefix = _prefix(
            [2 * (k.weight_bytes - nbytes) for k, nbytes in zip(kinds, travelling, strict=True)]
        )
        self.state_prefix = _prefix([kind.weight_bytes + kind.buffer_bytes for kind in kinds])
        self.update_accesses = max(FUSED_ACCESSES, accesses)
        """Of memory, in an update of a weight, in terms of its bytes."""
        scale = self.update_accesses / FUSED_ACCESSES
        self.update_prefix = _prefix([scale * kind.update_cpu_seconds for kind in kinds])
        self.gradient_prefix = _prefix(
            [kind.weight_bytes if kind.gradient_bytes is None else kind.gradient_bytes for kind in kinds]
        )
        self.optimizer_prefix = _prefix([kind.optimizer_state_bytes for kind in kinds] if states is None else states)
        self._operations = operations
        self._count_prefix = _prefix([0] * self.num_layers if weights is None else weights)
        # Lookups by size are many, sizes are few.
        self.forward_prefix = cache(self._forward_prefix)
        self.backward_prefix = cache(self._backward_prefix)
        self.recompute_prefix = cache(
            lambda size: _prefix([self._recompute_seconds(size, layer) for layer in range(self.num_layers)])
        )
        self.inputs = cache(self._inputs)
        self.stash_prefix = cache(self._stashes)
        self._working = cache(self._working_bytes)
        self._forward_peaks = cache(lambda size: self._peaks("forward", size))
        self._backward_peaks = cache(lambda size: self._peaks("backward", size))

    def on(self, machine: Machine) -> "Costs":
        """The same layers on another machine."""
        layers = [(layer, layer) for layer in range(self.num_layers)]
        travelling = [round(self.weight_bytes(layer)) for layer in layers]
        states = [round(self.optimizer_bytes(layer)) for layer in layers]
        weights = [round(self._count(layer)) for layer in layers]
        return Costs(self.profile, machine, travelling, states, weights, self._operations, self.update_accesses)

    def forward_seconds(self, size: int, span: Span) -> float:
        prefix = self.forward_prefix(size)
        return prefix[span[1] + 1] - prefix[span[0]]

    def backward_seconds(self, size: int, span: Span) -> float:
        """Without recompute; never negative, whatever the profile's noise."""
        prefix = self.backward_prefix(size)
        return max(0.0, prefix[span[1] + 1] - prefix[span[0]] - self.forward_seconds(size, span))

    def forward_compute_bytes(self, size: int, span: Span) -> float:
        """Peak on the device while the pack computes, its weights and its input included."""
        prefix = self._forward_peaks(size)
        return prefix[span[1] + 1] - prefix[span[0]] + self.inputs(size)[span[0]]

    def backward_compute_bytes(self, size: int, span: Span) -> float:
        prefix = self._backward_peaks(size)
        return prefix[span[1] + 1] - prefix[span[0]] + self.inputs(size)[span[0]]

    def peak_prefix(self, direction: str, size: int) -> list[float]:
        """Sums over layers of peak bytes without their inputs."""
        return self._forward_peaks(size) if direction == "forward" else self._backward_peaks(size)

    def input_bytes(self, size: int, layer: int) -> float:
        """Bytes that enter a layer; 0 behind the last one."""
        return self.inputs(size)[layer]

    def weight_bytes(self, span: Span) -> float:
        return self.weight_prefix[span[1] + 1] - self.weight_prefix[span[0]]

    def narrow_bytes(self, span: Span) -> float:
        """Masters of narrow weights."""
        return self.narrow_prefix[span[1] + 1] - self.narrow_prefix[span[0]]

    def state_bytes(self, span: Span) -> float:
        """Weights and buffers."""
        return self.state_prefix[span[1] + 1] - self.state_prefix[span[0]]

    def recompute_seconds(self, size: int, span: Span) -> float:
        """What of the backward of layers makes their activations again."""
        prefix = self.recompute_prefix(size)
        return prefix[span[1] + 1] - prefix[span[0]]

    def _recompute_seconds(self, size: int, layer: int) -> float:
        kind = self.profile.kind(layer)
        if not kind.recompute_seconds:
            return self.forward_seconds(size, (layer, layer))
        seconds = at_size(self.profile.microbatch_sizes.backward, kind.recompute_seconds, size)
        return max(0.0, seconds - self._cast_seconds(layer))

    def stash_bytes(self, size: int, span: Span) -> float:
        """What waits from forward to backward."""
        prefix = self.stash_prefix(size)
        return prefix[span[1] + 1] - prefix[span[0]]

    def kept_bytes(self, size: int, layer: int) -> float | None:
        """Activations of a layer that does not make them again; None where that was not measured."""
        kept = self.profile.kind(layer).kept_bytes
        return at_size(self.profile.microbatch_sizes.backward, kept, size) if kept else None

    def gradient_bytes(self, span: Span) -> float:
        """Of the weights that train."""
        return self.gradient_prefix[span[1] + 1] - self.gradient_prefix[span[0]]

    def trained_bytes(self, span: Span) -> float:
        """The same as they travel: what is narrow trains first, as far as costs can tell."""
        gradients = self.gradient_bytes(span)
        return gradients - min(gradients, self.narrow_bytes(span)) / 2

    def largest_weight_bytes(self, layer: int) -> float:
        """Of those of a layer that train; the whole layer where they were not told apart."""
        found = self.profile.kind(layer).largest_weight_bytes
        return self.gradient_bytes((layer, layer)) if found is None else found

    def optimizer_bytes(self, span: Span) -> float:
        """What the optimizer remembers of the weights that train."""
        return self.optimizer_prefix[span[1] + 1] - self.optimizer_prefix[span[0]]

    def working_bytes(self, direction: str, size: int, span: Span) -> float:
        """What the layer of a pack that needs most needs beside its weights and its input; in backward the gradients of its
        weights as they are made are part of it."""
        return max(self._working(direction, size)[span[0] : span[1] + 1])

    def device_seconds(self, nbytes: float) -> float:
        """That a device reads and writes so many bytes of its own memory; 0 where nobody has told how fast that is."""
        rate = self.machine.gpu_memory_bytes_per_second
        return nbytes / rate if rate else 0.0

    def launch_seconds(self, span: Span) -> float:
        """Of a step of the optimizer on a device, what its operations take beyond reading and writing."""
        return self._operations * self._count(span) * self.machine.launch_seconds

    def sum_launch_seconds(self, span: Span) -> float:
        """The same when one device's gradients are copied to another, which adds them to its own, one by one."""
        return 2 * self._count(span) * self.machine.launch_seconds

    def _count(self, span: Span) -> float:
        """Weights that train, as far as somebody has told."""
        return self._count_prefix[span[1] + 1] - self._count_prefix[span[0]]

    def update_seconds(self, span: Span) -> float:
        return self.update_prefix[span[1] + 1] - self.update_prefix[span[0]]

    def _forward_prefix(self, size: int) -> list[float]:
        sums = self._sums("forward", "forward_seconds", size)
        return self._without(sums, [self._cast_seconds(layer) for layer in range(self.num_layers)])

    def _backward_prefix(self, size: int) -> list[float]:
        """Weights are not cast again, gradients not at all, and added as they are made."""
        sums, layers = self._sums("backward", "backward_seconds", size), range(self.num_layers)
        trained = [min(self.gradient_bytes((q, q)), self.narrow_bytes((q, q))) for q in layers]
        gradients = [self.device_seconds((_CAST_ACCESSES + _NARROW_SAVES) * nbytes) for nbytes in trained]
        return self._without(sums, [self._cast_seconds(q) + gradients[q] for q in layers])

    def _cast_seconds(self, layer: int) -> float:
        """By which a call is shorter whose narrow weights have been cast on the host, as those of a profile are not."""
        return self.device_seconds(_CAST_ACCESSES * self.narrow_bytes((layer, layer)))

    def _without(self, sums: list[float], less: list[float]) -> list[float]:
        pairs = zip(pairwise(sums), less, strict=True)
        return (
            _prefix([max(0.0, after - before - seconds) for (before, after), seconds in pairs]) if any(less) else sums
        )

    def _inputs(self, size: int) -> list[float]:
        pairs = [self.profile.kind(layer).input_bytes for layer in range(self.num_layers)]
        return [max(0.0, one + (size - 1) * (two - one)) for one, two in pairs] + [0.0]

    def _stashes(self, size: int) -> list[float]:
        kinds = [self.profile.kind(layer) for layer in range(self.num_layers)]
        pairs = [kind.stash_bytes or kind.input_bytes for kind in kinds]
        return _prefix([max(0.0, pair[0] + (size - 1) * (pair[1] - pair[0])) for pair in pairs])

    def _working_bytes(self, direction: str, size: int) -> list[float]:
        sizes = getattr(self.profile.microbatch_sizes, direction)
        kinds = [self.profile.kind(layer) for layer in range(self.num_layers)]
        peaks = [at_size(sizes, getattr(kind, f"{direction}_peak_bytes"), size) for kind in kinds]
        rest = zip(peaks, kinds, self.inputs(size)[:-1], strict=True)
        return [max(0.0, peak - kind.weight_bytes - kind.buffer_bytes - entering) for peak, kind, entering in rest]

    def _peaks(self, direction: str, size: int) -> list[float]:
        sums, inputs = self._sums(direction, f"{direction}_peak_bytes", size), self.inputs(size)
        return [total - before for total, before in zip(sums, _prefix(inputs[:-1]), strict=True)]

    def _sums(self, direction: str, field: str, size: int) -> list[float]:
        sizes = getattr(self.profile.microbatch_sizes, direction)
        by_kind = [at_size(sizes, getattr(kind, field), size) for kind in self.profile.layer_kinds]
        return _prefix([by_kind[kind] for kind in self.profile.layers])


def _prefix(values: Sequence[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))
