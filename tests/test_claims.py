"""docs/claims.md has every built-in method with its paper, and each figure stands on a page that its row links to.

That the links lead somewhere is asked in tests/test_docs.py, as of every page.
"""

import re
from pathlib import Path

import pytest

from capabilities import built_in

PAGE = Path(__file__).resolve().parents[1] / "docs" / "claims.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
"""By heading, which names the section's methods in code letters."""
LINKS = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", TEXT, re.MULTILINE))
VERDICTS = {"seen", "in part", "not seen", "not testable here"}
FIGURE = re.compile(r"(?<![\d.])\d+(?:\.\d+(?:e[-+]\d+)?(?: ± \d+\.\d+)?|%)(?![\d.]*\d)")
"""A number with a decimal point, with its interval where it has one, or a per cent. Signs are not asked for: a page may
say of a difference that it is better by so much."""


def rows() -> list[list[str]]:
    """The cells of each claim: the claim, what is seen, by what it is shown, the verdict."""
    lines = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| claim ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def figures(text: str) -> set[str]:
    return set(FIGURE.findall(re.sub(r"\s*±\s*", " ± ", text)))


@pytest.mark.parametrize("name", built_in())
def test_every_method_has_its_papers_claims(name):
    headings = [heading for heading in SECTIONS if f"`{name}`" in heading]
    assert len(headings) == 1, f"docs/claims.md needs one section whose heading names `{name}`"
    section = SECTIONS[headings[0]]
    numbers = re.findall(r"\d{4}\.\d{4,5}", built_in()[name].paper)
    missing = [number for number in numbers if number not in section]
    assert not missing, f"the section {headings[0]!r} does not name arXiv {', '.join(missing)}, the paper of {name}"
    assert "\n| claim |" in section or "no paper" in section, f"the section {headings[0]!r} has no table of claims"


def test_every_heading_names_methods_that_there_are():
    named = {name for heading in SECTIONS for name in re.findall(r"`([^`]+)`", heading)}
    assert named == set(built_in())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_a_verdict_and_figures_of_the_linked_pages(row):
    claim, seen, shown, verdict = row
    kind, _, reason = verdict.partition(": ")
    assert kind in VERDICTS, f"{claim}: {verdict!r} is none of {', '.join(sorted(VERDICTS))}"
    assert bool(reason) == (kind != "seen"), f"{claim}: a verdict that is not 'seen' has a reason after a colon"
    names = re.findall(r"\[([^\]]+)\]", shown)
    unknown = [name for name in names if name not in LINKS]
    assert not unknown, f"{claim}: no link is defined for {', '.join(unknown)}"
    assert bool(names) == bool(seen), f"{claim}: what is seen is shown by something, and the other way round"
    assert names or kind.startswith("not "), f"{claim}: {kind!r}, but nothing is linked"
    linked = [(PAGE.parent / LINKS[name].partition("#")[0]).read_text(encoding="utf-8") for name in names]
    known = {figure for text in linked for figure in figures(text)}
    strange = figures(seen) - known
    assert not strange, f"{claim}: {', '.join(sorted(strange))} stands on none of {', '.join(names)}"


def test_every_link_is_used():
    used = set(re.findall(r"\[([^\]]+)\](?![(:])", TEXT))
    assert set(LINKS) <= used, f"defined and not used: {', '.join(sorted(set(LINKS) - used))}"
