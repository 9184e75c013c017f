"""What the plain model's own kernels take on a GPU: each as long as its arithmetic or its memory, whichever is longer.

Norms, activation functions, residuals and casts of activations are limited by memory. No schedule can remove them, and a
bound of matrix products alone does not know them. Each is launched, too, which takes a GPU a moment (`GpuModel`). What
microbatches add is left out: sums of gradients over them, and casts of weights and of their gradients.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from models import LanguageModel, Shape
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harmony_lightning.hardware.operations import operation, tensors
from harmony_lightning.hardware.presets import GpuModel


@dataclass
class OwnKernels:
    """Seconds of one microbatch, forward and backward."""

    total: float = 0.0
    again: Counter[str] = field(default_factory=Counter)
    """By block, of its forward up to its last product, whose result nobody needs when the block is run again."""

    def per_step(self, num_microbatches: int, recomputed: Collection[str]) -> float:
        """When these blocks are run again for their backward."""
        return num_microbatches * (self.total + sum(self.again[name] for name in recomputed))


def own_kernels(shape: Shape, batch_shape: tuple[int, int], gpu: GpuModel, precision: str) -> OwnKernels:
    """Of the model with weights as they travel, on a microbatch of [sequences, tokens]."""
    found, running, started = OwnKernels(), [], Counter[str]()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            one = operation(func)
            if one.is_idle or func.namespace != "aten":
                return out
            operands = list(tensors((args, kwargs.values(), out)))
            is_narrow = any(t.dtype in (torch.bfloat16, torch.float16) for t in operands)
            flops = one.flops(args, kwargs, out)
            nbytes = one.nbytes(args, kwargs, out)
            rate = gpu.flops("bfloat16" if is_narrow else "float32")
            seconds = max(flops / rate, nbytes / gpu.memory_bytes_per_second) + gpu.launch_seconds
            found.total += seconds
            for name in running:
                started[name] += seconds
                if func is torch.ops.aten.mm.default:
                    found.again[name] = started[name] - seconds
            return out

    with FakeTensorMode():
        module = LanguageModel(shape)
        if precision != "32-true":
            for inner in module.modules():
                if isinstance(inner, nn.Linear):
                    inner.weight = nn.Parameter(torch.empty(inner.weight.shape, dtype=torch.bfloat16))
        for name, layer in [(f"blocks.{i}", block) for i, block in enumerate(module.blocks)]:
            layer.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            layer.register_forward_hook(lambda *_: running.clear())
        tokens = torch.zeros(batch_shape, dtype=torch.long)
        with Count(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            module.training_step(tokens, 0).backward()
    return found
