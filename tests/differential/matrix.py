"""The product of features, and one run of one case."""

import copy
import dataclasses
import importlib
import warnings
from typing import Any

import oracle
import torch
from recording import WIDTH, make_callback, make_logger, make_module
from torch.utils.data import DataLoader, TensorDataset

from harmony_lightning import EmulatedCluster

FEATURES = {
    "plan": ("one", "one on 2", "pp on 1", "pp on 2", "pp on 3", "ragged pp on 2", "dp on 4", "dp on 2"),
    "optimizer": ("sgd", "adamw", "groups"),
    "optimization": ("automatic", "manual", "two optimizers"),
    "precision": ("32-true", "bf16-true", "bf16-mixed", "64-true"),
    "accumulate": (1, 2, 3),
    "clip": ("none", "norm", "value"),
    "scheduler": ("none", "step", "epoch", "plateau"),
    "logging": ("mean", "reductions", "sized", "metric", "dict"),
    "output": ("tensor", "dict", "rows", "none"),
    "loop": ("epochs", "interval", "steps", "nth epoch", "limits", "overfit", "fast_dev_run", "barebones", "no sanity"),
    "sees_gradients": (False, True),
    "last_batch": ("even", "uneven"),
}
LOOPS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "interval": {"val_check_interval": 0.5},
    "steps": {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": None, "max_steps": 5},
    "nth epoch": {"check_val_every_n_epoch": 2, "reload_dataloaders_every_n_epochs": 1},
    "limits": {"limit_train_batches": 2, "limit_val_batches": 0.5, "log_every_n_steps": 2},
    "overfit": {"overfit_batches": 2},
    "fast_dev_run": {"fast_dev_run": 2},
    "barebones": {"barebones": True},
    "no sanity": {"num_sanity_val_steps": 0, "limit_val_batches": 1},
}
PLANS: dict[str, tuple[str, int, int]] = {
    "one": ("pp", 1, 8),
    "one on 2": ("pp", 2, 8),
    "pp on 1": ("pp", 1, 4),
    "pp on 2": ("pp", 2, 2),
    "pp on 3": ("pp", 3, 2),
    "ragged pp on 2": ("pp", 2, 3),
    "dp on 4": ("dp", 4, 2),
    "dp on 2": ("dp", 2, 2),
}
"""mode, GPUs, microbatch size; minibatches have 8 samples."""
NBYTES = 7 * (WIDTH + 1) * WIDTH * 4
"""Of the weights in float32, nearly."""


def is_possible(case):
    is_automatic = case["optimization"] == "automatic"
    return (
        # Lightning's own rules.
        (is_automatic or (case["clip"], case["accumulate"]) == ("none", 1))
        and (case["output"] != "none" or is_automatic)
        # Clipping by value fails in torch where no weight has a gradient.
        and (case["output"], case["clip"]) != ("none", "value")
        and not (case["loop"] == "barebones" and case["scheduler"] == "plateau")
        and not (case["loop"] == "steps" and case["scheduler"] == "plateau")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What one run left behind."""

    weights: dict[str, torch.Tensor]
    optimizers: list[Any]
    schedulers: list[Any]
    events: list[Any]
    rows: list[dict[str, Any]]
    outputs: list[Any]
    metrics: dict[str, Any]
    progress: tuple[int, ...]
    statistics: Any = None


def run(package, case, strategy):
    """Train on the case.

    Args:
        package: "lightning.pytorch" or "pytorch_lightning".
        case: a value for each feature.
        strategy: "plain", "oracle" or "harmony".
    """
    pl = importlib.import_module(package)
    mode, num_gpus, microbatch_size = PLANS[case["plan"]]
    events: list[Any] = []
    outputs: list[Any] = []
    torch.manual_seed(1)
    module = make_module(pl, case, events)
    nbytes_per_number = {"64-true": 8, "bf16-true": 2}.get(case["precision"], 4)
    chosen = {
        "plain": lambda: "auto",
        "oracle": lambda: oracle.make_strategy(pl, microbatch_size),
        "harmony": lambda: harmony_class(package)(
            mode=mode,
            microbatch_size=microbatch_size,
            cluster=EmulatedCluster(num_gpus, int(NBYTES * 0.9) * nbytes_per_number // 4),
        ),
    }[strategy]()
    loop = LOOPS[case["loop"]]
    logger = False if loop.get("barebones") else make_logger(pl)
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "precision": case["precision"],
        "accumulate_grad_batches": case["accumulate"],
        "log_every_n_steps": 1,
        "logger": logger,
        "callbacks": [make_callback(pl, events, outputs, case["sees_gradients"])],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **loop,
    }
    if case["clip"] != "none":
        options |= {"gradient_clip_val": 0.05, "gradient_clip_algorithm": case["clip"]}
    if loop.get("barebones"):
        options = {key: value for key, value in options.items() if key not in ("logger", "log_every_n_steps")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(strategy=chosen, **options)
        num_samples = 24 if case["last_batch"] == "even" else 21
        trainer.fit(module, data(num_samples, case["precision"]), data(12, case["precision"]))
    return Run(
        weights={name: weight.detach().clone() for name, weight in module.state_dict().items()},
        optimizers=[copy.deepcopy(trainer.strategy.optimizer_state(optimizer)) for optimizer in trainer.optimizers],
        schedulers=[config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        events=events,
        rows=logger.rows if logger else [],
        outputs=outputs,
        metrics={**trainer.callback_metrics, **trainer.logged_metrics},
        progress=(trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx),
        statistics=trainer.strategy.statistics() if strategy == "harmony" else None,
    )


def harmony_class(package):
    home = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}[package]
    return importlib.import_module(f"harmony_lightning.{home}").HarmonyStrategy


def data(num_samples, precision="32-true"):
    generator = torch.Generator().manual_seed(3)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    inputs = torch.randn(num_samples, WIDTH, generator=generator)
    targets = inputs.sin().sum(1) / 4
    return DataLoader(TensorDataset(inputs.to(dtype), targets.to(dtype)), batch_size=8)
