import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.runtime.batch.minibatch import loss_shares, split_minibatch
from harmony_lightning.runtime.batch.rows import num_samples

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    scale: float
    built: ClassVar[list] = []

    def __post_init__(self):
        self.built.append(self.scale)


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: torch.Tensor = dataclasses.field(init=False)


class Graph:
    def __init__(self, nodes):
        self.nodes = nodes


class GraphBatch:
    """As in PyG: the tensors hold the nodes of all graphs."""

    def __init__(self, graphs):
        self.x, self.sizes = torch.cat([g.nodes for g in graphs]), [len(g.nodes) for g in graphs]

    @classmethod
    def from_data_list(cls, graphs):
        return cls(graphs)

    def to_data_list(self):
        return [Graph(nodes) for nodes in self.x.split(self.sizes)]


def rows(size, *shape):
    return torch.arange(size * max(1, int(np.prod(shape)))).float().view(size, *shape)


def test_the_rest_is_a_microbatch_of_its_own_and_weighs_less():
    parts = split_minibatch(rows(5, 2), 2)
    assert parts.num_samples == (2, 2, 1)
    assert loss_shares("mean", parts) == (0.4, 0.4, 0.2)
    assert parts.reason is None
    assert torch.equal(torch.cat(parts.batches), rows(5, 2))


@pytest.mark.parametrize(
    ("size", "microbatch_size", "expected"),
    [(5, 2, (2, 3)), (6, 4, (4, 2)), (4, 1, (2, 2)), (3, 2, (3,)), (3, 1, (3,))],
)
def test_a_rest_that_is_too_short_joins_its_neighbour(size, microbatch_size, expected):
    parts = split_minibatch(rows(size, 2), microbatch_size, min_samples=2)
    assert parts.num_samples == expected
    assert tuple(len(part) for part in parts.batches) == expected


def test_slices_are_views_of_the_minibatch():
    batch = {"x": rows(4, 3), "a": np.arange(4)}
    second = split_minibatch(batch, 2).batches[1]
    assert second["x"].untyped_storage().data_ptr() == batch["x"].untyped_storage().data_ptr()
    assert second["x"].is_contiguous()
    assert np.shares_memory(second["a"], batch["a"])


@pytest.mark.parametrize("batch", [None, rows(1, 3), rows(4, 3), {"x": rows(4), "mask": 3}])
def test_one_microbatch_needs_no_reason_where_one_is_right(batch):
    parts = split_minibatch(batch, 4)
    assert parts.batches[0] is batch
    assert len(parts.batches) == 1
    assert parts.reason is None
    assert loss_shares("mean", parts) == (1.0,)


def test_an_empty_minibatch_stays_whole():
    parts = split_minibatch(rows(0, 3), 1)
    assert (parts.num_samples, loss_shares("mean", parts), parts.reason) == ((0,), (1.0,), None)


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "2", None])
def test_a_bad_size_is_refused(size):
    with pytest.raises(ConfigurationError, match="microbatch_size must be a whole number"):
        split_minibatch(rows(4), size)
    with pytest.raises(ConfigurationError, match="min_samples must be a whole number"):
        split_minibatch(rows(4), 2, min_samples=size)


CONTAINERS = {
    "list": (lambda x, y: [x, y], lambda b: (b[0], b[1])),
    "tuple": (lambda x, y: (x, y), lambda b: (b[0], b[1])),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "ordered": (lambda x, y: OrderedDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "defaultdict": (lambda x, y: defaultdict(list, x=x, y=y), lambda b: (b["x"], b["y"])),
    "userdict": (lambda x, y: UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "proxy": (lambda x, y: MappingProxyType({"x": x, "y": y}), lambda b: (b["x"], b["y"])),
    "encoding": (lambda x, y: BatchEncoding({"x": x, "y": y}), lambda b: (b["x"], b.y)),
    "namedtuple": (Pair, lambda b: (b.x, b.y)),
    "nested": (lambda x, y: {"in": [x, (y,)]}, lambda b: (b["in"][0], b["in"][1][0])),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_keep_their_type(name):
    build, read = CONTAINERS[name]
    x, y = rows(4, 3), rows(4)
    batch = build(x, y)
    parts = split_minibatch(batch, 3)
    assert parts.num_samples == (3, 1), parts.reason
    for part, want in zip(parts.batches, (slice(0, 3), slice(3, 4)), strict=True):
        assert type(part) is type(batch)
        assert torch.equal(read(part)[0], x[want])
        assert torch.equal(read(part)[1], y[want])
    assert read(batch)[0] is x  # the minibatch itself is not written to


def test_a_defaultdict_keeps_its_factory():
    part = split_minibatch(defaultdict(list, x=rows(4)), 2).batches[0]
    assert part["missing"] == []


def test_a_batch_encoding_keeps_one_encoding_per_row():
    batch = BatchEncoding({"input_ids": rows(4, 7)}, encoding=None)
    batch._encodings = ["e0", "e1", "e2", "e3"]
    assert [part._encodings for part in split_minibatch(batch, 3).batches] == [["e0", "e1", "e2"], ["e3"]]


def test_a_frozen_dataclass_is_copied_without_its_post_init():
    Frozen.built.clear()
    batch = Frozen(rows(4, 2), 0.5)
    parts = split_minibatch(batch, 2).batches
    assert [type(part) for part in parts] == [Frozen, Frozen]
    assert torch.equal(parts[1].x, batch.x[2:])
    assert parts[1].scale == 0.5
    assert Frozen.built == [0.5]


def test_a_slotted_dataclass_with_fields_outside_init():
    batch = Slotted(rows(4))
    batch.y = rows(4, 2)
    part = split_minibatch(batch, 3).batches[1]
    assert torch.equal(part.x, batch.x[3:])
    assert torch.equal(part.y, batch.y[3:])


def test_what_has_no_rows_is_shared():
    marker = object()
    shared = {
        "t": torch.tensor(2.0),
        "n": 3,
        "s": "text",
        "none": None,
        "o": marker,
        "size": torch.Size([7, 7]),
        "e": [],
    }
    for part in split_minibatch({"x": rows(4), **shared}, 2).batches:
        assert all(part[key] is value for key, value in shared.items())


@pytest.mark.parametrize(
    "samples",
    [
        ["a", "b", "c", "d"],
        ("a", "b", "c", "d"),
        [1, 2, 3, 4],
        [[1], [1, 2], [], [3]],  # token ids of unequal length
        [{"id": 1}, {"id": 2}, {"id": 3}, {"id": 4}],
        ["a", None, "c", 4],
        [rows(2), rows(5), rows(4), rows(1)],
        [{"boxes": rows(2, 4), "labels": rows(2)}, {"boxes": rows(4, 4), "labels": rows(4)}] * 2,
        [Graph(rows(2)), Graph(rows(4)), Graph(rows(4)), Graph(rows(1))],
    ],
)
def test_a_list_of_samples_is_sliced(samples):
    parts = split_minibatch({"x": rows(4, 2), "s": samples}, 3)
    assert parts.num_samples == (3, 1), parts.reason
    assert [type(part["s"]) for part in parts.batches] == [type(samples)] * 2
    joined = [item for part in parts.batches for item in part["s"]]
    assert all(got is want for got, want in zip(joined, samples, strict=True))


def test_a_detection_batch_of_two_lists():
    images = tuple(torch.zeros(3, 8, 8 + n) for n in range(4))
    targets = tuple({"boxes": rows(n, 4), "labels": rows(n)} for n in (1, 0, 3, 2))
    parts = split_minibatch((images, targets), 3)
    assert parts.num_samples == (3, 1), parts.reason
    assert parts.batches[1][0][0] is images[3]
    assert parts.batches[1][1][0] is targets[3]


def test_columns_two_levels_deep():
    batch = [[rows(8, 2), rows(8, 2)], [rows(8, 5), rows(8, 5)]]
    parts = split_minibatch(batch, 4)
    assert parts.num_samples == (4, 4), parts.reason
    assert [[len(t) for t in pair] for pair in parts.batches[0]] == [[4, 4], [4, 4]]


def test_a_list_as_long_as_the_batch_is_descended_where_every_tensor_has_all_rows():
    parts = split_minibatch([rows(2, 3), rows(2, 3)], 1)
    assert [tuple(t.shape for t in part) for part in parts.batches] == [((1, 3), (1, 3))] * 2
    parts = split_minibatch({"views": [rows(2, 3), rows(2, 3)], "y": rows(2)}, 1)
    assert [[t.shape[0] for t in part["views"]] for part in parts.batches] == [[1, 1]] * 2


def test_features_as_a_list_of_dicts_are_columns():
    batch = ([{"ids": rows(8, 5), "mask": rows(8, 5)}, {"ids": rows(8, 7), "mask": rows(8, 7)}], rows(8))
    parts = split_minibatch(batch, 4)
    assert [feature["ids"].shape for feature in parts.batches[1][0]] == [(4, 5), (4, 7)]


def test_a_list_of_whole_samples_is_cut_between_them():
    samples = [{"image": torch.zeros(3, 4, 4), "boxes": rows(n, 4), "id": n} for n in (5, 2, 7)]
    parts = split_minibatch(samples, 2)
    assert parts.num_samples == (2, 1), parts.reason
    assert parts.batches[1][0] is samples[2]


def test_graphs_are_cut_between_graphs():
    batch = GraphBatch([Graph(rows(n, 2)) for n in (3, 1, 4, 2)])
    parts = split_minibatch((batch, rows(4)), 3)
    assert num_samples(batch) == 4
    assert [part[0].sizes for part in parts.batches] == [[3, 1, 4], [2]]
    assert torch.equal(torch.cat([part[0].x for part in parts.batches]), batch.x)


class Holder:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"images": rows(4, 3), "boxes": [rows(4), rows(3, 4)]}, "leaf ['boxes'][1] has 3 rows, leaf ['images'] has 4"),
        ((rows(8, 3), rows(5, 5)), "leaf [1] has 5 rows, leaf [0] has 8"),
        ({"x": rows(8), "names": ["a", "b"]}, "leaf ['names'] has 2 rows, leaf ['x'] has 8"),
        (Pair(rows(8), rows(2)), "leaf .y has 2 rows, leaf .x has 8"),
        ({"a": (rows(4), rows(4)), "b": (rows(6), rows(6))}, "leaf ['a'] may be a list of samples or of columns"),
        ([(rows(4, 3), rows(4)), (rows(6, 3), rows(6))], "leaf [1][0] has 6 rows, leaf [0][0] has 4"),
        (pack_sequence([rows(3), rows(2)]), "the batch is a PackedSequence"),
        ({"x": rows(4), "p": pack_sequence([rows(3), rows(2)])}, "leaf ['p'] is a PackedSequence"),
        ((rows(4, 4).to_sparse(), rows(4)), "leaf [0] is a tensor of layout torch.sparse_coo"),
        (torch.nested.nested_tensor([rows(2), rows(3)]), "the batch is a nested tensor"),
        ({"x": rows(4), "o": Holder({"deep": [rows(4)]})}, "leaf ['o'] is a Holder"),
        ((rows(4), iter([1, 2, 3, 4])), "leaf [1] is a list_iterator"),
        ({"n": 3}, "no leaf of a batch of type dict has rows"),
        # eight images as samples or two groups of three rows as columns?
        ({"images": [torch.zeros(3, 5, 5)] * 8}, "leaf ['images'] may be a list of samples or of columns"),
        (
            [(torch.zeros(3, 5, 5), 1), (torch.zeros(3, 5, 5), 0)] * 2,
            "the batch may be a list of samples or of columns",
        ),
        ({"x": rows(3), "i": [torch.zeros(3, 5, n) for n in (5, 6, 7)]}, "leaf ['i'] may be a list of samples or of"),
    ],
)
def test_what_cannot_be_cut_stays_whole_and_says_why(batch, reason):
    parts = split_minibatch(batch, 1)
    assert parts.batches[0] is batch
    assert parts.num_samples == (1,)
    assert reason in parts.reason
    assert num_samples(batch) is None


def test_a_doubtful_list_is_no_obstacle_where_another_leaf_settles_it():
    batch = {"views": [{"v": [torch.zeros(3, 5, 5)] * 3}] * 8, "y": rows(8)}
    assert split_minibatch(batch, 4).num_samples == (4, 4)


def test_a_type_that_cannot_be_copied_stays_whole_and_says_why():
    class Sealed(dict):
        def __setitem__(self, key, value):
            raise RuntimeError("sealed")

    batch = Sealed(x=rows(4))
    parts = split_minibatch(batch, 2)
    assert parts.batches[0] is batch
    assert parts.num_samples == (4,)
    assert parts.reason == "a Sealed could not be cut: RuntimeError: sealed"


def test_the_users_split_comes_first():
    asked = []

    def split(batch, n):
        asked.append(n)
        return [batch[:1], batch[1:]]

    parts = split_minibatch(rows(5), 2, split=split)
    assert asked == [3]
    assert parts.num_samples == (1, 4)
    assert loss_shares("mean", parts) == (0.2, 0.8)


def test_the_users_split_opens_what_the_rules_refuse():
    sequences = [rows(3), rows(2), rows(2), rows(1)]
    asked = []

    def split(batch, n):
        asked.append(n)
        return [pack_sequence(sequences[:2]), pack_sequence(sequences[2:])]

    parts = split_minibatch(pack_sequence(sequences), 2, split=split)
    assert asked == [2]
    assert parts.num_samples == (1, 1)
    assert loss_shares("mean", parts) == (0.5, 0.5)
    assert parts.reason is None


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([], "got an empty one"),
        (rows(4), "got Tensor"),
        ("ab", "got str"),
        (None, "got NoneType"),
        ([rows(4), rows(0)], "empty microbatch at position 1"),
    ],
)
def test_a_wrong_user_split_is_refused(result, message):
    with pytest.raises(ConfigurationError, match=message):
        split_minibatch(rows(4), 2, split=lambda batch, n: result)


def test_num_samples_is_the_common_leading_size():
    assert num_samples({"x": rows(4, 2), "names": ["a", "b", "c", "d"], "n": 7}) == 4
    assert num_samples(["a", "b", "c"]) == 3
    assert num_samples(None) is None
