"""Runs somebody else's module twice, under Lightning's default strategy and under harmony, and tells what differs.

One microbatch is the same arithmetic in the same order: everything must be equal to the bit. Emulated GPUs are smaller than
what training keeps: weights, gradients and optimizer states.
"""

import copy
from typing import Any

import lightning.pytorch
import torch
from torch.utils import _pytree as pytree

from harmony_lightning import EmulatedCluster
from harmony_lightning.lightning import HarmonyStrategy
from harmony_lightning.testing.compare import relative_difference

WHOLE = 1_000_000
"""Samples of a microbatch that no minibatch exceeds."""

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Runs:
    """What came out of fit, validate and predict, once under each strategy."""

    def __init__(self, expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], strategy: Any) -> None:
        self.expected = expected
        self.actual = actual
        self.strategy = strategy

    @property
    def differences(self) -> dict[str, float]:
        names = dict.fromkeys((*self.expected, *self.actual))
        found = {name: relative_difference(self.expected.get(name), self.actual.get(name)) for name in names}
        return {name: difference for name, difference in found.items() if difference > 0}


def run_both(
    make_module,
    train,
    *,
    memory,
    room=0,
    num_gpus=2,
    predict=None,
    predict_with=None,
    validate=None,
    pl=lightning.pytorch,
    strategy_class=HarmonyStrategy,
    max_epochs=1,
    **options,
) -> Runs:
    """Train, then validate and predict on what was trained.

    Args:
        make_module: called once per strategy, on the same random numbers.
        train, validate, predict: dataloaders; without the latter two those steps are left out.
        predict_with: (module, strategy) -> outputs, for packages with a predict of their own.
        memory: bytes of each emulated GPU that packs are planned for; less than the training state.
        room: bytes of each beside them, for activations.
        options: for the Trainer.
    """

    def harmony():
        return strategy_class(cluster=EmulatedCluster(num_gpus, memory + room), memory=memory, microbatch_size=WHOLE)

    strategy = harmony()
    results = []
    for each in ("auto", strategy):
        torch.manual_seed(0)
        module = make_module()
        before = copy.deepcopy(module.state_dict())
        torch.manual_seed(1)
        trainer = pl.Trainer(strategy=each, max_epochs=max_epochs, **{**QUIET, **options})
        trainer.fit(module, train)
        optimizer_states = [tensors_of(trainer.strategy.optimizer_state(o)) for o in trainer.optimizers]
        found = {f"weight {name}": value for name, value in module.state_dict().items()}
        assert any(not torch.equal(value, found[f"weight {name}"]) for name, value in before.items()), "nothing trained"
        if each is strategy:
            state = 2 * nbytes(list(module.parameters())) + sum(nbytes(state) for state in optimizer_states)
            device = strategy.plan, strategy.statistics()
            assert len(device[0].packs) >= 3, "the module is too small for a comparison"
            assert device[1].swap_in_bytes > 0
            assert state > memory, "everything fits on one GPU"
        found |= {f"optimizer {i} {j}": t for i, s in enumerate(optimizer_states) for j, t in enumerate(s)}
        found |= {f"metric {name}": torch.as_tensor(value) for name, value in trainer.callback_metrics.items()}
        if validate is not None:
            torch.manual_seed(2)
            for i, metrics in enumerate(trainer.validate(module, validate, verbose=False)):
                found |= {f"validation {i} {name}": torch.as_tensor(value) for name, value in metrics.items()}
        if predict is not None or predict_with is not None:
            torch.manual_seed(3)
            if predict_with is not None:
                outputs = predict_with(module, "auto" if each == "auto" else harmony())
            else:
                outputs = trainer.predict(module, predict)
            outputs = tensors_of(outputs)
            assert outputs, "nothing predicted"
            found |= {f"prediction {i}": value for i, value in enumerate(outputs)}
        results.append(found)
    return Runs(*results, strategy)


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(_plain(tree)) if isinstance(leaf, torch.Tensor)]


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _plain(tree):
    """Libraries return mappings of their own, which pytree takes for leaves."""
    if isinstance(tree, torch.Tensor):
        return tree.detach()
    if hasattr(tree, "items"):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(item) for item in tree]
    return tree
