"""What no schedule can beat: the busiest of compute, links, updates and host memory, if all of them never waited.

All of one settled step: what was begun from its second pack's first kernel to that of the next step.
"""

from dataclasses import dataclass

from harmony_lightning.hardware.presets import GpuModel, HostModel
from harmony_lightning.plan.timeline import HOST, Timeline


@dataclass(frozen=True)
class Bound:
    """Seconds per step that each resource needs."""

    products: float
    """All floating-point operations, recomputation included, at the full rate of all GPUs."""
    kernels: float
    """The model's own kernels (`own`), the same recomputation included, and sums of gradients over microbatches, on all
    GPUs; products are part of it."""
    sums: float
    """Those sums alone."""
    link_in: float
    """Weights and stashes to the GPUs."""
    link_out: float
    update: float
    """All parameters that the host updates, at its rate of a fused Adam."""
    host_memory: float
    """What copies and updates read and write there."""

    @property
    def seconds(self) -> float:
        return max(vars(self).values())

    @property
    def resource(self) -> str:
        return max(vars(self), key=lambda name: vars(self)[name])

    @property
    def seconds_without_sums(self) -> float:
        return max(self.seconds_of_products, self.kernels - self.sums)

    @property
    def seconds_of_products(self) -> float:
        """The bound with products in the place of kernels."""
        return max(value for name, value in vars(self).items() if name not in ("kernels", "sums"))


def starts(timeline: Timeline) -> list[float]:
    """When each step came to its second pack: by then the weights of the first have arrived, as they do in every step."""
    first = "forward of pack 1, microbatch 0"
    device = next(span.device for span in timeline.spans if span.name == first)
    is_behind_backward, found = True, []
    for span in timeline.lane(device, "compute"):
        if is_behind_backward and span.name == first:
            found.append(span.start)
            is_behind_backward = False
        is_behind_backward |= span.name.startswith("backward")
    return found


def bound(
    timeline: Timeline,
    start: float,
    end: float,
    *,
    num_gpus: int,
    num_parameters: int,
    kernel_seconds: float,
    sum_seconds: float,
    gpu: GpuModel,
    host: HostModel,
    dtype: str,
) -> Bound:
    """Of the step that goes from `start` to `end`, by what began meanwhile. `kernel_seconds` and `sum_seconds`, apart from
    each other: of all GPUs together."""
    spans = [span for span in timeline.spans if start <= span.start < end]

    def total(what: str, *lanes: str) -> float:
        return float(sum(getattr(s, what) for s in spans if s.device != HOST and s.lane in lanes))

    def on_link(nbytes: float) -> float:
        own = nbytes / (num_gpus * gpu.link_bytes_per_second)
        return own if host.uplink_bytes_per_second is None else max(own, nbytes / host.uplink_bytes_per_second)

    peers = 0.0 if gpu.peer_bytes_per_second is not None else total("nbytes", "peer-out")
    bytes_in = total("nbytes", "swap-in", "stash-in") + peers
    bytes_out = total("nbytes", "swap-out", "update-out") + peers
    on_host = sum(span.nbytes for span in spans if span.device == HOST)
    return Bound(
        products=total("flops", "compute") / (num_gpus * gpu.flops(dtype)),
        kernels=(kernel_seconds + sum_seconds) / num_gpus,
        sums=sum_seconds / num_gpus,
        link_in=on_link(bytes_in),
        link_out=on_link(bytes_out),
        update=num_parameters / host.update_parameters_per_second,
        host_memory=(on_host + bytes_in + bytes_out - peers) / host.memory_bytes_per_second,
    )
