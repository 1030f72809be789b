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
        source: the code of its one module, or a folder with a pyproject.toml, whose entry points and modules are used.
        group: of the entry point where `source` is code, without "auxin.".
        thing: what the entry point names in the module where `source` is code.
    """
    if isinstance(source, Path):
        project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
        groups, version = project["entry-points"], project["version"]
        assert project["name"] == package
        monkeypatch.syspath_prepend(source)
    else:
        module = re.sub(r"\W", "_", package) + "_plugin"
        (folder / f"{module}.py").write_text(source)
        groups, version = {f"auxin.{group}": {package: f"{module}:{thing}"}}, "1"
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {package}\nVersion: {version}\n")
    lines: list[str] = []
    for name, entries in groups.items():
        lines += [f"[{name}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(folder)
    # What is imported from it goes with it.
    for name in {value.partition(":")[0] for entries in groups.values() for value in entries.values()}:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
