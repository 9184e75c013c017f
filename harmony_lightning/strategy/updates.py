"""Which update an optimizer's step gets: just in time, pack by pack, or whole, on the host behind backward.

    nothing sees gradients between backward and step, and the optimizer is separable     just in time
    anything else (norm clipping, a scaler, the user's hooks, LBFGS, several optimizers)  whole

Lightning runs forward and backward inside the optimizer's step, as its closure. Just in time, all weights have been stepped
and have no gradient left when the closure returns, and the optimizer's own step passes them by.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from harmony_lightning.hardware.emulated import storage_key
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.updates.gradient_swap_out import OnComplete
from harmony_lightning.runtime.updates.separability import Separability
from harmony_lightning.runtime.updates.state_sizes import predict_state_nbytes, work_of_step
from harmony_lightning.runtime.updates.update import JustInTimeUpdate, stepping_on_host
from harmony_lightning.strategy import overrides

log = logging.getLogger(__name__)

LEFT_NBYTES = 256 * 2**20
"""Gradients of an epoch's last step stay for whoever looks behind it, as on one device, if they are no larger: a model that
just fits the host must not fail there."""

_LOOKS_BACK = "the user's code may look at gradients when the step is over"


class Updates:
    """Choices of one strategy. Trainer, module and Lightning package come in with each step: they may have changed."""

    def __init__(self) -> None:
        self._separability = Separability()
        self._optimizer: Optimizer | None = None
        self._just_in_time: JustInTimeUpdate | None = None
        self._looks_back = False
        """Whether the user's code may look at gradients behind each step."""
        self._stepped: frozenset[str] = frozenset()
        """Weights that just-in-time updates have stepped, so that the optimizer has its states of them."""
        self._stepped_by: weakref.ref[Optimizer] | None = None
        """The optimizer that has."""
        self._told: set[str] = set()

    def probe(self, optimizer: Optimizer) -> None:
        """Find out now whether an optimizer is separable: the first step need not wait for it."""
        self._separability.reason_against(optimizer)

    @contextmanager
    def stepping(
        self, optimizer: Optimizer, closure: Callable[[], Any], engine: Engine, trainer: Any
    ) -> Iterator[Callable[[], Any]]:
        """Around one step of the optimizer, which is to be called with the closure that is given back."""
        clip_value = trainer.gradient_clip_val
        if self._stepped_by is None or self._stepped_by() is not optimizer:
            self._stepped, self._stepped_by = frozenset(), weakref.ref(optimizer)
        self._optimizer, self._just_in_time = optimizer, None
        hidden: list[tuple[Any, Any]] = []
        try:
            with stepping_on_host(optimizer), engine.beside(closure) as user_code:

                def closure_with_updates() -> Any:
                    result = user_code()
                    if self._just_in_time is not None and not (engine.rest.has_settled and _has_gradients(optimizer)):
                        trainer.gradient_clip_val = None  # done; torch cannot clip nothing
                    if not engine.rest.has_settled:  # the worker steps them
                        for group in optimizer.param_groups:
                            hidden.append((group, group["params"]))
                            group["params"] = []
                    return result

                yield closure_with_updates
            if self._just_in_time is None:
                engine.counters.updates_whole += 1
            else:
                engine.counters.updates_just_in_time += 1
                self._just_in_time.finish()
                self._stepped |= frozenset(engine.rest.updated)
        finally:
            for group, members in hidden:
                group["params"] = members
            trainer.gradient_clip_val = clip_value
            self._optimizer = self._just_in_time = None

    def on_complete(self, engine: Engine, module: Any, precision_plugin: Any, pl: Any) -> OnComplete:
        """What happens to weights in the coming backward as soon as their gradients are complete."""
        optimizer, trainer = self._optimizer, module.trainer
        if optimizer is None:
            return _wait
        if (reason := self._reason_for_whole(optimizer, module, precision_plugin, pl)) is not None:
            engine.rest.bring_home()
            self._tell_once(f"{type(optimizer).__name__} updates all weights in one go behind backward: {reason}")
            return _wait
        clip_value = trainer.gradient_clip_val
        # A training_step that works with gradients may find those of the step before.
        self._looks_back = overrides.looks_back(module, pl) or not engine.is_cut
        self._just_in_time = JustInTimeUpdate(
            optimizer,
            engine.state.parameters,
            prepare=functools.partial(torch.nn.utils.clip_grad_value_, clip_value=clip_value) if clip_value else None,
            keeps_gradients=self._looks_back or _leaves_gradients(engine, trainer),
            stepped=self._stepped,
        )
        return self._just_in_time

    def state_nbytes(
        self, optimizers: Sequence[Optimizer], module: Any, precision_plugin: Any, pl: Any, *, is_asked: bool
    ) -> dict[str, tuple[int, ...]] | None:
        """By weight, the bytes that the optimizer will remember of it; None if devices cannot update weights, with a
        warning if that `is_asked` for."""
        if not module.automatic_optimization or not optimizers:
            reason: str | None = "optimization is manual"
        else:
            reason = self._reason_for_whole(optimizers[0], module, precision_plugin, pl)
            reason = reason or self._separability.reason_against_moving(optimizers[0])
            if reason is None and not is_asked and overrides.looks_back(module, pl):
                reason = _LOOKS_BACK
        if reason is not None:
            text = f"updates on devices are left out, weights are updated on the host: {reason}"
            self._tell_once(text, logging.WARNING if is_asked else logging.INFO)
            return None
        return predict_state_nbytes(optimizers[0], dict(module.named_parameters()))

    def work_of_step(self, optimizers: Sequence[Optimizer]) -> tuple[float, float]:
        """Of the optimizer that devices may step weights by: operations, and accesses to memory, for one weight."""
        return work_of_step(optimizers[0])

    def on_device(self, engine: Engine) -> JustInTimeUpdate | None:
        """The update of the coming backward, if it may be taken on devices for the packs of which the plan says so."""
        if self._optimizer is None or all(pack.update == "host" for pack in engine.plan.packs):
            return None
        if (reason := self._reason_for_host(engine)) is not None:
            text = f"packs that the plan wants to be updated on devices are updated on the host: {reason}"
            self._tell_once(text, logging.WARNING)
            return None
        return self._just_in_time

    def _reason_for_host(self, engine: Engine) -> str | None:
        if self._just_in_time is None:
            return "all weights are updated in one go"
        if engine.cluster.host_is_device:
            return "the host is the only device"
        if self._looks_back:
            return _LOOKS_BACK
        assert self._optimizer is not None
        return self._separability.reason_against_moving(self._optimizer)

    def may_go_on(self, engine: Engine) -> bool:
        """Whether the updates of this backward may go on while the next step begins: everything they write is there, and
        nobody but the worker looks for gradients."""
        optimizer, updated = self._optimizer, engine.rest.updated
        if optimizer is None or self._just_in_time is None or self._just_in_time.keeps_gradients:
            return False
        if not updated or not self._stepped.issuperset(updated) or self._just_in_time.leaves_gradients(updated):
            return False
        return not any(isinstance(value, Optimizer) for value in vars(optimizer).values())

    def may_write_frozen(self, optimizer: Optimizer, module: Any, precision_plugin: Any, pl: Any) -> bool:
        """Whether code runs around the optimizer's step, or in front of backward, that may write frozen weights:
        not Lightning's own, nor a step of which it was found out what it does."""
        if all(parameter.requires_grad for parameter in module.parameters()):
            return False
        if overrides.runs_before_backward(module, pl) or overrides.hook_around_step(module, precision_plugin, pl):
            return True
        return self._separability.reason_against(optimizer) is not None

    def watch(self, optimizer: Optimizer, parameters: Iterable[torch.Tensor]) -> Callable[[torch.Tensor], bool]:
        """Tells whether a tensor lies in memory that updates write."""
        memory: set[int] = set()

        def is_updated(tensor: torch.Tensor) -> bool:
            if not memory:
                values = (value for entries in optimizer.state.values() for value in entries.values())
                memory.update(storage_key(t) for t in (*parameters, *values) if isinstance(t, torch.Tensor))
            return storage_key(tensor) in memory

        return is_updated

    def _reason_for_whole(self, optimizer: Optimizer, module: Any, precision_plugin: Any, pl: Any) -> str | None:
        if len(module.trainer.optimizers) != 1:
            return "there are several optimizers"
        if torch.is_anomaly_enabled():
            return "an anomaly must be found before any weight has changed"
        if overrides.refuses_to_clip(optimizer, module, precision_plugin, pl):
            return "Lightning refuses to clip gradients for it"
        observer = overrides.observer_of_gradients(module, precision_plugin, pl)
        return observer or self._separability.reason_against(optimizer)

    def _tell_once(self, text: str, level: int = logging.INFO) -> None:
        if text not in self._told:
            self._told.add(text)
            log.log(level, "harmony: %s", text)


def _leaves_gradients(engine: Engine, trainer: Any) -> bool:
    """Whether gradients of the running step are to be there behind the epoch."""
    loop = trainer.fit_loop
    is_last = loop.epoch_loop.batch_progress.is_last_batch or trainer.should_stop
    if not is_last and (loop.max_steps == -1 or trainer.global_step + 1 < loop.max_steps):
        return False
    return sum(p.nbytes for p in engine.state.parameters.values() if p.requires_grad) <= LEFT_NBYTES


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"])


def _wait(names: list[str]) -> None:
    """The optimizer steps them with all others."""
