"""A line joins what was measured alike; other measurements are marked apart, and training fills gaps."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from auxin.accounting.comparison import compare
from auxin.report.curves import chart_data, chart_words, explanation
from auxin.report.picture import chart_svg
from report.made_up_run import PART, on_a_part, only_ends, results, results_of_images, seeded


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def curves_of(svg: str) -> list[list[tuple[float, float]]]:
    """The places of every line of a curve."""
    found = [element.get("points", "") for element in elements(svg, "polyline") if element.get("stroke-width")]
    return [[tuple(map(float, place.split(","))) for place in line.split()] for line in found]


def test_the_whole_split_is_marked_beside_the_end_of_the_line():
    run = on_a_part(results())
    for drawn, branch in zip(chart_data(run), run.branches, strict=True):
        assert drawn["validation"]["loss"][-1] == pytest.approx(branch.value + PART)
        assert (drawn["end"]["loss"], drawn["end"]["apart"], drawn["apart"]) == (branch.value, True, True)
    svg = chart_svg(run)
    hollow = [circle for circle in elements(svg, "circle") if circle.get("fill") == "none"]
    assert len(hollow) == len(run.branches)
    labels = " ".join("".join(text.itertext()) for text in elements(svg, "text"))
    for branch in run.branches:
        assert f"{branch.value:.3f}" in labels
        assert f"{branch.value + PART:.3f}" not in labels
    # No line comes down to what was measured on other samples.
    lowest = max(y for line in curves_of(svg) for _, y in line)
    assert min(float(circle.get("cy", "")) for circle in hollow) - 5 > min(line[-1][1] for line in curves_of(svg))
    assert lowest < max(float(circle.get("cy", "")) for circle in hollow)
    assert explanation(run) == ["validation on the first 64 held-out samples; hollow marks: on the whole split"]


def test_with_all_samples_nothing_is_apart():
    run = results()
    assert not any(drawn["apart"] or drawn["end"]["apart"] for drawn in chart_data(run))
    assert explanation(run) == []
    assert not [circle for circle in elements(chart_svg(run), "circle") if circle.get("fill") == "none"]


def test_a_line_ends_where_other_samples_were_measured():
    run = on_a_part(results())
    branch = run.branches[0]
    measured = [point for point in branch.curve if point.value is not None]
    curve = [p.model_copy(update={"samples": 32}) if p.stage == "final" else p for p in branch.curve]
    branch = branch.model_copy(update={"curve": curve})
    run = run.model_copy(update={"branches": [branch]})
    (drawn,) = chart_data(run)
    final = sum(point.stage == "final" for point in measured)
    assert drawn["validation"]["lines"] == [len(measured) - final, final]
    assert len(curves_of(chart_svg(run))) == 2
    assert explanation(run) == ["validation on a part of the held-out split; hollow marks: on the whole split"]


def test_seeds_keep_the_part_and_the_whole_apart():
    comparison = compare([on_a_part(seeded(0, 0.0, 0.0)), on_a_part(seeded(1, 0.3, 0.01))], "")
    for drawn, branch in zip(chart_data(comparison), comparison.branches, strict=True):
        assert drawn["end"] == pytest.approx(
            drawn["end"] | {"loss": branch.value.mean, "half": branch.value.half_width}
        )
        assert drawn["end"]["apart"]
    chart_svg(comparison)


def test_without_evaluations_on_the_way_the_training_loss_is_drawn():
    run = only_ends(results())
    assert all(drawn["trained"] for drawn in chart_data(run))
    assert json.loads(json.dumps(chart_words(run)))["range"] == "late"
    svg = chart_svg(run)
    for line, branch in zip(curves_of(svg), reversed(run.branches), strict=True):
        late = [p for p in branch.curve if p.flops >= 0.12 * max(b.flops for b in run.branches)]
        assert len(line) >= len(late), "every late training loss is on the line"
    assert "training loss" in re.sub(r"<title>.*?</title>", "", svg)


def test_a_run_with_evaluations_on_the_way_does_not_show_the_training_loss():
    assert not any(drawn["trained"] for drawn in chart_data(results()))
    assert "training loss" not in chart_svg(results())


def test_two_accuracies_are_a_line_and_not_a_stub():
    # The training loss can't stand in for an accuracy; the late part of two points would be one.
    run = only_ends(results_of_images())
    assert not any(drawn["trained"] for drawn in chart_data(run))
    assert chart_words(run)["range"] == "all"
    assert all(len(line) >= 2 for line in curves_of(chart_svg(run)))
