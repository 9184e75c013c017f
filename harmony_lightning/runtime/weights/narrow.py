"""Narrow weights: float32 weights that a layer uses only as autocast casts them.

Autocast casts such a weight to its own type for every operation. Cast once, on the host, the weight is the same to the bit,
takes half the link and half the slot, and its gradient is what autocast's cast would have been given. But code may do more
with a weight than hand it to a matrix product: read its type, scale it, return it. So how layers use their weights is
learned in the first step (`Probe`), and looked at in each call from then on (`Guard`), where whatever is not autocast's
cast gets the weight in float32:

    F.linear(x, weight)        narrow: autocast would cast it here
    weight.shape, .device      of any version of it the same
    anything else              float32, fetched for this call; the next plan lets the weight travel so
    F.linear, once written     that version, which the layer has written

Gradients of several uses are summed in float32, as they are without autocast's cache, which Lightning switches off: the
second use of a narrow weight in one call gets a version in float32. With the cache on, the sum is one of narrow gradients.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

aten = torch.ops.aten

_CASTS = frozenset(
    (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    + (torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.addbmm)
    + (torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm)
)
"""Functions whose tensors autocast casts to its type, all of them, on every kind of device."""
_TOLD = frozenset(
    """device dim get_device is_complex is_contiguous is_cpu is_cuda is_leaf is_meta is_nested is_quantized is_sparse layout
    names ndim ndimension nelement numel requires_grad shape size stride __len__""".split()  # noqa: SIM905
)
"""Functions and attributes of which a narrow weight tells the same."""


class WeightUses:
    """What has been seen of how layers use their float32 weights. Outlives plans."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        """Autocast's type, of the first call that was seen under it."""
        self._cast: set[tuple[str, str]] = set()
        self._others: set[tuple[str, str]] = set()
        """Layers and weights of which something else was seen."""

    def note(self, layer: str, name: str, *, is_cast: bool) -> None:
        """Once seen otherwise, a weight stays so."""
        (self._cast if is_cast else self._others).add((layer, name))

    def narrow(self) -> dict[str, frozenset[str]]:
        """Weights that may be narrow, by layer."""
        found: dict[str, set[str]] = {}
        for layer, name in self._cast - self._others:
            found.setdefault(layer, set()).add(name)
        return {layer: frozenset(names) for layer, names in sorted(found.items())}

    @property
    def dtype_name(self) -> Literal["bfloat16", "float16"] | None:
        return None if self.dtype is None else cast(Any, str(self.dtype).removeprefix("torch."))


class Watch(TorchFunctionMode):
    """What sees the weights of one call of a layer on their way into functions.

    Attributes:
        wide: float32 versions that were asked for, by name.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        """`weights`: the names of those to look for, by identity of the tensor."""
        super().__init__()
        self._weights = weights
        self.wide: dict[str, torch.Tensor] = {}

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _any_of(self._weights, args) and not (kwargs and _any_of(self._weights, kwargs.values())):
            return func(*args, **kwargs)
        if func in _CASTS and "out" not in kwargs:
            return self._cast(func, args, kwargs)
        if not _is_told(func):
            args, kwargs = self._take_all((args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function that makes autocast cast."""
        raise NotImplementedError

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as anybody else gets it: an autograd function of the user's, the layer's caller."""
        raise NotImplementedError

    def _take_all(self, values: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return pytree.tree_map_only(torch.Tensor, self.take, values)

    def conclude(self, uses: WeightUses, layer: str, *, sums_narrow: bool) -> None:
        """Note what was seen of a layer's weights, if its run has come to its end."""
        raise NotImplementedError

    def run(self, function: Callable[[], Any]) -> Any:
        """The layer's own code; what it returns."""
        with self:
            result = function()
        if _any_of(self._weights, pytree.tree_leaves(result)):
            result = self._take_all(result)
        return result


class Probe(Watch):
    """Learns from one call: what functions are given, and what operations autocast makes of it."""

    def __init__(self, weights: Mapping[int, str], dtype: torch.dtype) -> None:
        super().__init__(weights)
        self._dtype = dtype
        self._is_casting = False
        self._casts: Counter[str] = Counter()
        self._others: set[str] = set()

    @override
    def _cast(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._is_casting = True
        try:
            return func(*args, **kwargs)
        finally:
            self._is_casting = False

    @override
    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        if (name := self._weights.get(id(tensor))) is not None:
            self._others.add(name)
        return tensor

    @override
    def run(self, function: Callable[[], Any]) -> Any:
        with _Operations(self._operate):
            return super().run(function)

    def _operate(self, func: Any, args: Any, kwargs: Any) -> None:
        if self._is_casting and func is aten._to_copy.default and kwargs.get("dtype") is self._dtype:
            if (name := self._weights.get(id(args[0]))) is not None:
                self._casts[name] += 1
        elif func is not aten.detach.default:  # by which saved tensors are held
            self._take_all((args, kwargs))

    @override
    def conclude(self, uses: WeightUses, layer: str, *, sums_narrow: bool) -> None:
        # Several casts make several gradients, to be summed in float32 or as they are.
        for name in self._weights.values():
            if name in self._others or (self._casts[name] > 1 and not sums_narrow):
                uses.note(layer, name, is_cast=False)
            elif self._casts[name]:
                uses.note(layer, name, is_cast=True)


class Reading(Watch):
    """Learns from a whole step what functions are given, without autocast: of shapes, which it does not cast.

    Attributes:
        uses: what was seen in calls of layers; code between them fetches weights for itself.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__(weights)
        self.uses = WeightUses()
        self._layer: str | None = None
        self._is_used: set[str] = set()
        """Names of weights that the running call has given to functions."""

    def enter(self, layer: str | None) -> None:
        """A call of a layer begins; None: it ends."""
        self._layer = layer
        self._is_used.clear()

    @override
    def _cast(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if (name := self._weights.get(id(value))) is not None:
                self._note(name, is_cast=name not in self._is_used)
                self._is_used.add(name)
        return func(*args, **kwargs)

    @override
    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        if (name := self._weights.get(id(tensor))) is not None:
            self._note(name, is_cast=False)
        return tensor

    def _note(self, name: str, *, is_cast: bool) -> None:
        if self._layer is not None:
            self.uses.note(self._layer, name, is_cast=is_cast)

    @override
    def conclude(self, uses: WeightUses, layer: str, *, sums_narrow: bool) -> None:
        raise NotImplementedError  # it looks at all layers


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, see: Callable[[Any, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see

    @override
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunction():
            self._see(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))


class Guard(Watch):
    """Gives narrow weights to autocast's operations, and their float32 versions to all others."""

    def __init__(
        self,
        weights: Mapping[int, str],
        autocast: Callable[[], torch.dtype | None],
        dtype: torch.dtype,
        widen: Callable[[str], torch.Tensor],
        *,
        sums_narrow: bool,
    ) -> None:
        """
        Args:
            weights: the narrow ones.
            autocast: tells the type that autocast casts to now.
            dtype: that of the narrow weights.
            widen: makes a float32 version.
            sums_narrow: gradients of several uses are summed as they are.
        """
        super().__init__(weights)
        self._autocast = autocast
        self._dtype = dtype
        self._widen = widen
        self._sums_narrow = sums_narrow
        self._used: set[str] = set()

    @override
    def _cast(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._autocast() is not self._dtype or any(map(was_written, self.wide.values())):
            args, kwargs = self._take_all((args, kwargs))
        elif not self._sums_narrow and not torch.is_autocast_cache_enabled() and torch.is_grad_enabled():
            args = [self._use(arg) if id(arg) in self._weights else arg for arg in args]
            kwargs = {key: self._use(arg) if id(arg) in self._weights else arg for key, arg in kwargs.items()}
        return func(*args, **kwargs)

    def _use(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self._weights[id(tensor)]
        if name in self._used and tensor.requires_grad:
            return self.take(tensor)
        self._used.add(name)
        return tensor

    @override
    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self._weights.get(id(tensor))
        if name is None:
            return tensor
        if name not in self.wide:
            self.wide[name] = self._widen(name)
        return self.wide[name]

    @override
    def conclude(self, uses: WeightUses, layer: str, *, sums_narrow: bool) -> None:
        # What was asked for travels in float32 from the next plan on.
        for name in self.wide:
            uses.note(layer, name, is_cast=False)


def was_written(wide: torch.Tensor) -> bool:
    """Whether a layer has written a float32 version that it had asked for."""
    return wide._version > 0


def _any_of(weights: Mapping[int, str], values: Iterable[Any]) -> bool:
    """Whether some of the weights are among arguments or in lists of them."""
    return any(id(value) in weights or (type(value) in (tuple, list) and _any_of(weights, value)) for value in values)


@functools.cache
def _is_told(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name) in _TOLD
