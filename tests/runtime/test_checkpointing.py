import contextlib

import pytest
import torch
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from harmony_lightning.runtime.checkpointing import transparent_checkpoints

both = pytest.mark.parametrize("use_reentrant", [True, False])


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x.sin().exp()


def gradient(function, use_reentrant):
    x = torch.linspace(0, 1, 5, requires_grad=True)
    checkpoint(function, x, use_reentrant=use_reentrant).sum().backward()
    return x.grad


@both
def test_where_the_runtime_recomputes_the_function_just_runs(use_reentrant):
    function, outside = Counted(), Counted()
    expected = gradient(outside, use_reentrant)
    assert outside.calls == 2
    with transparent_checkpoints(lambda: True):
        assert torch.equal(gradient(function, use_reentrant), expected)
    assert function.calls == 1


@both
def test_elsewhere_checkpoints_work_as_always(use_reentrant):
    function = Counted()
    with transparent_checkpoints(lambda: False):
        gradient(function, use_reentrant)
    assert function.calls == 2


@both
def test_each_call_is_asked_anew(use_reentrant):
    where = iter([True, False])
    first, second = Counted(), Counted()
    with transparent_checkpoints(lambda: next(where)):
        gradient(first, use_reentrant)
        gradient(second, use_reentrant)
    assert (first.calls, second.calls) == (1, 2)


@both
def test_checkpoint_sequential_is_transparent_too(use_reentrant):
    functions = [Counted(), Counted(), Counted()]
    x = torch.ones(2, requires_grad=True)
    with transparent_checkpoints(lambda: True):
        checkpoint_sequential(functions, 2, x, use_reentrant=use_reentrant).sum().backward()
    assert [function.calls for function in functions] == [1, 1, 1]


@both
def test_several_results_and_random_numbers_pass_through(use_reentrant):
    def function(x, scale):
        return x * torch.rand(3), scale

    torch.manual_seed(3)
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(3)
    with transparent_checkpoints(lambda: True):
        result, scale = checkpoint(function, torch.ones(3, requires_grad=True), 4, use_reentrant=use_reentrant)
    assert torch.equal(result, expected[0])
    assert scale == 4
    assert torch.equal(torch.rand(3), expected[1])


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_torch_is_as_it_was_on_exit(error):
    before = dict(vars(torch_checkpoint))
    with pytest.raises(error) if error else contextlib.nullcontext(), transparent_checkpoints(lambda: True):
        assert torch_checkpoint.CheckpointFunction is not before["CheckpointFunction"]
        if error:
            raise error
    assert dict(vars(torch_checkpoint)) == before


@both
def test_errors_of_the_function_are_its_own(use_reentrant):
    def function(x):
        raise ValueError("in user code")

    with transparent_checkpoints(lambda: True), pytest.raises(ValueError, match="in user code"):
        checkpoint(function, torch.ones(1, requires_grad=True), use_reentrant=use_reentrant)


def test_nested_scopes_give_back_what_they_found():
    before = torch_checkpoint.CheckpointFunction
    with transparent_checkpoints(lambda: True):
        within = torch_checkpoint.CheckpointFunction
        with transparent_checkpoints(lambda: False):
            function = Counted()
            gradient(function, True)
            assert function.calls == 1  # the inner one hands on to the outer one
        assert torch_checkpoint.CheckpointFunction is within
    assert torch_checkpoint.CheckpointFunction is before
