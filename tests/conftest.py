"""What no test may leave behind."""

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other, the more so beside other test processes


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    yield
    assert not torch._C._len_torch_function_stack()
    assert torch.is_grad_enabled()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
