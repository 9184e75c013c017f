"""What no test may leave behind."""

import gc

import chain
import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other, the more so beside other test processes


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What is there by now stays: collections of garbage, of which some tests ask for one, need not go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    yield
    assert not torch._C._len_torch_function_stack()
    assert torch.is_grad_enabled()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.fixture
def nothing_stays(monkeypatch):
    """Memory that a step leaves is left: what is swapped and made again can be counted."""
    monkeypatch.setattr("harmony_lightning.strategy.residency.let_stay", lambda plan, usage, *args, **knobs: plan)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def devices(request, monkeypatch):
    """Runs a test twice: on emulated GPUs, and on real ones where there are any."""
    if request.param == "emulated":
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setattr(chain, "on_cuda", True)
    # The plan is for kilobytes; CUDA's own context and libraries would not fit such a limit.
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: None)
