"""Greenlets stand here for microbatches: each is parked in the middle of a `with` block."""

from contextlib import contextmanager

import greenlet
import pytest
import torch
from torch._C._dynamo import eval_frame
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from harmony_lightning.runtime.thread_state import ThreadState


class Functions(TorchFunctionMode):
    def __init__(self, name="functions"):
        super().__init__()
        self.name = name

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def keep(tensor):
    return tensor


@contextmanager
def compiled():
    """As within a compiled function, which only looks up what has been compiled."""
    before = eval_frame.set_eval_frame(False)
    try:
        yield
    finally:
        eval_frame.set_eval_frame(before)


def observe():
    """All that is kept per thread, as it shows from outside."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_autocast_dtype("cpu"),
        "cache": torch.is_autocast_cache_enabled(),
        "functions": [id(mode) for mode in _get_current_function_mode_stack()],
        "dispatches": [id(mode) for mode in _get_current_dispatch_mode_stack()],
        "hooks": None if hooks is None else tuple(map(id, hooks)),
        "compiler": eval_frame.get_eval_frame_callback(),
    }


class Parking:
    """Runs functions as greenlets, and parks and resumes them as the engine does."""

    def __init__(self):
        self.greenlets = {}
        self.parked = {}

    def go(self, name, function=None):
        """Let `name` run to its next `wait`."""
        if function is not None:
            self.greenlets[name] = greenlet.greenlet(function)
        base = ThreadState()
        if name in self.parked:
            self.parked.pop(name).resume()
        try:
            return self.greenlets[name].switch()
        finally:
            self.parked[name] = base.park()


def wait(value=None):
    return greenlet.getcurrent().parent.switch(value)


SCOPES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16 uncached": lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
    "function mode": Functions,
    "default device": lambda: torch.device("meta"),
    "dispatch mode": Dispatches,
    "saved tensors": lambda: saved_tensors_hooks(keep, keep),
    "compiled": compiled,
}


def scoped(scopes, seen):
    """User code that enters the scopes one by one, leaves them one by one, and waits after each move."""

    def move(step):
        step()
        before = observe()
        wait()
        seen.append(observe() == before)

    def function():
        contexts = [scope() for scope in scopes]
        for context in contexts:
            move(context.__enter__)
        for context in reversed(contexts):
            move(lambda context=context: context.__exit__(None, None, None))
        seen.append(observe())

    return function


@pytest.mark.parametrize("name", SCOPES)
def test_what_a_parked_function_entered_is_off_the_thread_and_back_when_it_goes_on(name):
    outside, seen, parking = observe(), [], Parking()
    parking.go("m0", scoped([SCOPES[name]], seen))
    assert observe() == outside
    parking.go("m0")
    parking.go("m0")
    assert observe() == outside
    assert seen == [True, True, outside]


@pytest.mark.parametrize("name", SCOPES)
def test_the_scopes_here_show(name):
    outside = observe()
    with SCOPES[name]():
        assert observe() != outside


def test_all_at_once_and_nested():
    outside, seen, parking = observe(), [], Parking()
    scopes = [*SCOPES.values(), torch.enable_grad, Functions]
    parking.go("m0", scoped(scopes, seen))
    for _ in range(2 * len(scopes)):
        assert observe() == outside
        parking.go("m0")
    assert seen == [True] * 2 * len(scopes) + [outside]


@pytest.mark.parametrize("one", SCOPES)
@pytest.mark.parametrize("other", SCOPES)
def test_interleaved_functions_do_not_see_each_other(one, other):
    """Three take turns, so that scopes are left in the order in which they were entered: no stack between them."""
    outside, parking = observe(), Parking()
    scopes = {"m0": [one, other], "m1": [other], "m2": [other, one]}
    seen = {name: [] for name in scopes}
    for name, mine in scopes.items():
        parking.go(name, scoped([SCOPES[scope] for scope in mine], seen[name]))
    for name in ("m1", "m0", "m2", "m1", *("m0", "m2") * 3):
        assert observe() == outside
        parking.go(name)
    assert observe() == outside
    assert seen == {name: [True] * 2 * len(mine) + [outside] for name, mine in scopes.items()}


def test_the_runtime_s_own_scopes_stay():
    """Only what lies above the base is taken off."""
    seen, parking = [], Parking()
    with torch.no_grad(), Functions(), Dispatches(), saved_tensors_hooks(keep, keep), torch.autocast("cpu"):
        outside = observe()
        parking.go("m0", scoped([torch.enable_grad, Functions, Dispatches, SCOPES["saved tensors"]], seen))
        assert observe() == outside
        for _ in range(8):
            parking.go("m0")
            assert observe() == outside
    assert seen == [True] * 8 + [outside]


def test_evaluation_within_inference_mode_may_leave_it():
    def leave():
        with torch.inference_mode(False):
            wait()
            assert not torch.is_inference_mode_enabled()
            assert torch.ones(2).requires_grad_().mul(2).requires_grad

    parking = Parking()
    with torch.inference_mode():
        parking.go("m0", leave)
        assert torch.is_inference_mode_enabled()
        parking.go("m0")
        assert torch.is_inference_mode_enabled()


def test_modes_are_in_force_where_they_were_entered():
    parking, seen = Parking(), []

    class Counting(Functions):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(self.name)
            return func(*args, **(kwargs or {}))

    def function():
        with Counting("outer"), Counting("inner"):
            wait()
            torch.ones(1)

    parking.go("m0", function)
    torch.ones(1)
    assert seen == []
    parking.go("m0")
    assert seen == ["inner", "outer"]
    torch.ones(1)
    assert len(seen) == 2


def test_an_error_leaves_the_thread_as_it_was():
    outside, parking = observe(), Parking()

    def function():
        with torch.no_grad(), Functions(), saved_tensors_hooks(keep, keep):
            wait()
            raise ValueError("in user code")

    parking.go("m0", function)
    with pytest.raises(ValueError, match="in user code"):
        parking.go("m0")
    assert observe() == outside
