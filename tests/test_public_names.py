import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import harmony_lightning


@pytest.mark.parametrize("name", harmony_lightning.__all__)
def test_every_public_name_can_be_imported(name):
    found = getattr(harmony_lightning, name)
    assert found.__name__ == name
    assert inspect.getdoc(found)
    assert name in dir(harmony_lightning)


@pytest.mark.parametrize(("name", "home"), harmony_lightning._HOMES.items())
def test_a_lazy_name_is_the_one_of_its_home(name, home):
    module = importlib.import_module(f"harmony_lightning.{home}")
    assert getattr(harmony_lightning, name) is getattr(module, name)


def test_all_lists_every_name_once_in_order():
    assert sorted(harmony_lightning._HOMES) + ["HarmonyStrategy"] == sorted(
        harmony_lightning.__all__, key=lambda name: (name == "HarmonyStrategy", name)
    )
    assert harmony_lightning.__all__ == sorted(set(harmony_lightning.__all__))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(inspect.getsource(harmony_lightning))
    guarded = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imports = [n for n in ast.walk(guarded) if isinstance(n, ast.ImportFrom)]
    names = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted(names) == harmony_lightning.__all__
    homes = {name: f"harmony_lightning.{home}" for name, home in harmony_lightning._HOMES.items()}
    assert {name: home for name, home in names.items() if name != "HarmonyStrategy"} == homes


def test_every_error_is_public():
    errors = importlib.import_module("harmony_lightning.errors")
    assert {name for name in vars(errors) if name.endswith("Error")} <= set(harmony_lightning.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'harmony_lightning' has no attribute 'nonsense'"):
        _ = harmony_lightning.nonsense


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = (
        "import sys, harmony_lightning\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "harmony_lightning.CapacityError, harmony_lightning.Plan, harmony_lightning.Statistics\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
