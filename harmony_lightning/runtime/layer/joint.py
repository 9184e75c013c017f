"""One forward of a layer for several microbatches (Harmony's U_fwd >= U_bwd): forward needs little memory, so larger calls
may fill a device better. Backward stays per microbatch.

When the microbatches of a group wait at the same layer with inputs of the same kind, the layer is called once on their
concatenation, and each gets its part of the result. Only layers that treat samples independently may be called so:

    learned    from calls by single microbatches: it draws no random numbers, writes no inputs and no buffers, takes no
               derivatives, is given no objects with tensors in them
    probed     once, when a group first waits at it: parts of the joint result equal what single calls give, but for
               rounding; they stay the same to the bit when the others' samples are exchanged for wild ones; and no
               operation ranks or counts elements, as routers with a limited capacity do, or tells the layer's code of
               them. There, who shares the call may decide what becomes of a sample, though it did not in the probe.

Where memory is short for a joint call, idle slots of packs go, which come back; then half as many go together from then on.

A joint call leaves no graph. Backward runs the layer again, whole, on each microbatch, and differentiates that run.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from harmony_lightning.errors import HarmonyError
from harmony_lightning.hardware.device import Device
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY
from harmony_lightning.runtime.layer.watching import run_layer
from harmony_lightning.runtime.randomness import Replay
from harmony_lightning.runtime.site import Site
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.structure import Arguments, is_plain
from harmony_lightning.runtime.thread_state import Autocast

_RANKING = frozenset(
    (
        *(
            "argsort",
            "bincount",
            "histc",
            "histogram",
            "kthvalue",
            "masked_select",
            "median",
            "mode",
            "msort",
            "nonzero",
        ),
        *("nonzero_static", "sort", "topk", "unique_consecutive", "unique_dim", "_unique", "_unique2"),
        *("_local_scalar_dense", "equal", "is_nonzero"),  # the layer's code looks at values, and may go another way
    )
)
"""Operations whose results depend on how elements compare with each other, or on how many there are of a kind, or which
tell Python's code of elements."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A microbatch's call of a layer that may be joined with others."""

    state: RuntimeState
    site: Site
    device: Device
    trained: tuple[str, ...]
    arguments: Arguments
    originals: list[torch.Tensor]
    """The tensors among them, as the user's code has them."""
    tensors: list[torch.Tensor]
    """The same on the device."""
    needs: list[bool]
    """Which of these get a gradient."""
    autocast: Autocast

    @property
    def num_rows(self) -> int:
        """Samples of the microbatch: length of the first tensor; 0 if there is none."""
        return self.tensors[0].shape[0] if self.tensors and self.tensors[0].dim() else 0

    def is_joinable_with(self, other: "Waiting") -> bool:
        """Whether one call can serve both: tensors are cut into samples alike, or are the same."""
        return (
            self.site is other.site
            and self.device is other.device
            and self.autocast == other.autocast
            and min(self.num_rows, other.num_rows) > 0
            and self.arguments.is_like(other.arguments)
            and all(
                self.shares(index, other)
                or (self._is_per_sample(one) and other._is_per_sample(another) and _are_like(one, another))
                for index, (one, another) in enumerate(zip(self.tensors, other.tensors, strict=True))
            )
            and self.needs == other.needs
        )

    def shares(self, index: int, other: "Waiting") -> bool:
        """Whether both are given the same tensor."""
        return self.originals[index] is other.originals[index]

    def _is_per_sample(self, tensor: torch.Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.num_rows


def _are_like(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.layout, one.shape[1:]) == (other.dtype, other.layout, other.shape[1:])


@dataclass(frozen=True, slots=True)
class Part:
    """What one microbatch gets of a joint result: leaves, of which those at `positions` are tensors."""

    leaves: list[Any]
    spec: Any
    positions: list[int]
    need_gradient: list[bool]

    @property
    def results(self) -> list[torch.Tensor]:
        return [self.leaves[position] for position in self.positions]

    def has_same_rest(self, leaves: Sequence[Any], positions: Sequence[int]) -> bool:
        """Whether leaves with tensors at `positions` are the same beside these: a number of rows, say, is not."""
        rest = [leaf for index, leaf in enumerate(self.leaves) if index not in self.positions]
        return self.positions == list(positions) and rest == [
            leaf for index, leaf in enumerate(leaves) if index not in positions
        ]


class Joint:
    """One call for several microbatches. The first to go on makes it."""

    def __init__(self, members: Sequence[Waiting]) -> None:
        self._members = list(members)
        self._site = members[0].site
        self._is_probe = self._site.joins is None
        self._parts: dict[Waiting, Part] | None = None

    def part_of(self, member: Waiting, buffers: Sequence[torch.Tensor]) -> Part | None:
        """Called within the layer: the microbatch's part; None if it must call the layer itself, be it for the probe."""
        if self._parts is None:
            parts = self._call_if_there_is_room(buffers)
            if parts is None and member.state.memory.let_go_idle(member.device):
                parts = self._call_if_there_is_room(buffers)
            if parts is None:
                member.state.memory.join_fewer(member.device)
            elif not parts:
                self._site.joins = False
            self._parts = dict(zip(self._members, parts, strict=True)) if parts else {}
        return None if self._is_probe else self._parts.pop(member, None)

    def compare(
        self, member: Waiting, results: Sequence[torch.Tensor], leaves: Sequence[Any], positions: Sequence[int]
    ) -> None:
        """The layer was called for the microbatch alone: does its part say the same? The tensors at `positions` of the
        result's leaves are `results`."""
        part = (self._parts or {}).pop(member, None)
        if not self._is_probe or part is None or self._site.joins is False:
            return
        is_same = part.has_same_rest(leaves, positions) and all(map(_agree, part.results, results))
        if not is_same:
            self._site.joins = False
        elif not self._parts:
            self._site.joins = True

    def _call_if_there_is_room(self, buffers: Sequence[torch.Tensor]) -> list[Part] | None:
        try:
            return self._call(buffers)
        except OUT_OF_MEMORY:
            return None

    def _call(self, buffers: Sequence[torch.Tensor]) -> list[Part]:
        """Parts of the result, in the order of members; none if it cannot be taken apart, or the layer did what it must
        not, or failed."""
        first = self._members[0]
        own = Replay(first.device)
        ranking = _Ranking()
        try:
            with ranking if self._is_probe else nullcontext():
                parts = self._run(buffers, self._tensors())
        except Exception as error:
            own.keep_what_was_drawn(first.device)
            own.begin(first.device)
            if isinstance(error, (*OUT_OF_MEMORY, HarmonyError)):
                raise
            return []  # what was taken for samples may be none; an error of the layer's own comes in single calls, too
        own.keep_what_was_drawn(first.device)
        if not own.is_empty:
            own.begin(first.device)
            return []
        if self._is_probe:
            return parts if not ranking.was_seen and self._is_independent(buffers, parts) else []
        first.state.counters.joint_forwards += bool(parts)
        return parts

    @torch.no_grad()
    def _tensors(self, kept: int | None = None) -> list[torch.Tensor]:
        """What the joint call is given. With `kept`, samples of all members but that one are wild."""
        first, *others = self._members
        joined = []
        for index, tensor in enumerate(first.tensors):
            each = [member.tensors[index].detach() for member in self._members]
            if all(first.shares(index, other) for other in others):
                joined.append(tensor.detach())
                continue
            if kept is not None:
                each = [one if m == kept else _wild(one, each[kept]) for m, one in enumerate(each)]
            joined.append(torch.cat(each))
        return [tensor.requires_grad_(needs) for tensor, needs in zip(joined, first.needs, strict=True)]

    def _run(self, buffers: Sequence[torch.Tensor], tensors: list[torch.Tensor]) -> list[Part]:
        first = self._members[0]
        with torch.enable_grad(), saved_tensors_hooks(_drop, _refuse):
            args, kwargs = first.arguments.build(tensors)
            weights = first.state.weights.of_site(self._site, first.device, first.trained)
            result, _ = run_layer(
                first.state,
                self._site,
                first.device,
                weights,
                [buffer.clone() for buffer in buffers],
                args,
                kwargs,
                lambda weight, trains: weight.requires_grad_(trains),
                sums_narrow=True,  # of no gradients
                is_joint=True,
            )
            return self._take_apart(result)

    def _is_independent(self, buffers: Sequence[torch.Tensor], parts: list[Part]) -> bool:
        """Whether the parts of the first and of the last member do not depend on what the others' samples are. Kernels are
        the same for the same shapes, so equality is to the bit."""
        return bool(parts) and all(self._is_same(buffers, parts, kept) for kept in (0, len(self._members) - 1))

    def _is_same(self, buffers: Sequence[torch.Tensor], parts: list[Part], kept: int) -> bool:
        try:
            others = self._run(buffers, self._tensors(kept))
        except OUT_OF_MEMORY:
            raise
        except Exception:  # user code that looks at its inputs
            return False
        part, other = parts[kept], others[kept] if others else None
        return (
            other is not None
            and part.has_same_rest(other.leaves, other.positions)
            and all(map(torch.equal, part.results, other.results))
        )

    @torch.no_grad()
    def _take_apart(self, result: Any) -> list[Part]:
        leaves, spec = pytree.tree_flatten(result)
        sizes = [member.num_rows for member in self._members]
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if not positions or not all(_is_cut_by(leaves[index], sum(sizes)) for index in positions):
            return []
        if not all(is_plain(leaf) for index, leaf in enumerate(leaves) if index not in positions):
            return []
        # Clones: whoever writes one in place must not change the version of the others.
        pieces = {index: [piece.clone() for piece in leaves[index].split(sizes)] for index in positions}
        need_gradient = [leaves[index].requires_grad for index in positions]
        return [
            Part(
                [pieces[i][m] if i in pieces else leaf for i, leaf in enumerate(leaves)], spec, positions, need_gradient
            )
            for m in range(len(sizes))
        ]


def _is_cut_by(tensor: torch.Tensor, num_rows: int) -> bool:
    return tensor.layout == torch.strided and tensor.dim() > 0 and tensor.shape[0] == num_rows


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for what rounding in another order can do."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    largest = other.detach().abs().max() if other.numel() else other.new_zeros(())
    return bool(((one - other).abs() <= tolerance * largest).all())


def _wild(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Samples unlike those of the tensor; of integers, such as tokens, only `other` is known to have possible ones."""
    if tensor.is_floating_point():
        return tensor * -3
    return other[torch.arange(tensor.shape[0], device=other.device) % other.shape[0]]


def _drop(_: torch.Tensor) -> None: ...


def _refuse(_: Any) -> Any:
    raise AssertionError("a joint forward is never differentiated")


class _Ranking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks for operations that may couple samples."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.was_seen = False

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.was_seen |= func._schema.name.removeprefix("aten::") in _RANKING
        return func(*args, **(kwargs or {}))


Join = Callable[[Waiting], Joint | None]
"""Called where a layer may be called jointly: waits for the others; None if there are none."""
