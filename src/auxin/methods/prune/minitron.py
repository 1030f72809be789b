"""Widths pruned by the size of activations: the units go that do least on samples of text (Minitron, Muralidharan et
al. 2024, arXiv 2407.14679, section 2.2).

The score is that of the measurement `activations` (`auxin.analysis.activations`), by forward passes without labels: of
a head the length of its output, of a feed-forward unit its activation, of a unit of the residual its entry in the
outputs of all norms in the layers; the mean of absolute values over a sample's tokens, and L2 over samples, unless it
is said otherwise. Units of the residual can go by it, too, which by Wanda's and FLAP's scores they can't.

* The paper scores once, on the whole model, and so it is here: scoring anew after every step was not better there.
* The paper's layers keep as many units each, which is `uniform` (the default).
* Whole experts are not in the paper: their score is the length of what they give, times the router's weight.
* What the paper does beside it: layers go by the loss or by similarity (`finercut`, `shortgpt`), the model is trained
  on the large one's answers (the objective `distillation`), and the best of several shapes is looked for after some
  training of each, which is not here.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from auxin.analysis.activations import Activations, ActivationSettings
from auxin.analysis.run import measure
from auxin.analysis.units import why_no_residual
from auxin.edits import Plan
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.pruning import Prunable, Pruning, prunable, pruning_example
from auxin.planning.pruning_settings import Part
from auxin.planning.unit_order import Place

NAME = "minitron"


class Minitron(Pruning, ActivationSettings):
    """What stays, and how units are scored."""


def plan_minitron(bench: Bench, settings: Minitron) -> Plan:
    """Plan a model without the units whose activations are smallest.

    Raises:
        PlanError: see `auxin.planning.pruning`; a model that can't be measured (`auxin.analysis.activations`), or the
            residual of one whose norms are not known.
    """
    found = _prunable(bench.model, settings)
    found.refuse_impossible(NAME)  # before the model is run
    asked = {name: getattr(settings, name) for name in ActivationSettings.model_fields}
    measured = measure(Activations(**asked), bench.model, bench.data)
    scores: dict[Place, Sequence[float]] = {}
    for group in measured.groups:
        if group.stream != "key_value":  # of heads, those of the queries are added up
            scores[group.stream, group.scope] = group.scores.means
    return found.plan(NAME, scores)


def _prunable(model: PreTrainedModel, settings: Minitron) -> Prunable:
    why = why_no_residual(model, "normed")
    refused: dict[Part, str] = {"hidden": f"{why} Leave it out, or choose taylor, fisher or magnitude."}
    return prunable(model, settings, refused if why else {})


METHOD = Method(
    name=NAME,
    title="Fewer heads, feed-forward units or units of the residual, without those whose activations are smallest",
    paper="arXiv 2407.14679",
    intent="prune",
    settings=Minitron,
    plan=plan_minitron,
    examples=pruning_example,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=64),
    outline=lambda bench, settings: _prunable(bench.model, settings).outline(NAME),
)
