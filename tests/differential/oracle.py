"""One device that accumulates over the microbatches of each minibatch: what several microbatches are compared with.

Written without the package's own ideas: microbatches run one after the other, each with a whole graph of its own, and are
differentiated in their order by plain autograd. What they log is not merged: rows are compared with plain Lightning.
"""

import torch
from torch.utils import _pytree as pytree


class Accumulate(torch.autograd.Function):
    """Mean of the losses; its backward is that of each microbatch, in order.

    Gradients of earlier minibatches are added at the end: microbatches are summed before minibatches.
    """

    @staticmethod
    def forward(ctx, root, losses, shares, parameters):
        ctx.losses, ctx.shares, ctx.parameters = losses, shares, parameters
        return sum(share * loss.detach() for share, loss in zip(shares, losses, strict=True)) + 0 * root

    @staticmethod
    def backward(ctx, factor):
        earlier = [parameter.grad for parameter in ctx.parameters]
        for parameter in ctx.parameters:
            parameter.grad = None
        for loss, share in zip(ctx.losses, ctx.shares, strict=True):
            loss.backward(torch.full_like(loss, share * float(factor)))
        for parameter, gradient in zip(ctx.parameters, earlier, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        return None, None, None, None


def make_strategy(pl, microbatch_size):
    class OneDevice(pl.strategies.SingleDeviceStrategy):
        def __init__(self):
            super().__init__(device=torch.device("cpu"))

        def training_step(self, batch, batch_idx):
            sizes = [len(part) for part in batch[0].split(microbatch_size)]
            parts = zip(*(column.split(microbatch_size) for column in batch), strict=True)
            outputs = [super(OneDevice, self).training_step(part, batch_idx) for part in map(list, parts)]
            losses = [output["loss"] if isinstance(output, dict) else output for output in outputs]
            if losses[0] is None:
                return None
            shares = [size / sum(sizes) for size in sizes]
            root = torch.zeros((), dtype=losses[0].dtype, requires_grad=True)
            loss = Accumulate.apply(root, losses, shares, list(self.lightning_module.parameters()))
            if isinstance(outputs[0], dict):
                rest = pytree.tree_map_only(torch.Tensor, torch.detach, outputs[-1])
                return {**rest, "loss": loss}
            return loss

    return OneDevice()
