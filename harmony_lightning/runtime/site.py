"""A call site: one interposed module of the user's, with the places where its weights and buffers hang.

Running a site means: hang device-resident tensors into the module's own places, call the module as it would have been
called, and hang the user's `Parameter`s and buffers back, whatever happens. The user's objects are never changed.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.hardware.out_of_memory import told_by_type
from harmony_lightning.runtime.derived import find_derived

Call = Callable[..., Any]


class Site:
    """One interposed module.

    Attributes:
        name: of the module within the root.
        layer: name of the layer it belongs to; the same unless user code calls into a layer.
        pack: index of its pack; None for a module without weights, which runs wherever its microbatch is.
        weight_names: of its weights, each once.
        call: calls the module as if nothing were interposed.
        is_compiled: torch's compiler has taken it, or a part of it.
    """

    def __init__(
        self, module: nn.Module, name: str, layer: str, pack: int | None, names: Mapping[int, str], call: Call
    ) -> None:
        self.module = module
        self.name = name
        self.layer = layer
        self.pack = pack
        self.call = call
        self._weights = [
            (owner, attribute, names[id(parameter)], parameter)
            for owner in module.modules()
            for attribute, parameter in owner._parameters.items()
            if parameter is not None
        ]
        """Places, with the names of the masters that hang there."""
        self.weight_names = tuple(dict.fromkeys(weight for _, _, weight, _ in self._weights))
        self.buffer_places = [
            (owner, attribute)
            for owner in module.modules()
            for attribute, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self.written_buffers: dict[tuple[bool, ...], frozenset[int]] = {}
        """By training flags of the buffers' owners: which places a forward was seen to write."""
        self.mutated_inputs: frozenset[int] | None = None
        """Positions of input tensors that a forward was seen to write in place; None before the first call."""
        self.writes_objects: bool | None = None
        """Whether a forward was seen to write tensors within the objects it is given; None before the first."""
        self.num_checked = 0
        """Calls whose graph was looked through."""
        self.differentiates = False
        """Whether a forward was seen to take derivatives by itself."""
        self.has_functions: bool | None = None
        """Whether Python autograd functions of the user's were seen in a forward's graph."""
        self.saved_kinds: list[tuple[torch.Size, torch.dtype]] = []
        """Of the tensors that operations of the last forward have saved."""
        self.draws = False
        """Whether a forward was seen to draw random numbers."""
        self.joins: bool | None = None
        """Whether it may be called for several microbatches at once; None: nobody has tried."""
        self.writes_weights = False
        """Whether its forward has written weights of its own."""
        self._hooks_inside = [inner._forward_hooks for inner in module.modules() if inner is not module]
        self._derived = [(one.owner, one.attribute) for one in find_derived(module)]
        self.is_compiled = any(
            hasattr(inner, "_orig_mod") or not isinstance(inner._compiled_call_impl, _Seam | None)
            for inner in module.modules()
        )
        self._recurrent = [owner for owner in module.modules() if isinstance(owner, nn.RNNBase)]
        self._hangs_weights_alone = not (self.buffer_places or self._derived or self._recurrent)

    def has_hooks_inside(self) -> bool:
        """Whether somebody watches results of modules within this one now. They must be results of layers then."""
        return any(self._hooks_inside)

    def has_own_weights(self) -> bool:
        """Whether the masters hang in their places. `torch.func.functional_call` hangs others there for one call, and the
        module must be run with those."""
        for owner, attribute, _, master in self._weights:  # noqa: SIM110  # a generator takes twice as long
            if owner._parameters.get(attribute) is not master:
                return False
        return True

    def training_flags(self) -> tuple[bool, ...]:
        return tuple(owner.training for owner, _ in self.buffer_places)

    def run(self, weights: Mapping[str, torch.Tensor], buffers: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """Call the module on other weights and buffers, without its own forward hooks: see `run_forward_hooks`.

        `buffers` follow `buffer_places`; an entry is replaced if the module hangs a new tensor into that place.
        """
        if not self._hooks_follow():
            return self._run_hung(weights, buffers, args, kwargs)
        hooks, self.module._forward_hooks = self.module._forward_hooks, OrderedDict()
        try:
            return self._run_hung(weights, buffers, args, kwargs)
        finally:
            self.module._forward_hooks = hooks

    def run_forward_hooks(self, args: Any, kwargs: Any, result: Any) -> Any:
        """The user's forward hooks on this very module, as part of the code around it. So they run once, though the module
        is recomputed, and what they keep is the layer's real result."""
        if self._hooks_follow():
            for key, hook in list(self.module._forward_hooks.items()):
                takes_kwargs = key in self.module._forward_hooks_with_kwargs
                answer = hook(self.module, args, kwargs, result) if takes_kwargs else hook(self.module, args, result)
                if answer is not None:
                    result = answer
        return result

    def _hooks_follow(self) -> bool:
        # Hooks that want to be called on errors too stay where errors are.
        return bool(self.module._forward_hooks) and not self.module._forward_hooks_always_called

    def _run_hung(
        self, weights: Mapping[str, torch.Tensor], buffers: list[torch.Tensor], args: Any, kwargs: Any
    ) -> Any:
        own_weights = [owner._parameters[attribute] for owner, attribute, _, _ in self._weights]
        try:
            for owner, attribute, name, _ in self._weights:
                owner._parameters[attribute] = weights[name]  # type: ignore[assignment]
            if self._hangs_weights_alone:
                return told_by_type(self.call, *args, **kwargs)
            return self._run_with_more(buffers, args, kwargs)
        finally:
            for (owner, attribute, _, _), parameter in zip(self._weights, own_weights, strict=True):
                owner._parameters[attribute] = parameter

    def _run_with_more(self, buffers: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """With buffers, and what modules keep beside their weights."""
        own_buffers = [owner._buffers[attribute] for owner, attribute in self.buffer_places]
        own_flat = [owner._flat_weights for owner in self._recurrent]
        own_derived = [owner.__dict__.get(attribute) for owner, attribute in self._derived]
        try:
            for (owner, attribute), buffer in zip(self.buffer_places, buffers, strict=True):
                owner._buffers[attribute] = buffer
            for recurrent in self._recurrent:
                # Recurrent modules keep a second list of their weights, for cuDNN.
                recurrent._flat_weights = [getattr(recurrent, name) for name in recurrent._flat_weights_names]
            result = told_by_type(self.call, *args, **kwargs)
            for index, (owner, attribute) in enumerate(self.buffer_places):
                if (now := owner._buffers[attribute]) is not None:
                    buffers[index] = now
            return result
        finally:
            for (owner, attribute), own in zip(self.buffer_places, own_buffers, strict=True):
                owner._buffers[attribute] = own
            for (owner, attribute), weight in zip(self._derived, own_derived, strict=True):
                owner.__dict__[attribute] = weight
            for recurrent, flat in zip(self._recurrent, own_flat, strict=True):
                recurrent._flat_weights = flat


class Interposition:
    """All call sites of a root module, in force between `install` and `remove`.

    The seam is `Module._compiled_call_impl`: hooks and parametrisations of the user run inside it, and copies and
    pickles of the module leave it behind.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._before: list[tuple[nn.Module, Any]] = []
        self.sites: dict[int, Site] = {}

    def install(
        self,
        packs: Mapping[str, int],
        layers: Mapping[str, tuple[str, ...]],
        names: Mapping[int, str],
        dispatch: Call,
    ) -> None:
        """Send the calls of all layers, and of the modules within them, to `dispatch`.

        Args:
            packs: pack by layer name.
            layers: weight names by layer name.
            names: parameter names by identity.
            dispatch: receives the site of each call in front of its arguments; returns the module's result.
        """
        self.remove()
        for name, module in self._root.named_modules():
            layer = _enclosing(name, layers)
            has_state = layer is not None or any(b is not None for b in module._buffers.values())
            if module is self._root or not has_state or id(module) in self.sites:
                continue
            if layer is not None and not any(True for _ in module.parameters()) and not _has_buffers(module):
                continue
            has_weights = next(module.parameters(), None) is not None
            if (layer is None and has_weights) or (not has_weights and _keeps_tensors(module)):
                continue  # above the layers, or a metric that adds up in its attributes: its own code is glue
            before = module._compiled_call_impl
            site = Site(
                module,
                name,
                layer or name,
                None if layer is None or not layers[layer] else packs[layer],
                names,
                before if before is not None else module._call_impl,
            )
            self.sites[id(module)] = site
            self._before.append((module, before))
            module._compiled_call_impl = _Seam(dispatch, site)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Calls are errors: a copy of the root is run, and must not reach the modules that it is a copy of."""
        seams = [(site.module, site.module._compiled_call_impl) for site in self.sites.values()]
        try:
            for module, _ in seams:
                module._compiled_call_impl = _refuse
            yield
        finally:
            for module, seam in seams:
                module._compiled_call_impl = seam

    def remove(self) -> None:
        """Give all modules their own calls back."""
        for module, before in reversed(self._before):
            module._compiled_call_impl = before
        self._before.clear()
        self.sites.clear()


class _Seam(functools.partial[Any]):
    """What stands in for a module's call. No Python of its own: modules within a layer pass it, too."""

    __slots__ = ()


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedError("a copy of the module calls layers of the module itself")


def _keeps_tensors(module: nn.Module) -> bool:
    return any(isinstance(value, torch.Tensor) for value in vars(module).values())


def _has_buffers(module: nn.Module) -> bool:
    return next(module.buffers(), None) is not None


def _enclosing(name: str, layers: Mapping[str, tuple[str, ...]]) -> str | None:
    """The layer that is, or holds, the module of this name."""
    while name:
        if name in layers:
            return name
        name = name.rpartition(".")[0]
    return None
