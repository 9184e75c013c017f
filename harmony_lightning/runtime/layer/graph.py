"""What the graph of a layer's own operations may reach: its inputs and its weights, and no slot once the layer is over."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.runtime.layer.call import LayerCall


def follow_kept_results(call: LayerCall, results: list[torch.Tensor], detached: list[torch.Tensor]) -> None:
    """A hook that ran inside the layer may have kept a result; glue that uses it means the layer's real result."""
    replaced = call.segment.replaced
    for index, outer in enumerate(detached):
        # Held by the list of results and by getrefcount itself; by anybody else it was kept.
        if sys.getrefcount(results[index]) > 2:
            replaced[id(results[index])] = (results[index], outer)


def outlive_slots(results: Sequence[torch.Tensor], call: LayerCall) -> None:
    """Autograd functions of the user's may hold weights as attributes. Their slot will be overwritten, so they get copies
    of their own. Whether a layer has such functions is learned from its first call."""
    site, state = call.site, call.segment.state
    if state.cluster.host_is_device or site.has_functions is False:
        return
    site.has_functions = False
    for function in _functions(results):
        site.has_functions = True
        for name, held in vars(function).items():
            setattr(function, name, pytree.tree_map_only(torch.Tensor, state.weights.off_the_arena, held))


def refuse_strangers(results: Sequence[torch.Tensor], call: LayerCall, start: int) -> None:
    """The layer's own graph must end at its inputs and weights: beyond, gradients would be lost. Looked for in the first
    calls, and where objects were given, into which not everybody can look.

    Raises:
        UnsupportedError: it goes on to nodes from before `start`, or to weights of others.
    """
    site, state = call.site, call.segment.state
    if site.num_checked >= _NUM_CHECKED and not call.objects:
        return
    site.num_checked += 1
    for node in _nodes(results):
        variable = getattr(node, "variable", None)
        name = None if variable is None else state.weight_name(variable)
        if name is not None and name not in call.trained:
            what = f"weight {name}"
        elif variable is None and node._sequence_nr() < start:
            what = f"a result of {node.name()}"
        else:
            continue
        raise UnsupportedError(
            f"layer {site.name} used {what}, which requires a gradient and is neither an argument nor a weight of the "
            f"layer (is it kept in an attribute or a closure?); that gradient would be lost. Hand it to the layer as an "
            f"argument, or make a module that contains both one layer: HarmonyStrategy(layers=[...])"
        )


_NUM_CHECKED = 4
"""Calls of each layer whose graph is looked at; what it does then, it is taken to do always."""


def _nodes(results: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Of the graph of these tensors."""
    nodes, seen = [result.grad_fn for result in results], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes += [following for following, _ in node.next_functions]


def _functions(results: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Nodes of Python autograd functions in the graph of these tensors."""
    return (node for node in _nodes(results) if isinstance(node, torch.autograd.function.BackwardCFunction))
