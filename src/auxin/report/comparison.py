"""What a recipe shows over several seeds: as sentences, and as the rows of tables."""

import math
from typing import NamedTuple

from auxin.accounting.comparison import BranchComparison, Comparison, MeanGrowth
from auxin.accounting.results import MeasureDescription
from auxin.accounting.statistics import Estimate
from auxin.report.curves import branch_order
from auxin.report.findings import EXACT_CHANGE, SAME_COST, promise_sentence
from auxin.report.formatting import DASH, power


class ComparisonRow(NamedTuple):
    """One line of the table of results."""

    branch: BranchComparison
    standing: str
    """Of the branch beside the main one: "better" or "worse" where the interval of their difference excludes 0, else
    "open"; "main" for the main branch itself."""


class GrowthRow(NamedTuple):
    """One line of the table of growths."""

    title: str
    growth: MeanGrowth
    verdict: str
    """What became of the promise: "kept", "broken", "none" (nothing exact was promised) or "unknown"."""


def comparison_findings(comparison: Comparison) -> list[str]:
    """What the seeds show together, in sentences: whether growths kept their promise, what the main branch reached, and
    which differences are larger than chance makes them."""
    found = [comparison_growth_sentence(comparison), comparison_headline(comparison)]
    return [sentence for sentence in found if sentence is not None]


def comparison_headline(comparison: Comparison) -> str:
    """What the main branch reached, against each of the others. Better or worse is only said where the 95 % interval of
    the differences, taken seed by seed, excludes 0."""
    main = comparison.main
    if main is None:
        return "The main branch has no results yet."
    if main.value is None:
        return f"{main.title} has no final {measure_words(comparison.measure)} with every seed: a run failed."
    count = main.value.count
    over = f"mean of {count} seeds, 95 % interval" if count > 1 else "one seed"
    reached = (
        f"For {power(main.flops)} training FLOPs, “{main.title}” reached a {measure_words(comparison.measure)} of "
        f"{main.value.text()}{unit_words(comparison.measure)} ({over})"
    )
    clauses = [
        f"{_clause(branch.difference, branch.title, comparison)}{_cost(main, branch)}"
        for branch in comparison.branches
        if branch.difference is not None
    ]
    text = f"{reached}{': ' if clauses else ''}{', '.join(clauses)}."
    return text if count > 1 or not clauses else f"{text} One seed gives no interval: these differences may be chance."


def comparison_growth_sentence(comparison: Comparison) -> str | None:
    """Whether the growths of the main branch kept their promise with every seed; None where there was none to keep."""
    main = comparison.main
    promised = [growth for growth in main.growths if growth.promise == "exact"] if main else []
    changes = [growth.largest_change for growth in promised if growth.largest_change is not None]
    return promise_sentence(
        promised, changes, comparison.measure, f" with any of {len(main.seeds)} seeds" if main else ""
    )


def standing(branch: BranchComparison, comparison: Comparison) -> str:
    """Of `branch` beside the main one, as in `ComparisonRow`."""
    if branch.name == comparison.main_branch:
        return "main"
    sign = 0 if branch.difference is None else branch.difference.sign
    if not sign:
        return "open"
    return "better" if (sign < 0) == (comparison.measure.better == "lower") else "worse"


def comparison_rows(comparison: Comparison) -> list[ComparisonRow]:
    """The table of results, the main branch first."""
    return [ComparisonRow(branch, standing(branch, comparison)) for branch in branch_order(comparison)]


def comparison_growths(comparison: Comparison) -> list[GrowthRow]:
    """Every growth once, in the branch that did it; a fork's results repeat those of its parent."""
    rows: list[GrowthRow] = []
    seen: set[tuple[str, int, float]] = set()
    for branch in branch_order(comparison):
        for growth in branch.growths:
            if (key := (growth.stage, growth.units, growth.flops)) not in seen:
                seen.add(key)
                rows.append(GrowthRow(branch.title, growth, _verdict(growth)))
    return rows


def measure_words(measure: MeasureDescription) -> str:
    """What a sentence calls the measure."""
    return "validation loss" if measure.kind == "loss" else f"held-out {measure.name}"


def unit_words(measure: MeasureDescription) -> str:
    """Its unit after a number: " nats per token"; empty for a plain number."""
    return f" {measure.unit.replace('/', ' per ')}" if measure.unit else ""


def estimate_text(estimate: Estimate | None, digits: int = 4, signed: bool = False) -> str:
    """Mean and interval; a dash where there is none."""
    return DASH if estimate is None else estimate.text(digits, signed).replace("-", "−")


def _clause(difference: Estimate, title: str, comparison: Comparison) -> str:
    """`difference` is the other branch's measure minus the main one's."""
    gap = f"{abs(difference.mean):.3f}"
    if difference.half_width is None:
        return f"{gap} {'below' if difference.mean > 0 else 'above'} “{title}”"
    if not difference.sign:
        return f"not to be told from “{title}” by these seeds ({estimate_text(difference, 3, signed=True)})"
    ahead = (difference.sign > 0) == (comparison.measure.better == "lower")
    return f"{gap} ± {difference.half_width:.3f} {'better' if ahead else 'worse'} than “{title}”"


def _cost(main: BranchComparison, other: BranchComparison) -> str:
    ratio = other.flops / main.flops if main.flops else math.nan
    return "" if math.isnan(ratio) or abs(ratio - 1) <= SAME_COST else f" (at {ratio:.2f} times these FLOPs)"


def _verdict(growth: MeanGrowth) -> str:
    if growth.promise != "exact":
        return "none"
    if growth.largest_change is None:
        return "unknown"
    return "kept" if growth.largest_change < EXACT_CHANGE else "broken"
