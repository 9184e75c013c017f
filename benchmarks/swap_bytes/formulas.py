"""Bytes that one step moves over the links, by schedule: sums over all GPUs, so that they are whole numbers.

P parameters of w bytes with gradients of g bytes, N GPUs, m microbatches on each GPU (a minibatch of m * N). Weights,
gradients and optimizer states only: activations depend on the model and on what is recomputed.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Bytes of one step, all GPUs together: into their memories and out of them."""

    into_gpus: int
    out_of_gpus: int

    @property
    def total(self) -> int:
        return self.into_gpus + self.out_of_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    weight_nbytes: int
    """w * P: all weights on their way to a GPU."""
    gradient_nbytes: int
    """g * P."""
    num_gpus: int
    num_microbatches: int
    """Of each GPU: accumulation steps."""


def sharded_offload(setting: Setting) -> Moved:
    """ZeRO-3 and FSDP2 with weights, gradients and optimizer on the host.

    For each microbatch all weights are gathered twice on each GPU: its own share from the host, those of the others from
    them, and it sends its share to each. Gradients are then reduced and scattered, and each GPU's share goes to the host.
    A GPU's PCIe link carries what comes from and goes to the other GPUs too.
    """
    n, m = setting.num_gpus, setting.num_microbatches
    weights, gradients = setting.weight_nbytes, setting.gradient_nbytes
    return Moved(
        into_gpus=m * (2 * weights * n + gradients * (n - 1)),
        out_of_gpus=m * (2 * weights * (n - 1) + gradients * n),
    )


def harmony_dp(setting: Setting) -> Moved:
    """Harmony DP as published: every GPU fetches each weight for forward and for backward and sends all its gradients."""
    n = setting.num_gpus
    return Moved(into_gpus=2 * setting.weight_nbytes * n, out_of_gpus=setting.gradient_nbytes * n)


def harmony_pp(setting: Setting) -> Moved:
    """Harmony PP as published: each weight is fetched by one GPU, for forward and for backward."""
    return Moved(into_gpus=2 * setting.weight_nbytes, out_of_gpus=setting.gradient_nbytes)


def virtual_memory(packs: Sequence[tuple[int, int]], setting: Setting, *, states: int, memory_bytes: int) -> Moved:
    """Data parallelism in which each GPU pages by itself.

    Each GPU has a whole training state and touches it as plain training does (`_touches`). What does not fit is paged,
    least recently used first; what was not written is dropped without a copy. A page is what a pack has of one kind. The
    second of two steps counts: what the first leaves in memory is there. Gradients are summed over the GPUs for nothing.

    Args:
        packs: bytes of weights and of gradients of each pack.
        states: optimizer states of the size of the weights; Adam has 2.
        memory_bytes: what each GPU offers for all this.
    """
    memory = PagedMemory(memory_bytes)
    for _ in range(2):
        memory.into_gpu = memory.out_of_gpu = 0
        for page, nbytes, access in _touches(packs, setting.num_microbatches, states):
            memory.touch(page, nbytes, access)
    return Moved(into_gpus=memory.into_gpu * setting.num_gpus, out_of_gpus=memory.out_of_gpu * setting.num_gpus)


def _touches(
    packs: Sequence[tuple[int, int]], num_microbatches: int, states: int
) -> Iterator[tuple[Hashable, int, str]]:
    """What one step of plain training reads and writes: forward, backward, and at the end the update on the GPU."""
    order = range(len(packs))
    for microbatch in range(num_microbatches):
        for pack in order:
            yield ("weights", pack), packs[pack][0], "read"
        for pack in reversed(order):
            yield ("weights", pack), packs[pack][0], "read"
            yield ("gradients", pack), packs[pack][1], "write" if microbatch else "create"
    for pack in order:
        yield ("gradients", pack), packs[pack][1], "read"
        yield ("states", pack), packs[pack][0] * states, "write"
        yield ("weights", pack), packs[pack][0], "write"
        yield ("gradients", pack), packs[pack][1], "free"


class PagedMemory:
    """A GPU's memory that evicts the least recently used page, and counts what it copies."""

    def __init__(self, memory_bytes: int) -> None:
        self.into_gpu = 0
        self.out_of_gpu = 0
        self._free = memory_bytes
        self._pages: OrderedDict[Hashable, tuple[int, bool]] = OrderedDict()
        """Bytes, and whether they were written since they came; least recently used first."""

    def touch(self, page: Hashable, nbytes: int, access: str) -> None:
        """`access`: "read", "write" (reads too), "create" (needs no old content) or "free" (nobody needs the content)."""
        old = self._pages.pop(page, None)
        if old is not None:
            self._free += nbytes
        if access == "free":
            return
        while self._free < nbytes and self._pages:
            _, (evicted, is_written) = self._pages.popitem(last=False)
            self._free += evicted
            self.out_of_gpu += evicted if is_written else 0
        if self._free < nbytes:
            raise ValueError(f"a page of {nbytes} bytes does not fit into {self._free} bytes of GPU memory")
        self._free -= nbytes
        if old is None and access != "create":
            self.into_gpu += nbytes
        self._pages[page] = nbytes, access != "read" or (old is not None and old[1])
