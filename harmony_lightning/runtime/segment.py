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

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from harmony_lightning.hardware.device import Device

if TYPE_CHECKING:
    from harmony_lightning.runtime.microbatch import Microbatch

_NUM_MOVED = 16
"""Copies that a segment keeps of tensors from elsewhere. Few are used again: masks, encoder states. Code that looks at
every gradient once must not gather them all on the device."""

Sink = Callable[[torch.Tensor], None]

_READS = frozenset(
    """__get__ __set__ __len__ __repr__ __format__ __bool__ __int__ __float__ __index__ __contains__ __hash__
    __deepcopy__ __reduce_ex__ _set_grad_enabled backward data_ptr dense_dim detach dim element_size get_device
    has_names item ndimension nelement numel numpy register_hook register_post_accumulate_grad_hook requires_grad_
    retain_grad size sparse_dim storage storage_offset stride tolist untyped_storage""".split()  # noqa: SIM905
)
"""Functions that take tensors as they are: they leave no trace in the autograd graph and compute nothing on a device."""
_COMPUTED_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
"""Attributes whose getters make tensors that belong to the autograd graph."""
_MOVES = frozenset(("to", "cpu", "cuda"))
_WRITES = re.compile(r"__setitem__|__i(?!nvert)\w+__|.*[^_]_")
"""In-place operators and methods."""


class Import(torch.autograd.Function):
    """Identity with a graph that ends: the gradient goes to a sink instead of to the source's node."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, anchor: torch.Tensor, source: torch.Tensor, sink: Sink, device: Device, is_written: bool
    ) -> torch.Tensor:
        """`source` must be detached: autograd walks into the graph of every input, even one without gradient. `anchor`
        requires a gradient, so that the result does."""
        ctx.sink = sink
        moved = source.to(device.torch_device)
        if moved is source:
            return source.clone() if is_written else source.view_as(source)
        return moved

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            ctx.sink(gradient)
        return (None,) * 5


class Segment:
    """What one microbatch does in one visit to a pack."""

    def __init__(self, microbatch: "Microbatch", pack: int, device: Device) -> None:
        self.microbatch = microbatch
        self.pack = pack
        self.device = device
        self.start = torch.autograd._get_sequence_nr() if microbatch.is_cut else 0  # type: ignore[attr-defined]
        """Autograd nodes with a smaller number are older than this segment."""
        self.has_graph = False
        """Whether anything in here may get a gradient."""
        self.uses: Counter[str] = Counter()
        """How often each weight that trains is used; counts down in backward."""
        self.partial: dict[str, torch.Tensor] = {}
        """Gradients of weights with uses still to come."""
        self._moved: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        """Copies on this device, by identity of the source; the source is held so that its identity stays taken."""
        self.stashed: dict[Any, Any] = {}
        """Tensors that were stashed on the host in here, so that each is copied once."""

    def add_gradient(self, name: str, pack: int | None, gradient: torch.Tensor | None) -> None:
        """One use of a weight has been differentiated; the last one hands the sum on."""
        if not self.microbatch.is_cut:
            self.microbatch.engine.collect_later()
        self.uses[name] -= 1
        held = self.partial.pop(name, None)
        if gradient is None:
            gradient = held
        elif held is not None:
            gradient = held + gradient
        if gradient is None:
            return
        if self.uses[name] > 0:
            self.partial[name] = gradient
        else:
            self.microbatch.engine.gradients.add(name, gradient, self.device.index, pack)

    def close(self) -> None:
        """The microbatch has left; its backward may still come."""
        self._moved.clear()
        self.stashed.clear()

    def bring(self, tensor: torch.Tensor, is_written: bool = False) -> torch.Tensor:
        """The tensor as glue or a layer in this segment may use it."""
        replaced = self.microbatch.replaced
        if replaced:
            entry = replaced.get(id(tensor))
            if entry is not None:
                tensor = entry[1]
        is_local = tensor.device == self.device.torch_device
        node = tensor.grad_fn
        if node is None:
            engine = self.microbatch.engine
            if (name := engine.weight_name(tensor)) is not None:
                return engine.bring_glue_weight(self, name, tensor)
            if is_local or (tensor.dim() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad):
                return tensor
            if tensor.requires_grad and torch.is_grad_enabled():
                self.has_graph = True
                return tensor.to(self.device.torch_device)  # a leaf of the user's own: its gradient goes to its .grad
            return self._move(tensor)
        if not torch.is_grad_enabled():
            return tensor if is_local else self._move(tensor)
        if node._sequence_nr() >= self.start:  # type: ignore[attr-defined]
            return tensor if is_local else self._count_peer(tensor.to(self.device.torch_device), tensor)
        return self._cut(tensor, is_written)

    def bring_written(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as a function may use it that writes it; from now on the result stands for it."""
        result = self.bring(tensor, is_written=True)
        if result is not tensor:
            # Later segments must see what is written, and the name in the user's frame still means `tensor`.
            self.microbatch.replaced[id(tensor)] = (tensor, result)
        return result

    def _cut(self, tensor: torch.Tensor, is_written: bool) -> torch.Tensor:
        edge = get_gradient_edge(tensor)
        microbatch = self.microbatch

        def sink(gradient: torch.Tensor) -> None:
            microbatch.deposit(edge, gradient)

        self.has_graph = True
        source = tensor.detach()
        if tensor.device != self.device.torch_device:
            source = self._move(tensor)
            engine, home, nbytes = microbatch.engine, tensor.device, tensor.nbytes

            def peer_sink(gradient: torch.Tensor) -> None:
                engine.counters.p2p_bytes += nbytes
                sink(gradient.to(home))

            return Import.apply(engine.anchor, source, peer_sink, self.device, is_written)  # type: ignore[no-any-return,no-untyped-call]
        return Import.apply(microbatch.engine.anchor, source, sink, self.device, is_written)  # type: ignore[no-any-return,no-untyped-call]

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the value on this device, made once as long as the value is the same."""
        version = -1 if tensor.is_inference() else tensor._version
        entry = self._moved.get(id(tensor))
        if entry is None or entry[1] != version:
            copy = self._count_peer(tensor.detach().to(self.device.torch_device), tensor)
            entry = self._moved[id(tensor)] = (tensor, version, copy)
            if len(self._moved) > _NUM_MOVED:
                del self._moved[next(iter(self._moved))]
        return entry[2]

    def _count_peer(self, copy: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        counters = self.microbatch.engine.counters
        if self.microbatch.engine.is_device(source.device):
            counters.p2p_bytes += copy.nbytes
        else:
            counters.input_bytes += copy.nbytes
        return copy


def add_place(error: BaseException, what: str, segment: Segment) -> None:
    """Note on an error where in the plan it happened, once."""
    if not any(note.startswith("harmony: ") for note in getattr(error, "__notes__", ())):
        error.add_note(
            f"harmony: {what}, pack {segment.pack}, microbatch {segment.microbatch.index}, {segment.device.name}"
        )


class Glue(TorchFunctionMode):
    """In force while user code runs; `current` tells the segment it runs in, None inside a layer."""

    def __init__(self, current: Callable[[], Segment | None], is_device: Callable[[torch.device], bool]) -> None:
        super().__init__()
        self._current = current
        self._is_device = is_device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        segment = self._current()
        if segment is None:
            return func(*args, **kwargs)
        kind = _KINDS.get(func) or _classify(func)
        if kind == "read":
            return func(*_originals(segment, args), **kwargs)
        with torch._C.DisableTorchFunction():
            if kind == "move" and isinstance(args[0], torch.Tensor) and not args[0].requires_grad:
                return func(*_originals(segment, args), **kwargs)
            if (kind == "write" or kwargs.get("inplace") is True) and isinstance(args[0], torch.Tensor):
                return self._write(segment, func, args, kwargs)
            args = _bring_all(segment, args)
            kwargs = {name: _bring_all(segment, value) for name, value in kwargs.items()}
        if "device" in kwargs:
            kwargs["device"] = self._local_device(segment, kwargs["device"])
        return func(*args, **kwargs)

    def _write(self, segment: Segment, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        target = args[0]
        if target.device.type == "cpu" and target.device != segment.device.torch_device and target.grad_fn is None:
            others = (args[1:], kwargs)
            if not (torch.is_grad_enabled() and _any_requires_grad((target, others))):
                rest, named = _to_host(others)
                return func(target, *rest, **named)
        written = segment.bring_written(target)
        return func(written, *_bring_all(segment, args[1:]), **_bring_all(segment, kwargs))

    def _local_device(self, segment: Segment, device: Any) -> Any:
        """New tensors belong on the segment's device when the user says "on the GPU"."""
        if device is None or isinstance(device, int):
            return device if device is None else segment.device.torch_device
        return segment.device.torch_device if self._is_device(torch.device(device)) else device


_KINDS: dict[Any, str] = {}


def _classify(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _COMPUTED_ATTRIBUTES:
        kind = "compute"
    elif name in _READS or name.startswith("is_"):
        kind = "read"
    elif name in _MOVES:
        kind = "move"
    elif _WRITES.fullmatch(name):
        kind = "write"
    else:
        kind = "compute"
    _KINDS[func] = kind
    return kind


def _originals(segment: Segment, args: tuple[Any, ...]) -> tuple[Any, ...]:
    replaced = segment.microbatch.replaced
    if not replaced or not args or not isinstance(args[0], torch.Tensor):
        return args
    entry = replaced.get(id(args[0]))
    return args if entry is None else (entry[1], *args[1:])


def _bring_all(segment: Segment, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return segment.bring(value)
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_bring_all(segment, item) for item in value])
    if kind is dict:
        return {key: _bring_all(segment, item) for key, item in value.items()}
    return value


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu")
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_to_host(item) for item in value])
    if kind is dict:
        return {key: _to_host(item) for key, item in value.items()}
    return value


def _any_requires_grad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, tuple | list):
        return any(_any_requires_grad(item) for item in value)
    if isinstance(value, dict):
        return any(_any_requires_grad(item) for item in value.values())
    return False
