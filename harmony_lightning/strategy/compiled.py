"""What of `torch.compile` takes part: modules that are called within the step, not the step as a whole. And of TorchScript:
only modules whose weights nobody has to bring or to train."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harmony_lightning.errors import UnsupportedError

_WHOLE = (
    "torch.compile of the whole module is passed over: a step that goes from pack to pack cannot be one graph. Compile "
    "what is called within: for block in module.blocks: block.compile()"
)
_EMULATED = "compiled modules run eagerly on emulated GPUs, whose tensors torch.compile does not know"


def what_runs_eagerly(module: Any, is_emulated: bool) -> str | None:
    """What of the user's wishes is not met, in words; None if all of it is."""
    if _is_compiled_as_a_whole(module):
        return _WHOLE
    is_compiled = any(inner._compiled_call_impl is not None for inner in module.modules())
    return _EMULATED if is_compiled and is_emulated else None


def refuse_scripts(module: Any, *, on_host: bool, trains: bool) -> None:
    """TorchScript uses weights where nobody sees it: they are not brought to devices, and gradients do not come back.

    Args:
        module: all of the user's.
        on_host: nothing has to be brought.
        trains: gradients are wanted.

    Raises:
        UnsupportedError: that would be an error within TorchScript, or weights that silently do not train.
    """
    for name, inner in module.named_modules():
        if not isinstance(inner, torch.jit.ScriptModule):
            continue
        needs_device = not on_host and any(True for of in (inner.parameters(), inner.buffers()) for _ in of)
        if needs_device or (trains and any(parameter.requires_grad for parameter in inner.parameters())):
            raise UnsupportedError(
                f"{name} is a TorchScript module, which uses its weights where nobody sees it, so they can neither be "
                f"brought to a GPU nor be trained. Use the module that it was made of, and script that behind training"
            )


@contextmanager
def uncompiled_step(module: Any) -> Iterator[None]:
    """In force around the user's step: a module that was compiled as a whole runs as it was written."""
    if _is_compiled_as_a_whole(module):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _is_compiled_as_a_whole(module: Any) -> bool:
    return getattr(module, "_compiler_ctx", None) is not None
