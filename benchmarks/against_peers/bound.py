"""What one GPU and its host allow at best, for any schedule that recomputes each block once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of this machine, as measured (`rates.py`)."""

    flops_per_second: float
    """Of large matrix products in the precision of the run."""
    in_bytes_per_second: float
    """From pinned host memory to the GPU."""
    out_bytes_per_second: float
    updates_per_second: float
    """Parameters that a fused AdamW steps on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step."""

    block_parameters: int
    """Of matrices in blocks, which are computed again in backward."""
    head_parameters: int
    """Of the output matrix, which is not."""
    num_parameters: int
    """All, the embedding too."""
    tokens: int
    length: int
    """Tokens of a sequence."""
    depth: int
    width: int
    wire_nbytes: int
    """Bytes of a weight, and of a gradient, on the link."""
    state_nbytes: int = 16
    """Bytes per parameter of all that Adam trains with, in float32."""

    @property
    def flops(self) -> float:
        """2 per parameter and token forward, 4 backward, 2 for recompute; causal attention sees half of each sequence."""
        attention = 2 * self.length * self.width * self.depth
        return self.tokens * (8 * self.block_parameters + 4 * attention + 6 * self.head_parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The least seconds of one step for each of the things that can be the longest, all overlapped."""

    compute: float
    link_in: float
    link_out: float
    update: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.link_in, self.link_out, self.update)

    @property
    def bottleneck(self) -> str:
        return max(("compute", "link_in", "link_out", "update"), key=lambda name: float(getattr(self, name)))


def bound(work: Work, rates: Rates, memory_bytes: int) -> Bound:
    """For a GPU that offers `memory_bytes`.

    If the whole training state fits, nothing has to cross the link or be updated on the host. If not, updates are on the
    host: each weight comes in at least once, and a second time unless it could stay from forward to backward, and each
    gradient leaves once.
    """
    compute = work.flops / rates.flops_per_second
    if work.num_parameters * work.state_nbytes <= memory_bytes:
        return Bound(compute=compute, link_in=0.0, link_out=0.0, update=0.0)
    weights = work.num_parameters * work.wire_nbytes
    return Bound(
        compute=compute,
        link_in=(weights + max(0, weights - memory_bytes)) / rates.in_bytes_per_second,
        link_out=weights / rates.out_bytes_per_second,
        update=work.num_parameters / rates.updates_per_second,
    )
