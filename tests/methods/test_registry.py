"""Methods are found by themselves, those of other packages too; a broken plugin is one message and no more."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import auxin.methods
from auxin.errors import ConfigError
from auxin.methods import method, methods
from auxin.planning.method import Method
from auxin.settings import Settings
from plugins import EXAMPLE, install


def test_every_module_of_a_method_is_registered():
    root = Path(auxin.methods.__file__).parent
    modules = {path for path in root.rglob("*.py") if path.name != "__init__.py"}
    offering = {path for path in modules if re.search(r"^METHODS?\b", path.read_text(), re.MULTILINE)}
    assert offering == modules
    assert len(methods()) >= len(modules)


@pytest.mark.parametrize("name", methods())
def test_every_method_says_what_it_is(name):
    found = method(name)
    assert found.name == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert found.title
    assert not found.title.endswith(".")
    assert found.promise, "say in a few words what its plans promise"
    assert issubclass(found.settings, Settings)
    for field, info in found.settings.model_fields.items():
        assert info.description, f"{field} has no docstring"


def test_finding_the_methods_does_not_load_what_the_report_needs():
    found = "import sys, auxin; auxin.methods(); print({'plotly', 'scipy.stats'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_names_are_not_used_twice(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "twice", "from auxin.methods.grow.tokenformer import METHOD")
    with pytest.warns(UserWarning, match="of the package twice was left out: .*auxin has a method of that name"):
        found = methods()
    assert found["tokenformer"].plan.__module__.startswith("auxin.")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"Unknown method 'tokenfromer'\. Did you mean 'tokenformer'"):
        method("tokenfromer")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("METHOD = 1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("METHOD = 3", "is a int, not an auxin.planning.method.Method"),
        ("", "has no attribute 'METHOD'"),
        (
            "import dataclasses\nfrom auxin.methods.grow.tokenformer import METHOD as M\n"
            "METHOD = dataclasses.replace(M, name='Two Words')",
            "'Two Words' is no method's name",
        ),
    ],
)
def test_a_broken_plugin_is_named_and_harms_nobody(tmp_path, monkeypatch, code, words):
    install(tmp_path, monkeypatch, "broken", code)
    with pytest.warns(UserWarning, match="left out") as caught:
        found = methods()
    (message,) = [str(item.message) for item in caught]
    assert "The method 'broken' of the package broken was left out" in message
    assert words in message
    assert "tokenformer" in found


def test_a_plugin_is_found_and_gone_when_uninstalled(tmp_path, monkeypatch):
    assert "drop-layers" not in methods()
    with monkeypatch.context() as installed:
        install(tmp_path, installed, "auxin-drop-layers", EXAMPLE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = methods()
        assert isinstance(found["drop-layers"], Method)
        assert list(found) == sorted(found)
    assert "drop-layers" not in methods()
    assert "auxin_drop_layers" not in sys.modules
