"""What machines can do, as numbers: GPUs and hosts that an emulated cluster can be timed as.

Rates are peaks of data sheets, dense (no sparsity), with accumulation in float32 for half precision; consumer tensor
cores reach only half of the advertised float16 rate that way. `efficiency` scales them to what kernels achieve.

Sources, by GPU: GTX 1080 Ti product page (11.3 TFLOP/s, 484 GB/s); "NVIDIA Ampere GA102 GPU Architecture" whitepaper,
appendix A (RTX 3090: 35.6 / 71 TFLOP/s, 936 GB/s); "NVIDIA Ada GPU Architecture" whitepaper, appendix A (RTX 4090: 82.6 /
165.2, 1008 GB/s); "NVIDIA RTX Blackwell GPU Architecture" whitepaper, appendix A (RTX 5090: 104.8 / 209.5, 1792 GB/s);
A100, H100 and H200 data sheets. Links are PCIe x16 in one direction: 8, 16 and 32 GT/s per lane with 128b/130b encoding
(PCI Express Base Specification), less what headers of 256-byte packets take (about 5 %) and what measurements leave
(`_PCIE_*` below). Update rates start from ZeRO-Offload (Ren et al., USENIX ATC 2021, table 4: a vectorised Adam steps 1e9
parameters in 0.25 s on two 24-core Xeons) and follow the host's memory bandwidth from there.
"""

from dataclasses import dataclass, field

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.units import parse_nbytes

# Bytes per second and direction that large pinned copies reach over x16, of 15.75, 31.5 and 63.0 GB/s raw: what
# NVIDIA's bandwidthTest commonly reports, about 12.3, 25 and 55 GB/s.
_PCIE_3, _PCIE_4, _PCIE_5 = 12.3e9, 25e9, 55e9
_LAUNCH_SECONDS = 2e-6
"""Between the start of one kernel and the next in an in-order stream that never runs dry; 2 to 3 us on all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuModel:
    """What a GPU can do."""

    name: str
    memory_bytes: int
    flops_per_second: dict[str, float] = field(hash=False)
    """By dtype, as "float32"; what is missing runs at the rate of float32."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """To the host, and as much from it at the same time."""
    peer_bytes_per_second: float | None = None
    """To another GPU, per direction; None: there is no peer access, and copies pass through the host."""
    launch_seconds: float = _LAUNCH_SECONDS
    """What each kernel and each copy costs beyond its work."""
    efficiency: float = 1.0
    """Share of `flops_per_second` that kernels reach."""

    def __post_init__(self) -> None:
        rates = {**self.flops_per_second, "memory": self.memory_bytes_per_second, "link": self.link_bytes_per_second}
        if "float32" not in self.flops_per_second:
            raise ConfigurationError(f"GPU model {self.name!r} needs flops_per_second of float32")
        if bad := {key: rate for key, rate in rates.items() if not rate > 0}:
            raise ConfigurationError(f"rates of GPU model {self.name!r} must be positive, got {bad}")

    def flops(self, dtype: str) -> float:
        """FLOP/s that kernels of a dtype reach."""
        return self.efficiency * self.flops_per_second.get(dtype, self.flops_per_second["float32"])


@dataclass(frozen=True, slots=True, kw_only=True)
class HostModel:
    """What the host of the GPUs can do."""

    name: str
    memory_bytes_per_second: float
    """Reads and writes together, over all channels."""
    update_parameters_per_second: float
    """What a fused Adam reaches on all cores when memory does not limit it."""
    flops_per_second: float
    uplink_bytes_per_second: float | None = None
    """What all GPUs together get over their shared way to the host, per direction; None: each has its own."""

    def __post_init__(self) -> None:
        rates = (self.memory_bytes_per_second, self.update_parameters_per_second, self.flops_per_second)
        if any(not rate > 0 for rate in rates):
            raise ConfigurationError(f"rates of host model {self.name!r} must be positive, got {rates}")


def _gpu(
    name: str, memory: str, float32: float, half: float, memory_rate: float, link: float, **more: float
) -> GpuModel:
    """Rates in TFLOP/s and GB/s."""
    rates = {"float32": float32 * 1e12, "float16": half * 1e12, "bfloat16": half * 1e12}
    if "float64" in more:
        rates["float64"] = more.pop("float64") * 1e12
    return GpuModel(
        name=name,
        memory_bytes=parse_nbytes(memory),
        flops_per_second=rates,
        memory_bytes_per_second=memory_rate * 1e9,
        link_bytes_per_second=link,
        **more,  # type: ignore[arg-type]
    )


GPUS: dict[str, GpuModel] = {
    gpu.name: gpu
    for gpu in (
        # Half precision is computed in float32: no tensor cores, and native float16 at 1/64 of the rate. Peer access over
        # PCIe is open on this generation.
        _gpu("1080ti", "11GiB", 11.34, 11.34, 484, _PCIE_3, float64=0.354, peer_bytes_per_second=_PCIE_3),
        _gpu("3090", "24GiB", 35.6, 71.0, 936, _PCIE_4, float64=0.556),
        _gpu("4090", "24GiB", 82.6, 165.2, 1008, _PCIE_4, float64=1.29),
        _gpu("5090", "32GiB", 104.8, 209.5, 1792, _PCIE_5, float64=1.64),
        # SXM4: NVLink 3, 600 GB/s in both directions together.
        _gpu("a100-40", "40GiB", 19.5, 312, 1555, _PCIE_4, float64=9.7, peer_bytes_per_second=300e9),
        # SXM5: NVLink 4, 900 GB/s in both directions together.
        _gpu("h100", "80GiB", 67, 989.4, 3350, _PCIE_5, float64=34, peer_bytes_per_second=450e9),
        _gpu("h200", "141GB", 67, 989.4, 4800, _PCIE_5, float64=34, peer_bytes_per_second=450e9),
    )
}

HOSTS: dict[str, HostModel] = {
    host.name: host
    for host in (
        # Two channels of DDR4-3200 at 25.6 GB/s (JEDEC JESD79-4), 16 cores of 3.5 GHz with 2 AVX2 FMA units; the GPUs sit
        # behind the CPU's 16 lanes of PCIe 4.
        HostModel(
            name="desktop",
            memory_bytes_per_second=51.2e9,
            update_parameters_per_second=1e9,
            flops_per_second=1.8e12,
            uplink_bytes_per_second=_PCIE_4,
        ),
        # Eight channels of DDR4-3200; 64 cores; 128 lanes of PCIe 4, so each GPU has its own 16.
        HostModel(
            name="server",
            memory_bytes_per_second=204.8e9,
            update_parameters_per_second=4e9,
            flops_per_second=5e12,
        ),
        # Twelve channels of DDR5-4800 at 38.4 GB/s (JEDEC JESD79-5), 96 cores; 128 lanes of PCIe 5.
        HostModel(
            name="server-ddr5",
            memory_bytes_per_second=460.8e9,
            update_parameters_per_second=9e9,
            flops_per_second=9e12,
        ),
    )
}
DEFAULT_HOST = "server"


def gpu_model(preset: str | GpuModel) -> GpuModel:
    """Raises ConfigurationError for a name that is not in `GPUS`."""
    if isinstance(preset, GpuModel):
        return preset
    found = GPUS.get(str(preset).lower().replace(" ", ""))
    if found is None:
        raise ConfigurationError(f"no GPU is called {preset!r}; choose from {', '.join(GPUS)}, or give a GpuModel")
    return found


def find_gpu_model(name: str) -> GpuModel | None:
    """By what its driver calls a GPU, such as "NVIDIA GeForce RTX 3090"; None where a data sheet of that very one is not
    here."""
    words = name.lower().split()
    return GPUS.get("".join(word for word in words if word not in ("nvidia", "geforce", "gtx", "rtx")))


def host_model(preset: str | HostModel) -> HostModel:
    """Raises ConfigurationError for a name that is not in `HOSTS`."""
    if isinstance(preset, HostModel):
        return preset
    found = HOSTS.get(preset)
    if found is None:
        raise ConfigurationError(f"no host is called {preset!r}; choose from {', '.join(HOSTS)}, or give a HostModel")
    return found
