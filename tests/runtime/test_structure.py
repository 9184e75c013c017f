import collections
import dataclasses
import decimal
import pathlib
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from harmony_lightning.runtime.structure import Arguments, clone_with_strides, copy_structure, is_opaque

Pair = namedtuple("Pair", ["left", "right"])
TENSOR = torch.randn(3)


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("one", "two")

    def __init__(self, one):
        self.one = one


class SlottedAndMore(Slotted):
    __slots__ = ("__dict__", "__weakref__", "three")


@dataclasses.dataclass(frozen=True)
class Frozen:
    items: list


class Cache(dict):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.seen = []


def test_tensors_and_modules_are_shared_and_everything_around_them_is_copied():
    module = nn.Linear(1, 1)
    original = Plain(tensors=[TENSOR], settings={"a": {TENSOR.dtype}}, module=module, call=len)
    copy = copy_structure(original)
    assert type(copy) is Plain
    assert copy is not original
    assert copy.tensors[0] is TENSOR
    assert copy.module is module
    assert copy.call is len
    copy.tensors.append(1)
    copy.settings["a"].clear()
    copy.settings["b"] = 2
    assert original.tensors == [TENSOR]
    assert original.settings == {"a": {torch.float32}}


@pytest.mark.parametrize("leaf", [1, 2.5, 1j, "text", b"bytes", True, None, torch.float16, torch.device("cpu"), int])
def test_plain_values_are_themselves(leaf):
    assert copy_structure(leaf) is leaf
    assert not is_opaque(leaf)


def test_tuples_keep_their_type():
    copy = copy_structure((Pair([1], TENSOR), frozenset({2}), torch.Size((1, 2))))
    assert copy == (Pair([1], TENSOR), frozenset({2}), torch.Size((1, 2)))
    assert type(copy[0]) is Pair
    assert copy[0].right is TENSOR


def test_slots_are_copied_where_they_are_set():
    original = SlottedAndMore([1])
    original.three, original.four = {3}, [4]
    copy = copy_structure(original)
    assert (copy.one, copy.three, copy.four) == ([1], {3}, [4])
    assert copy.one is not original.one
    assert copy.four is not original.four
    assert not hasattr(copy, "two")


@pytest.mark.parametrize("slots", ["cache", ("__cache",)])
def test_slots_of_one_name_and_private_ones_are_copied(slots):
    kind = type("Odd", (), {"__slots__": slots})
    name = kind.__dict__.keys() & {"cache", "_Odd__cache"}
    original = kind()
    setattr(original, *name, [1])
    assert getattr(copy_structure(original), *name) == [1]


def test_frozen_dataclasses_and_subclasses_of_dict_are_copied_with_what_they_hold():
    original = Cache("k")
    original["frozen"] = Frozen([1])
    copy = copy_structure(original)
    assert (type(copy), copy.name, dict(copy)) == (Cache, "k", {"frozen": Frozen([1])})
    assert copy["frozen"].items is not original["frozen"].items


def test_attributes_of_containers_are_copied():
    original = Cache("k")
    copy = copy_structure(original)
    copy.seen.append(1)
    assert original.seen == []


def test_what_is_shared_stays_shared_and_cycles_end():
    shared = [1]
    original = Plain(a=shared, b=shared)
    original.myself = original
    original.ring = {"up": [original]}
    copy = copy_structure(original)
    assert copy.a is copy.b is not shared
    assert copy.myself is copy
    assert copy.ring["up"][0] is copy


class Two:
    def __init__(self, a, b):
        self.a, self.b = a, b

    def __new__(cls, a, b):
        return super().__new__(cls)


def test_what_cannot_be_made_empty_is_shared():
    for value in (Two(1, 2), np.ones(2), range(3), slice(1)):
        assert copy_structure(value) is value


@pytest.mark.parametrize(
    "value",
    [
        pathlib.PurePosixPath("a/b"),
        collections.Counter("aab"),
        np.float32(3),
        np.int64(3),
        decimal.Decimal(3),
        bytearray(b"ab"),
        collections.deque([1, 2]),
        collections.OrderedDict(a=1, b=2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_copy_holds_what_the_original_holds(value):
    copy = copy_structure(Plain(value=value)).value
    assert type(copy) is type(value)
    assert (list(copy.items()) if isinstance(copy, dict) else copy) == (
        list(value.items()) if isinstance(value, dict) else value
    )


def test_a_defaultdict_keeps_its_default():
    assert copy_structure(collections.defaultdict(list))["new"] == []


def test_a_generator_s_copy_draws_what_the_original_draws():
    generator = torch.Generator().manual_seed(5)
    copy = copy_structure(generator)
    assert torch.rand((), generator=generator) == torch.rand((), generator=copy)


# --- arguments of a call -----------------------------------------------------------------------------------------------


def test_arguments_come_back_with_other_tensors_in_place():
    a, b = torch.randn(1), torch.randn(2)
    arguments = Arguments((a, [b, 3]), {"mask": {"x": a}, "flag": None})
    assert [id(tensor) for tensor in arguments.take_tensors()] == [id(a), id(b)]
    new_a, new_b = torch.zeros(1), torch.zeros(2)
    (first, (second, three)), kwargs = arguments.build([new_a, new_b])
    assert first is new_a
    assert second is new_b
    assert three == 3
    assert kwargs["mask"]["x"] is new_a
    assert kwargs["flag"] is None


def test_equal_tensors_that_are_not_the_same_stay_two():
    assert len(Arguments((torch.zeros(1), torch.zeros(1)), {}).take_tensors()) == 2


def test_arguments_hold_no_tensors_after_these_were_taken():
    tensor = torch.zeros(1)
    arguments = Arguments((tensor,), {})
    arguments.take_tensors()
    assert arguments._rest == [None]


def test_arguments_without_objects_are_their_own_snapshot():
    arguments = Arguments((TENSOR, [1, "a"], {"f": len}), {"k": None})
    arguments.take_tensors()
    assert arguments.snapshot() is arguments


def test_a_snapshot_shows_objects_as_they_were():
    cache = Plain(keys=[])
    arguments = Arguments((TENSOR, cache), {"same": cache})
    tensors = arguments.take_tensors()
    snapshot = arguments.snapshot()
    cache.keys.append(1)
    (tensor, first), kwargs = snapshot.build(tensors)
    assert tensor is TENSOR
    assert first.keys == []
    assert kwargs["same"] is first
    (_, now), _ = arguments.build(tensors)
    assert now is cache
    # Each recompute takes a snapshot of the snapshot.
    (_, again), _ = snapshot.snapshot().build(tensors)
    again.keys.append(2)
    assert first.keys == []


LAID_OUT = [lambda x: x, lambda x: x[:, :2], lambda x: x.T[1:], lambda x: x[:1].expand(7, 3, 4)]


@pytest.mark.parametrize("make", LAID_OUT)
def test_a_clone_may_keep_its_strides(make):
    tensor = make(torch.arange(24.0).reshape(2, 3, 4))
    twin = clone_with_strides(tensor)
    assert twin.stride() == tensor.stride() and torch.equal(twin, tensor)
    assert twin.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("make", LAID_OUT)
def test_a_clone_with_strides_hands_the_gradient_of_each_element_on(make):
    tensor = make(torch.arange(24.0).reshape(2, 3, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad((clone_with_strides(tensor) * 2).sum(), tensor)
    assert torch.equal(gradient, torch.full_like(tensor, 2))
