"""What no schedule can beat: the busiest of compute, links, updates and host memory, if all of them never waited."""

from dataclasses import dataclass

from harmony_lightning.hardware.presets import GpuModel, HostModel
from harmony_lightning.plan.timeline import HOST, Timeline


@dataclass(frozen=True)
class Bound:
    """Seconds per step that each resource needs."""

    compute: float
    """All floating-point operations at the full rate of all GPUs."""
    link_in: float
    """Weights and stashes to the GPUs."""
    link_out: float
    update: float
    """All parameters at the host's rate of a fused Adam."""
    host_memory: float
    """What copies and updates read and write there."""

    @property
    def seconds(self) -> float:
        return max(vars(self).values())

    @property
    def resource(self) -> str:
        return max(vars(self), key=lambda name: vars(self)[name])


def starts(timeline: Timeline) -> list[float]:
    """When each step's first kernel started."""
    spans = timeline.lane(0, "compute")
    former = "backward"
    found = []
    for span in spans:
        if former.startswith("backward") and span.name == "forward of pack 0, microbatch 0":
            found.append(span.start)
        if span.name.startswith(("forward", "backward")):
            former = span.name
    return found


def bound(
    timeline: Timeline, num_steps: int, num_gpus: int, num_parameters: int, gpu: GpuModel, host: HostModel, dtype: str
) -> Bound:
    """Of one step, from what all steps of a timeline have done."""

    def total(what: str, *lanes: str) -> float:
        return sum(getattr(s, what) for s in timeline.spans if s.device != HOST and s.lane in lanes) / num_steps

    def on_link(nbytes: float) -> float:
        own = nbytes / (num_gpus * gpu.link_bytes_per_second)
        return own if host.uplink_bytes_per_second is None else max(own, nbytes / host.uplink_bytes_per_second)

    peers = 0.0 if gpu.peer_bytes_per_second is not None else total("nbytes", "peer-out")
    bytes_in = total("nbytes", "swap-in", "stash-in") + peers
    bytes_out = total("nbytes", "swap-out") + peers
    on_host = sum(span.nbytes for span in timeline.spans if span.device == HOST) / num_steps
    return Bound(
        compute=total("flops", "compute") / (num_gpus * gpu.flops(dtype)),
        link_in=on_link(bytes_in),
        link_out=on_link(bytes_out),
        update=num_parameters / host.update_parameters_per_second,
        host_memory=(on_host + bytes_in + bytes_out - peers) / host.memory_bytes_per_second,
    )
