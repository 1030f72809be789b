"""Widths pruned by what units do on samples of text: the units that matter least by a score of the literature go.

The scores are those of the measurement `importance` (`auxin.analysis.importance`), of masks on heads, feed-forward
units and, where gradients are looked at, units of the residual:

* **taylor**: the size of the loss's derivative by the unit's mask, mean over samples. Of a group of weights as in
  LLM-Pruner (arXiv 2305.11627) it is the sum of weight times gradient over the columns that read the unit.
* **fisher**: the mean over samples of its square.
* **wanda-structured**: the root mean square of each entry of a unit's activation, times the length of the column that
  reads it: the L2 norm of Wanda's scores of the column's single weights (arXiv 2306.11695). The structured variant in
  FLAP's repository takes their mean (L1), layer after layer on inputs that are pruned already.
* **fluctuation**: the variance of each entry times the squared length of that column, FLAP's score. The mean of what
  goes is given back by the bias of the output matrix, as in FLAP; see `auxin.planning.compensation`. Where layers may
  differ (`uniform: false`) a target is met as there: the scores of entries are standardised within each layer's heads
  and feed-forward units, a group of heads gets the mean of its entries, and one ranking goes over heads and units of
  all layers. The authors' code squares the scores of heads' entries before; the paper does not, nor is it done here.

All are measured once on the whole model. The order of units goes by sums over key-value groups.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel

from auxin.analysis.importance import Importance, Importances
from auxin.analysis.run import measure
from auxin.analysis.unit_sums import OF_GRADIENTS, Score
from auxin.analysis.units import why_no_residual
from auxin.edits import Plan
from auxin.errors import PlanError
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.compensation import READ, Compensation, compensation
from auxin.planning.method import Method
from auxin.planning.pruning import Prunable, Pruning, prunable, pruning_example
from auxin.planning.pruning_settings import STREAMS, Part
from auxin.planning.unit_order import Place
from auxin.planning.width_removal import Split


class FluctuationPruning(Pruning):
    """What stays, and whether the mean of what goes does, too."""

    bias: bool = True
    """Whether the mean of what goes is given back by the bias of the matrix that read it, where it has one, or the
    config has a switch for one (Llama)."""


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
    found = _prunable(bench.model, settings, name, score)
    found.refuse_impossible(name)  # before the model is run
    measured = measure(Importance(score=score), bench.model, bench.data)
    return found.plan(name, _scores(measured))


def plan_fluctuation(bench: Bench, settings: FluctuationPruning) -> Plan:
    """Plan a model without the units that vary least, and with the mean of what they gave.

    Raises:
        PlanError: as `plan_by_importance`; or `bias` is asked for, and nothing can be given back.
    """
    found = _prunable(bench.model, settings, "fluctuation", "fluctuation")
    given = _given_back(found, settings)
    found.refuse_impossible("fluctuation", given)  # before the model is run
    measured = measure(Importance(score="fluctuation"), bench.model, bench.data)
    if given is not None:
        given = given.filled(measured.entries, bench.folder)
    scores = _scores(measured)
    scores |= {("query", scope): entries for scope, entries in measured.of_heads.items()}
    # Standardised scores alone are of one kind for heads and feed-forward units.
    split: Split = "score" if settings.normalised and not settings.uniform else "alike"
    return found.plan("fluctuation", scores, split=split, given_back=given)


def _given_back(found: Prunable, settings: FluctuationPruning) -> Compensation | None:
    if not settings.bias:
        return None
    streams = [stream for part in settings.chosen for stream in STREAMS[part] if stream in READ]
    given = compensation(found.model, found.body, streams)
    if not given.readers and "bias" in settings.model_fields_set:
        raise PlanError(
            "bias = true: no output matrix of what goes has a bias, nor can the config of this model say one. Leave it "
            "out."
        )
    return given


def _outline(bench: Bench, settings: Pruning, name: str, score: Score) -> Plan:
    return _prunable(bench.model, settings, name, score).outline(name)


def _outline_fluctuation(bench: Bench, settings: FluctuationPruning) -> Plan:
    found = _prunable(bench.model, settings, "fluctuation", "fluctuation")
    return found.outline("fluctuation", _given_back(found, settings))


def _prunable(model: PreTrainedModel, settings: Pruning, name: str, score: Score) -> Prunable:
    """What can go; not the residual, where the score has none for it."""
    refused: dict[Part, str] = {}
    if score not in OF_GRADIENTS:
        refused["hidden"] = (
            f"{name} scores what enters one output matrix, and every matrix reads the residual. Leave it out, or "
            "choose taylor or fisher."
        )
    elif why := why_no_residual(model):
        refused["hidden"] = f"{why} Leave it out, or choose magnitude."
    return prunable(model, settings, refused)


def _scores(measured: Importances) -> dict[Place, Sequence[float]]:
    scores: dict[Place, Sequence[float]] = {}
    for group in measured.groups:
        if group.stream != "key_value":  # of heads, those of the queries are added up
            scores[group.stream, group.scope] = group.scores.means
    return scores


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
        outline=partial(_outline, name=name, score=score),
    )


METHODS = (
    _method("taylor", "taylor", "the derivative of the loss", "arXiv 1905.10650 (for groups: arXiv 2305.11627)"),
    _method("fisher", "fisher", "the Fisher information of their masks", "arXiv 2204.09656"),
    _method("wanda-structured", "output", "activation times weights (Wanda)", "arXiv 2306.11695"),
    replace(
        _method("fluctuation", "fluctuation", "how much their activation varies (FLAP)", "arXiv 2312.11983"),
        settings=FluctuationPruning,
        plan=plan_fluctuation,
        outline=_outline_fluctuation,
    ),
)
