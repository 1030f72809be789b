"""What a package offers without importing it is what type checkers are told, and is there when it is asked for."""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

import auxin
from auxin.words.first_use import on_first_use

ROOT = Path(auxin.__file__).parent
PACKAGES = [path for path in sorted(ROOT.rglob("__init__.py")) if "on_first_use(" in path.read_text(encoding="utf-8")]


def package_name(path: Path) -> str:
    return ".".join(("auxin", *path.parent.relative_to(ROOT).parts))


def told_to_type_checkers(path: Path) -> dict[str, str]:
    """Names imported under TYPE_CHECKING, with the module that they are imported from."""
    branches = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    (branch,) = [node for node in branches if ast.unparse(node.test) == "TYPE_CHECKING"]
    return {alias.name: str(node.module) for node in branch.body for alias in node.names}


@pytest.mark.parametrize("path", PACKAGES, ids=package_name)
def test_type_checkers_are_told_what_is_there(path):
    package, told = importlib.import_module(package_name(path)), told_to_type_checkers(path)
    assert told
    assert set(told) <= set(package.__all__)
    for name in package.__all__:
        assert name in dir(package)
        assert getattr(package, name) is not None
    for name, module in told.items():
        defined = getattr(importlib.import_module(module), name)
        assert getattr(package, name) is defined or isinstance(getattr(package, name), ModuleType)


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "offering"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from auxin.words.first_use import on_first_use\n"
        "homes = {'offering.inside': ('word', 'inside'), 'offering.other': ('third',)}\n"
        "__getattr__, __dir__ = on_first_use(__name__, homes)\n"
    )
    (folder / "inside.py").write_text("word = object()\ndef inside(): pass\n")
    (folder / "other.py").write_text("third = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("offering")
    for name in [name for name in sys.modules if name.partition(".")[0] == "offering"]:
        del sys.modules[name]


def test_a_module_is_imported_with_the_first_of_its_names(package):
    assert "offering.inside" not in sys.modules
    assert {"word", "inside", "third"} <= set(dir(package))
    assert "offering.inside" not in sys.modules
    assert package.word is sys.modules["offering.inside"].word
    assert "offering.other" not in sys.modules


def test_a_name_that_is_also_a_modules_is_the_same_before_and_after(package):
    first = package.inside
    assert first is package.inside is sys.modules["offering.inside"]


def test_an_unknown_name_is_an_attribute_error_that_names_the_package(package):
    with pytest.raises(AttributeError, match=r"module 'offering' has no attribute 'wrod'") as caught:
        _ = package.wrod
    assert (caught.value.name, caught.value.obj) == ("wrod", package)
    assert on_first_use("offering", {})[1]() == sorted(vars(package))
