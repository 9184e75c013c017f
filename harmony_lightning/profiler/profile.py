"""What each layer of a model costs, by microbatch size: the measured ground on which plans are made.

A profile is a list of layers in call order, of which many are alike: those share a *kind*, measured once. The JSON form
is that of the profiles published with Harmony (Li et al., VLDB 2022), so those can be planned with as they are.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.profiler.fields import Fields, read_text
from harmony_lightning.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchSizes(Record):
    """Sizes, in samples and ascending, at which layers were measured."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind(Record):
    """One layer's costs. Sequences run over the profile's microbatch sizes."""

    weight_bytes: int
    buffer_bytes: int
    optimizer_state_bytes: int
    input_bytes: tuple[float, float]
    """Bytes of the layer's input at one sample and at two; affine in the number of samples."""
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    """Recomputing the layer's forward included."""
    forward_peak_bytes: tuple[float, ...]
    """On the device while the layer runs, its weights and its input included."""
    backward_peak_bytes: tuple[float, ...]
    update_cpu_seconds: float
    """The optimizer's step for this layer's weights on the host."""
    recompute_seconds: tuple[float, ...] = ()
    """What of `backward_seconds` makes activations again; empty where it was not told apart from a forward."""
    stash_bytes: tuple[float, float] | tuple[()] = ()
    """Bytes that wait from forward to backward at one sample and at two, what the code behind the layer saves included;
    empty where only the input waits."""
    gradient_bytes: int | None = None
    """Bytes of the weights that train; None: all of them do."""
    largest_weight_bytes: int | None = None
    """Of these, of the largest one; None where that was not told."""
    kept_bytes: tuple[float, ...] = ()
    """What waits on the device if nothing is to be made again: what operations save beside inputs and weights, at the
    backward sizes; empty where it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(Record):
    """Layers in call order; the last one computes the loss."""

    model: str
    source: str = ""
    note: str = ""
    units: str = "seconds, bytes; backward includes recompute; input_bytes at microbatch sizes 1 and 2"
    microbatch_sizes: MicrobatchSizes
    layer_kinds: tuple[LayerKind, ...]
    layers: tuple[int, ...]
    """Index into `layer_kinds` of each layer."""
    names: tuple[str, ...] = ()
    """Of the layers, where the profile is of a module."""
    glue_bytes: int = 0
    """Weights outside layers, which code between layers uses."""

    def __post_init__(self) -> None:
        for direction in ("forward", "backward"):
            sizes = getattr(self.microbatch_sizes, direction)
            if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
                raise ConfigurationError(
                    f"microbatch_sizes.{direction} must be positive and ascending, got {list(sizes)}"
                )
        if not self.layers:
            raise ConfigurationError("a profile needs at least one layer")
        if self.names and len(self.names) != len(self.layers):
            raise ConfigurationError(f"names must hold one name per layer, {len(self.layers)}, got {len(self.names)}")
        for index, kind in enumerate(self.layers):
            if not 0 <= kind < len(self.layer_kinds):
                raise ConfigurationError(
                    f"layers[{index}] is kind {kind}, but there are {len(self.layer_kinds)} layer_kinds"
                )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; fields that we do not know are left aside.

        Raises:
            ConfigurationError: a field is missing, is no number, is negative, or has not one entry per microbatch size.
        """
        fields = Fields.parse(text, "a profile")
        sizes = fields.object("microbatch_sizes")
        measured = MicrobatchSizes(forward=sizes.counts("forward", least=1), backward=sizes.counts("backward", least=1))
        try:
            return cls(
                model=fields.text("model", "model"),
                source=fields.text("source"),
                note=fields.text("note"),
                units=fields.text("units"),
                microbatch_sizes=measured,
                layer_kinds=tuple(_layer_kind(kind, measured) for kind in fields.objects("layer_kinds")),
                layers=fields.counts("layers"),
                names=fields.texts("names"),
                glue_bytes=fields.count("glue_bytes", default=0),
            )
        except ConfigurationError as error:
            text_of_error = str(error)
            if text_of_error.startswith("this is not"):
                raise
            raise ConfigurationError(f"this is not a profile: {text_of_error}") from error

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def kind(self, layer: int) -> LayerKind:
        return self.layer_kinds[self.layers[layer]]


def read_profile(path: str | Path) -> Profile:
    """A profile from a JSON file. Raises ConfigurationError, naming the file and the faulty field."""
    text = read_text(path, "a profile")
    try:
        return Profile.from_json(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def at_size(sizes: tuple[int, ...], values: tuple[float, ...], samples: int) -> float:
    """A measured quantity at any microbatch size: linear between measurements, as measured below the smallest.

    Raises:
        ConfigurationError: more samples than were ever measured; they may not even have fit.
    """
    if samples > sizes[-1]:
        raise ConfigurationError(f"microbatches of {samples} samples were not profiled; the largest has {sizes[-1]}")
    right = bisect_right(sizes, samples)
    if right == 0:
        return values[0]
    if right == len(sizes) or sizes[right - 1] == samples:
        return values[right - 1]
    share = (samples - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def _layer_kind(fields: Fields, sizes: MicrobatchSizes) -> LayerKind:
    forward, backward = len(sizes.forward), len(sizes.backward)
    first, second = fields.numbers("input_bytes", 2, "size 1 and 2")
    told = fields.tells
    stash = fields.numbers("stash_bytes", 2, "size 1 and 2") if told("stash_bytes") else ()
    return LayerKind(
        weight_bytes=fields.count("weight_bytes"),
        buffer_bytes=fields.count("buffer_bytes", default=0),
        optimizer_state_bytes=fields.count("optimizer_state_bytes", default=0),
        input_bytes=(first, second),
        forward_seconds=fields.numbers("forward_seconds", forward, "microbatch size"),
        backward_seconds=fields.numbers("backward_seconds", backward, "microbatch size"),
        forward_peak_bytes=fields.numbers("forward_peak_bytes", forward, "microbatch size"),
        backward_peak_bytes=fields.numbers("backward_peak_bytes", backward, "microbatch size"),
        update_cpu_seconds=fields.number("update_cpu_seconds", default=0.0),
        recompute_seconds=fields.numbers("recompute_seconds", backward, "size") if told("recompute_seconds") else (),
        stash_bytes=(stash[0], stash[1]) if stash else (),
        gradient_bytes=fields.count("gradient_bytes") if told("gradient_bytes") else None,
        largest_weight_bytes=fields.count("largest_weight_bytes") if told("largest_weight_bytes") else None,
        kept_bytes=fields.numbers("kept_bytes", backward, "size") if told("kept_bytes") else (),
    )
