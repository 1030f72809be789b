"""The report in a real browser: its charts draw on every axis, in light and dark, and the console stays clean."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from auxin.accounting.comparison import compare
from auxin.report.html import write_report
from report.made_up_run import on_a_part, only_ends, partial_results, results, seeded

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium to look at the report (Debian: chromium)")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
    "--dump-dom",
]
# Presses every control in turn and writes what was drawn into the page, where --dump-dom shows it.
VISIT = """<script>
(() => {
  const drawn = () => ({
    curves: [...document.querySelectorAll("#chart .scatterlayer .trace")].filter((t) => t.querySelector("path")).length,
    colour: document.querySelector("#chart .scatterlayer .trace path.js-line")?.style.stroke ?? null,
    ticks: document.querySelectorAll("#chart .xtick").length,
    labels: document.querySelectorAll("#chart .annotation").length,
    pressed: [...document.querySelectorAll("[data-setting] [aria-pressed=true]")].map((b) => b.dataset.value).join(),
    theme: document.documentElement.dataset.theme,
    matters: document.querySelector("#results tbody td:nth-child(2)").getBoundingClientRect().right,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
  const seen = { start: drawn() };
  for (const selector of ["[data-value=units]", "[data-value=seconds]", "[data-value=all]", "[data-value=log]",
    "#training", "#theme", "#legend button"]) {
    document.querySelector(selector).click();
    seen[selector] = drawn();
  }
  const out = document.createElement("script");
  out.type = "application/json"; out.id = "seen"; out.textContent = JSON.stringify(seen);
  document.body.append(out);
})();
</script></body>"""


def visit(page: Path, profile: Path, *flags: str) -> dict:
    """Load `page` without a network, press its controls, and return what was drawn; the console must be empty."""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", VISIT), encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<script type="application/json" id="seen">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, "the page's scripts did not run to their end"
    return json.loads(found[1])


def test_the_charts_draw_on_every_axis_in_both_themes(tmp_path):
    run = results()
    seen = visit(write_report(run, tmp_path / "report.html"), tmp_path / "profile", "--window-size=1200,900")
    curves, growths = len(run.branches), sum(bool(branch.growths) for branch in run.branches)
    assert seen["start"]["theme"] == "light"
    for state in ("start", "[data-value=units]", "[data-value=seconds]", "[data-value=all]", "[data-value=log]"):
        assert seen[state]["curves"] == curves + growths, state
        assert seen[state]["ticks"] >= 3, state
    assert seen["start"]["labels"] == curves + len(run.branches[0].growths)
    assert seen["[data-value=log]"]["pressed"] == "seconds,all,log"
    assert seen["#training"]["curves"] == 2 * curves + growths
    assert seen["#theme"]["theme"] == "dark"
    assert seen["#theme"]["colour"] != seen["#training"]["colour"]
    assert seen["#legend button"]["curves"] == 2 * (curves - 1), "the main branch and its growths are hidden"


def test_a_failed_run_on_a_narrow_dark_screen(tmp_path):
    page = write_report(partial_results(), tmp_path / "a folder" / "report.html")
    flags = ("--window-size=500,900", "--blink-settings=preferredColorScheme=0")
    seen = visit(page, tmp_path / "profile", *flags)
    assert seen["start"]["theme"] == "dark"
    assert seen["start"]["curves"] == 1
    assert {state["overflow"] for state in seen.values()} == {0}, "the page must not scroll sideways"


@pytest.mark.parametrize("width", [1200, 500])
def test_bands_of_several_seeds_draw_on_every_axis_and_width(tmp_path, width):
    comparison = compare([seeded(0, 0.0, 0.0), seeded(1, 0.04, 0.01), seeded(2, -0.03, -0.01)], "")
    seen = visit(write_report(comparison, tmp_path / "report.html"), tmp_path / "profile", f"--window-size={width},900")
    branches, growths = len(comparison.branches), sum(bool(branch.growths) for branch in comparison.branches)
    for state in ("start", "[data-value=units]", "[data-value=seconds]", "[data-value=all]", "[data-value=log]"):
        assert seen[state]["curves"] == 2 * branches + growths, state
    assert {state["overflow"] for state in seen.values()} == {0}, "the page must not scroll sideways"
    if width == 500:
        assert seen["start"]["matters"] <= 420, "on a telephone too the measure is on the screen"


def test_a_run_without_evaluations_on_the_way_shows_its_training_loss(tmp_path):
    run = only_ends(results())
    seen = visit(write_report(run, tmp_path / "report.html"), tmp_path / "profile", "--window-size=1200,900")
    curves, growths = len(run.branches), sum(bool(branch.growths) for branch in run.branches)
    assert seen["start"]["curves"] == 2 * curves + growths
    assert seen["#training"]["curves"] == curves + growths, "pressed once, it is gone"


def test_what_was_measured_on_the_whole_split_is_drawn_apart(tmp_path):
    run = on_a_part(results())
    seen = visit(write_report(run, tmp_path / "report.html"), tmp_path / "profile", "--window-size=1200,900")
    curves, growths = len(run.branches), sum(bool(branch.growths) for branch in run.branches)
    for state in ("start", "[data-value=units]", "[data-value=seconds]", "[data-value=all]", "[data-value=log]"):
        assert seen[state]["curves"] == 2 * curves + growths, state
