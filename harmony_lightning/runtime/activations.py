"""What the operations inside one layer call save for their backward: made again when that backward comes, or kept.

Forward builds the layer's autograd graph, but in place of each tensor that an operation saves, the graph holds the
tensor's position in the order of saving. When backward first asks for one, the layer is run a second time, and what its
operations save then is what backward gets. That run ends as soon as the last of them is there: the last matrix product
of a transformer block is never computed again, nor any of an embedding's or a head's. (The same order twice is also what
`torch.utils.checkpoint` relies on.)
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.out_of_memory import OUT_OF_MEMORY

_hooks = torch._C._autograd

Position = int
Kind = tuple[torch.Size, torch.dtype]
Restore = Callable[[], torch.Tensor]
"""Finds a weight where it is then."""
Recompute = Callable[[Callable[[torch.Tensor], Position]], None]
"""Runs the layer again with the given saved-tensor hook in force."""


class _Enough(BaseException):
    """Ends a recompute. Not an `Exception`: user code that catches those must not catch this."""


class TakesDerivative(BaseException):
    """A layer's forward asks for what it has just saved. Not an `Exception`, as above."""


class Activations:
    """The saved tensors of one layer call. The layer's graph holds this, so this must hold nothing of the call."""

    def __init__(
        self,
        layer: str,
        *,
        is_kept: bool,
        refer: Callable[[torch.Tensor], Restore | None] = lambda tensor: None,
    ) -> None:
        """`refer`: what stands for a tensor in slot memory, which may be overwritten; None for others."""
        self.is_kept = is_kept
        self.weighed: list[torch.Tensor] | None = None
        """What the forward saves, where somebody wants to know."""
        self._refer = refer
        self._layer = layer
        self._recompute: Recompute | None = None
        """Known while the layer's backward runs."""
        self._kinds: list[Kind] = []
        self._is_in_forward = False
        self._ready: dict[Position, tuple[torch.Tensor, int] | Restore] = {}
        """Tensors that backward has not asked for yet, with their versions."""
        self._handed_out: dict[Position, weakref.ref[torch.Tensor]] = {}

    def save(self, tensor: torch.Tensor) -> Position:
        """Hook of the forward: an operation saves a tensor."""
        kinds = self._kinds
        position = len(kinds)
        kinds.append((tensor.shape, tensor.dtype))
        if self.is_kept or self.weighed is not None:
            self._hold(position, tensor)
        return position

    def _hold(self, position: Position, tensor: torch.Tensor) -> None:
        # Not the tensor itself: its graph would hold this, and this would hold its graph.
        reference, held = self._refer(tensor), (tensor.detach(), tensor._version)
        if self.weighed is not None and reference is None:
            self.weighed.append(held[0])
        if self.is_kept:
            self._ready[position] = reference or held

    def load(self, position: Position) -> torch.Tensor:
        """Hook of the forward: the operation's backward asks for it. What was handed out is not held any longer."""
        if self._recompute is None:
            if self._is_in_forward:
                raise TakesDerivative
            raise UnsupportedError(
                f"a tensor computed inside layer {self._layer} was used outside of it other than through its result "
                f"(was it kept in an attribute?); its gradient is not available. Choose smaller layers, so that it "
                f"becomes the result of one: HarmonyStrategy(layers=[...])"
            )
        held = self._ready.pop(position, None)
        if held is None and (handed_out := self._handed_out.get(position)) and (again := handed_out()) is not None:
            return again
        if type(held) is tuple and held[0]._version == held[1]:
            tensor = held[0]
        elif callable(held):
            tensor = held()
        else:  # not kept, or written since
            made = self._make(self._recompute)
            tensor = self.hand_out(made.pop(position))
            self._ready = cast(dict[Position, tuple[torch.Tensor, int] | Restore], made)
        self._handed_out[position] = weakref.ref(tensor)
        return tensor

    def hand_out(self, saved: tuple[torch.Tensor, int]) -> torch.Tensor:
        """What was saved, with its version then. Torch does not compare these where there are hooks.

        Raises:
            RuntimeError: it was written since, as torch tells it.
        """
        tensor, version = saved
        if tensor._version != version and self._refer(tensor) is None:  # weights of one slot count together
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation in layer "
                f"{self._layer}: a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} is at version "
                f"{tensor._version}; expected version {version} instead. Let the layer write a copy of it "
                f"(x = x.clone()), or x = x * 2 in place of x *= 2"
            )
        return tensor

    def __enter__(self) -> None:
        """The forward begins: the hooks are in force."""
        self._is_in_forward = True
        _hooks._push_saved_tensors_default_hooks(self.save, self.load)

    def __exit__(self, *_: object) -> None:
        _hooks._pop_saved_tensors_default_hooks()
        self._is_in_forward = False

    def share_kinds(self, known: list[Kind]) -> list[Kind]:
        """What kinds of tensors the forward has saved: `known` itself if it is the same, as it is for all calls of most
        layers. So they need not each keep a list for the garbage collector to go through."""
        if self._kinds == known:
            self._kinds = known
        return self._kinds

    def open(self, recompute: Recompute, make_room: Callable[[], bool] = lambda: False) -> None:
        """The layer's backward begins: its operations may load. `make_room`: of a device that has run out of memory; tells
        whether it could."""
        self._recompute, self._make_room = recompute, make_room

    def close(self) -> None:
        """The layer's backward is over; another may follow if its graph was retained."""
        self._recompute = None
        self._handed_out.clear()
        self.drop()

    def restart(self) -> None:
        """The forward begins anew."""
        self._kinds = []
        self._ready = {}
        if self.weighed is not None:
            self.weighed.clear()

    def drop(self) -> bool:
        """Keep nothing any more; what backward needs will be made again. Returns whether there was anything."""
        found = bool(self._ready)
        self._ready.clear()  # a second run's tensors hold its graph, whose hook holds them
        return found

    def _make(self, recompute: Recompute) -> dict[Position, tuple[torch.Tensor, int]]:
        made: dict[Position, tuple[torch.Tensor, int]] = {}
        kinds, last = self._kinds, len(self._kinds) - 1

        def save_again(tensor: torch.Tensor) -> Position:
            position = len(made)
            if position > last or kinds[position] != (tensor.shape, tensor.dtype):
                raise self._differs(f"saved tensor {position} is {tuple(tensor.shape)}, {tensor.dtype} now")
            made[position] = tensor, tensor._version
            if position == last:
                raise _Enough
            return position

        with contextlib.suppress(_Enough):
            try:
                recompute(save_again)
            except OUT_OF_MEMORY:
                if not self._make_room():
                    raise
                made.clear()
                recompute(save_again)
        if len(made) < len(self._kinds):
            raise self._differs(f"it saved {len(self._kinds)} tensors for its backward first, {len(made)} now")
        return made

    def _differs(self, how: str) -> UnsupportedError:
        return UnsupportedError(
            f"layer {self._layer} did something else when it was recomputed ({how}): its forward must do the same when "
            f"it is called again with the same inputs"
        )


def keep_detached(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return tensor.detach(), tensor._version  # an operation that saves its own result would hold itself alive for ever


def unreachable(_: Any) -> Any:
    raise AssertionError("gradients of a layer's inputs are taken where its graph begins, and a second run has none")


def is_layer_hook(pack: Any) -> bool:
    """Whether a saved-tensor hook is that of a layer's forward, which may be taken off the thread.

    Raises:
        TakesDerivative: it is, but without it the layer's graph would hold weights.
    """
    if isinstance(getattr(pack, "__self__", None), Activations):
        raise TakesDerivative
    return pack is keep_detached
