"""The documentation tells the truth: its code runs, its commands run, its output is what is printed, its links lead.

Fenced blocks of a page run in order, in one namespace and one temporary folder. `python` blocks are executed; in `sh`
blocks, lines of `auxin` go through the command line as written, those of `torchrun` start processes, and lines of
`make` must name a target. A `text` block right after one of them is its output, `...` standing for anything. A block
after `<!-- file: NAME -->` becomes that file; one after `<!-- not run: reason -->` is skipped.

Nothing is downloaded: `hf download MODEL --local-dir FOLDER` writes a narrow Llama as deep as SmolLM2-135M to it
(tests/stand_in.py). What a page says of a real model stands apart from the commands, and other tests hold it.
"""

import contextlib
import doctest
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stand_in import write_stand_in

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if "results" not in path.parts)
"""What people write and run; pages of results are written by benchmarks."""
LINKED = sorted({*PAGES, *(ROOT / "docs").rglob("*.md")})
MAXIMUM_SKIPPED = 8
"""Blocks that may stay unrun, over all pages."""
NOTE = re.compile(r"<!-- (?P<kind>not run|file): (?P<value>.+?) -->\s*\Z")
FENCE = re.compile(r"(?P<indent> *)```")
RUNNABLE = {"python", "sh"}
LANGUAGES = {*RUNNABLE, "text", "yaml", "toml", "json", "math", "bibtex"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    """Line number of its first line of code."""
    follows: bool
    """Whether nothing but empty lines stands between it and the block before."""
    not_run: str | None = None
    """The reason why it is not run."""
    file: str | None = None
    """The file that it is the content of."""


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    indent = ""
    last_end = -1
    for number, line in enumerate(lines):
        if (fence := FENCE.match(line)) is None:
            continue
        if start is None:
            start, indent = number, fence["indent"]
            continue
        note = NOTE.search("\n".join(lines[max(0, start - 2) : start]))
        found.append(
            Block(
                language=lines[start].strip().removeprefix("```"),
                code="".join(line.removeprefix(indent) + "\n" for line in lines[start + 1 : number]),
                line=start + 2,
                follows=not any(line.strip() for line in lines[last_end + 1 : start]),
                **({note["kind"].replace(" ", "_"): note["value"]} if note else {}),
            )
        )
        start, last_end = None, number
    assert start is None, f"{page}: the block of line {start} has no end"
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run_auxin(line: str) -> str:
    """Run one `auxin ...` line in this process; what it wrote to standard output."""
    from auxin import cli

    output, code, arguments = io.StringIO(), 0, sys.argv
    sys.argv = shlex.split(line, comments=True)
    try:
        with contextlib.redirect_stdout(output):
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = arguments
    assert code == 0, f"{line}\nexited with {code}:\n{output.getvalue()}"
    return output.getvalue()


def parse_auxin(line: str) -> None:
    """Fail where the command line has no such command, option or argument; nothing is run."""
    from typer.main import get_command

    from auxin.cli.app import app

    command: Any = get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{line}: there is no {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context("auxin", words)  # which reads the words and goes no further


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def run_shell(block: Block) -> str:
    output = ""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert set(words[1:]) <= make_targets(), f"line {block.line}: {line}: no such target"
        elif words[:2] == ["hf", "download"]:
            assert words[3] == "--local-dir", f"line {block.line}: {line}: a folder by name, which later lines can read"
            write_stand_in(Path(words[4]))
        elif words[0] == "torchrun":
            output += run_processes(words[1:])
        else:
            known = "auxin, torchrun, make, hf"
            assert words[0] == "auxin", f"line {block.line}: only {known} can be run; mark the block as not run"
            output += run_auxin(line)
    return output


def run_processes(words: list[str]) -> str:
    """What torchrun does with these words, at a port that is free."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", *words]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, **threads})
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    output = io.StringIO()
    # Empty lines in front, so that a traceback names the line of the page.
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    with contextlib.redirect_stdout(output):
        exec(code, namespace)
    return output.getvalue()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in RUNNABLE for b in blocks(page))], ids=name
)
def test_code_and_commands_run_and_print_what_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    checker = doctest.OutputChecker()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.code, encoding="utf-8")
        elif block.language in RUNNABLE:
            printed = None
            if block.not_run is None:
                printed = run_python(block, page, namespace) if block.language == "python" else run_shell(block)
        elif block.language == "text" and block.follows and printed is not None:
            same = checker.check_output(block.code, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert same, (
                f"{name(page)}, line {block.line}: the page says\n{block.code}\nbut this is printed:\n{printed}"
            )


def test_blocks_say_their_language_and_few_are_not_run():
    skipped = []
    for page in PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{name(page)}, line {block.line}: language {block.language!r}"
            if block.not_run:
                skipped.append(f"{name(page)}, line {block.line}: {block.not_run}")
    assert len(skipped) <= MAXIMUM_SKIPPED, "\n".join(skipped)


def targets(page: Path) -> Iterator[str]:
    """Where the links and images of a page lead."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r"^\[[^\]]+\]: +(\S+)$", text, re.MULTILINE)
    yield from re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page):
    for target in targets(page):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}, which does not exist"
        assert file.is_relative_to(ROOT), f"{name(page)} links to {target}, which is outside the project"
        if anchor:
            assert anchor in anchors(file), f"{name(page)} links to {target}, but there is no such heading"


@pytest.mark.parametrize(
    "page", [page for page in LINKED if page.parent != ROOT and page.name != "README.md"], ids=name
)
def test_every_page_is_in_the_index(page):
    index = ROOT / "docs" / "README.md"
    assert page.resolve() in {(index.parent / target.partition("#")[0]).resolve() for target in targets(index)}


@pytest.mark.parametrize("image", sorted((ROOT / "docs").rglob("*.svg")), ids=name)
def test_images_are_whole_and_self_contained(image):
    root = ElementTree.parse(image).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox"), "without a viewBox it can't be scaled"
    references = [value for item in root.iter() for key, value in item.attrib.items() if key.endswith(("href", "src"))]
    assert all(reference.startswith(("#", "data:")) for reference in references)


def test_every_promise_has_a_test():
    page = ROOT / "docs" / "what_happens_when.md"
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"\[(test_\w+)\]\(([^)]+)\)", text)
    assert len(shown) > 30
    for test, path in shown:
        assert f"def {test}(" in (page.parent / path).read_text(encoding="utf-8"), f"{path} has no {test}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| fault"))]
    assert all("](../tests/" in row for row in rows)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_tables", ROOT / "docs" / "generate_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_up_to_date():
    tables = generator()
    found = set()
    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found |= {match["name"] for match in tables.MARKED.finditer(text)}
        assert tables.filled(text) == text, f"{page} is out of date: run python docs/generate_tables.py"
    assert found == set(tables.TABLES)


def test_the_page_of_recipes_has_every_field():
    """Not by the generator's own account: by the schemas that recipes and their stages are validated with, and by the
    registries of what is of several kinds."""
    from auxin.data.dataset import DATASETS
    from auxin.objectives.measures import REGISTRY as MEASURES
    from auxin.objectives.objective import OBJECTIVES
    from auxin.planning.hooks import HOOKS
    from auxin.recipes.schema import Recipe
    from auxin.training import TrainingSettings

    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    kinds = [kind.settings for kind in DATASETS.all().values()]
    kinds += [kind for registry in (OBJECTIVES, MEASURES, HOOKS) for kind in registry.all().values()]
    schemas = {settings.__name__: settings.model_json_schema() for settings in (Recipe, TrainingSettings, *kinds)}
    parts = {
        **schemas,
        **{title: part for schema in schemas.values() for title, part in schema.get("$defs", {}).items()},
    }
    assert {"CorpusSettings", "SpanCorruption", "Accuracy", "OldRatesSettings", "TrainStage"} <= parts.keys()
    for title, part in parts.items():
        found = re.search(rf"\n###? {title}\n(.*?)(?=\n###? |\Z)", text, re.DOTALL)
        section = found[1] if found else ""
        assert section, f"docs/recipes.md has no section {title}"
        for field in part["properties"]:
            assert f"\n| `{field}` |" in section, f"docs/recipes.md does not explain {field} of {title}"


def test_commands_that_are_not_run_are_commands():
    tried = 0
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh" and block.not_run is not None:
                for line in block.code.replace("\\\n", " ").splitlines():
                    if shlex.split(line, comments=True)[:1] == ["auxin"]:
                        parse_auxin(line)
                        tried += 1
    assert tried > 5
    for wrong in ("apply CKPT shortgpt --set removed=2 -o out", "plan CKPT", "prune CKPT", "show CKPT more"):
        with pytest.raises(Exception, match=r"(?i)--set|missing|no 'prune'|extra"):
            parse_auxin(f"auxin {wrong}")
