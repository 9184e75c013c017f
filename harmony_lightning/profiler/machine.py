"""The machine that a plan is made for: GPUs, their memory, and the links between them and the host."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.presets import GpuModel, HostModel, find_gpu_model, gpu_model
from harmony_lightning.profiler.fields import Fields, read_text
from harmony_lightning.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine(Record):
    """One server. Its JSON form is that of the machine published beside Harmony's profiles."""

    name: str
    gpus: int
    memory_bytes: int
    """What each GPU offers."""
    host_link_bytes_per_second: float
    """Host to device, and as much again from device to host; what `host_link_shared_by` GPUs share."""
    host_link_shared_by: int
    """GPUs behind one host link: 1 if each has its own."""
    peer_bytes_per_second: float
    """From one GPU to another, each pair on its own."""
    host_message_bytes_per_second: float
    """Copies within host memory, shared by all GPUs; a message crosses it twice."""
    release_seconds: float
    """What it costs to free a pack's weights where memory is not reused in place."""
    note: str = ""
    peers_by_host: bool = False
    """Copies between GPUs pass through the host and share its links."""
    link_bytes_per_second: float | None = None
    """What one GPU alone gets of the host link; None: all of it."""
    update_parameters_per_second: float | None = None
    """Parameters that the host's optimizer steps; None where nobody has told."""
    host_memory_bytes: int | None = None
    gpu: str = ""
    """The model of the GPUs."""
    gpu_memory_bytes_per_second: float | None = None
    """What one GPU reads and writes of its own memory; None where nobody has told."""

    def __post_init__(self) -> None:
        for field in ("gpus", "memory_bytes", "host_link_shared_by"):
            if getattr(self, field) < 1:
                raise ConfigurationError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("host_link_bytes_per_second", "peer_bytes_per_second", "host_message_bytes_per_second"):
            if getattr(self, field) <= 0:
                raise ConfigurationError(f"{field} must be more than 0, got {getattr(self, field)}")
        if self.release_seconds < 0:
            raise ConfigurationError(f"release_seconds must be at least 0, got {self.release_seconds}")

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; fields that we do not know are left aside.

        Where the text does not say, `host_link_shared_by` is all GPUs, `release_seconds` is 0, and
        `gpu_memory_bytes_per_second` is that of the data sheet of a `gpu` that is known.

        Raises:
            ConfigurationError: a field is missing, is no number, or is out of range.
        """
        fields = Fields.parse(text, "a machine")
        gpus = fields.count("gpus", least=1)
        return cls(
            name=fields.text("name"),
            gpus=gpus,
            memory_bytes=fields.count("memory_bytes", least=1),
            host_link_bytes_per_second=fields.number("host_link_bytes_per_second", above=0),
            host_link_shared_by=fields.count("host_link_shared_by", default=gpus, least=1),
            peer_bytes_per_second=fields.number("peer_bytes_per_second", above=0),
            host_message_bytes_per_second=fields.number("host_message_bytes_per_second", above=0),
            release_seconds=fields.number("release_seconds", default=0.0),
            note=fields.text("note"),
            peers_by_host=fields.is_true("peers_by_host"),
            link_bytes_per_second=_optional(fields, "link_bytes_per_second"),
            update_parameters_per_second=_optional(fields, "update_parameters_per_second"),
            host_memory_bytes=fields.count("host_memory_bytes") if fields.tells("host_memory_bytes") else None,
            gpu=fields.text("gpu"),
            gpu_memory_bytes_per_second=_optional(fields, "gpu_memory_bytes_per_second")
            or _rate_of(fields.text("gpu")),
        )

    def host_share(self, num_active: int) -> float:
        """Host-link bytes per second and direction for each of so many GPUs that are at work."""
        share = self.host_link_bytes_per_second / max(1, min(num_active, self.host_link_shared_by))
        return share if self.link_bytes_per_second is None else min(share, self.link_bytes_per_second)

    @property
    def launch_seconds(self) -> float:
        """What each kernel takes beyond its work, by the data sheet of the GPUs' model; 0 for one that is not known."""
        known = find_gpu_model(self.gpu)
        return 0.0 if known is None else known.launch_seconds


def _optional(fields: Fields, name: str) -> float | None:
    return fields.number(name, above=0) if fields.tells(name) else None


def _rate_of(gpu: str) -> float | None:
    """Memory rate of a GPU by its data sheet; None for one that is not known. Drivers say "NVIDIA GeForce RTX 3090"."""
    known = find_gpu_model(gpu)
    return None if known is None else known.memory_bytes_per_second


def preset_machine(num_gpus: int, gpu: GpuModel, host: HostModel, memory_bytes: int | None = None) -> Machine:
    """So many GPUs of a model in a host, by their data sheets."""
    uplink, link = host.uplink_bytes_per_second, gpu.link_bytes_per_second
    return Machine(
        name=f"{num_gpus}x{gpu.name} in {host.name}",
        gpus=num_gpus,
        memory_bytes=memory_bytes or gpu.memory_bytes,
        host_link_bytes_per_second=uplink or link,
        host_link_shared_by=num_gpus if uplink else 1,
        link_bytes_per_second=link,
        peers_by_host=gpu.peer_bytes_per_second is None,
        peer_bytes_per_second=gpu.peer_bytes_per_second or min(link, uplink or link),
        host_message_bytes_per_second=host.memory_bytes_per_second / 2,
        release_seconds=0.0,
        update_parameters_per_second=host.update_parameters_per_second,
        gpu=gpu.name,
        gpu_memory_bytes_per_second=gpu.memory_bytes_per_second,
        note="rates of data sheets (harmony_lightning.hardware.presets)",
    )


def parse_gpus(text: str) -> tuple[int, GpuModel]:
    """ "4x3090", or "3090" for one. Raises ConfigurationError."""
    count, times, name = text.lower().rpartition("x")
    if not times:
        count, name = "1", text
    if not count.isdecimal() or int(count) < 1:
        raise ConfigurationError(f"{text!r} names no GPUs; write a number and a model, such as 4x3090")
    return int(count), gpu_model(name)


def read_machine(path: str | Path) -> Machine:
    """A machine from a JSON file. Raises ConfigurationError, naming the file and the faulty field."""
    text = read_text(path, "a machine")
    try:
        return Machine.from_json(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
