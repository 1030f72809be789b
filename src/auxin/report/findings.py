"""What a run shows, as sentences made of its numbers; also that growing lost, where it did."""

import math
from collections.abc import Sequence

from auxin.accounting.results import BranchResult, GrowthPoint, MeasureDescription, RunResults
from auxin.report.curves import word_for
from auxin.report.formatting import change, decimal, difference, power, short

EXACT_CHANGE = 1e-5
"""Largest change of the measure, such as the held-out loss in nats per token, at a growth that kept its promise to be
exact."""
SAME_COST = 0.02
"""Relative difference of costs up to which two branches are said to have cost the same."""
TIE = 0.005
"""Difference of values, such as losses in nats per token, up to which they are said to be equal."""


def main_result(results: RunResults) -> BranchResult | None:
    """The branch that the others are compared with; None where it is missing."""
    return next((branch for branch in results.branches if branch.name == results.main_branch), None)


def findings(results: RunResults) -> list[str]:
    """What the run shows, in sentences: whether growths kept their promise, and what the main branch reached."""
    return [sentence for sentence in (growth_sentence(results), headline(results)) if sentence is not None]


def headline(results: RunResults) -> str:
    """One sentence: what the main branch reached, against each of the others."""
    main = main_result(results)
    if main is None:
        return "The main branch has no results yet."
    if difference(main.value, 0.0) is None:
        return f"{main.title} has no final validation {results.measure.name}: the run is not finished, or it failed."
    reached = (
        f"For {power(main.flops)} training FLOPs, “{main.title}” reached a validation {results.measure.name} of "
        f"{decimal(main.value, 3)} {results.measure.unit_in_words}".rstrip()
    )
    clauses = [
        _comparison(main, other, results.measure)
        for other in results.branches
        if other.name != main.name and difference(other.value, 0.0) is not None
    ]
    return f"{reached}{': ' if clauses else ''}{', '.join(clauses)}."


def standing(main: BranchResult, other: BranchResult, measure: MeasureDescription) -> str | None:
    """Whether `main` is "ahead", "behind" or "level" in its final `measure`; None where one has none."""
    gap = difference(main.value, other.value)
    if gap is None:
        return None
    return "level" if abs(gap) <= TIE else "ahead" if measure.gain(gap) > 0 else "behind"


def growth_sentence(results: RunResults) -> str | None:
    """Whether the growths of the main branch kept their promise; None where there was none to keep."""
    main = main_result(results)
    promised = [growth for growth in main.growths if growth.promise == "exact"] if main else []
    changes = [
        abs(value) for growth in promised if (value := difference(growth.value_after, growth.value_before)) is not None
    ]
    return promise_sentence(promised, changes, results.measure)


def promise_sentence(
    promised: Sequence[GrowthPoint], changes: Sequence[float], measure: MeasureDescription, over: str = ""
) -> str | None:
    """What became of growths that promised to be exact; None where no change was measured.

    Args:
        promised: the growths.
        changes: how much they changed the measure, without signs.
        measure: what was measured.
        over: put behind "changed by at most X nats".
    """
    if not changes:
        return None
    largest, name, word = max(changes), f"validation {measure.name}", word_for(promised)
    by = f"{change(largest).lstrip('+')} {measure.unit.partition('/')[0]}".rstrip()
    if largest < EXACT_CHANGE:
        at_most = "did not change at all" if largest == 0 else f"changed by at most {by}"
        at_most += over
        times = word if len(changes) == 1 else f"{len(changes)} {word}s"
        return f"At the {times} from {_sizes(promised)} parameters the {name} {at_most}."
    return f"A {word} that promised to be exact changed the {name} by {by}."


def _sizes(growths: Sequence[GrowthPoint]) -> str:
    return " to ".join([short(growths[0].parameters_before), *(short(g.parameters_after) for g in growths)])


def _comparison(main: BranchResult, other: BranchResult, measure: MeasureDescription) -> str:
    gap = abs(difference(main.value, other.value) or 0.0)
    verdict = {
        "ahead": f"{gap:.3f} better than",
        "behind": f"{gap:.3f} worse than",
        "level": f"within {TIE} of",
    }[standing(main, other, measure) or "level"]
    ratio = other.flops / main.flops if main.flops else math.nan
    cost = "" if math.isnan(ratio) or abs(ratio - 1) <= SAME_COST else f" (at {ratio:.2f} times these FLOPs)"
    return f"{verdict} “{other.title}”{cost}"
