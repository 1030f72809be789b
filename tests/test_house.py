"""The house stands as drawn: imports go down only, no file is a junk drawer, every method stands alone."""

import ast
from pathlib import Path

import auxin

ROOT = Path(auxin.__file__).parent
# A room may import rooms of lower floors and its own. Rooms of one floor don't know each other.
FLOORS = [
    {"errors"},
    {"locks", "interruption"},
    {"files", "foreign", "field_errors"},
    {"sums", "yaml_files", "kept_records"},
    {"settings"},
    {"words"},
    {"nn", "accounting"},
    {"data", "models"},
    {"objectives"},
    {"edits", "report"},
    {"planning", "analysis", "evaluation", "export"},
    {"methods", "training"},
    {"recipes", "doctor"},
    {"face", "shrinking"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
JUNK_DRAWERS = {"utils", "helpers", "misc", "common"}
LONGEST = 600
"""Lines of a file."""


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


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_go_down_only():
    wrong = [f"{short(path)} is in a room without a floor" for path in FILES if room(path) not in FLOOR]
    assert not wrong, "\n".join(wrong)
    for path in FILES:
        for imported in sorted(imported_modules(path)):
            other = imported.partition(".")[2].partition(".")[0]
            if other not in FLOOR:
                wrong.append(f"{short(path)} imports {imported}, the package's face")
            elif other != room(path) and FLOOR[other] >= FLOOR[room(path)]:
                wrong.append(f"{short(path)} imports {imported}, which is no lower")
    assert not wrong, "\n".join(wrong)


def test_no_method_imports_a_sibling():
    methods = [path for path in FILES if room(path) == "methods" and path.name != "__init__.py"]
    assert methods
    wrong = [
        f"{short(path)} imports {imported}"
        for path in methods
        for imported in sorted(imported_modules(path))
        if imported.startswith("auxin.methods")
    ]
    assert not wrong, "\n".join(wrong)


# What is no brick in nn, or stands for what an edit or an architecture of ours says itself.
NO_BRICKS = {
    "attention_functions",
    "autocast",
    "bricks",
    "calls",
    "extension",
    "linear",
    "random_features",
    "reading_few",
    "resizing",
    "scores",
    "shared_rows",
    "universal_features",
}
KNOWN_BY_NAME = {"edits": {"stand_ins"}, "models": {"pattention", "stand_ins"}}


def test_only_methods_know_bricks_by_name():
    wrong = []
    for path in FILES:
        if room(path) not in ("nn", "methods"):
            allowed = NO_BRICKS | KNOWN_BY_NAME.get(room(path), set())
            named = {name.split(".")[2] for name in imported_modules(path) if name.startswith("auxin.nn.")}
            wrong += [f"{short(path)} knows the brick {name}" for name in sorted(named - allowed)]
    assert not wrong, "\n".join(wrong)


def test_files_are_short_and_named_for_what_is_in_them():
    wrong = [f"{short(path)} is named for nothing" for path in FILES if path.stem in JUNK_DRAWERS]
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST:
            wrong.append(f"{short(path)} has {lines} lines, more than {LONGEST}")
    assert not wrong, "\n".join(wrong)


def test_no_shape_that_does_not_fit_is_passed_over():
    """transformers would fill such parameters at random, without an error: a model loaded so is another one."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {
                getattr(node, "arg", None),
                getattr(node, "value", None) if isinstance(node, ast.Constant) else None,
            }
            if "ignore_mismatched_sizes" in names:
                wrong.append(f"{short(path)}, line {node.lineno}: ignore_mismatched_sizes")
    assert not wrong, "\n".join(wrong)


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
    cycles = []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            cycles.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for other in sorted(resolved[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(resolved):
        visit(module, ())
    assert not cycles, "\n".join(cycles)
