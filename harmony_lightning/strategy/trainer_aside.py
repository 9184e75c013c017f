"""The trainer, as a training step sees it that is run aside to be profiled: plain values, and nothing that acts.

Most modules look at their trainer: for the epoch, the learning rate, the number of batches. Of it they get what it holds
now, numbers and flags; what they log or print is swallowed, and what they set is forgotten. What is more than that, such as
`save_checkpoint`, raises, so nothing of the run is touched and the module is not searched for.
"""

import enum
import inspect
import types
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.profiler.visits import Step

_VALUES = (
    *("current_epoch", "global_step", "is_last_batch", "estimated_stepping_batches"),
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "enable_validation"),
    *("num_training_batches", "num_sanity_val_batches", "num_val_batches", "num_test_batches", "num_predict_batches"),
    *("training", "testing", "validating", "predicting", "evaluating", "sanity_checking"),
    *("is_global_zero", "global_rank", "local_rank", "node_rank", "world_size", "num_nodes"),
    *(
        "num_devices",
        "device_ids",
        "precision",
        "interrupted",
        "received_sigterm",
        "train_dataloader",
        "val_dataloaders",
    ),
    *("checkpoint_callback", "checkpoint_callbacks", "early_stopping_callback", "early_stopping_callbacks"),
)
"""Properties of the trainer that compute nothing but what they return."""
_VALUES_OF_LOOPS = ("batch_idx", "total_batch_idx", "global_step", "max_epochs", "min_epochs")
_PLAIN = (types.NoneType, bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)
_MOST_ITEMS = 1_000
_MOST_BYTES = 16 << 20
"""Of a container, and of a tensor, that are handed out as a copy."""


def step_aside(step: Step, trainer: Any) -> Step:
    """The step of a copy of the module, which has the stand-in for its trainer while it runs; None if it has none.

    Raises, when it is called:
        UnsupportedError: user code has asked for what it cannot have, be it that it has caught the error.
    """
    if trainer is None:
        return step

    def attached(twin: nn.Module, batch: Any) -> Any:
        aside = _Aside()
        owners = [vars(module) for module in twin.modules() if "_trainer" in vars(module)]
        stand_in = _Trainer(aside, trainer, twin)
        try:
            for owner in owners:
                owner["_trainer"] = stand_in
            loss = step(twin, batch)
        finally:
            for owner in owners:
                owner["_trainer"] = None
        if aside.refused is not None:
            aside.refuse(aside.refused)
        return loss

    return attached


class _Aside:
    """One step aside: what it gets, and what was refused."""

    def __init__(self) -> None:
        self.refused: str | None = None

    def refuse(self, path: str) -> NoReturn:
        self.refused = path
        raise UnsupportedError(f"training_step uses {path}, which a run aside must not touch")

    def copy(self, value: Any, path: str) -> Any:
        """What user code may have instead of a value of the run."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.Tensor) and value.nbytes <= _MOST_BYTES:
            return value.detach().clone()
        if type(value) in (list, tuple, set, dict) and len(value) <= _MOST_ITEMS:
            if isinstance(value, dict):
                return {key: self.copy(item, f"{path}[{key!r}]") for key, item in value.items()}
            return type(value)(self.copy(item, f"{path}[{index}]") for index, item in enumerate(value))
        return _View(self, value, path)


class _View:
    """An object of the run: plain values in its attributes, and its length."""

    _aside: _Aside

    def __init__(self, aside: _Aside, of: Any, path: str) -> None:
        vars(self).update(_aside=aside, _of=of, _path=path)

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}"
        try:
            found = inspect.getattr_static(self._of, name)
        except AttributeError:
            if hasattr(type(self._of), "__getattr__"):
                self._aside.refuse(path)
            raise AttributeError(f"{self._path} has no attribute {name!r}") from None
        if isinstance(found, property):
            is_value = name in _VALUES_OF_LOOPS and ".loops." in type(self._of).__module__
        else:
            is_own = name in getattr(self._of, "__dict__", ()) or inspect.ismemberdescriptor(found)
            is_value = is_own or isinstance(found, _PLAIN)
        if not is_value:
            self._aside.refuse(path)
        return self._aside.copy(getattr(self._of, name), path)

    def __len__(self) -> int:
        return len(self._of)

    def __bool__(self) -> bool:
        return not hasattr(type(self._of), "__len__") or len(self._of) > 0

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        self._aside.refuse(self._path)

    __call__ = __iter__ = __getitem__ = __contains__ = __str__ = __format__ = _refuse  # type: ignore[assignment]
    __setattr__ = __delattr__ = __setitem__ = _refuse


class _Silent:
    """Takes all that is told to it, and does nothing: a logger, whatever it may offer, or a progress bar."""

    def __init__(self, aside: _Aside, path: str) -> None:
        self._aside, self._path = aside, path

    def __getattr__(self, name: str) -> "_Silent":
        return _Silent(self._aside, f"{self._path}.{name}")

    def __call__(self, *_: Any, **__: Any) -> "_Silent":
        return self

    def __str__(self) -> NoReturn:  # most likely as part of a path
        self._aside.refuse(self._path)

    def __format__(self, _: str) -> NoReturn:
        self._aside.refuse(self._path)


class _Profiler:
    def profile(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def start(self, *_: Any) -> None: ...

    def stop(self, *_: Any) -> None: ...


class _Strategy:
    """Of one process."""

    is_global_zero, world_size, global_rank, local_rank = True, 1, 0, 0

    def __init__(self, aside: _Aside, optimizers: list[Optimizer], device: Any) -> None:
        self._aside, self._lightning_optimizers, self.root_device = aside, optimizers, device

    def all_gather(self, tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    reduce = broadcast = all_gather

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def barrier(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> NoReturn:
        self._aside.refuse(f"self.trainer.strategy.{name}")


class _Optimizer(Optimizer):
    """Its groups are copies without weights: what is set there is forgotten."""

    _aside: _Aside

    def __init__(self, aside: _Aside, of: Optimizer) -> None:
        def settings(group: dict[str, Any]) -> Iterable[tuple[str, Any]]:
            return ((key, value) for key, value in group.items() if key not in ("params", "param_names"))

        groups = [
            {"params": [], **aside.copy(dict(settings(group)), f"self.optimizers().param_groups[{index}]")}
            for index, group in enumerate(of.param_groups)
        ]
        vars(self).update(_aside=aside, param_groups=groups, defaults={}, state={}, optimizer=self)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        self._aside.refuse("more than the groups of self.optimizers()")

    step = zero_grad = state_dict = load_state_dict = add_param_group = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(name)

    __repr__ = object.__repr__


class _Scheduler:
    def __init__(self, aside: _Aside, of: Any) -> None:
        self._aside, self._of = aside, of
        self.last_epoch = getattr(of, "last_epoch", None)

    def get_last_lr(self) -> list[Any]:
        copied: list[Any] = self._aside.copy(list(self._of._last_lr), "self.lr_schedulers().get_last_lr()")
        return copied

    def __getattr__(self, name: str) -> NoReturn:
        self._aside.refuse(f"self.lr_schedulers().{name}")


class _Trainer:
    def __init__(self, aside: _Aside, trainer: Any, twin: nn.Module) -> None:
        optimizers: list[Optimizer] = [_Optimizer(aside, optimizer) for optimizer in trainer.optimizers]
        schedulers = [_Scheduler(aside, config.scheduler) for config in trainer.lr_scheduler_configs]
        loggers = [_Silent(aside, "self.logger") for _ in trainer.loggers]
        vars(self).update(
            _aside=aside,
            _of=trainer,
            barebones=True,  # with which Lightning's own `log` does nothing
            model=twin,
            lightning_module=twin,
            logger=loggers[0] if loggers else None,
            loggers=loggers,
            progress_bar_callback=_Silent(aside, "self.trainer.progress_bar_callback"),
            profiler=_Profiler(),
            optimizers=optimizers,
            lr_scheduler_configs=[types.SimpleNamespace(scheduler=scheduler) for scheduler in schedulers],
            strategy=_Strategy(aside, optimizers, getattr(twin, "device", None)),
        )

    def __getattr__(self, name: str) -> Any:
        path = f"self.trainer.{name}"
        if name in _VALUES:
            return self._aside.copy(getattr(self._of, name), path)
        if name == "datamodule":
            data = getattr(self._of, name, None)
            return None if data is None else _View(self._aside, data, path)
        return getattr(_View(self._aside, self._of, "self.trainer"), name)
