"""What an optimizer will remember is known before its first step."""

import pytest
import torch
from torch import nn

from harmony_lightning.runtime.updates.optimizer_states import find_states
from harmony_lightning.runtime.updates.state_sizes import predict_state_nbytes, work_of_step
from harmony_lightning.runtime.updates.update import JustInTimeUpdate

KINDS = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "fused": (torch.optim.Adam, {"fused": True}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9}),
    "ASGD": (torch.optim.ASGD, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_prediction_is_what_comes(name):
    kind, options = KINDS[name]
    net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Linear(20, 7), nn.LayerNorm(7), nn.Linear(2, 3).bfloat16())
    parameters = dict(net.named_parameters())
    groups = [{"params": list(net[:2].parameters())}, {"params": list(net[2:].parameters()), "weight_decay": 0.1}]
    optimizer = kind(groups, lr=1e-2, **options)
    before = torch.random.get_rng_state()
    predicted = predict_state_nbytes(optimizer, parameters)
    assert torch.equal(torch.random.get_rng_state(), before)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    update = JustInTimeUpdate(optimizer, parameters)
    for weight in parameters:
        found = find_states(update, [weight])
        assert sorted(predicted[weight]) == sorted(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize(
    ("kind", "options", "operations", "accesses"),
    [
        (torch.optim.AdamW, {"fused": True}, (1, 3), (7, 10)),
        (torch.optim.SGD, {"momentum": 0.9}, (2, 5), (6, 10)),
        (torch.optim.Adam, {}, (6, 20), (15, 40)),
    ],
)
def test_the_work_of_a_step_of_one_weight(kind, options, operations, accesses):
    weights = [nn.Parameter(torch.ones(8, 8)) for _ in range(4)]
    found = work_of_step(kind(weights, lr=1e-3, **options))
    assert operations[0] <= found[0] <= operations[1] and accesses[0] <= found[1] <= accesses[1]
