"""The report of a run as one HTML file that needs no network."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from auxin.accounting.comparison import Comparison
from auxin.accounting.results import BranchResult, GrowthPoint, MeasureDescription, RunResults
from auxin.files import write_text
from auxin.report import formatting
from auxin.report.comparison import (
    comparison_growth_sentence,
    comparison_growths,
    comparison_headline,
    comparison_rows,
    measure_words,
    unit_words,
)
from auxin.report.curves import branch_colours, branch_order, chart_data, chart_words, explanation, word_for
from auxin.report.findings import EXACT_CHANGE, growth_sentence, headline, main_result, standing
from auxin.report.lineage import lineage
from auxin.words.printable import printable

TEMPLATE = "report.html"
SCRIPT = "chart.js"


def write_report(results: RunResults | Comparison, path: str | Path) -> Path:
    """Write the report of `results` to `path`, whole or not at all.

    The page holds everything it shows, its chart library included (about 5 MB), follows the light or dark setting of
    the reader's system, and prints. What was not measured appears as a dash.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_report(results))
    return path


def render_report(results: RunResults | Comparison) -> str:
    """The report's HTML; with several seeds it shows means, their intervals and the seeds' own results."""
    environment = Environment(
        loader=PackageLoader("auxin.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    for name in ("exact", "short", "power", "duration", "decimal", "signed", "change", "sentence"):
        environment.filters[name] = getattr(formatting, name)
    own = _of_seeds(results) if isinstance(results, Comparison) else _of_run(results)
    return environment.get_template(TEMPLATE).render(
        **own,
        results=results,
        word=word_for(growth for branch in results.branches for growth in branch.growths),
        titles={branch.name: branch.title for branch in results.branches},
        colours=branch_colours(results),
        chart=_script_json(chart_data(results)),
        words=_script_json(chart_words(results)),
        explained=explanation(results),
        order={branch.name: index for index, branch in enumerate(branch_order(results))},
        plotly=Markup(get_plotlyjs()),
        script=Markup(files("auxin.report").joinpath(SCRIPT).read_text(encoding="utf-8")),
        fork_of={branch.name: branch.parent for branch in results.branches},
    )


def _of_run(results: RunResults) -> dict[str, Any]:
    """What the page says of one run alone."""
    main = main_result(results)
    return {
        "several": False,
        "headline": headline(results),
        "growth_sentence": growth_sentence(results),
        "rows": [_row(branch, main, results.measure) for branch in branch_order(results)],
        "best": _best(results),
        "growths": _growth_rows(results),
        "trees": lineage(results),
    }


def _of_seeds(comparison: Comparison) -> dict[str, Any]:
    """What the page says of several seeds alone."""
    return {
        "several": True,
        "headline": comparison_headline(comparison),
        "growth_sentence": comparison_growth_sentence(comparison),
        "rows": comparison_rows(comparison),
        "growths": comparison_growths(comparison),
        "measure": measure_words(comparison.measure),
        "measure_unit": unit_words(comparison.measure),
    }


def _row(branch: BranchResult, main: BranchResult | None, measure: MeasureDescription) -> dict[str, Any]:
    """One line of the table; `gap` is how far the branch's value lies from the main one's."""
    other = main is not None and branch.name != main.name
    return {
        "branch": branch,
        "gap": formatting.difference(branch.value, main.value) if main and other else None,
        "standing": standing(main, branch, measure) if main and other else None,
    }


def _best(results: RunResults) -> float | None:
    values = [b.value for b in results.branches if b.value is not None and formatting.is_number(b.value)]
    return max(values, key=results.measure.gain, default=None)


def _growth_rows(results: RunResults) -> list[dict[str, Any]]:
    """Every growth once, in the branch that did it; a fork's results repeat those of its parent."""
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, int, float]] = set()
    for branch in branch_order(results):
        for growth in branch.growths:
            key = (growth.stage, growth.units, growth.flops)
            if key not in seen:
                seen.add(key)
                rows.append({"title": branch.title, "growth": growth, "verdict": _verdict(growth)})
    return rows


def _verdict(growth: GrowthPoint) -> str:
    """What became of the promise: "kept", "broken", "none" (nothing exact was promised) or "unknown"."""
    change = formatting.difference(growth.value_after, growth.value_before)
    if growth.promise != "exact":
        return "none"
    if change is None:
        return "unknown"
    return "kept" if abs(change) < EXACT_CHANGE else "broken"


def _script_json(value: Any) -> Markup:
    """JSON for a script element: no text in it can end the element."""
    text = json.dumps(_shown(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _shown(value: Any) -> Any:
    """`value` with all texts in it as a page can show them: the script draws them, and saves pictures of them."""
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return printable(value) if isinstance(value, str) else value
