"""Frozen weights: no gradients leave, and what comes before everything that trains runs no backward."""

import dataclasses

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer
from lightning.pytorch import callbacks
from torch import nn

from harmony_lightning import ConfigurationError
from harmony_lightning.runtime.layer import node

DEPTH = 12


class LowRank(nn.Module):
    """A frozen linear layer beside a small one that trains: W x + B A x."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Partly(Chain):
    """A chain of which only some blocks train."""

    def __init__(self, adapted=(), whole=(), head=True):
        super().__init__(depth=DEPTH)
        self.requires_grad_(False)
        for index in adapted:
            self.net[index][0] = LowRank(self.net[index][0])
        for index in whole:
            self.net[index].requires_grad_(True)
        self.head.requires_grad_(head)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


CASES = {
    "head": {},
    "last blocks": {"whole": (9, 10, 11)},
    "adapters everywhere": {"adapted": range(DEPTH)},
    "adapters in the second half": {"adapted": range(6, DEPTH)},
    "one block in the middle": {"whole": (5,), "head": False},
    "one adapter in the middle": {"adapted": (5,), "head": False},
}


def build(case):
    torch.manual_seed(0)
    return Partly(**CASES[case])


@pytest.fixture
def recomputed(monkeypatch):
    """Names of layers in the order of their backward."""
    names = []
    differentiate = node.differentiate

    def noting(call, *args):
        names.append(call.site.name)
        return differentiate(call, *args)

    monkeypatch.setattr(node, "differentiate", noting)
    return names


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_frozen_packs_cost_what_the_plan_says(case, mode, num_gpus, recomputed):
    """Each pack is brought in for its forward; again for its backward if it, or one before it, trains, except where
    slots hold it still, as they may in the next step what nobody updates. Only gradients of what trains leave."""
    ours, reference = build(case), build(case)
    trainer(accumulate_grad_batches=4).fit(reference, loader(2, 24))
    fitted = trainer(harmony(num_gpus, mode=mode))
    fitted.fit(ours, loader(8, 24))
    if mode == "pp" or num_gpus == 1:
        assert same_weights(ours, reference)
    statistics, plan = fitted.strategy.statistics(), fitted.strategy.plan
    trains = [any(ours.get_parameter(name).requires_grad for name in pack.parameters) for pack in plan.packs]
    num_packs, first = len(plan.packs), trains.index(True)
    assert num_packs > 2 * num_gpus
    swapped = 0
    for device in range(num_gpus):
        here = [p for p in range(num_packs) if mode == "dp" or p % num_gpus == device]
        again = [p for p in here[: -1 - plan.prefetch] if p >= first]
        swapped += sum(plan.packs[p].nbytes for p in here) + sum(plan.packs[p].nbytes for p in again)
    gradients = sum(p.nbytes for p in ours.parameters() if p.requires_grad)
    assert plan.swap_in_bytes(is_first=True) == swapped >= plan.swap_in_bytes_per_step
    assert statistics.swap_in_bytes == swapped + 2 * plan.swap_in_bytes_per_step
    assert statistics.swap_out_bytes == 3 * gradients == 3 * plan.swap_out_bytes_per_step
    packs = {name: index for index, pack in enumerate(plan.packs) for name in pack.layers}
    owners = [next(packs[name] for name in packs if f"{inner}.".startswith(f"{name}.")) for inner in recomputed]
    assert min(owners) == first


def test_a_frozen_module_behind_one_that_trains_hands_the_gradient_on():
    """Its weights are needed in backward, and get no gradient."""
    ours, reference = build("one block in the middle"), build("one block in the middle")
    trainer(accumulate_grad_batches=4).fit(reference, loader(2))
    trainer(harmony()).fit(ours, loader(8))
    assert same_weights(ours, reference)
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_checkpoints_of_adapters_alone(tmp_path):
    """A module that saves only what trains, as is usual with adapters."""

    class Slim(Partly):
        def on_save_checkpoint(self, checkpoint):
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

        strict_loading = False

    torch.manual_seed(0)
    module = Slim(adapted=range(DEPTH))
    fitted = trainer(harmony())
    fitted.fit(module, loader(8))
    fitted.save_checkpoint(tmp_path / "slim.ckpt")
    saved = torch.load(tmp_path / "slim.ckpt", weights_only=False)["state_dict"]
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(saved)
    torch.manual_seed(0)
    again = Slim(adapted=range(DEPTH))
    trainer(harmony()).validate(again, loader(8), ckpt_path=tmp_path / "slim.ckpt", verbose=False)
    assert same_weights(again, module)


class InBuffers(nn.Module):
    """A frozen layer whose weight is a buffer, as in a quantised model: it has nothing that a pack could hold."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("microbatch_size", [8, 2])
def test_weights_in_buffers_may_be_larger_than_the_gpus(microbatch_size):
    class Quantised(Chain):
        def __init__(self):
            super().__init__(depth=4)
            self.net[2] = nn.Sequential(*(nn.Sequential(InBuffers(), nn.ReLU()) for _ in range(30)))

    runs = []
    for strategy in ("auto", harmony(2, "200KiB", microbatch_size=microbatch_size)):
        torch.manual_seed(0)
        module = Quantised()
        accumulate = 8 // microbatch_size if strategy == "auto" else 1
        run = trainer(strategy, accumulate_grad_batches=accumulate)
        run.fit(module, loader(8 // accumulate, 24), loader(8, 16))
        runs.append(module)
    assert same_weights(*runs)
    assert sum(buffer.nbytes for buffer in module.buffers()) > 2 * run.strategy.plan.memory_bytes


def test_lora_of_peft_trains_like_on_one_device():
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    class Tuned(Chain):
        def __init__(self):
            super().__init__(depth=1)
            self.net = self.head = None
            config = LlamaConfig(
                vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
            )
            lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
            self.model = peft.get_peft_model(LlamaForCausalLM(config), lora)

        def step(self, batch):
            return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    data = torch.randint(0, 64, (24, 12), generator=torch.Generator().manual_seed(1))
    runs = []
    for strategy in ("auto", harmony(2, "400KiB")):
        torch.manual_seed(0)
        module = Tuned()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        batch_size = 2 if strategy == "auto" else 8
        run = trainer(strategy, accumulate_grad_batches=8 // batch_size)
        run.fit(module, torch.utils.data.DataLoader(data, batch_size=batch_size))
        for name, p in module.named_parameters():
            assert torch.equal(before[name], p) == (not p.requires_grad), name
        runs.append(module)
    for theirs, mine in zip(*(module.parameters() for module in runs), strict=True):
        # Queries, keys and values are layers of their own here: gradients of their common input are added in another order.
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)
    statistics = run.strategy.statistics()
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert statistics.swap_out_bytes == 3 * trained
    assert sum(p.nbytes for p in module.parameters()) > run.strategy.plan.memory_bytes


class Thawing(callbacks.BaseFinetuning):
    """Biases train from the start, the first four blocks' weights from the second epoch on."""

    def freeze_before_training(self, module):
        for block in module.net:
            block[0].weight.requires_grad_(False)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[:4], optimizer, lr=1e-2)


class OnlyTrainable(Chain):
    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], **self.options)


@pytest.mark.parametrize("update", ["host", "device"])
def test_a_given_plan_goes_on_when_weights_are_thawed(update, caplog):
    """It was made while they were frozen: in the same packs, with larger slots for gradients; told once."""

    def fit(strategy, max_epochs=3, **options):
        torch.manual_seed(0)
        module = OnlyTrainable()
        fitted = trainer(strategy, max_epochs=max_epochs, callbacks=[Thawing()], **options)
        fitted.fit(module, loader(8, 24))
        return module, fitted

    _, first = fit(harmony(memory="160KiB", update=update), max_epochs=1)
    made = first.strategy.plan
    given = harmony(memory="160KiB", plan=made)
    ours, _ = fit(given)
    reference, _ = fit(harmony(memory="160KiB"))
    assert same_weights(ours, reference)
    assert sum("other weights train than when plan= was made" in record.message for record in caplog.records) == 1
    pairs = list(zip(made.packs, given.plan.packs, strict=True))
    assert [one.layers for one, _ in pairs] == [other.layers for _, other in pairs]
    grown = [index for index, (one, other) in enumerate(pairs) if other.gradient_slot_nbytes > one.gradient_slot_nbytes]
    assert grown and all(pairs[index][1].update == "host" for index in grown)
    assert made.packs[-1] == given.plan.packs[-1] and made.packs[-1].update == update
    if update == "host":  # before the first step it is a fault
        short = dataclasses.replace(
            made, packs=(dataclasses.replace(made.packs[0], gradient_slot_nbytes=64), *made.packs[1:])
        )
        with pytest.raises(ConfigurationError, match="gradient_slot_nbytes of 64"):
            fit(harmony(memory="160KiB", plan=short))
