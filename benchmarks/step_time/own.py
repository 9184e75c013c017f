"""What the plain model's own kernels take on a GPU: each as long as its arithmetic or its memory, whichever is longer.

Norms, activation functions, residuals and casts of activations are limited by memory. No schedule can remove them, and a
bound of matrix products alone does not know them. Each is launched, too, which takes a GPU a moment (`GpuModel`).

Plain training that accumulates over the same microbatches adds every later one's gradient to that of those before: one sum
less than there are microbatches, for each weight. They are counted apart, as cheap as they can be at equal bits: a gradient
is read as its product leaves it, bfloat16 for the weight of a linear layer under autocast, and the sum is read and written
in float32. (Plain Lightning casts each gradient to float32 first, which is left out, as are its casts of weights.)
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from models import LanguageModel, Shape
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harmony_lightning.hardware.operations import operation, tensors
from harmony_lightning.hardware.presets import GpuModel
from harmony_lightning.plan import Plan


@dataclass
class OwnKernels:
    """Seconds of one microbatch, forward and backward."""

    total: float = 0.0
    again: Counter[str] = field(default_factory=Counter)
    """By block, of its forward up to its last product, whose result nobody needs when the block is run again."""
    sums: Counter[str] = field(default_factory=Counter)
    """By layer, of adding one microbatch's gradients of its weights to those of others."""

    def per_step(self, num_microbatches: int, recomputed: Collection[str]) -> float:
        """When these blocks are run again for their backward; sums aside."""
        return num_microbatches * (self.total + sum(self.again[name] for name in recomputed))

    def sums_per_step(self, num_sums: Mapping[str, int]) -> float:
        """`num_sums`: by layer."""
        return sum(count * self.sums[name] for name, count in num_sums.items())


def num_sums(plan: Plan) -> dict[str, int]:
    """By layer: of each weight's gradients, on GPUs. Where microbatches are dealt, each GPU has a first one, and the host
    adds up what GPUs have made."""
    return {
        name: plan.num_microbatches - len(plan.visitors(index))
        for index, pack in enumerate(plan.packs)
        for name in pack.layers
    }


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
        for layer, weight in [(_layer_of(name), weight) for name, weight in module.named_parameters()]:
            nbytes = weight.grad.nbytes + 2 * torch.float32.itemsize * weight.numel()
            found.sums[layer] += nbytes / gpu.memory_bytes_per_second + gpu.launch_seconds
    return found


def _layer_of(weight: str) -> str:
    first, *others = weight.split(".")
    return f"{first}.{others[0]}" if first == "blocks" else first
