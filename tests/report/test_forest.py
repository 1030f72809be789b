"""The forest of marks: places follow the numbers, nothing runs out of the picture or into each other."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from auxin.report.forest import WIDTH, Mark, Panel, Row, Series, forest_svg

ROUND, SQUARE = Series("round", "#2F8AC9", "circle"), Series("square <1>", "#D55E00", "square")
NAMESPACE = "{http://www.w3.org/2000/svg}"


def drawn(rows: list[list[Mark]], title: str = "A title") -> ElementTree.Element:
    panel = Panel("layers", [Row(str(number), marks) for number, marks in enumerate(rows)])
    return ElementTree.fromstring(forest_svg(title, "A note.", [panel], [ROUND, SQUARE]))


def circles(root: ElementTree.Element) -> list[tuple[float, float]]:
    """Places of the round marks, that of the legend left out."""
    found = [element for group in root.iter(f"{NAMESPACE}g") for element in group.iter(f"{NAMESPACE}circle")]
    return [(float(element.attrib["cx"]), float(element.attrib["cy"])) for element in found]


def intervals(root: ElementTree.Element) -> list[tuple[float, float]]:
    paths = [group.find(f"{NAMESPACE}path") for group in root.iter(f"{NAMESPACE}g")]
    matches = [re.match(r"M([\d.]+) [\d.]+H([\d.]+)", path.attrib["d"]) for path in paths if path is not None]
    return [(float(match[1]), float(match[2])) for match in matches if match]


def ticks(root: ElementTree.Element) -> dict[str, float]:
    texts = [element for element in root.iter(f"{NAMESPACE}text") if element.attrib["text-anchor"] == "middle"]
    return {str(element.text): float(element.attrib["x"]) for element in texts}


def test_decades_of_the_distance_from_one_are_equally_long():
    root = drawn([[Mark("round", value)] for value in (0.0, 0.9, 0.99, 0.999, 1.0)])
    places = [x for x, _ in circles(root)]
    steps = [b - a for a, b in pairwise(places)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    assert steps[1] == pytest.approx(steps[2], abs=0.2)
    assert steps[3] > 0, "one itself lies to the right of all others"
    for value, place in zip(("0", "0.9", "0.99", "0.999", "1"), places, strict=True):
        assert ticks(root)[value] == pytest.approx(place, abs=0.11)


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-1, 1), st.none() | st.floats(0, 3)), min_size=1, max_size=4),
        min_size=1,
        max_size=6,
    )
)
@example([[(-0.9, None)], [(1 - 1.58e-5, None)]])
@example([[(0.2, 0.3), (1 - 1.5e-4, None)]])
def test_everything_lies_inside_and_in_order(rows):
    marks = [[Mark("round", value, margin) for value, margin in row] for row in rows]
    root = drawn(marks)
    height = float(root.attrib["height"])
    places, flat = circles(root), [mark for row in marks for mark in row]
    assert len(places) == len(flat)
    for (x, y), (low, high) in zip(places, intervals(root), strict=True):
        assert 0 <= low <= x <= high <= WIDTH
        assert 0 < y < height
    assert [y for _, y in places] == sorted(y for _, y in places)
    order = sorted(range(len(flat)), key=lambda number: flat[number].value)
    assert [places[number][0] for number in order] == sorted(x for x, _ in places)
    labels = sorted((x, label) for label, x in ticks(root).items())
    for (x, label), (following, right) in pairwise(labels):
        assert x + 3.3 * len(label) < following - 3.3 * len(right), "labels of the axis run into each other"


def test_intervals_have_the_lengths_of_the_margins():
    root = drawn([[Mark("round", 0.9, 0.05)], [Mark("round", 0.99)], [Mark("round", 0.9, 0.2)]])
    (low, high), (alone, end), (_, farthest) = intervals(root)
    decade = ticks(root)["0.99"] - ticks(root)["0.9"]
    (centre, _) = circles(root)[0]
    assert (high - centre) / decade == pytest.approx(math.log10(0.1 / 0.05), abs=0.01)
    assert (centre - low) / decade == pytest.approx(math.log10(0.15 / 0.1), abs=0.01)
    assert alone == end
    assert farthest == pytest.approx(ticks(root)["1"], abs=0.11), "nothing is more alike than one"


def test_legend_titles_and_numbers():
    root = drawn([[Mark("square <1>", 0.25, 0.5)]], "A & B")
    texts = ["".join(element.itertext()) for element in root.iter(f"{NAMESPACE}text")]
    assert {"A & B", "A note.", "layers", "square <1>", "0"} <= set(texts)
    assert "round" not in texts, "what is not drawn is not explained"
    told = [element.text for element in root.iter(f"{NAMESPACE}title")]
    assert told == ["A & B", "square <1>: 0.25 ± 0.5"]
