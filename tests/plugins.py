"""Installs plugins without network: a folder on the path, with the metadata that an installer would write."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "plugin"


def install(
    folder: Path, monkeypatch, package: str, source: str | Path, group: str = "methods", thing: str = "METHOD"
) -> None:
    """Install `package` for as long as `monkeypatch` holds.

    Args:
        folder: where the metadata go.
        monkeypatch: pytest's.
        package: its name, and that of the entry point where `source` is code.
        source: the code of its one module, or a folder with a pyproject.toml, whose entry points and module are used.
        group: of the entry points, without "auxin.".
        thing: what the entry point names in the module where `source` is code.
    """
    if isinstance(source, Path):
        project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
        entries, version = project["entry-points"][f"auxin.{group}"], project["version"]
        assert project["name"] == package
        monkeypatch.syspath_prepend(source)
    else:
        module = re.sub(r"\W", "_", package) + "_plugin"
        (folder / f"{module}.py").write_text(source)
        entries, version = {package: f"{module}:{thing}"}, "1"
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[auxin.{group}]", *lines]) + "\n")
    monkeypatch.syspath_prepend(folder)
    # What is imported from it goes with it.
    for value in entries.values():
        name = value.partition(":")[0]
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
