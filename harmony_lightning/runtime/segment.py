"""Segments: what one microbatch does between two switches, on one device, and how tensors get into it.

While user code between layers ("glue") runs, a function mode looks at the arguments of every torch function and
*imports* each tensor that comes from an older segment or another device: the tensor's value moves to the segment's
device, and its autograd edge ends there. The gradient that arrives at the end is handed to the engine, addressed to
the edge it was cut from. So the graph is cut at every pack border, whatever the user's code does (skips, encoder
states, auxiliary losses), and glue never sees tensors on mixed devices.

    older segment (pack 0, gpu0)       |   this segment (pack 1, gpu1)
    layer -> x ------------------------|--> import(x) -> layer -> y
             ^  edge of x              |        |  backward
             '--- pending gradient <---|--------'

Functions that write their first argument are different: a host tensor that takes part in no graph (a queue, a moving
average, a metric) is written where it lives; anything else is written as an import, which then stands for the original
in the rest of the microbatch.
"""

import copy
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from harmony_lightning.runtime.differentiate import kept_edge_of
from harmony_lightning.runtime.functions import apply_own
from harmony_lightning.runtime.moved import Copies, Moved
from harmony_lightning.runtime.state import RuntimeState
from harmony_lightning.runtime.structure import clone_with_strides, nbytes_of, tensors_in
from harmony_lightning.runtime.transfer import Arrival
from harmony_lightning.runtime.transforms import bring_in_transform

Sink = Callable[[torch.Tensor], None]
Deposit = Callable[[GradientEdge, Arrival], None]
Replaced = dict[int, tuple[torch.Tensor, torch.Tensor]]


def reaches_weights(ctx: Any) -> bool:
    """Whether the running backward is for all leaves. `torch.autograd.grad(loss, inputs)` in user code is not, and must
    leave the gradients of weights alone. Told by the anchor, the first input of every node of ours."""
    try:
        return bool(torch._C._will_engine_execute_node(ctx.next_functions[0][0]))  # type: ignore[attr-defined]
    except RuntimeError:  # torch does not say for a leaf whose own gradient is asked for: see `differentiate_weights`
        return True


class Import(torch.autograd.Function):
    """Identity with a graph that ends: the gradient goes to a sink instead of to the source's node."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, anchor: torch.Tensor, source: torch.Tensor, sink: Sink, is_written: bool
    ) -> torch.Tensor:
        """`source` must be detached: autograd walks into the graph of every input, even one without gradient. `anchor`
        requires a gradient, so that the result does."""
        ctx.set_materialize_grads(False)
        ctx.sink = sink
        return clone_with_strides(source) if is_written else source.view_as(source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[None, ...]:  # type: ignore[override]
        # A layer that does not differentiate its input gives none to it, and autograd walks on. None is not zero: weights
        # with a zero gradient are stepped.
        if gradient is not None and reaches_weights(ctx):
            with torch._C.DisableTorchFunction():
                ctx.sink(gradient)
        return (None,) * 4


class Segment:
    """What one microbatch does in one visit to a pack.

    Attributes:
        state: where weights come from and gradients go.
        pack, microbatch, device: which visit this is.
        is_cut: the autograd graph ends at the borders of segments.
        start: autograd nodes with a smaller sequence number are older than this segment.
        has_graph: whether anything in here may get a gradient.
        has_glue: whether code between layers has computed anything.
        uses: how often each weight that trains is used; counts down in backward.
        partial: gradients of weights with uses still to come.
        replaced: tensors whose later value is another object, by identity, with the original held; shared by all
            segments of the microbatch.
        saved_nbytes: of what glue has saved while it used weights.
        stashed: what has gone to the host from in here, so that each tensor goes once.
        stash: the same for backward, in the order of leaving.
        on_leave: called when the microbatch goes on to another pack.
    """

    def __init__(
        self, state: RuntimeState, pack: int, microbatch: int, *, is_cut: bool, replaced: Replaced, deposit: Deposit
    ) -> None:
        """`deposit` takes gradients for edges of older segments."""
        self.state = state
        self.pack = pack
        self.microbatch = microbatch
        self.device = state.device_of(pack, microbatch)
        self.is_cut = is_cut
        self.start = torch.autograd._get_sequence_nr() if is_cut else 0  # type: ignore[attr-defined]
        self.has_graph = False
        self.has_glue = False
        self.uses: dict[str, int] = defaultdict(int)
        self.partial: dict[str, torch.Tensor] = {}
        self.replaced = replaced
        self.saved_nbytes = 0
        self.stashed: dict[Any, Any] = {}
        self.stash: list[weakref.ref[Any]] = []
        self.on_leave: list[Callable[[], object]] = []
        self._deposit = deposit
        self._moved = Moved(state, self.device)

    @property
    def has_saved_much(self) -> bool:
        """Whether glue has saved so much that it goes to the host as it comes."""
        return self.saved_nbytes > self.state.spare_nbytes

    def add_gradients(
        self,
        gradients: Mapping[str, torch.Tensor | None],
        pack: int | None,
        owned: Collection[str] = (),
        *,
        sums_narrow: bool = False,
    ) -> None:
        """One use of each of these weights has been differentiated; sums are handed on with the last use.

        Args:
            owned: gradients that nobody else holds.
            sums_narrow: a narrow one is added to others of its kind as it is, as autocast with a cache does.
        """
        if self.state.captured is not None:
            for name, gradient in gradients.items():
                if gradient is not None:
                    self.state.capture(name, gradient)
            return
        if not self.is_cut:
            self.state.collect_later()
        sums: dict[str, torch.Tensor] = {}
        own = set(owned)
        for name, gradient in gradients.items():
            self.uses[name] -= 1
            held = self.partial.pop(name, None)
            if gradient is None:
                gradient = held
            elif held is not None:
                gradient = self._sum(name, held, gradient, sums_narrow)
                own.add(name)
            if gradient is None:
                continue
            if self.is_cut and self.uses[name] > 0:
                self.partial[name] = gradient
                self._make_room(name)
            else:
                sums[name] = gradient
        if sums:
            self._hand_in(sums, pack, own)

    def _sum(self, name: str, held: torch.Tensor, gradient: torch.Tensor, sums_narrow: bool) -> torch.Tensor:
        if gradient.dtype is held.dtype and not sums_narrow:
            held = held.to(self.state.parameters[name].dtype)
        return held.to(gradient.device) + gradient

    def _hand_in(self, gradients: dict[str, torch.Tensor], pack: int | None, owned: Collection[str] = ()) -> None:
        add, device = self.state.gradients.add, self.device
        self.state.memory.with_room(device, lambda: add(gradients, device.index, pack, owned))

    def _make_room(self, newest: str) -> None:
        """Sums with uses still to come, of weights that the pack has no slot for, wait on the host if they are many."""
        state, here = self.state, self.device.torch_device
        if state.cluster.host_is_device or state.slot_pack(newest, self.pack) is not None:
            return
        held = [n for n, g in self.partial.items() if g.device == here and state.slot_pack(n, self.pack) is None]
        total = sum(self.partial[name].nbytes for name in held)
        for name in held[:-1]:
            if total <= state.spare_nbytes:
                return
            total -= self.partial[name].nbytes
            state.counters.swap_out_bytes += self.partial[name].nbytes
            self.partial[name] = self.partial[name].detach().to("cpu")

    def add_partial_gradients(self) -> None:
        """The segment's backward is over: uses that have got no gradient until now never will."""
        while self.partial:
            name = next(iter(self.partial))
            gradient = self.partial.pop(name).to(self.device.torch_device)
            self._hand_in({name: gradient}, self.state.slot_pack(name, self.pack))

    def leave(self) -> None:
        """The microbatch goes on to another pack, and the weights of this one may go."""
        for callback in self.on_leave:
            callback()
        self.close()

    def expect(self, copies: Copies) -> None:
        """Copies that were sent here before the microbatch came."""
        self._moved.expect(copies)

    def close(self) -> None:
        """The microbatch's code has left; its backward may still come."""
        self._moved.clear()
        self.stashed.clear()

    def bring(self, tensor: torch.Tensor, is_written: bool = False) -> torch.Tensor:
        """The tensor as glue in this segment may use it."""
        if (
            torch._C._are_functorch_transforms_active()
            and (found := bring_in_transform(tensor, self.bring)) is not None
        ):
            return found
        value, sink = self.take(tensor, is_written)
        if sink is None:
            return value
        self.has_graph = True
        return apply_own(Import, self.state.anchor, value, sink, is_written)  # type: ignore[no-any-return,no-untyped-call]

    def where(self, values: Any) -> "Segment":
        """For code of the user's own amid a backward in one piece (a hook, a function's backward), which was not
        necessarily used in this segment: the device is that of the tensors that the code works with."""
        devices = (self.state.find_device(tensor.device) for tensor in tensors_in(values) if tensor.dim())
        device = next((device for device in devices if device is not None), self.device)
        if device is self.device:
            return self
        other = copy.copy(self)
        other.device, other._moved = device, Moved(self.state, device)
        return other

    def take(self, tensor: torch.Tensor, is_written: bool = False) -> tuple[torch.Tensor, Sink | None]:
        """The tensor as it may be used here. Where this segment's graph must not go on to the tensor's node, that is its
        value alone, and what takes its gradient."""
        tensor = self.present(tensor)
        is_local = tensor.device == self.device.torch_device
        if tensor.grad_fn is None:
            if (name := self.state.weight_name(tensor)) is not None:
                return self._take_weight(name, tensor.requires_grad)
            is_scalar = tensor.dim() == 0 and not tensor.requires_grad and not is_written
            if is_local or (is_scalar and self._is_host(tensor)):
                return tensor, None
            if tensor.requires_grad and torch.is_grad_enabled():
                self.has_graph = True  # a leaf of the user's own: its gradient goes to its .grad
                return tensor.to(self.device.torch_device), None
            return self._moved.take(tensor), None
        if not torch.is_grad_enabled():
            return tensor if is_local else self._moved.take(tensor), None
        if self.is_own(tensor):
            return tensor if is_local else self._count_peer(tensor.to(self.device.torch_device), tensor), None
        return tensor.detach() if is_local else self._moved.take(tensor), self.sink(tensor)

    def present(self, tensor: torch.Tensor) -> torch.Tensor:
        """What has taken the tensor's place since it was written."""
        entry = self.replaced.get(id(tensor)) if self.replaced else None
        return tensor if entry is None else entry[1]

    def is_own(self, tensor: torch.Tensor) -> bool:
        """Whether the graph of this segment may go on to the tensor's node: it is no older, or a leaf."""
        node = tensor.grad_fn
        return node is None or node._sequence_nr() >= self.start  # type: ignore[attr-defined]

    def bring_within(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor within an object that a layer is given: on this device, unless it belongs to a graph."""
        is_local = tensor.device == self.device.torch_device
        return tensor if is_local or tensor.requires_grad or tensor.dim() == 0 else self.bring(tensor)

    def bring_written(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as a function may use it that writes it; from now on the result stands for it."""
        result = self.bring(tensor, is_written=True)
        if result is not tensor:
            # Later segments must see what is written, and the name in the user's frame still means `tensor`.
            self.replaced[id(tensor)] = (tensor, result)
        return result

    def _take_weight(self, name: str, trains: bool) -> tuple[torch.Tensor, Sink | None]:
        copy = self.state.memory.with_room(self.device, lambda: self.state.glue.fetch(name, self.device))
        if not (trains and torch.is_grad_enabled()):
            return copy, None
        self.uses[name] += 1
        return copy, lambda gradient: self.add_gradients({name: gradient}, None)

    def sink(self, tensor: torch.Tensor) -> Sink:
        """Takes the gradient of a tensor of an older segment."""
        return functools.partial(self._hand_back, kept_edge_of(tensor), tensor.device)

    def _hand_back(self, edge: GradientEdge, home: torch.device, gradient: torch.Tensor) -> None:
        self._deposit(edge, self.send_home(gradient, home))

    def send_home(self, gradient: torch.Tensor, home: torch.device) -> Arrival:
        """A gradient, on its way to where the tensor is that it belongs to."""
        source, target = self.state.find_device(gradient.device), self.state.find_device(home)
        if source is None or target is None or source is target:
            return Arrival(gradient.to(home), target or self.device)
        return self.state.send(gradient, source, target)

    def _is_host(self, tensor: torch.Tensor) -> bool:
        """Functions of any device read scalars of the host; those of another GPU they do not."""
        return tensor.device.type == "cpu" and not self.state.is_device(tensor.device)

    def _count_peer(self, copy: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        counters = self.state.counters
        if self.state.is_device(source.device):
            counters.p2p_bytes += nbytes_of(copy)
        else:
            counters.input_bytes += nbytes_of(copy)
        return copy


def add_place(error: BaseException, what: str, segment: Segment) -> None:
    """Note on an error where in the plan it happened, once."""
    if not any(note.startswith("harmony: ") for note in getattr(error, "__notes__", ())):
        error.add_note(f"harmony: {what}, pack {segment.pack}, microbatch {segment.microbatch}, {segment.device.name}")
