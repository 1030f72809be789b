"""Widths pruned by what units do on samples of text: the units that matter least by a score of the literature go.

The scores are those of the measurement `importance` (`auxin.analysis.importance`), of masks on heads, feed-forward
units and, where gradients are looked at, units of the residual:

* **taylor**: the size of the loss's derivative by the unit's mask, mean over samples. Of a group of weights as in
  LLM-Pruner (arXiv 2305.11627) it is the sum of weight times gradient over the columns that read the unit.
* **fisher**: the mean over samples of its square.
* **wanda-structured**: the root mean square of each entry of a unit's activation, times the length of the column that
  reads it; Wanda's score of single weights (arXiv 2306.11695) for whole columns.
* **fluctuation**: the variance of each entry times the squared length of that column, FLAP's score. FLAP also puts the
  mean of what went into a bias, which Llama and its twins don't have; that is left out here.

All are measured once on the whole model. The order of units goes by sums over key-value groups.
"""

from collections.abc import Sequence
from functools import partial

from auxin.analysis.importance import Importance
from auxin.analysis.run import measure
from auxin.analysis.unit_sums import OF_GRADIENTS, Score
from auxin.edits import Plan
from auxin.errors import PlanError
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.pruning import Pruning, prunable, pruning_example
from auxin.planning.unit_order import Place


def plan_by_importance(bench: Bench, settings: Pruning, name: str, score: Score) -> Plan:
    """Plan a model without the units of the lowest scores.

    Args:
        bench: with the samples.
        settings: what stays.
        name: the method's.
        score: of the measurement.

    Raises:
        PlanError: see `auxin.planning.pruning`; the residual by a score that has none for it.
        DataError: gradients are asked for, and the samples have no labels.
    """
    if "hidden" in settings.chosen and score not in OF_GRADIENTS:
        raise PlanError(
            f"hidden: {name} scores what enters one output matrix, and every matrix reads the residual. Leave it out, "
            "or choose taylor or fisher."
        )
    found = prunable(bench.model, settings)
    measured = measure(Importance(score=score), bench.model, bench.data)
    scores: dict[Place, Sequence[float]] = {}
    for group in measured.groups:
        if group.stream != "key_value" and group.stream != "expert":  # of heads, those of the queries are added up
            scores[group.stream, group.scope] = group.scores.means
    return found.plan(name, scores)


def _method(name: str, score: Score, by: str, paper: str) -> Method:
    return Method(
        name=name,
        title=f"Fewer heads and feed-forward units, without those that matter least by {by}",
        paper=paper,
        intent="prune",
        settings=Pruning,
        plan=partial(plan_by_importance, name=name, score=score),
        examples=pruning_example,
        needs_weights=True,
        promise="none",
        calibration=lambda settings: CalibrationSettings(samples=64),
        outline=lambda bench, settings: prunable(bench.model, settings).outline(name),
    )


METHODS = (
    _method("taylor", "taylor", "the derivative of the loss", "arXiv 1905.10650 (for groups: arXiv 2305.11627)"),
    _method("fisher", "fisher", "the Fisher information of their masks", "arXiv 2204.09656"),
    _method("wanda-structured", "output", "activation times weights (Wanda)", "arXiv 2306.11695"),
    _method("fluctuation", "fluctuation", "how much their activation varies (FLAP's score)", "arXiv 2312.11983"),
)
