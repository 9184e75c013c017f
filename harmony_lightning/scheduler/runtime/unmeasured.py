"""Profiles that do not tell all that the runtime's rules ask for, such as those published with Harmony."""

from dataclasses import replace

from harmony_lightning.profiler import LayerKind, MicrobatchSizes, Profile


def completed(profile: Profile) -> Profile:
    """The same profile with what is left out, never too small:

    buffers     travel with the weights, and do not train
    kept_bytes  of a layer that makes nothing again: at most what is on the device at the peak of its backward, which holds
                all of it, beside weights, buffers and the input
    """
    kinds = (_completed(kind, profile.microbatch_sizes) for kind in profile.layer_kinds)
    return replace(profile, layer_kinds=tuple(kinds))


def _completed(kind: LayerKind, sizes: MicrobatchSizes) -> LayerKind:
    one, two = kind.input_bytes
    held = [kind.weight_bytes + kind.buffer_bytes + one + (size - 1) * (two - one) for size in sizes.backward]
    at_most = tuple(max(0.0, peak - rest) for peak, rest in zip(kind.backward_peak_bytes, held, strict=True))
    return replace(
        kind,
        weight_bytes=kind.weight_bytes + kind.buffer_bytes,
        buffer_bytes=0,
        gradient_bytes=kind.weight_bytes if kind.gradient_bytes is None else kind.gradient_bytes,
        kept_bytes=kind.kept_bytes or at_most,
    )
