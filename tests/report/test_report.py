"""The report tells the numbers of a run, lost comparisons and failures included, and needs nothing but itself."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auxin.accounting import Ledger
from auxin.accounting.results import RunResults
from auxin.report import formatting
from auxin.report.curves import COLOURS
from auxin.report.findings import growth_sentence, headline
from auxin.report.forest import Mark, Panel, Row, Series, forest_svg
from auxin.report.html import render_report, write_report
from auxin.report.lineage import BranchNode, lineage
from auxin.report.picture import HEIGHT, LABEL_HEIGHT, WIDTH, chart_svg, spread, write_chart_svg
from report.made_up_run import grown_branch, partial_results, results


def own_html(html: str) -> str:
    """The page without the chart library."""
    longest = max(re.findall(r"<script>.*?</script>", html, flags=re.DOTALL), key=len)
    assert "plotly.js v" in longest[:200]
    return html.replace(longest, "")


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(results())


def test_the_page_asks_for_nothing_from_elsewhere(page):
    assert not re.search(r"""<(script|img|iframe)[^>]*\bsrc=|<link[^>]*href="(?!data:)|@import|url\(""", own_html(page))
    assert "http" not in own_html(page)


def test_the_table_holds_every_branch_and_marks_the_best(page):
    run = results()
    table = page[page.index('<section id="results">') : page.index('<section id="growths">')]
    for branch in run.branches:
        for text in (branch.title, formatting.power(branch.flops), f"{branch.value:.4f}"):
            assert text in table
        assert f"{branch.perplexity:.3f}" in table
        assert f"{branch.bits_per_byte:.4f}" in table
    best = min(branch.value for branch in run.branches)
    assert re.findall(r'class="best">([\d.]+)<', table)[0] == f"{best:.4f}"


def test_the_headline_says_what_growing_won_and_what_it_lost():
    run = results()
    loss = {branch.name: branch.value for branch in run.branches}
    text = headline(run)
    assert f"{loss['small'] - loss['grown']:.3f} better than “Small TokenFormer, trained on”" in text
    assert f"{loss['grown'] - loss['scratch']:.3f} worse than “TokenFormer of the final size, from scratch”" in text
    assert "times these FLOPs" not in text


def test_the_headline_says_when_costs_differ():
    run = results()
    cheap = run.branches[1].model_copy(update={"flops": run.branches[0].flops / 2})
    assert "“Small TokenFormer, trained on” (at 0.50 times these FLOPs)" in headline(
        run.model_copy(update={"branches": [run.branches[0], cheap]})
    )


@pytest.mark.parametrize(("after", "verdict"), [(9.9e-6, "kept"), (1.01e-5, "broken")])
def test_a_growth_that_moved_the_loss_by_1e_5_broke_its_promise(after, verdict):
    run = results()
    growth = run.branches[0].growths[0].model_copy(update={"value_before": 2.0, "value_after": 2.0 + after})
    grown = run.branches[0].model_copy(update={"growths": [growth]})
    run = run.model_copy(update={"branches": [grown]})
    section = own_html(render_report(run)).split('<section id="growths">')[1].split("</section>")[0]
    assert f'<td class="{verdict}">' in section
    assert ("promised to be exact" in str(growth_sentence(run))) == (verdict == "broken")


def test_a_growth_is_listed_once_though_forks_inherit_it():
    run = results()
    fork = run.branches[1].model_copy(update={"growths": run.branches[0].growths[:1]})
    page = own_html(render_report(run.model_copy(update={"branches": [run.branches[0], fork]})))
    section = page.split('<section id="growths">')[1].split("</section>")[0]
    assert section.count("<tr>") == 1 + len(run.branches[0].growths)


def test_unfinished_runs_have_dashes_and_no_made_up_numbers():
    for run in (partial_results(), partial_results().model_copy(update={"branches": []})):
        page = own_html(render_report(run))
        visible = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
        assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<[^>]*>", " ", visible))
        assert "–" in visible
    assert "not finished, or it failed" in headline(partial_results())
    assert growth_sentence(partial_results()) is None


def test_results_survive_their_file(tmp_path: Path):
    for run in (results(), partial_results()):
        again = RunResults.model_validate_json(run.model_dump_json())
        assert own_html(render_report(again)) == own_html(render_report(run))


def test_names_are_text_and_never_code():
    evil = '</script><script>alert(1)</script><b>"&'
    run = results()
    branch = run.branches[0].model_copy(update={"title": evil})
    page = own_html(render_report(run.model_copy(update={"title": evil, "command": evil, "branches": [branch]})))
    assert "<script>alert" not in page
    assert "<b>&" not in page
    assert ElementTree.fromstring(chart_svg(run.model_copy(update={"title": evil, "branches": [branch]}))) is not None


@pytest.mark.parametrize("character", ["\x1b", "\x00", "\x9b", "\ud800", "\ufffe"], ids=ascii)
def test_what_no_page_can_show_is_replaced(character):
    evil = f"a {character}[31m title"
    run = results()
    branch = run.branches[0].model_copy(update={"title": evil})
    run = run.model_copy(update={"title": evil, "description": evil, "command": evil, "branches": [branch]})
    svg, page = chart_svg(run), own_html(render_report(run))
    assert ElementTree.fromstring(svg.encode()) is not None
    for text in (svg, page):
        assert character not in text
        assert "a \ufffd[31m title" in text
    assert "\\u001b" not in page, "nor in what scripts read"
    ElementTree.fromstring(
        forest_svg(evil, evil, [Panel(evil, [Row("0", [Mark(evil, 0.5)])])], [Series(evil, "#000000", "circle")])
    )


def test_the_first_columns_are_what_matters(page):
    headers = re.findall(r'<th scope="col">([^<]*)</th>', own_html(page))
    assert headers[:2] == ["Branch", "Validation loss"]
    assert headers[headers.index("Growth") :][:3] == ["Growth", "Difference", "Promise"]


def test_a_report_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    path = tmp_path / "new folder" / "report.html"
    write_report(results(), path)
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_report(partial_results(), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def stage_names(node: BranchNode) -> list[str]:
    return [stage.record.name for stage in node.stages]


def test_a_fork_hangs_below_the_stage_it_started_from():
    trees = lineage(results())
    assert [tree.name for tree in trees] == ["grown", "scratch", "dense"]
    assert stage_names(trees[0]) == ["build", "base", "grow-1", "middle", "grow-2", "final"]
    forks = {stage.record.name: [fork.name for fork in stage.forks] for stage in trees[0].stages if stage.forks}
    assert forks == {"base": ["small"]}
    assert stage_names(trees[0].stages[1].forks[0]) == ["train"]
    growth = trees[0].stages[2]
    assert (growth.parameters_before, growth.record.parameters) == (131_328, 262_400)
    assert [name for name, _ in growth.details] == ["plan", "receipt"]


def test_a_fork_of_a_fork_and_a_fork_of_nothing():
    run = results()
    small = run.branches[1]
    ledger = Ledger(stages=[*small.ledger.stages, small.ledger.stages[-1]])
    grandchild = small.model_copy(
        update={"name": "child", "parent": "small", "fork_stage": "train", "ledger": ledger, "title": "child"}
    )
    orphan = small.model_copy(update={"name": "orphan", "parent": "gone", "title": "orphan"})
    trees = lineage(run.model_copy(update={"branches": [*run.branches[:2], grandchild, orphan]}))
    assert [tree.name for tree in trees] == ["grown", "orphan"]
    assert stage_names(trees[0].stages[1].forks[0].stages[0].forks[0]) == ["train"]
    assert stage_names(trees[1]) == ["build", "base", "train"]


def test_the_picture_holds_every_curve_growth_and_title(tmp_path: Path):
    run = results()
    path = write_chart_svg(run, tmp_path / "chart.svg")
    root = ElementTree.parse(path).getroot()
    text = " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    for branch in run.branches:
        assert f"{branch.value:.3f}" in text
    thick = [e for e in root.iter("{http://www.w3.org/2000/svg}polyline") if e.get("stroke-width")]
    assert len(thick) == len(run.branches)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == len(run.branches[0].growths)
    for line in thick:
        for x, y in (point.split(",") for point in line.get("points", "").split()):
            assert 0 <= float(x) <= WIDTH
            assert 0 <= float(y) <= HEIGHT


def test_the_picture_of_a_failed_run_is_still_a_picture():
    for run in (partial_results(), partial_results().model_copy(update={"branches": []})):
        assert "nan" not in chart_svg(run)
        ElementTree.fromstring(chart_svg(run))
    one_point = grown_branch().model_copy(update={"curve": grown_branch().curve[3:4], "growths": []})
    ElementTree.fromstring(chart_svg(results().model_copy(update={"branches": [one_point]})))


@given(st.lists(st.floats(50, HEIGHT - 60), max_size=8).map(sorted))
def test_labels_keep_their_order_and_their_distance(places):
    moved = spread(places)
    assert all(b - a >= LABEL_HEIGHT - 1e-6 for a, b in pairwise(moved))
    assert all(place <= HEIGHT for place in moved)
    if all(b - a >= LABEL_HEIGHT for a, b in pairwise(places)):
        assert moved == places


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", COLOURS, ids=lambda colour: colour.both)
def test_every_colour_is_legible_where_it_is_used(colour):
    # WCAG 2.1: 4.5 for text, 3 for graphics and their labels in bold.
    assert contrast(colour.light, "#ffffff") >= 4.3
    assert contrast(colour.dark, "#171b1f") >= 4.5
    assert min(contrast(colour.both, "#ffffff"), contrast(colour.both, "#0d1117")) >= 3


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        ("short", 0, "0"),
        ("short", 999, "999"),
        ("short", 999_400, "999K"),
        ("short", 999_600, "1.00M"),
        ("short", 1_309_705_728, "1.31B"),
        ("short", 30e9, "30.0B"),
        ("exact", 1_309_705_728, "1,309,705,728"),
        ("power", 1.234e14, "1.23 × 10¹⁴"),
        ("power", 0.0, "0"),
        ("duration", 0.42, "0.4 s"),
        ("duration", 9.96, "10 s"),
        ("duration", 59.7, "1 min 00 s"),
        ("duration", 3599.6, "1 h 00 min"),
        ("duration", 90_000, "1 d 01 h"),
        ("change", -3.14e-7, "−3.1 × 10⁻⁷"),
        ("change", 0.0, "0"),
        ("signed", -0.01234, "−0.0123"),
        ("decimal", 1.70005, "1.7001"),
    ],
)
def test_numbers_are_written_as_people_write_them(function, value, text):
    assert getattr(formatting, function)(value) == text


@pytest.mark.parametrize("function", ["short", "exact", "power", "duration", "change", "signed", "decimal"])
def test_what_was_not_measured_is_a_dash(function):
    for value in (None, math.nan, math.inf, -math.inf):
        assert getattr(formatting, function)(value) == "–"
