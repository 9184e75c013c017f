"""`Trainer(strategy="harmony")` without an import of this package.

Lightning looks a strategy's name up before it loads entry points of its own. But `import torch`, which comes before the
import of its strategies, calls every `torch.backends` entry point (unless TORCH_DEVICE_BACKEND_AUTOLOAD=0). Ours leaves
a hook that registers the name right after that import, in each of the two copies in which Lightning ships.

Imports neither torch nor Lightning, and never raises: an error here would make `import torch` fail for every program.
"""

import importlib
import importlib.util
import logging
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

log = logging.getLogger(__name__)
_STRATEGY_MODULES = {
    "lightning.pytorch.strategies": "harmony_lightning.lightning",
    "pytorch_lightning.strategies": "harmony_lightning.pytorch_lightning",
}


def install() -> None:
    """Have "harmony" registered in every Lightning that is, or will be, imported by this process. Idempotent."""
    try:
        # By name: after a reload of this module the finder in place is of an older class.
        sys.meta_path[:] = [f for f in sys.meta_path if (type(f).__module__, type(f).__name__) != (__name__, "_Finder")]
        sys.meta_path.insert(0, _Finder())
    except Exception as error:
        _warn(error)
    for module in filter(None, map(sys.modules.get, _STRATEGY_MODULES)):
        _register(module)


def flavour_module() -> str:
    """The module of ours whose `HarmonyStrategy` derives from the Lightning in use: the one that is imported, else the
    one that is installed. `lightning` counts first."""
    names = {module.partition(".")[0]: home for module, home in _STRATEGY_MODULES.items()}
    imported = [home for name, home in names.items() if name in sys.modules]
    installed = [home for name, home in names.items() if importlib.util.find_spec(name) is not None]
    for home in (*imported, *installed):
        return home
    raise ModuleNotFoundError("HarmonyStrategy needs Lightning: pip install lightning")


def _register(module: ModuleType) -> None:
    try:
        home = _STRATEGY_MODULES[module.__name__]
        if "harmony" not in (registry := module.StrategyRegistry):
            # Called when a Trainer asks for the name; only then is the strategy itself imported.
            registry.register("harmony", lambda **options: importlib.import_module(home).HarmonyStrategy(**options))
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    message = f'strategy="harmony" is not registered ({error!r}); pass strategy=HarmonyStrategy() instead'
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # `python -W error`
        log.warning(message)


class _Finder(MetaPathFinder):
    """Finds the strategy modules where the other finders find them, and wraps their loaders."""

    _searching = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        # Another post-import hook may ask all finders in its turn: the inner search passes this one by.
        if name not in _STRATEGY_MODULES or name == getattr(self._searching, "name", None):
            return None
        self._searching.name = name
        try:
            others = (f.find_spec for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
            spec = next(filter(None, (find_spec(name, path, target) for find_spec in others)), None)
        finally:
            self._searching.name = None
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = cast(Loader, _Loader(spec))
        return spec


class _Loader:
    """Executes a module with its own loader, gives it that loader back, and registers the strategy in it."""

    def __init__(self, spec: ModuleSpec) -> None:
        self._spec, self._loader = spec, cast(Any, spec.loader)

    def __getattr__(self, name: str) -> Any:  # get_source, create_module, ...
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._spec.loader = self._loader
        self._loader.exec_module(module)
        _register(module)
