"""The ways in which user code may write a weight between steps. Some begin with something that was taken before."""

import torch

WAYS = ["in place", "data", "exchange", "state dict", "a view from before", "numpy"]


def writer_of(weight, module, way):
    """What multiplies the weight, or a part of it, when it is called; by "state dict" all others of the module, too."""
    if way == "a view from before":
        taken = weight.view(-1)
    elif way == "numpy":
        taken = weight.detach().numpy()

    @torch.no_grad()
    def write():
        nonlocal taken
        if way == "in place":
            weight.mul_(1.5)
        elif way == "data":
            weight.data.view(-1)[5:].mul_(1.5)
        elif way == "exchange":
            weight.data = weight.data * 1.5
        elif way == "state dict":
            module.load_state_dict({name: value * 1.5 for name, value in module.state_dict().items()})
        else:
            taken *= 1.5

    return write
