"""The report of several seeds: intervals wherever there is one, and no claim that an interval leaves open."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from auxin.accounting.comparison import Comparison, compare
from auxin.accounting.results import MeasureDescription
from auxin.report.comparison import comparison_findings, comparison_rows
from auxin.report.curves import chart_data
from auxin.report.html import render_report
from auxin.report.markdown import comparison_markdown
from auxin.report.picture import chart_svg
from report.made_up_run import results, seeded

COMMAND = "auxin run demo --seeds 0 1 2"


def three(*small_shifts: float) -> Comparison:
    """Three seeds; the small branch ends 0.29 above the main one, and that much further with each seed."""
    shifts = (0.0, 0.04, -0.03)
    return compare(
        [seeded(seed, shifts[seed], small) for seed, small in enumerate(small_shifts)],
        COMMAND,
    )


def test_better_is_said_where_the_interval_excludes_zero():
    text = " ".join(comparison_findings(three(0.0, 0.01, -0.01)))
    assert re.search(r"0\.\d{3} ± 0\.\d{3} better than “Small TokenFormer, trained on”", text)
    assert "mean of 3 seeds" in text


def test_nothing_is_better_where_the_interval_holds_zero():
    comparison = three(-0.5, 0.5, -0.6)
    text = " ".join(comparison_findings(comparison))
    assert "not to be told from “Small TokenFormer, trained on”" in text
    assert not re.search(r"(better|worse) than “Small", text)
    assert {row.branch.name: row.standing for row in comparison_rows(comparison)}["small"] == "open"


def test_one_seed_claims_nothing():
    comparison = compare([results()], COMMAND)
    text = " ".join(comparison_findings(comparison))
    assert "better" not in text
    assert "worse" not in text
    assert "±" not in text
    assert "One seed gives no interval" in text
    assert "<polygon" not in chart_svg(comparison)
    assert "half" not in chart_data(comparison)[0]["validation"]
    assert "±" not in comparison_markdown(comparison).partition("<!-- results:begin -->")[2]


def test_where_more_is_better_the_verdict_turns():
    comparison = three(0.0, 0.01, -0.01)
    accuracy = MeasureDescription(kind="accuracy", name="accuracy", unit="", better="higher")
    turned = comparison.model_copy(update={"measure": accuracy})
    assert {row.branch.name: row.standing for row in comparison_rows(comparison)}["small"] == "worse"
    assert {row.branch.name: row.standing for row in comparison_rows(turned)}["small"] == "better"
    text = " ".join(comparison_findings(turned))
    assert "worse than “Small TokenFormer, trained on”" in text
    assert "held-out accuracy" in text


@pytest.mark.parametrize("broken", [False, True])
def test_one_seed_that_broke_a_promise_is_told(broken):
    runs = [seeded(seed, 0.0, 0.0) for seed in range(3)]
    if broken:
        main = runs[2].branches[0]
        growth = main.growths[0]
        growth = growth.model_copy(update={"value_after": growth.value_before - 0.1})
        main = main.model_copy(update={"growths": [growth, *main.growths[1:]]})
        runs[2] = runs[2].model_copy(update={"branches": [main, *runs[2].branches[1:]]})
    text = comparison_findings(compare(runs, COMMAND))[0]
    assert ("promised to be exact changed" in text) == broken


def test_page_picture_and_tables_show_every_interval():
    comparison = three(0.0, 0.01, -0.01)
    page, table = render_report(comparison), comparison_markdown(comparison)
    for branch in comparison.branches:
        assert f"± {branch.value.half_width:.4f}" in page
        assert branch.value.text(3) in table
        if branch.difference is not None:
            assert branch.difference.text(3, signed=True).replace("-", "−") in table
    for seed in (0, 1, 2):
        assert f'href="seed-{seed}/report.html"' in page
    svg = ElementTree.fromstring(chart_svg(comparison))
    assert len(svg.findall("{http://www.w3.org/2000/svg}polygon")) == len(comparison.branches)
    for data in chart_data(comparison):
        assert len(data["validation"]["half"]) == len(data["validation"]["loss"])
