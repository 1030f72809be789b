"""Widths pruned by magnitude: the units whose parameters have the smallest L2 norm go.

The norm of a unit is taken over all entries of matrices, biases and embeddings that run along it: the rows that make it
and the columns that read it, each as many times as it is there. That is of

* a feed-forward unit its row of the gate and up (or first) matrix with its biases, and its column of the down (or
  second) one; of experts, those of all experts of a layer together;
* a key-value group the rows of its key and value head and of the query heads that read it, with their biases, and the
  columns of the output matrix;
* a unit of the residual its column of the embeddings and of every matrix that reads the residual, and its row of every
  matrix, with its bias, that writes to it.

Gains and offsets of norms, and other factors, do not count. Heads that can go from all layers at once only (hidden size
= heads x dimension; a stack that shares its table of positions) have one norm over all those layers.

The oldest criterion; nothing says that a unit whose weights are small matters little, so that chance (the method
random) belongs beside it.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.edits import Plan
from auxin.planning.bench import from_model
from auxin.planning.method import Method
from auxin.planning.pruning import Prunable, Pruning, prunable, pruning_example
from auxin.planning.unit_order import Place, Scores
from auxin.words.paths import encloses
from auxin.words.roles import Kind, ParameterRole, laid_out

COUNTED: tuple[Kind, ...] = ("matrix", "bias", "embedding", "head")


def plan_magnitude(model: PreTrainedModel, settings: Pruning) -> Plan:
    """Plan a model without the units of the smallest norms.

    Raises:
        PlanError: see `auxin.planning.pruning`.
    """
    found = prunable(model, settings)
    return found.plan("magnitude", magnitudes(model, found))


def magnitudes(model: PreTrainedModel, found: Prunable) -> Scores:
    """The L2 norm of every unit that can go, see this module, by place."""
    squares = {place: torch.zeros(units, dtype=torch.float64) for place, units in found.units.items()}
    for name, parameter in model.named_parameters():
        role = next((role for role in found.body.roles if role.matches(name)), None)
        if role is None or role.kind not in COUNTED:
            continue
        for axis, segments in enumerate(role.axes):
            if any(_place(segment.stream, segment.scope, squares) for segment in segments):
                _add(squares, role, axis, parameter.detach())
    return {place: total.sqrt().tolist() for place, total in squares.items()}


def _add(squares: dict[Place, Tensor], role: ParameterRole, axis: int, parameter: Tensor) -> None:
    """Add the squares of the entries of a parameter to the units that they run along by one of its axes."""
    others = [other for other in range(parameter.dim()) if other != axis]
    # In their own type if that is float64, since a whole table in that type might not fit.
    wide = torch.promote_types(parameter.dtype, torch.float32)
    entries = torch.linalg.vector_norm(parameter, dim=others, dtype=wide) if others else parameter.to(wide)
    segments = role.axes[axis]
    counts, sizes = [segment.count for segment in segments], [segment.unit for segment in segments]
    ordered = torch.empty(len(entries), dtype=torch.float64)
    ordered[torch.tensor(laid_out(segments, counts, sizes))] = entries.cpu().double().square()
    start = 0
    for segment in segments:
        place = _place(segment.stream, segment.scope, squares)
        # Query heads by the group that they belong to, where groups go; a key-value head that all read never goes.
        if place is not None and segment.count % len(squares[place]) == 0:
            squares[place] += ordered[start : start + segment.size].view(len(squares[place]), -1).sum(1)
        start += segment.size


def _place(stream: str, scope: str, squares: dict[Place, Tensor]) -> Place | None:
    """The place whose units are (parts of) those of a segment."""
    wanted = "query" if stream == "key_value" else stream
    around = [place for place in squares if place[0] == wanted and encloses(place[1], scope)]
    return max(around, key=lambda place: len(place[1]), default=None)


METHOD = Method(
    name="magnitude",
    title="Fewer heads, feed-forward units or units of the residual: without those of the smallest L2 norm",
    paper="arXiv 1506.02626 (for units: arXiv 1608.08710)",
    intent="prune",
    settings=Pruning,
    plan=from_model(plan_magnitude),
    examples=pruning_example,
    needs_weights=True,
    promise="none",
    outline=lambda bench, settings: prunable(bench.model, settings).outline("magnitude"),
)
