import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from harmony_lightning import ConfigurationError
from harmony_lightning.decomposer.discover import decompose, decompose_as, is_container, weight_names

LINEAR = 4 * (8 * 8 + 8)
"""Bytes of one Linear(8, 8)."""


def linear():
    return nn.Linear(8, 8)


def names(root, unit_nbytes, choices=()):
    return [layer.name for layer in decompose(root, unit_nbytes, choices).layers]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = linear()
        self.feed = nn.Sequential(linear(), nn.ReLU(), linear())


class Model(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16, bias=False)


def test_a_module_is_a_layer_as_soon_as_it_fits_the_unit():
    assert names(Model(), 3 * LINEAR) == ["embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]


def test_what_does_not_fit_is_taken_apart():
    block = ["attend", "feed"]
    assert names(Model(1), 2 * LINEAR) == ["embed", *(f"blocks.0.{name}" for name in block), "norm", "head"]
    assert names(Model(1), LINEAR)[1:4] == ["blocks.0.attend", "blocks.0.feed.0", "blocks.0.feed.2"]


def test_the_root_is_never_a_layer():
    assert names(linear(), 1 << 30) == []
    assert decompose(linear(), 1 << 30).glue == ("weight", "bias")


def test_a_container_is_never_a_layer_though_it_fits():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.many = nn.ModuleList([linear(), linear()])
            self.named = nn.ModuleDict({"one": nn.ModuleList([linear()])})
            self.bare = nn.ParameterList([torch.zeros(4)])
            self.sequence = nn.Sequential(linear(), linear())

    decomposition = decompose(Held(), 1 << 30)
    assert [layer.name for layer in decomposition.layers] == ["many.0", "many.1", "named.one.0", "sequence"]
    assert decomposition.glue == ("bare.0",)
    assert [is_container(module) for module in Held().children()] == [True, True, True, False]


def test_modules_without_weights_are_no_layers():
    assert names(nn.Sequential(nn.ReLU(), linear(), nn.Dropout(), nn.BatchNorm1d(8, affine=False)), 1 << 30) == ["1"]


def test_a_module_that_holds_most_bytes_itself_stays_whole():
    class Large(nn.Module):
        def __init__(self, direct):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(direct))
            self.inner = linear()

    assert names(nn.Sequential(nn.Embedding(1000, 8), Large(LINEAR // 4), Large(LINEAR // 4 - 1)), 1) == [
        "0",
        "1",
        "2.inner",
    ]
    assert decompose(nn.Sequential(Large(8)), 1).glue == ("0.table",)


def test_parametrised_modules_stay_whole():
    """Their weights exist only while they are called, and not under their own names."""
    root = nn.Sequential(
        parametrizations.weight_norm(linear()), nn.Sequential(parametrizations.spectral_norm(linear()))
    )
    assert names(root, 1) == ["0", "1.0"]
    assert "0.parametrizations.weight.original0" in decompose(root, 1).layers[0].weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_modules_are_no_layers():
    root = nn.Sequential(torch.jit.trace(linear(), torch.zeros(1, 8)), linear())
    assert names(root, 1 << 30) == ["1"]
    assert decompose(root, 1 << 30).glue == ("0.weight", "0.bias")


def test_tied_weights_appear_once_under_their_first_name():
    root = Model(0)
    root.head.weight = root.embed.weight
    decomposition = decompose(root, 1 << 30)
    assert [weight.name for weight in decomposition.weights] == ["embed.weight", "norm.weight", "norm.bias"]
    assert [layer.weights for layer in decomposition.layers] == [
        ("embed.weight",),
        ("norm.weight", "norm.bias"),
        ("embed.weight",),
    ]
    assert decomposition.nbytes == 4 * (16 * 8 + 8 + 8)
    assert weight_names(root)[id(root.head.weight)] == "embed.weight"


def test_a_weight_that_a_layer_has_twice_is_its_weight_once():
    root = nn.Sequential(nn.Sequential(linear(), linear()))
    root[0][1].weight = root[0][0].weight
    (layer,) = decompose(root, 1 << 30).layers
    assert layer.weights == ("0.0.weight", "0.0.bias", "0.1.bias")


def test_a_module_that_is_registered_twice_is_one_layer():
    shared = linear()
    assert names(nn.Sequential(shared, nn.ReLU(), shared), 1 << 30) == ["0"]


def test_layers_are_in_the_order_of_registration():
    root = nn.Module()
    for name in ("z", "a", "m"):
        root.add_module(name, linear())
    decomposition = decompose(root, 1 << 30)
    assert [layer.name for layer in decomposition.layers] == ["z", "a", "m"]
    assert [layer.name for layer in decomposition.reordered(("m", "z")).layers] == ["m", "z", "a"]
    assert decomposition.reordered(("m",)).weights == decomposition.weights


def test_weights_tell_their_bytes_and_whether_they_train():
    root = nn.Sequential(linear(), linear().bfloat16())
    root[0].requires_grad_(False)
    assert [(w.name, w.nbytes, w.is_trainable) for w in decompose(root, 1).weights] == [
        ("0.weight", 256, False),
        ("0.bias", 32, False),
        ("1.weight", 128, True),
        ("1.bias", 16, True),
    ]


@pytest.mark.parametrize(
    ("module", "expected"), [(nn.BatchNorm2d(4), True), (nn.SyncBatchNorm(4), True), (nn.LayerNorm(4), False)]
)
def test_batch_statistics_are_noticed_at_any_depth(module, expected):
    assert decompose(nn.Sequential(nn.Sequential(module)), 1).has_batch_statistics is expected


def test_deep_trees_need_no_recursion():
    root = linear()
    for _ in range(300):
        root = nn.Sequential(root, linear())
    assert len(names(root, LINEAR)) == 301


# --- the user's own choice ---------------------------------------------------------------------------------------------


def test_a_choice_by_name_stays_whole_whatever_its_size():
    assert names(Model(2), 1, ["blocks.1"]) == [
        *("embed", "blocks.0.attend", "blocks.0.feed.0", "blocks.0.feed.2"),
        *("blocks.1", "norm", "head"),
    ]


@pytest.mark.parametrize("choice", ["blocks.?", "blocks.[01]", Block])
def test_a_choice_by_glob_or_class(choice):
    assert names(Model(2), 1, [choice]) == ["embed", "blocks.0", "blocks.1", "norm", "head"]


def test_what_holds_a_chosen_layer_is_taken_apart_though_it_fits():
    assert names(Model(1), 1 << 30, ["blocks.0.feed.0"])[1:4] == [
        "blocks.0.attend",
        "blocks.0.feed.0",
        "blocks.0.feed.2",
    ]


def test_of_nested_choices_the_outermost_counts():
    assert names(Model(1), 1, [nn.Linear, Block]) == ["embed", "blocks.0", "norm", "head"]
    assert names(Model(1), 1, ["blocks.*"]) == ["embed", "blocks.0", "norm", "head"]


def test_a_class_of_several_depths_is_a_layer_everywhere():
    assert names(Model(1), 1 << 30, [nn.Linear]) == [
        *("embed", "blocks.0.attend", "blocks.0.feed.0", "blocks.0.feed.2", "norm", "head"),
    ]


@pytest.mark.parametrize("choice", ["nothing.*", "blocks", nn.Conv2d, "BLOCKS.0", ""])
def test_a_choice_that_matches_nothing_is_refused_with_names(choice):
    with pytest.raises(ConfigurationError, match=r"matches no module with weights; module names look like 'embed'"):
        decompose(Model(1), 1, [choice])


def test_a_choice_without_weights_is_refused():
    with pytest.raises(ConfigurationError, match="matches no module with weights"):
        decompose(nn.Sequential(nn.ReLU(), linear()), 1, ["0"])


def test_layers_that_somebody_names_are_taken_as_they_are():
    root = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4), nn.ParameterList([nn.Parameter()])
    )
    found = decompose_as(root, ["1", "0.1", "0.0"])
    assert [layer.name for layer in found.layers] == ["1", "0.1", "0.0"] and found.glue == ("2.0",)
    assert [layer.name for layer in decompose_as(root, ["0", "1"]).layers] == ["0", "1"]
    for names, what in (
        (["0", "1", "3"], "layer '3', which this module does not have"),
        (["0", "0.1", "1"], "layer '0.1', which is a part of its layer '0'"),
        (["0.0", "1"], "must have layer '0.1', or one around it"),
    ):
        with pytest.raises(ConfigurationError, match=what):
            decompose_as(root, names)
