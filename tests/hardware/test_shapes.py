"""Operations without numbers: shapes that were found once are those that torch would find again."""

import pytest
import torch

from harmony_lightning.hardware.operations import operation
from harmony_lightning.hardware.shapes import run_on_shapes

aten = torch.ops.aten
SQUARE = torch.zeros(200, 300)  # more bytes than are computed
CALLS = [
    (aten.sum.dim_IntList, (SQUARE, [1]), {}),
    (aten.sum.dim_IntList, (SQUARE, [1], True), {}),
    (aten.sum.dim_IntList, (SQUARE, [0]), {}),
    (aten.sum.dim_IntList, (SQUARE.t(), [0]), {}),
    (aten.sum.dim_IntList, (SQUARE, [1]), {"dtype": torch.float64}),
    (aten.add.Tensor, (SQUARE, 1), {}),
    (aten.add.Tensor, (SQUARE.to(torch.int32), 1), {}),
    (aten.add.Tensor, (SQUARE.to(torch.bool), True), {}),
    (aten.add.Tensor, (SQUARE.to(torch.bool), 1), {}),
    (aten.add.Tensor, (SQUARE.to(torch.bool), 1.0), {}),
    (aten.native_layer_norm.default, (SQUARE, [300], None, None, 1e-5), {}),
    (aten.cat.default, ([SQUARE, SQUARE],), {}),
    (aten.cat.default, ([SQUARE, SQUARE], 1), {}),
    (aten._to_copy.default, (SQUARE,), {"dtype": torch.bfloat16}),
    (aten.ones_like.default, (SQUARE.t(),), {"memory_format": torch.contiguous_format}),
    (aten.bernoulli.default, (SQUARE,), {"generator": torch.Generator()}),
]


def kinds(found):
    tensors = found if isinstance(found, (tuple, list)) else (found,)
    return [(t.shape, t.stride(), t.dtype) for t in tensors]


@pytest.mark.parametrize("order", [1, -1])
def test_the_same_kinds_of_tensors_as_with_numbers(order):
    for func, args, kwargs in CALLS[::order] * 2:
        assert kinds(run_on_shapes(operation(func), args, kwargs)) == kinds(func(*args, **kwargs)), func


def test_results_do_not_share_memory():
    func, args, kwargs = CALLS[5]
    one, other = (run_on_shapes(operation(func), args, kwargs) for _ in range(2))
    assert one.data_ptr() != other.data_ptr()
