"""A report speaks of what its run was compared by and of what its data is made of, not of losses and tokens."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from auxin.accounting.comparison import compare
from auxin.accounting.results import MeasureDescription
from auxin.report.findings import findings, growth_sentence, headline, standing
from auxin.report.html import render_report
from auxin.report.markdown import results_table
from auxin.report.picture import chart_svg
from report.made_up_run import results, results_of_images


def visible(html: str) -> str:
    """The page's text and labels, without the chart library and without code."""
    body = html[html.index("<header>") :]
    labels = " ".join(re.findall(r'aria-label="([^"]*)"', body))
    return labels + re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script).*?</\1>", "", body, flags=re.DOTALL))


def words_of(html: str) -> str:
    found = re.search(r'<script id="words" type="application/json">(.*?)</script>', html)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def pages() -> tuple[str, str]:
    return render_report(results()), render_report(results_of_images())


def test_a_run_of_images_says_nothing_of_losses_or_tokens(pages):
    run = results_of_images().model_copy(update={"other_measures": []})
    page = render_report(run)
    for text in (visible(page), words_of(page), chart_svg(run), *findings(run)):
        assert not re.search(r"loss|token(?!former)|nats|perplexity|bits per byte", text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("What the loss cost", "What the accuracy cost"),
        ("loss axis", "accuracy axis"),
        ("Loss axis", "Accuracy axis"),
        ("Tokens seen", "Images seen"),
        ("Validation loss of every branch against what it cost", "Validation accuracy of every branch against"),
        ("Validation loss", "Validation accuracy"),
        (
            "Loss in nats per token on the whole held-out split; below",
            "Accuracy on the whole held-out split, higher is",
        ),
        ("Tokens, FLOPs and wall time include", "Images, FLOPs and wall time include"),
        ("What each growth did to the loss", "What each growth did to the accuracy"),
        ("At tokens", "At images"),
        ("Loss before", "Accuracy before"),
        ("Loss after", "Accuracy after"),
    ],
)
def test_headings_and_hints(pages, text, image):
    of_text, of_images = map(visible, pages)
    assert text in of_text
    assert image in of_images
    assert text not in of_images


def test_stages_say_what_they_measured(pages):
    of_text, of_images = pages
    assert re.search(r"<span>loss <b>\d", of_text)
    assert re.search(r"<span>accuracy <b>0\.\d", of_images)
    assert re.search(r"<b>[\d.]+[KM]</b> images", of_images)


def test_the_chart_is_told_what_it_draws(pages):
    of_text, of_images = pages
    assert words_of(of_text) == '{"unit":"token","measure":"loss","axis":"loss, nats per token","range":"late"}'
    assert words_of(of_images) == '{"unit":"image","measure":"accuracy","axis":"accuracy","range":"late"}'
    # A training loss is no accuracy: it can't be drawn beside it.
    assert 'id="training"' in of_text
    assert 'id="training"' not in of_images


def test_the_largest_accuracy_is_the_best_one(pages):
    table = pages[1].split('<section id="results">')[1].split("</section>")[0]
    best = max(branch.value for branch in results_of_images().branches)
    assert re.findall(r'class="best">([\d.]+)<', table) == [f"{best:.4f}"]


@pytest.mark.parametrize("several", [False, True])
def test_what_else_was_measured_has_a_column(several):
    run = results_of_images()
    page = render_report(compare([run, run.model_copy(update={"seed": 1})], "") if several else run)
    table = page.split('<section id="results">')[1].split("</section>")[0]
    assert "Loss, nats per image" in re.findall(r'<th scope="col">([^<]*)</th>', table)
    rows = table.split("<tbody>")[1].split("</tr>")
    for branch in run.branches:
        (row,) = (row for row in rows if branch.title in row)
        assert f"<td>{branch.measures['loss']:.4f}" in row
        assert row.count("<td") == table.count("<th ")
    assert "Perplexity" not in table


def test_what_else_was_measured_stands_in_the_table_in_markdown():
    run = results_of_images()
    head, rule, *rows = results_table(compare([run], ""))
    assert "| loss, nats per image |" in head
    assert all(row.count("|") == rule.count("|") == head.count("|") for row in rows)
    assert f"| {run.branches[0].measures['loss']:.3f} |" in rows[0]


def test_more_accuracy_is_better_and_more_loss_is_worse():
    text, image = results(), results_of_images()
    value = {branch.name: branch.value for branch in image.branches}
    said = headline(image)
    assert f"reached a validation accuracy of {value['grown']:.3f}: " in said
    assert f"{value['grown'] - value['small']:.3f} better than “Small TokenFormer, trained on”" in said
    other = headline(image.model_copy(update={"main_branch": "small"}))
    assert f"{value['grown'] - value['small']:.3f} worse than “TokenFormer, grown”" in other
    assert "reached a validation loss of " in headline(text)
    assert " nats per token: " in headline(text)
    for run in (text, image):
        grown, small = run.branches[:2]
        assert standing(grown, small, run.measure) == "ahead"
        assert standing(small, grown, run.measure) == "behind"


def test_what_growths_did_is_said_in_the_measures_unit():
    assert re.search(r"the validation loss changed by at most [\d.]+ × 10⁻⁷ nats\.$", str(growth_sentence(results())))
    said = str(growth_sentence(results_of_images()))
    assert re.search(r"the validation accuracy changed by at most [\d.]+ × 10⁻[⁷⁸]\.$", said)


def test_the_picture_names_the_measure():
    def texts(run):
        root = ElementTree.fromstring(chart_svg(run))
        return ["".join(item.itertext()) for item in root.iter("{http://www.w3.org/2000/svg}text")]

    assert "validation loss, nats per token" in texts(results())
    assert "validation accuracy" in texts(results_of_images())
    none = {"curve": [], "growths": []}
    run = results_of_images()
    empty = run.model_copy(update={"branches": [branch.model_copy(update=none) for branch in run.branches]})
    assert "no accuracy was measured" in texts(empty)


def test_every_visible_part_of_a_rising_curve_begins_inside_the_picture():
    run = results_of_images()
    svg = chart_svg(run)
    lines = re.findall(r'<polyline points="([^"]+)" fill="none" stroke="#\w+" stroke-width', svg)
    assert len(lines) == len(run.branches)
    assert all(50 <= float(point.split(",")[1]) <= 460 - 56 for line in lines for point in line.split())


def test_units_in_words():
    loss, percent = MeasureDescription(), MeasureDescription(kind="x", name="macro F1", unit="", better="higher")
    assert (loss.unit_in_words, loss.with_unit, loss.gain(-0.5)) == ("nats per token", "loss, nats per token", 0.5)
    assert (percent.unit_in_words, percent.with_unit, percent.gain(-0.5)) == ("", "macro F1", -0.5)
    assert loss.per_token
    assert not percent.per_token
    assert not MeasureDescription(unit="nats/image").per_token
