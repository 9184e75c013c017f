import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from harmony_lightning.runtime.batch.outputs import loss_of, map_tensors, merge_outputs, with_loss

Named = namedtuple("Named", ["logits", "name"])


def scalar(value, **kwargs):
    return torch.tensor(value, **kwargs)


def test_a_loss_is_the_mean_over_all_samples():
    x = torch.linspace(-1, 2, 7, dtype=torch.float64)
    losses = [part.square().mean() for part in x.split(3)]
    torch.testing.assert_close(merge_outputs(losses, [3, 3, 1]), x.square().mean(), rtol=1e-15, atol=0)


def test_only_the_loss_is_detached():
    weight = torch.ones((), requires_grad=True)
    outputs = [{"loss": weight * k, "kept": weight * k, "preds": weight.expand(2) * k} for k in (1.0, 3.0)]
    merged = merge_outputs(outputs, [2, 2])
    assert merged["loss"].item() == 2.0
    assert not merged["loss"].requires_grad
    assert merged["kept"].requires_grad
    assert merged["preds"].requires_grad
    assert all(output["loss"].requires_grad for output in outputs)
    assert not merge_outputs([weight * 1, weight * 2], [1, 1]).requires_grad


def test_the_sum_of_half_precision_losses_is_rounded_once():
    losses = [scalar(value, dtype=torch.bfloat16) for value in (1.0, 1.0, 1.0, 1.03125)]
    merged = merge_outputs(losses, [1] * 4)
    assert merged.dtype == torch.bfloat16
    assert merged == scalar((3 + 1.03125) / 4, dtype=torch.bfloat16)


@pytest.mark.parametrize("output", [None, 3, {"loss": 1}, torch.ones(2, requires_grad=True), ["a"]])
def test_a_single_output_passes_by_identity(output):
    assert merge_outputs([output], [4]) is output


def test_none_is_left_out_and_the_others_weigh_more():
    assert merge_outputs([None, None], [2, 2]) is None
    assert merge_outputs([None, scalar(1.0), scalar(4.0)], [5, 2, 1]).item() == 2.0
    only = scalar(3.0, requires_grad=True)
    assert merge_outputs([None, only], [5, 2]) is only


def test_a_dict_is_merged_item_by_item():
    outputs = [
        {
            "loss": scalar(1.0),
            "acc": scalar(0.5),
            "preds": torch.tensor([1, 2, 3]),
            "names": ["a", "b", "c"],
            "array": np.arange(3),
            "lr": 0.1,
            "score": 1.0,
            "step": 7,
            "tag": "first",
            "matrix": torch.ones(2, 2),
            "count": scalar(3),
            "deep": {"acc": scalar(1.0)},
            "pair": (scalar(1.0), torch.zeros(3, 2)),
            "named": Named(torch.zeros(3), "x"),
            "gone": None,
            "late": None,
        },
        {
            "loss": scalar(5.0),
            "acc": scalar(1.0),
            "preds": torch.tensor([4]),
            "names": ["d"],
            "array": np.arange(1),
            "lr": 0.1,
            "score": 3.0,
            "step": 8,
            "tag": "last",
            "matrix": torch.zeros(2, 2),
            "count": scalar(1),
            "deep": {"acc": scalar(0.0)},
            "pair": (scalar(2.0), torch.ones(1, 2)),
            "named": Named(torch.ones(1), "y"),
            "gone": None,
            "late": scalar(9.0),
        },
    ]
    merged = merge_outputs(outputs, [3, 1])
    assert list(merged) == list(outputs[0])
    assert merged["loss"].item() == 2.0
    assert merged["acc"].item() == 0.625
    assert merged["preds"].tolist() == [1, 2, 3, 4]
    assert merged["names"] == ["a", "b", "c", "d"]
    assert merged["array"].tolist() == [0, 1, 2, 0]
    assert (merged["lr"], merged["score"], merged["step"], merged["tag"]) == (0.1, 1.5, 7, "last")
    assert merged["matrix"] is not outputs[0]["matrix"]
    assert merged["matrix"].sum() == 0
    assert merged["count"].item() == 1
    assert merged["deep"]["acc"].item() == 0.75
    assert merged["pair"][0].item() == 1.25
    assert merged["pair"][1].shape == (4, 2)
    assert type(merged["named"]) is Named
    assert merged["named"].logits.tolist() == [0, 0, 0, 1]
    assert merged["named"].name == "y"
    assert merged["gone"] is None
    assert merged["late"].item() == 9.0
    assert outputs[0]["loss"].item() == 1.0


def test_equal_floats_keep_their_bits():
    assert merge_outputs([{"lr": 0.1}] * 3, [3, 3, 1])["lr"] == 0.1


def test_rows_of_unequal_width_are_not_strung_together():
    outputs = [{"ids": torch.zeros(2, 5)}, {"ids": torch.zeros(2, 7)}]
    assert merge_outputs(outputs, [2, 2])["ids"] is outputs[1]["ids"]


def test_a_key_that_only_some_have_is_merged_over_those():
    merged = merge_outputs([{"loss": scalar(1.0)}, {"loss": scalar(1.0), "extra": scalar(5.0)}], [2, 2])
    assert list(merged) == ["loss", "extra"]
    assert merged["extra"].item() == 5.0


@pytest.mark.parametrize(
    "build", [dict, OrderedDict, lambda **items: SequenceClassifierOutput(loss=items["loss"], logits=items["logits"])]
)
def test_mappings_keep_their_type(build):
    outputs = [build(loss=scalar(float(n)), logits=torch.full((n, 2), float(n))) for n in (1, 3)]
    merged = merge_outputs(outputs, [1, 3])
    assert type(merged) is type(outputs[0])
    assert merged["loss"].item() == 2.5
    assert merged["logits"].shape == (4, 2)
    if isinstance(merged, SequenceClassifierOutput):
        assert merged.loss is merged["loss"]


def test_a_loss_that_is_no_scalar_stays_one():
    """Lightning then fails in backward as it would on one device."""
    assert merge_outputs([torch.ones(2), torch.zeros(1)], [2, 1]).tolist() == [1, 1, 0]
    assert merge_outputs([torch.ones(1), torch.zeros(1)], [3, 1]).tolist() == [0.75]


def test_counts_and_outputs_must_agree():
    with pytest.raises(ValueError, match="2 outputs and 1 sample counts"):
        merge_outputs([None, None], [1])
    with pytest.raises(ValueError, match="0 outputs"):
        merge_outputs([], [])


def test_loss_of():
    loss = scalar(1.0)
    assert loss_of(loss) is loss
    assert loss_of({"loss": loss, "x": 1}) is loss
    assert loss_of({"x": 1}) is None
    assert loss_of({"loss": 1.0}) is None
    assert loss_of(None) is None


def test_with_loss_leaves_the_output_alone():
    old, new = scalar(1.0), scalar(2.0)
    assert with_loss(old, new) is new
    output = OrderedDict(loss=old, preds=torch.ones(2))
    changed = with_loss(output, new)
    assert type(changed) is OrderedDict
    assert changed["loss"] is new
    assert changed["preds"] is output["preds"]
    assert output["loss"] is old
    with pytest.raises(TypeError, match="NoneType carries no loss"):
        with_loss(None, new)


@dataclasses.dataclass
class Report:
    predictions: torch.Tensor
    score: torch.Tensor
    names: list
    note: str = "same"


def test_dataclasses_are_merged_field_by_field():
    reports = [Report(torch.ones(n, 2) * n, scalar(float(n)), ["x"] * n) for n in (3, 1)]
    merged = merge_outputs([{"loss": scalar(0.0), "report": report} for report in reports], [3, 1])["report"]
    assert merged.predictions.shape == (4, 2)
    assert merged.score.item() == 2.5
    assert (merged.names, merged.note) == (["x"] * 4, "same")
    assert reports[0].predictions.shape == (3, 2)


def test_lists_that_are_no_samples_are_merged_item_by_item():
    """`[logits, features]` has two items in the minibatch too, however many samples there are."""
    for counts in ([3, 2], [2, 2]):
        outputs = [{"loss": scalar(0.0), "both": [torch.ones(n, 4), torch.ones(n)]} for n in counts]
        merged = merge_outputs(outputs, counts)["both"]
        assert [tuple(item.shape) for item in merged] == [(sum(counts), 4), (sum(counts),)]
    samples = [{"loss": scalar(0.0), "boxes": [torch.ones(k, 4) for k in range(n)]} for n in (2, 2)]
    assert len(merge_outputs(samples, [2, 2])["boxes"]) == 4


def test_shares_say_what_each_loss_counts():
    outputs = [{"loss": scalar(2.0), "score": scalar(1.0)}, None, {"loss": scalar(float("nan")), "score": scalar(3.0)}]
    merged = merge_outputs(outputs, [1, 1, 1], [2.0, 1.0, 0.0])
    assert (merged["loss"].item(), merged["score"].item()) == (4.0, 2.0)


def test_tensors_are_replaced_wherever_outputs_hold_them():
    value = {
        "named": Named(torch.ones(2), "a"),
        "user": UserDict({"x": torch.ones(1)}),
        "report": Report(torch.ones(1), scalar(1.0), [torch.ones(1)]),
        "model": SequenceClassifierOutput(logits=torch.ones(2, 3)),
        "size": torch.Size([2]),
        "text": "x",
    }
    found = map_tensors(lambda tensor: tensor + 1, value)
    assert {key: type(item) for key, item in found.items()} == {key: type(item) for key, item in value.items()}
    replaced = [found["named"].logits, found["user"]["x"], found["report"].names[0], found["model"].logits]
    assert all((tensor == 2).all() for tensor in (*replaced, found["model"]["logits"], found["report"].score))
    assert value["report"].score == 1
    assert map_tensors(lambda tensor: tensor, value) is value
