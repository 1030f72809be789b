"""Whole layers go, those that turn the residual stream least (ShortGPT, Men et al. 2024, arXiv 2403.03853).

A layer's block influence is 1 minus the cosine of what enters it and what leaves it, averaged over tokens, on
calibration samples (`auxin.analysis.similarity`). All are measured once, on the whole model; the least influential ones
are left out. Nothing is trained or repaired.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from auxin.analysis.run import measure
from auxin.analysis.similarity import Similarity
from auxin.edits import Plan
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.removal_order import Going, HowMuch, from_the_top, last_ones, taken
from auxin.planning.removed_sublayers import layers_to_leave_out, without_layers


class ShortGPT(HowMuch):
    """How many layers go; give exactly one of `removed` and `target`."""


def plan_shortgpt(bench: Bench, settings: ShortGPT) -> Plan:
    """Plan the removals.

    Raises:
        PlanError: the architecture is not known, less or more is to go than can, or the target can't be reached.
    """
    offered, edits = layers_to_leave_out(bench.model), partial(without_layers, bench.model)
    return taken(bench.model, settings, offered, _order(bench, settings, offered), edits, METHOD.name)


def _outline(bench: Bench, settings: ShortGPT) -> Plan:
    """A plan that leaves out as many layers, from the top, of which each is as large as any."""
    offered, edits = layers_to_leave_out(bench.model), partial(without_layers, bench.model)
    return taken(bench.model, settings, offered, from_the_top(offered, settings), edits, METHOD.name)


def _order(bench: Bench, settings: ShortGPT, offered: dict[str, str]) -> Iterator[Going]:
    """The layers, the least influential first, each with its influence."""
    found = measure(Similarity(parts=False), bench.model, bench.data)
    layers = sorted((layer for stack in found.stacks for layer in stack.layers), key=lambda layer: layer.influence)
    gone: list[str] = []
    may_go = offered.keys() - settings.kept(offered)
    for layer in layers:
        if layer.path in may_go and layer.path not in last_ones(offered, gone):
            gone.append(layer.path)
            yield Going(layer.path, f"influence {layer.influence:.3g}", layer.similarity.margin)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    return {"removed": 1}


METHOD = Method(
    name="shortgpt",
    title="Fewer layers, without those that turn the residual stream least (ShortGPT)",
    paper="arXiv 2403.03853",
    intent="prune",
    settings=ShortGPT,
    plan=plan_shortgpt,
    examples=_examples,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=16),
    outline=_outline,
)
