"""Finds the layers of any module tree without help.

A layer should be as large as possible, so that little has to be stashed between layers, but small enough that two of
them with their gradients fit on a GPU. So the tree is walked from the root, and a module becomes a layer as soon as its
weights fit the unit size. Two kinds of module are never taken apart, whatever their size: one that holds most of its
bytes itself (its `forward` uses them directly), and one whose weights are parametrised (they exist only in its calls).

Whether the `forward` of a module is ever called cannot be seen here; if it is not, calls of the modules within it are
caught instead, and belong to the same pack.
"""

import fnmatch
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from harmony_lightning.decomposer.decomposition import Decomposition, Layer, Weight
from harmony_lightning.errors import ConfigurationError

LayerChoice = str | type[nn.Module]
"""A name or glob of module names ("model.layers.*"), or a class whose instances are layers."""


def weight_names(root: nn.Module) -> dict[int, str]:
    """The first name of each parameter, by identity."""
    return {id(parameter): name for name, parameter in root.named_parameters()}


def decompose(root: nn.Module, unit_nbytes: int, choices: Sequence[LayerChoice] = ()) -> Decomposition:
    """Layers of `root`, in the order of registration.

    Args:
        root: the module; it is never a layer itself.
        unit_nbytes: the most bytes of weights that one layer should have.
        choices: the user's own layers; the rest of the tree is decomposed as usual.

    Raises:
        ConfigurationError: a choice matches no module with weights.
    """
    layers, seen = [], set[int]()
    for name, module in _walk(root, unit_nbytes, _chosen(root, choices)):
        if id(module) not in seen:
            seen.add(id(module))
            layers.append((name, module))
    return _decomposition(root, layers)


def decompose_as(root: nn.Module, layers: Sequence[str]) -> Decomposition:
    """The layers of these names, in this order; what is outside of them is used by the code around layers.

    Raises:
        ConfigurationError: one is no module with weights, or lies in another one, or a module with weights is left out
            altogether.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    for name in layers:
        if not name or name not in modules or next(modules[name].parameters(), None) is None:
            raise ConfigurationError(f"the plan names layer {name!r}, which this module does not have")
        if around := [other for other in layers if name.startswith(f"{other}.")]:
            raise ConfigurationError(f"the plan names layer {name!r}, which is a part of its layer {around[0]!r}")
    inside = {id(parameter) for name in layers for parameter in modules[name].parameters()}
    for name, module in modules.items():
        if not name or is_container(module) or isinstance(module, torch.jit.ScriptModule):
            continue
        left = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in inside]
        if left and not any(layer.startswith(f"{name}.") for layer in layers):
            raise ConfigurationError(
                f"the plan must have layer {name!r}, or one around it, in one pack, it has it in none"
            )
    return _decomposition(root, [(name, modules[name]) for name in dict.fromkeys(layers)])


def _decomposition(root: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> Decomposition:
    names = weight_names(root)
    layers = [
        Layer(name=name, weights=tuple(dict.fromkeys(names[id(parameter)] for parameter in module.parameters())))
        for name, module in modules
    ]
    weights_of_root = tuple(
        Weight(name=name, nbytes=parameter.nbytes, is_trainable=parameter.requires_grad)
        for name, parameter in root.named_parameters()
    )
    has_batch_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in root.modules())
    return Decomposition(layers=tuple(layers), weights=weights_of_root, has_batch_statistics=has_batch_statistics)


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others: it has no `forward` that could be called."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def _walk(root: nn.Module, unit_nbytes: int, chosen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Depth first, in the order of registration; without recursion, as user trees can be deep."""
    stack = [(name, child) for name, child in reversed(list(root.named_children()))]
    while stack:
        name, module = stack.pop()
        if id(module) in chosen or _is_layer(module, unit_nbytes, chosen):
            yield name, module
        else:
            stack += [(f"{name}.{child_name}", child) for child_name, child in reversed(list(module.named_children()))]


def _is_layer(module: nn.Module, unit_nbytes: int, chosen: set[int]) -> bool:
    own = list(module.parameters())
    if not own or is_container(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    if chosen and any(id(inner) in chosen for inner in module.modules()):
        return False
    if parametrize.is_parametrized(module):
        return True
    nbytes = sum(parameter.nbytes for parameter in own)
    direct = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return nbytes <= unit_nbytes or 2 * direct >= nbytes


def _chosen(root: nn.Module, choices: Sequence[LayerChoice]) -> set[int]:
    found: set[int] = set()
    for choice in choices:
        matches = {
            id(module)
            for name, module in root.named_modules()
            if module is not root
            and (fnmatch.fnmatchcase(name, choice) if isinstance(choice, str) else isinstance(module, choice))
            and next(module.parameters(), None) is not None
            and not is_container(module)
        }
        if not matches:
            raise ConfigurationError(
                f"layers={choice!r} matches no module with weights; module names look like "
                f"{', '.join(repr(name) for name, _ in list(root.named_modules())[1:6])}"
            )
        found |= matches
    return found
