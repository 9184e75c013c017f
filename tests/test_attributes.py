"""What code between layers keeps in an attribute while microbatches take turns."""

import copy

import pytest
import torch
from chain import Chain, harmony, loader, same_weights, trainer
from torch import nn

from harmony_lightning import UnsupportedError


class Body(nn.Module):
    """An attribute that is set in one pack is read in another."""

    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind, self.kept = net, kind, []

    def forward(self, x):
        hidden = self.net[:3](x)
        self.aux = hidden.square() if self.kind == "between layers" else hidden
        x = self.net[3:](hidden)
        if self.kind == "looked at":
            self.kept = [*self.kept, self.aux.mean() + x.mean()][-5:]
            assert torch.isfinite(torch.stack(self.kept)).all()
            return x
        return x + self.aux.mean()


class Keeping(Chain):
    def __init__(self, kind):
        super().__init__()
        self.net = Body(self.net, kind)


def twins(kind):
    torch.manual_seed(0)
    module = Keeping(kind)
    return module, copy.deepcopy(module)


LAYERS = {"layers": ["net.net.*", "head"], "one_layer_per_pack": True}


@pytest.mark.parametrize("kind", ["a layer's", "between layers"])
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_an_attribute_that_another_microbatch_has_set_is_told(kind, num_gpus):
    module, _ = twins(kind)
    told = r"microbatch 0 differentiates what microbatch 3 has made, in layer net\.net\.2 .*layers=\[ThatModule\]"
    with pytest.raises(UnsupportedError, match=told) as caught:
        trainer(harmony(num_gpus, **LAYERS)).fit(module, loader(8))
    assert [note.startswith("harmony: in backward of") for note in caught.value.__notes__] == [True]


@pytest.mark.parametrize("remedy", [{"layers": [Body, "head"]}, {"microbatch_size": 8}])
def test_its_remedies_train(remedy):
    ours, reference = twins("between layers")
    trainer(harmony(2, "1MiB", **{**LAYERS, **remedy})).fit(ours, loader(8))
    num_microbatches = 8 // remedy.get("microbatch_size", 2)
    trainer(accumulate_grad_batches=num_microbatches).fit(reference, loader(8 // num_microbatches))
    assert same_weights(ours, reference)


def test_an_attribute_of_several_microbatches_may_be_looked_at():
    ours, reference = twins("looked at")
    trainer(harmony(2, **LAYERS)).fit(ours, loader(8))
    trainer(accumulate_grad_batches=4).fit(reference, loader(2))
    assert same_weights(ours, reference)
