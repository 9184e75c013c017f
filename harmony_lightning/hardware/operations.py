"""What is known of each torch operation: what it writes, what it returns, what it costs.

Costs follow the roofline: floating-point operations by the formulas of `torch.utils.flop_counter`, and bytes of what is
read and written. Operations that only make another view of memory, or that only reserve some, do no work.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

SPECIAL: dict[Any, Callable[..., Any]] = {}
"""Operations that an emulated GPU does in its own way; filled in by `emulated_copies`."""

_IDLE = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.lift_fresh.default,
    aten.resize_.default,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
}
"""No kernel runs, and no view is declared in the schema."""
_TELLS_HOST = {aten.equal.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
"""The host waits for the result, or for its shape."""
_CALLS_OTHERS = {aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default}
"""Kernels that are made of operations which autocast casts: `nn.TransformerEncoderLayer` in evaluation."""


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, *_of_all_heads(query, key, value)))  # type: ignore[no-untyped-call]


def _attention_backward_flops(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    shapes = grad.shape, query.shape, *_of_all_heads(query, key, value)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _of_all_heads(query: torch.Tensor, *grouped: torch.Tensor) -> list[torch.Size]:
    """Shapes of keys and values as each head of the query meets them. Several heads may share one (grouped-query
    attention), which older versions of torch refuse to count."""
    return [torch.Size((shape[0], query.shape[1], *shape[2:])) for shape in (one.shape for one in grouped)]


# The CPU's own attention kernels; on a GPU the same call runs one that the registry knows.
_FLOPS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Operation:
    """One operation, by its schema.

    Attributes:
        run: how an emulated GPU does it, if in a way of its own.
        is_idle: no memory is read or written.
        tells_host: the calling thread waits for the result.
        calls_others: its kernel is made of operations that autocast sees.
        is_factory: takes a device.
        is_fused_update: steps the parameters in its first argument.
        returns_tensor: some result is a tensor, not a number.
        mutates: index and name of each argument that is written.
        returned: for each return the argument that it is, or None if it is a tensor of its own (or a view, or no tensor).
    """

    __slots__ = (
        "_flops",
        "calls_others",
        "func",
        "is_factory",
        "is_fused_update",
        "is_idle",
        "mutates",
        "returned",
        "returns_tensor",
        "run",
        "tells_host",
    )

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.func = func
        self.run: Callable[..., Any] | None = SPECIAL.get(func)
        self.is_idle = func.is_view or func in _IDLE
        self.tells_host = func in _TELLS_HOST
        self.calls_others = func in _CALLS_OTHERS
        self.is_factory = any(argument.name == "device" for argument in schema.arguments)
        self.is_fused_update = schema.name.startswith("aten::_fused_")
        written = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.mutates = tuple((index, argument.name) for index, argument in written)
        by_set = {frozenset(argument.alias_info.before_set): (i, argument.name) for i, argument in written}
        self.returned = tuple(
            by_set.get(frozenset(r.alias_info.before_set))
            if r.alias_info is not None and r.alias_info.is_write
            else None
            for r in schema.returns
        )
        self.returns_tensor = any("Tensor" in str(r.type) for r in schema.returns)
        packet = func._overloadpacket
        self._flops: Callable[..., int] | None = flop_registry.get(packet) or _FLOPS.get(packet)

    def written(self, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """The tensors that this call writes."""
        return list(tensors(args[i] if i < len(args) else kwargs.get(name) for i, name in self.mutates))

    def flops(self, args: Any, kwargs: Any, out: Any) -> int:
        """Floating-point operations of this call; 0 for those that memory limits anyway."""
        return 0 if self._flops is None else int(self._flops(*args, **kwargs, out_val=out))

    def nbytes(self, args: Any, kwargs: Any, out: Any) -> int:
        """Bytes that this call reads and writes."""
        return sum(
            t.nbytes for t in tensors((args, kwargs.values(), self.written(args, kwargs) if self.mutates else out))
        )


_operations: dict[Any, Operation] = {}


def operation(func: Any) -> Operation:
    found = _operations.get(func)
    if found is None:
        found = _operations[func] = Operation(func)
    return found


def tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors among arguments or results, lists unpacked."""
    if isinstance(values, torch.Tensor):
        yield values
        return
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple, type({}.values()))):
            yield from tensors(value)
