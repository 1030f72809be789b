"""A curve lies where its numbers say, also below zero, and says of each step what it took."""

import re

import pytest

from auxin.report.curve import HEIGHT, TOP, Step, curve_svg


def heights(picture: str) -> list[float]:
    return [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([-\d.]+)"', picture)]


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.4], [-0.1, 0.1, 0.3], [0.0, 0.0, 0.0], [-0.2, -0.1, -0.3]])
def test_marks_lie_in_the_plane_in_the_order_of_their_values(values):
    picture = curve_svg("T", "note", [Step(f"A {number}", value, 0.05) for number, value in enumerate(values)])
    found = heights(picture)
    assert all(TOP <= y <= TOP + HEIGHT + 0.1 for y in found)
    assert sorted(found, reverse=True) == [y for _, y in sorted(zip(values, found, strict=True))]
    line = re.search(r'<polyline points="([^"]+)"', picture)[1].split()
    assert [float(point.split(",")[1]) for point in line[1:]] == found
    ends = [tuple(map(float, pair)) for pair in re.findall(r'd="M[\d.]+ ([-\d.]+)V([-\d.]+)"', picture)]
    assert len(ends) == len(values)
    assert all(low >= y >= high for (low, high), y in zip(ends, found, strict=True))


def test_a_step_says_what_it_took_and_one_of_unknown_spread_has_no_interval():
    picture = curve_svg("T", "note", [Step("F 7", 0.25, 0.031), Step("A <1>", 0.5)])
    assert "<title>1 gone, F 7 last: 0.25 ± 0.031</title>" in picture
    assert "<title>2 gone, A &lt;1&gt; last: 0.5</title>" in picture
    assert picture.count("<path") == 1
