"""The heat map: colours follow the numbers, cells lie side by side, labels don't run into each other."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auxin.report.heat_map import VIRIDIS, Panel, Row, heat_map_svg
from auxin.report.svg import CHARACTER

NAMESPACE = "{http://www.w3.org/2000/svg}"


def drawn(*panels: Panel, title: str = "A title") -> ElementTree.Element:
    return ElementTree.fromstring(heat_map_svg(title, panels, "A note."))


def cells(root: ElementTree.Element) -> dict[str, tuple[float, float, float, float, str]]:
    """By what they tell: x, y, width, height, colour."""
    found = {}
    for path in root.iter(f"{NAMESPACE}path"):
        if (told := path.find(f"{NAMESPACE}title")) is not None:
            places = re.fullmatch(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", path.attrib["d"])
            assert places is not None
            found[str(told.text)] = (*map(float, places.groups()), path.attrib["fill"])  # type: ignore[assignment]
    return found


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{NAMESPACE}text")]


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, by WCAG 2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_larger_numbers_are_lighter_up_to_the_ends_of_the_scale():
    root = drawn(Panel("heads", [Row("0", [0.0, 0.25, 0.5]), Row("1", [0.75, 1.0])]))
    colours = [colour for *_, colour in cells(root).values()]
    assert colours[0] == VIRIDIS[0]
    assert colours[-1] == VIRIDIS[-1]
    assert all(luminance(a) < luminance(b) for a, b in pairwise(colours))
    assert {"0", "0.5", "1", "heads"} <= set(texts(root))


def test_a_logarithmic_scale_has_equal_factors_equally_far_apart_and_ends_four_decades_down():
    log = cells(drawn(Panel("log", [Row("0", [1e-9, 1e-4, 1e-2, 1.0])], logarithmic=True)))
    linear = cells(drawn(Panel("linear", [Row("0", [0.0, 0.5, 1.0])])))
    assert [colour for *_, colour in log.values()][1:] == [colour for *_, colour in linear.values()]
    assert "≤ 0.0001" in texts(drawn(Panel("log", [Row("0", [1e-9, 1e-4, 1e-2, 1.0])], logarithmic=True)))
    nothing = cells(drawn(Panel("log", [Row("0", [0.0, 0.0])], logarithmic=True)))
    assert len(nothing) == 2


def test_the_ends_of_a_scale_can_be_given():
    (cell,) = cells(drawn(Panel("share", [Row("0", [0.5])], low=0.0, high=1.0))).values()
    (half, *_) = [cell[-1] for cell in cells(drawn(Panel("other", [Row("0", [1.0, 0.0, 2.0])]))).values()]
    assert cell[-1] == half


@given(
    st.lists(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=90), min_size=1, max_size=20),
    st.booleans(),
    st.text(max_size=80),
)
def test_everything_lies_inside_side_by_side(rows, logarithmic, title):
    panel = Panel("p", [Row(str(n), values) for n, values in enumerate(rows)], logarithmic=logarithmic)
    root = drawn(panel, panel, title=title)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for path in root.iter(f"{NAMESPACE}path"):
        x, y, wide, high = map(float, re.findall(r"[\d.]+", path.attrib["d"])[:4])
        assert 0 <= x <= x + wide <= width
        assert 0 <= y <= y + high <= height
    for element in root.iter(f"{NAMESPACE}text"):
        assert 0 <= float(element.attrib["y"]) <= height
    told = list(root.iter(f"{NAMESPACE}title"))[1:]
    assert len(told) == 2 * sum(value is not None for values in rows for value in values)


def test_labels_of_columns_do_not_run_into_each_other():
    names = [str(number) for number in range(95, 175)]
    root = drawn(Panel("p", [Row("0", [float(n) for n in range(80)])], columns=names))
    places = [
        (float(element.attrib["x"]), len(str(element.text)))
        for element in root.iter(f"{NAMESPACE}text")
        if element.text in names and element.attrib["text-anchor"] == "middle"
    ]
    # Three characters need more than four cells of five pixels: every eighth column has its label.
    assert [x for x, _ in places] == [places[0][0] + 40 * n for n in range(10)]
    for (x, count), (after, next_count) in pairwise(places):
        assert x + CHARACTER * count / 2 < after - CHARACTER * next_count / 2


def test_it_reads_on_white_and_on_black():
    """Whatever the background, a cell or the frame around it stands out: grey from both, and each colour from one."""
    root = drawn(Panel("p", [Row("0", [0.0, None, 1.0])]))
    for element in root.iter():
        for attribute in ("fill", "stroke"):
            colour = element.attrib.get(attribute, "none")
            if element.tag in (f"{NAMESPACE}text", f"{NAMESPACE}rect") and colour != "none":
                light = luminance(colour)
                assert min(1.05 / (light + 0.05), (light + 0.05) / 0.05) > 3
    assert len(cells(root)) == 2


def test_what_is_not_markup_stays_text():
    root = drawn(Panel("<b>", [Row("a&b", [1.0])], columns=["<i>"]), title="1 < 2")
    assert {"1 < 2", "<b>", "a&b", "<i>"} <= set(texts(root))
    assert cells(root).keys() == {"a&b, <i>: 1"}


@pytest.mark.parametrize("rows", [[], [Row("0", [])], [Row("0", [None, None])], [Row("0", [3.0, 3.0])]])
def test_there_may_be_nothing_to_tell_apart(rows):
    assert "A title" in texts(drawn(Panel("p", rows)))
