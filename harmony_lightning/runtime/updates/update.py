"""Just-in-time updates: a pack's weights are stepped as soon as its gradients are complete.

The user's own optimizer does it while other packs still compute: on the host worker, or on the device that has the
gradients (`device_update`). The step runs on a shadow of the optimizer: the same class, the hyper-parameters of this
moment, but only the weights at hand, or what stands in for them on a device, and what is remembered of these. For an
optimizer whose update is separable per parameter this is its ordinary step to the bit; `separability` finds out.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harmony_lightning.runtime.thread_state import DEFAULT_DTYPE

Group = dict[str, Any]
Prepare = Callable[[Sequence[nn.Parameter]], None]
"""Done to weights between their backward and their step, such as clipping by value."""


@dataclass(slots=True)
class StandIn:
    """What is stepped in the place of a weight, such as its copy on a device."""

    parameter: nn.Parameter
    """With its gradient."""
    state: dict[str, Any]
    """What the optimizer remembers of the weight; the step changes it."""


class JustInTimeUpdate:
    """One step's update, pack by pack. Made on the controller: it remembers the hyper-parameters of that moment."""

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        *,
        prepare: Prepare | None = None,
        keeps_gradients: bool = False,
        stepped: Set[str] = frozenset(),
    ) -> None:
        """
        Args:
            keeps_gradients: hold what was stepped with, for `finish`, instead of freeing it.
            stepped: weights that the optimizer has stepped before.
        """
        self.stepped = stepped
        self._optimizer = optimizer
        self._parameters = parameters
        self._prepare = prepare
        self.keeps_gradients = keeps_gradients
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._groups = [({**group}, {id(p) for p in group["params"]}) for group in optimizer.param_groups]
        self._num_states = len(optimizer.state)

    def __call__(self, names: Sequence[str]) -> None:
        """Step these weights and free their gradients. Weights that the optimizer does not know keep theirs."""
        weights = [self._parameters[name] for name in names]
        groups: list[Group] = []
        for group, members in self._groups:
            ours = [weight for weight in weights if id(weight) in members]
            if ours:
                groups.append(part_of_group(group, ours))
        if not groups:
            return
        ours = [weight for group in groups for weight in group["params"]]
        if self._prepare is not None and any(weight.grad is not None for weight in ours):
            self._prepare(ours)  # clipping by value wants a gradient at least
        # States may be of torch's default type, which the controller changes for a layer that runs again.
        with nullcontext() if self.stepped >= set(names) else DEFAULT_DTYPE:
            step_part(self._optimizer, groups)
        for weight in ours:
            self._keep(weight, weight.grad)
            weight.grad = None

    def step_there(self, stand_ins: Mapping[str, StandIn]) -> None:
        """Step these, in place of the weights of these names; weights and what is remembered of them stay as they are.

        Large ones are stepped one after the other, as steps make temporary tensors of their size, small ones together."""
        for part in _parts(stand_ins, max((one.parameter.nbytes for one in stand_ins.values()), default=0)):
            groups: list[Group] = []
            for group, members in self._groups:
                ours = [one.parameter for name, one in part.items() if id(self._parameters[name]) in members]
                if ours:
                    groups.append(part_of_group(group, ours))
            if self._prepare is not None:
                self._prepare([one.parameter for one in part.values()])
            step_part(self._optimizer, groups, {one.parameter: one.state for one in part.values()})
            for name, one in part.items():
                self._keep(self._parameters[name], one.parameter.grad)

    def _keep(self, weight: nn.Parameter, gradient: torch.Tensor | None) -> None:
        if self.keeps_gradients and gradient is not None:
            self._kept.append((weight, gradient.to(weight.device)))

    def options(self, name: str) -> Group | None:
        """Of the group that has the weight; None if the optimizer does not know it."""
        weight = id(self._parameters[name])
        return next((group for group, members in self._groups if weight in members), None)

    def remembered(self, name: str) -> dict[str, Any]:
        """What the optimizer remembers of a weight: its own entries."""
        return self._optimizer.state.get(self._parameters[name], {})  # type: ignore[no-any-return]

    def remember(self, name: str, entries: dict[str, Any]) -> None:
        """Have the optimizer remember this of a weight, of which it has remembered nothing so far."""
        self._optimizer.state[self._parameters[name]] = entries

    def leaves_gradients(self, updated: Iterable[str]) -> bool:
        """Whether there are weights with a gradient that are neither stepped here nor among those being `updated`, or some
        of these that the optimizer does not know."""
        ours = {id(self._parameters[name]) for name in updated}
        members = set[int]().union(*(members for _, members in self._groups))
        weights = (weight for group in self._optimizer.param_groups for weight in group["params"])
        return not ours <= members or any(w.grad is not None for w in weights if id(w) not in ours)

    def finish(self) -> None:
        """After the whole step: let all be as behind a plain one. Weights have the gradients again that they were stepped
        with, if these were kept, and the optimizer remembers in the order of weights, in which checkpoints list it."""
        for weight, gradient in self._kept:
            weight.grad = gradient
        state = self._optimizer.state
        if (
            len(state) > self._num_states
        ):  # no update is under way: the first one of a weight does not go on behind its step
            new = set(list(state)[self._num_states :])
            for group in self._optimizer.param_groups:
                state.update((weight, state.pop(weight)) for weight in group["params"] if weight in new)


def _parts(stand_ins: Mapping[str, StandIn], limit_nbytes: int) -> Iterator[dict[str, StandIn]]:
    """All of them, as many at once as the limit allows."""
    part: dict[str, StandIn] = {}
    nbytes = 0
    for name, one in stand_ins.items():
        if part and nbytes + one.parameter.nbytes > limit_nbytes:
            yield part
            part, nbytes = {}, 0
        part[name] = one
        nbytes += one.parameter.nbytes
    if part:
        yield part


def part_of_group(group: Group, members: Sequence[nn.Parameter]) -> Group:
    """A parameter group with some of its parameters."""
    part = {**group, "params": list(members)}
    return part | _HOST_OPTIONS if part.get("capturable") else part


def step_part(
    optimizer: Optimizer, groups: list[Group], state: Mapping[torch.Tensor, dict[str, Any]] | None = None
) -> None:
    """One step of the optimizer on these groups alone; its own groups are left as they are, and so is its state if another
    one is given."""
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(optimizer.__dict__)
    shadow.__dict__.pop("step", None)  # schedulers wrap the instance's step to count calls
    shadow.param_groups = groups
    if state is not None:
        shadow.state = defaultdict(dict, state)
    type(optimizer).step(shadow)


_HOST_OPTIONS = {"capturable": False}
"""Options that mean something on a GPU only; torch refuses them for weights on the host."""


@contextmanager
def stepping_on_host(optimizer: Any) -> Iterator[None]:
    """Within, the optimizer may step weights on the host although its options were written for a GPU."""
    groups = [group for group in getattr(optimizer, "param_groups", ()) if group.get("capturable")]
    try:
        for group in groups:
            group.update(_HOST_OPTIONS)
        yield
    finally:
        for group in groups:
            group["capturable"] = True
