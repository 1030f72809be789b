"""The house stands as drawn: imports go down only, no file is a junk drawer, every method stands alone."""

import ast
from pathlib import Path

import pytest

import auxin

ROOT = Path(auxin.__file__).parent
# A room may import rooms of lower floors and its own. Rooms of one floor don't know each other.
FLOORS = [
    {"errors"},
    {"files"},
    {"settings"},
    {"words"},
    {"nn", "accounting"},
    {"data", "models"},
    {"objectives"},
    {"edits", "report"},
    {"planning", "analysis", "evaluation"},
    {"methods", "training"},
    {"recipes", "doctor"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "auxin"}


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    for name in imported_modules(path):
        parts = name.split(".")
        assert len(parts) > 1, f"{path} imports the package's face"
        assert parts[1] == room(path) or FLOOR[parts[1]] < FLOOR[room(path)], (
            f"{path} imports {name}, which is no lower"
        )


@pytest.mark.parametrize("path", sorted((ROOT / "methods").rglob("*.py")), ids=lambda path: path.stem)
def test_no_method_imports_a_sibling(path):
    if path.name == "__init__.py":
        return
    assert not [name for name in imported_modules(path) if name.startswith("auxin.methods")]


# What is no brick in nn, or stands for what an edit or an architecture of ours says itself.
NO_BRICKS = {"bricks", "extension"}
KNOWN_BY_NAME = {"edits": {"stand_ins"}, "models": {"pattention"}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_methods_know_bricks_by_name(path):
    if room(path) in ("nn", "methods"):
        return
    allowed = NO_BRICKS | KNOWN_BY_NAME.get(room(path), set())
    named = {name.split(".")[2] for name in imported_modules(path) if name.startswith("auxin.nn.")}
    assert named <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_named_for_what_is_in_them(path):
    assert path.stem not in {"utils", "helpers", "misc", "common"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_modules_form_no_cycle():
    graph = {}
    for path in FILES:
        relative = path.relative_to(ROOT).with_suffix("")
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        graph[".".join(("auxin", *parts))] = imported_modules(path)
    # `from package import room` imports the room; `from room import name` the room that holds the name.
    resolved = {
        module: {name if name in graph else name.rpartition(".")[0] for name in names} & set(graph) - {module}
        for module, names in graph.items()
    }
    # A package's face imports its rooms; a room that imports its own face's names would be a circle.
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in sorted(resolved[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(resolved):
        visit(module, ())
