"""`strategy="harmony"` is known to every Lightning, whichever is imported first, and `import torch` never suffers.

Each case is a fresh interpreter, because what is tested is the order of imports. Most import a stand-in Lightning of a
few lines; two import the real ones, through a real `torch.backends` entry point.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent
_FLAVOURS = ("lightning.pytorch", "pytorch_lightning")
_STAND_IN = """
class Registry(dict):
    def register(self, name, strategy, description=None):
        self[name] = strategy

StrategyRegistry = Registry()
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder, to be put on the path, that holds this package's entry point as an installer would write it."""
    metadata = tmp_path / "harmony_lightning-0.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: harmony-lightning\nVersion: 0\n")
    metadata.joinpath("entry_points.txt").write_text("[torch.backends]\nharmony = harmony_lightning.autoload:install\n")
    return tmp_path


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Both Lightnings in a few lines each, and the module `flavours` that tells which of them know "harmony"."""
    for flavour in _FLAVOURS:
        strategies = tmp_path.joinpath(*flavour.split("."), "strategies")
        strategies.mkdir(parents=True)
        for package in (strategies, *strategies.relative_to(tmp_path).parents[:-1]):
            tmp_path.joinpath(package, "__init__.py").touch()
        strategies.joinpath("__init__.py").write_text(_STAND_IN)
    return tmp_path


def _run(code: str, path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{_REPOSITORY}", **environment}
    command = [sys.executable, *options, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


_BEFORE = """
import sys
from harmony_lightning import autoload
autoload.install()
import lightning.pytorch.strategies as first, pytorch_lightning.strategies as second
"""


def test_both_flavours_know_the_name_whether_imported_before_or_after(stand_ins: Path) -> None:
    _run(
        """
import lightning.pytorch.strategies as first
assert "harmony" not in first.StrategyRegistry
from harmony_lightning import autoload
autoload.install()
assert "harmony" in first.StrategyRegistry
import pytorch_lightning.strategies as second
assert "harmony" in second.StrategyRegistry
""",
        stand_ins,
    )


def test_the_factory_imports_the_strategy_of_its_own_flavour_only_when_called(stand_ins: Path) -> None:
    _run(
        _BEFORE
        + """
from types import ModuleType
for name, strategies in ("lightning", first), ("pytorch_lightning", second):
    assert f"harmony_lightning.{name}" not in sys.modules
    home = sys.modules[f"harmony_lightning.{name}"] = ModuleType(name)
    home.HarmonyStrategy = lambda name=name, **options: (name, options)
    assert strategies.StrategyRegistry["harmony"](mode="pp") == (name, {"mode": "pp"})
""",
        stand_ins,
    )


def test_imports_neither_torch_nor_lightning(stand_ins: Path) -> None:
    _run(
        """
import sys
from harmony_lightning import autoload
autoload.install()
assert not {"torch", "lightning", "pytorch_lightning"} & set(sys.modules)
""",
        stand_ins,
    )


def test_installs_once_and_survives_reloads(stand_ins: Path) -> None:
    _run(
        _BEFORE
        + """
from importlib import reload
def count():
    return sum(type(finder).__module__ == autoload.__name__ for finder in sys.meta_path)
factory = first.StrategyRegistry["harmony"]
autoload.install()
reload(autoload).install()
assert count() == 1
assert first.StrategyRegistry["harmony"] is factory
assert reload(first).StrategyRegistry["harmony"] is not factory
""",
        stand_ins,
    )


def test_modules_keep_their_own_loader(stand_ins: Path) -> None:
    _run(
        _BEFORE
        + """
from importlib.machinery import SourceFileLoader
for module in first, second:
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
    assert "StrategyRegistry" in module.__loader__.get_source(module.__name__)
""",
        stand_ins,
    )


def test_works_beside_another_import_hook_that_asks_all_finders(stand_ins: Path) -> None:
    _run(
        """
import importlib.util, sys
class Other:
    busy = False
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if not cls.busy and name.endswith("strategies"):
            cls.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                cls.busy = False
sys.meta_path.insert(0, Other)
"""
        + _BEFORE
        + """
assert "harmony" in first.StrategyRegistry and "harmony" in second.StrategyRegistry
""",
        stand_ins,
    )


@pytest.mark.parametrize("options", [(), ("-W", "error::RuntimeWarning")])
def test_a_failing_registration_only_warns(stand_ins: Path, options: tuple[str, ...]) -> None:
    stand_ins.joinpath("lightning/pytorch/strategies/__init__.py").write_text("")
    result = _run(_BEFORE + 'assert "harmony" in second.StrategyRegistry; autoload.install()', stand_ins, *options)
    assert 'strategy="harmony" is not registered' in result.stderr
    assert "pass strategy=HarmonyStrategy()" in result.stderr


def test_errors_of_the_imported_module_are_left_alone(stand_ins: Path) -> None:
    stand_ins.joinpath("lightning/pytorch/strategies/__init__.py").write_text("1 / 0")
    _run(
        """
from harmony_lightning import autoload
autoload.install()
try:
    import lightning.pytorch.strategies
except ZeroDivisionError:
    pass
else:
    raise AssertionError("the error was swallowed")
""",
        stand_ins,
    )


def test_importing_the_real_lightning_is_enough_for_both_flavours(site: Path) -> None:
    _run(
        """
import lightning.pytorch as first, pytorch_lightning as second
for flavour in first, second:
    assert "harmony" in flavour.strategies.StrategyRegistry.available_strategies()
""",
        site,
    )


def test_with_autoloading_off_an_explicit_install_after_the_real_lightning_is_enough(site: Path) -> None:
    _run(
        """
from lightning.pytorch.strategies import StrategyRegistry
assert "harmony" not in StrategyRegistry.available_strategies()
from harmony_lightning import autoload
autoload.install()
assert "harmony" in StrategyRegistry.available_strategies()
""",
        site,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
