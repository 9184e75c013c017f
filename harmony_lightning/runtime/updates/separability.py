"""Whether an optimizer is separable: stepping parameters one after the other equals stepping them together.

Only then may packs be updated just in time. No list of names can tell: options decide (a trust ratio per parameter is
separable, a clipped global norm is not), and everybody writes optimizers. So it is tried: two clones of the optimizer, over
a few tiny parameters of the kinds that it really has, take some steps with the same gradients; one steps all parameters at
once, the other one by one, last to first, by the very mechanism that updates packs (`update`). Weights, state, groups and
every other attribute must be equal to the bit. Gradients are small and large, missing, and left over from before.
"""

import copy
import functools
import inspect
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from harmony_lightning.runtime.randomness import HostState
from harmony_lightning.runtime.updates.update import Group, part_of_group, step_part

_ROUNDS = (
    (1.0, False, False),
    (1e-3, True, False),
    (1e2, False, True),
    (1.0, True, True),
    (1e2, True, False),
    (1e-1, False, False),
)
"""Step by step: the scale of gradients (what compares a norm with a threshold shows itself at one of them), whether some
are missing, and whether all are there from the beginning, as when minibatches are accumulated."""
_MAX_SIZE = 3
_PER_KIND = 2
_MAX_KINDS = 4
_MAX_GROUPS = 8
_LEARNING_RATE = 1e-2
"""Used where a warm-up begins with 0: every update would look the same."""
_NOT_COMPARED = frozenset(("step", "_opt_called", "_zero_grad_profile_name", "_need_device_dtype_check_for_fused"))


class Separability:
    """What is known of each optimizer; options are looked at anew each time, as schedulers and users change them."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, dict[Any, str | None]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["Separability"], tuple[()]]:
        """A copy finds out anew: weak references cannot be pickled."""
        return Separability, ()

    def reason_against(self, optimizer: Optimizer) -> str | None:
        """Why the optimizer must step all its parameters together; None if it need not.

        Hooks on its step are not answered from memory: they may come and go.
        """
        if (reason := _observer(optimizer) or _list_for_parameters(optimizer)) is not None:
            return reason
        return self._look_up(optimizer, moves=False)

    def reason_against_moving(self, optimizer: Optimizer) -> str | None:
        """Why parameters of a separable optimizer must be stepped where they are; None if copies may be."""
        return self._look_up(optimizer, moves=True)

    def _look_up(self, optimizer: Optimizer, *, moves: bool) -> str | None:
        known = self._known.setdefault(optimizer, {})
        question = _signature(optimizer), moves
        if question not in known:
            known[question] = probe(optimizer, moves=moves)
        return known[question]


def probe(optimizer: Optimizer, *, moves: bool = False) -> str | None:
    """Why stepping parameters one by one is not the optimizer's own step; None if it is. Nothing real is touched. `moves`:
    what is stepped are copies of parameters and of what is remembered of them."""
    streams = HostState.capture()
    try:
        with torch.enable_grad():
            return _try(optimizer, _step_in_place if not moves else _step_copies)
    except Exception as error:
        return f"a trial step on copies failed ({type(error).__name__}: {error})"
    finally:
        streams.restore()


def _try(optimizer: Optimizer, step: Callable[[Optimizer, nn.Parameter], None]) -> str | None:
    together, apart = clone_small(optimizer), clone_small(optimizer)
    ours, theirs = _parameters(together), _parameters(apart)
    generator = torch.Generator().manual_seed(0)
    for round_, (scale, has_missing, has_leftovers) in enumerate(_ROUNDS):
        gradients = [
            None if has_missing and (index + round_) % 3 == 2 else _random(parameter, generator) * scale
            for index, parameter in enumerate(ours)
        ]
        _seed(round_)
        if not _step_once(together, ours, functools.partial(_give, ours, gradients)):
            return "it evaluates the closure not once, or on weights that it has moved"
        _seed(round_)
        if has_leftovers:
            _give(theirs, gradients)
        _step_once(apart, theirs, functools.partial(_step_one_by_one, apart, theirs, gradients, step))
        if not all(_is_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            return "its update of one parameter depends on the others"
        if not _is_equal(_remembered(together, ours), _remembered(apart, theirs)):
            return "it remembers something of all parameters together"
    return None


def _step_once(optimizer: Optimizer, parameters: list[nn.Parameter], backward: Callable[[], None]) -> bool:
    """One step with a closure that only has a backward, as Lightning takes it. Returns whether the closure was called once,
    with the weights as they were."""
    before = [parameter.detach().clone() for parameter in parameters]
    calls = []

    def closure() -> Any:
        calls.append(all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True)))
        backward()
        return torch.ones(())

    type(optimizer).step(optimizer, closure=closure)
    for parameter in parameters:
        parameter.grad = None
    return calls == [True]


def _give(parameters: list[nn.Parameter], gradients: list[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


def _step_one_by_one(
    optimizer: Optimizer,
    parameters: list[nn.Parameter],
    gradients: list[torch.Tensor | None],
    step: Callable[[Optimizer, nn.Parameter], None],
) -> None:
    """As packs are, from last to first. The whole step finds no gradient any more then."""
    for parameter, gradient in reversed(list(zip(parameters, gradients, strict=True))):
        if gradient is not None:
            parameter.grad = gradient.clone()
            step(optimizer, parameter)
            parameter.grad = None


def _step_in_place(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    step_part(optimizer, _groups_with(optimizer, parameter, parameter))


def _step_copies(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """As devices update."""
    remembered = optimizer.state.get(parameter, {})
    state = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in remembered.items()}
    with torch.no_grad():
        copied = nn.Parameter(parameter.clone())
        copied.grad = parameter.grad
        step_part(optimizer, _groups_with(optimizer, parameter, copied), {copied: state})
        parameter.copy_(copied)
        if state or remembered:
            optimizer.state[parameter] = state


def _groups_with(optimizer: Optimizer, parameter: nn.Parameter, stepped: nn.Parameter) -> list[Group]:
    return [part_of_group(group, [stepped]) for group in optimizer.param_groups if _holds(group, parameter)]


def _observer(optimizer: Optimizer) -> str | None:
    """What would see a step for each pack instead of one."""
    hooks = (
        getattr(optimizer, "_optimizer_step_pre_hooks", None),
        getattr(optimizer, "_optimizer_step_post_hooks", None),
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if any(hooks):
        return "hooks on its step see all parameters at once"
    own = vars(optimizer).get("step")
    if own is not None and not getattr(own, "_wrapped_by_lr_sched", False):
        return "its step was replaced"
    return _step_of_user(type(optimizer))


def _step_of_user(kind: type[Optimizer]) -> str | None:
    """Whether somebody's step goes around that of an optimizer of torch: it counts, prints or records steps, which a trial
    on copies and a call for each pack would show. One that somebody has written from scratch is tried."""
    owners = [cls for cls in kind.__mro__ if cls is not Optimizer and "step" in vars(cls)]
    are_of_torch = [_is_of_torch(inspect.unwrap(vars(cls)["step"])) for cls in owners]
    if any(_is_of_torch(cls) for cls in owners) and not all(are_of_torch):
        return "its step goes around that of one of torch's optimizers, and is called once in each step"
    return None


def _is_of_torch(named: Any) -> bool:
    return str(getattr(named, "__module__", None)).startswith("torch.optim.")


def _list_for_parameters(optimizer: Optimizer) -> str | None:
    """A list with one entry for each parameter could not be taken apart with them."""
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, list) and len(value) == len(group["params"]) and key not in ("params", "param_names"):
                return f"{key!r} may hold one entry for each parameter"
    return None


# Clones ---------------------------------------------------------------------------------------------------------------


def clone_small(optimizer: Optimizer) -> Optimizer:
    """The optimizer over tiny parameters. Optimizers within it (as wrappers have) are cloned along."""
    sample = _sample(optimizer.param_groups)
    generator = torch.Generator().manual_seed(1)
    # Tensors that have no stand-in are left alone: none of them may be copied, they are as large as the model.
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for parameter in sample:
        shape = [min(size, _MAX_SIZE) for size in parameter.shape]
        stand_in = torch.empty(shape, dtype=parameter.dtype)
        memo[id(parameter)] = nn.Parameter(_random(stand_in, generator))
    return _copy_optimizer(optimizer, sample, memo)


def _copy_optimizer(optimizer: Optimizer, sample: list[nn.Parameter], memo: dict[int, Any]) -> Optimizer:
    if id(optimizer) in memo:
        return memo[id(optimizer)]  # type: ignore[no-any-return]
    clone = memo[id(optimizer)] = object.__new__(type(optimizer))
    attributes = vars(optimizer)
    groups, state = attributes.get("param_groups"), attributes.get("state")
    if id(groups) not in memo:
        memo[id(groups)] = [_copy_group(group, sample, memo) for group in groups or () if _holds_any(group, sample)]
    if id(state) not in memo:
        memo[id(state)] = _copy_state(state or {}, sample, memo)
    for name, value in attributes.items():
        if name == "step":
            continue
        if isinstance(value, Optimizer):
            clone.__dict__[name] = _copy_optimizer(value, sample, memo)
        elif name.startswith("_optimizer_") and name.endswith("_hooks"):
            clone.__dict__[name] = OrderedDict()
        else:
            clone.__dict__[name] = copy.deepcopy(value, memo)
    return clone


def _copy_group(group: Group, sample: list[nn.Parameter], memo: dict[int, Any]) -> Group:
    if id(group) in memo:
        return memo[id(group)]  # type: ignore[no-any-return]
    part = part_of_group(group, [parameter for parameter in sample if _holds(group, parameter)])
    copied = memo[id(group)] = {key: copy.deepcopy(value, memo) for key, value in part.items()}
    if isinstance(rate := copied.get("lr"), float | int | torch.Tensor) and rate == 0:
        copied["lr"] = copied.get("initial_lr") or _LEARNING_RATE
    return copied


def _copy_state(state: Mapping[Any, Any], sample: list[nn.Parameter], memo: dict[int, Any]) -> Any:
    """Some optimizers fill their state when they are made. Values of another shape than their parameter's are left out
    with all that belongs to that parameter: the clone makes them anew."""
    copied: defaultdict[Any, Any] = defaultdict(dict)
    for parameter in sample:
        entries = state.get(parameter)
        if not isinstance(entries, Mapping):
            continue
        if all(
            value.dim() == 0 or value.shape == parameter.shape
            if isinstance(value, torch.Tensor)
            else isinstance(value, int | float | str | None)
            for value in entries.values()
        ):
            stand_in = memo[id(parameter)]
            corner = tuple(slice(size) for size in stand_in.shape)
            copied[stand_in] = {
                key: (value[corner] if value.dim() else value).detach().clone()
                if isinstance(value, torch.Tensor)
                else value
                for key, value in entries.items()
            }
    return copied


def _sample(groups: Iterable[Group]) -> list[nn.Parameter]:
    """A few parameters of each kind from a few groups of each kind."""
    chosen: list[nn.Parameter] = []
    seen: defaultdict[Any, int] = defaultdict(int)
    for group in groups:
        options = options_of(group)
        if seen[options] >= _PER_KIND or len(seen) > _MAX_GROUPS:
            continue
        seen[options] += 1
        kinds: defaultdict[Any, int] = defaultdict(int)
        for parameter in group["params"]:
            kind = (parameter.dtype, parameter.dim())
            if kinds[kind] < _PER_KIND and (kind in kinds or len(kinds) <= _MAX_KINDS) and parameter.numel():
                kinds[kind] += 1
                chosen.append(parameter)
    return chosen


# Comparing ------------------------------------------------------------------------------------------------------------


def _signature(optimizer: Optimizer) -> Any:
    """What of the options may change the answer. Sizes of numbers are not looked at, schedulers change them all the time;
    whether they are zero is."""
    return frozenset(options_of(group) for group in optimizer.param_groups)


def options_of(group: Group) -> Any:
    """What of a group's options may change the answer, to be compared."""
    return tuple((key, _kind(value)) for key, value in group.items() if key not in ("params", "param_names", "lr"))


def _kind(value: Any) -> Any:
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, int | float):
        return bool(value)
    if isinstance(value, tuple | list):
        return tuple(_kind(item) for item in value)
    return type(value)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _remembered(optimizer: Optimizer, parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Everything an optimizer holds beside the weights; parameters are named by their position."""
    positions = {id(parameter): index for index, parameter in enumerate(parameters)}

    def named(value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return positions.get(id(value), value)
        if isinstance(value, Mapping):
            return {named(key): named(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [named(item) for item in value]
        return _remembered(value, parameters) if isinstance(value, Optimizer) else value

    return {name: named(value) for name, value in vars(optimizer).items() if name not in _NOT_COMPARED}


def _is_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(torch.nan_to_num(one.detach()), torch.nan_to_num(other.detach()))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(_is_equal(a, b) for a, b in zip(one, other, strict=True))
    if hasattr(one, "__dict__") and "__eq__" not in vars(type(one)):
        return _is_equal(vars(one), vars(other))
    return bool(one == other)


def _holds(group: Group, parameter: nn.Parameter) -> bool:
    return any(member is parameter for member in group["params"])


def _holds_any(group: Group, sample: list[nn.Parameter]) -> bool:
    return any(_holds(group, parameter) for parameter in sample)


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    wide = torch.complex64 if like.is_complex() else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=wide).to(like.dtype)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # not those of GPUs
    random.seed(seed)
    numpy.random.seed(seed)
