"""Graft: parameter tokens for models that were never TokenFormers.

Beside every chosen linear layer y = W x + b a branch of parameter tokens is placed, y = W x + b + Pattention(x) (see
`auxin.nn.graft`). The branch's keys are random, its values zero, so that the function is the same to the last bit.
Applied to a grafted model again, each branch gets one more group of tokens with a norm and a scale of its own (grouped
growth): new keys at the root mean square of the old ones, new values zero.

The values get a gradient from the first step, the keys from the second, as in LoRA. Keys of zero would not do for a
first group: the norm of its scores would be zero, and their gradient that of a division by eps.

A branch can't be merged into W afterwards, since it is no linear map of x. What can be had back are the smaller models
inside: without the newest groups, or, where W was frozen, the model before the graft.

Paper: the layer is that of TokenFormer (arXiv 2410.23168, eq. 4 and 16); grafts and groups are Auxin's own.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auxin.edits import Edit, NormalFill, PadParameter, Plan, Receipt, ZeroFill, apply
from auxin.edits.kinds.fills import Fill
from auxin.edits.kinds.module_edits import ReplaceModule
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.nn.graft import Grafted, GraftedConv1D, GraftedLinear
from auxin.nn.linear import linear_class, widths
from auxin.nn.scores import ScoreFunction
from auxin.planning.bench import from_model
from auxin.planning.hooks import Hook, OldRates
from auxin.planning.lineage import OldShapes
from auxin.planning.linear_layers import linear_layers, merged_paths
from auxin.planning.method import Method
from auxin.settings import Settings

Groups = Literal["all", "newest"]

GRAFTED: dict[type[nn.Module], str] = {
    nn.Linear: "grafted_linear",
    Conv1D: "grafted_conv1d",
    GraftedLinear: "grafted_linear",
    GraftedConv1D: "grafted_conv1d",
}
"""The brick for every class of linear layer."""


class Graft(Settings):
    """Which linear layers get how many new parameter tokens."""

    tokens: int = Field(default=16, ge=2)
    """New tokens of every branch: those of its first group, or of its next one where there is a branch already. n of
    them have n (in + out) parameters, as many as a LoRA of rank n. One alone would not do under a norm: divided by its
    own, its score is 1 or -1, and its key never gets a gradient."""
    targets: list[str] = []
    """The layers, as dotted paths or ends of paths; `*` stands for any one part ("q_proj", "layers.0.mlp.*"). Empty:
    all linear layers inside the layer stacks."""
    score_function: ScoreFunction = "l2_norm_gelu"
    """How scores become weights: "l2_norm_gelu" (divided by their norm, then GELU), "gelu_l2_norm" (the other way
    round), "gelu" (without a norm), "linear" (as in LoRA) or "softmax"; all groups of a branch have the same."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the new keys."""


def plan_graft(model: PreTrainedModel, settings: Graft) -> Plan:
    """Plan branches beside the target layers of `model`, or a further group of tokens where they have one.

    Args:
        model: any transformer whose layers are `nn.Linear` or `Conv1D`, or subclasses that compute the same; weights
            are not looked at.
        settings: what to graft.

    Raises:
        PlanError: there is no such layer, adapters are in the way, or a branch has another score function; the message
            says what to ask for instead.
    """
    targets = _targets(model, settings.targets)
    edits: list[Edit] = []
    for path, name in merged_paths(model, targets, lambda name: _kind(targets[name])):
        edits += _edits(path, targets[name], settings)
    return Plan(
        method="graft",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        seed=settings.seed,
        edits=edits,
        made_for=config_values(model.config),
    )


def graft(
    model: PreTrainedModel,
    tokens: int = 16,
    targets: Sequence[str] = (),
    optimizer: Optimizer | None = None,
    seed: int = 0,
    probe: Tensor | None = None,
) -> Receipt:
    """Give the linear layers of `model` branches of parameter tokens, in place, or their branches more tokens.

    Args:
        model: any transformer whose layers are `nn.Linear` or `Conv1D`, grafted or not.
        tokens: new tokens of every branch.
        targets: which layers, see `Graft.targets`; empty: all linear layers inside the layer stacks.
        optimizer: the optimizer that trains the model, if there is one; what it holds of grown branches follows. New
            branches are new parameters: add them to it, or make it afterwards.
        seed: seed of the new keys.
        probe: token ids (batch, sequence) on which the promise is checked; default: two random sequences.

    Returns:
        What was done, with the largest change of a logit.

    Raises:
        PlanError: see `plan_graft`.
        PromiseError: the function changed; the model is as before.
    """
    settings = Graft.parse({"tokens": tokens, "targets": list(targets), "seed": seed})
    return apply(plan_graft(model, settings), model, optimizer, probe)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    _targets(model, [])
    return {"tokens": 4}


METHOD = Method(
    name="graft",
    title="Parameter tokens beside the linear layers of any dense model",
    paper="after arXiv 2410.23168; grafts are Auxin's own",
    intent="adapt",
    settings=Graft,
    plan=from_model(plan_graft),
    examples=_example,
    promise="exact",
)


def _targets(model: PreTrainedModel, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The layers to graft by path; PlanError when there are none or they can't be grafted."""
    none = "A TokenFormer grows by the method 'tokenformer'."
    return linear_layers(model, patterns, "grafted", (GraftedLinear, GraftedConv1D), none)


def _brick(layer: nn.Module) -> str:
    """The name of the brick for a layer."""
    known = type(layer) if type(layer) in GRAFTED else linear_class(layer)
    assert known is not None
    return GRAFTED[known]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """All that the edits of a layer depend on."""
    branch = (layer.branch.group_sizes, layer.branch.initial_tau) if isinstance(layer, Grafted) else ()
    return type(layer), *widths(layer), *branch


def _edits(path: str, layer: nn.Module, settings: Graft) -> list[Edit]:
    """The branch of one layer, or its next group."""
    brick, added = _brick(layer), settings.tokens
    if not isinstance(layer, Grafted):
        # On an input of root mean square 1, as after a norm, such keys give scores of 1.
        fills: dict[str, Fill] = {
            "branch.key_tokens": NormalFill(std=widths(layer)[0] ** -0.5),
            "branch.value_tokens": ZeroFill(),
        }
        return [ReplaceModule(module=path, brick=brick, settings=_branch([added], settings), fills=fills)]
    branch = layer.branch
    if branch.score_function != settings.score_function:
        raise PlanError(
            f"score_function = {settings.score_function!r}, but the branch of {path} has {branch.score_function!r}; "
            f"all groups of a branch share one. Ask for {branch.score_function!r}."
        )
    sizes = [*branch.group_sizes, added]
    return [
        ReplaceModule(module=path, brick=brick, settings=_branch(sizes, settings, branch.initial_tau)),
        PadParameter(parameter=f"{path}.branch.key_tokens", axis=0, size=sum(sizes), fill=NormalFill()),
        PadParameter(parameter=f"{path}.branch.value_tokens", axis=0, size=sum(sizes), fill=ZeroFill()),
    ]


def _branch(sizes: list[int], settings: Graft, tau: Sequence[float] = ()) -> dict[str, Any]:
    """The brick's settings. Scales are written out: they are constants of the model that no formula should redo."""
    return {
        "tokens": sizes,
        "tau": [*tau, math.sqrt(sizes[-1])],
        "score_function": settings.score_function,
    }


def freeze_all_but_branches(model: nn.Module, groups: Groups = "all") -> list[Hook]:
    """Let only the branches of a grafted model be trained; everything else gets requires_grad = False.

    Old and new tokens of a branch are rows of one tensor, which autograd can't tell apart. So with groups = "newest"
    there is a training hook that holds the older groups still, bit by bit: give it to the loop, or call its `attach`
    once and its `before_step` and `after_step` around every step of the optimizer. `model.requires_grad_(True)` sets
    everything free again.

    Args:
        model: a grafted model.
        groups: "all" (all tokens of all branches) or "newest" (the tokens of the newest group).

    Returns:
        The hooks that have to take part in training: none for "all", one for "newest".

    Raises:
        PlanError: the model has no branch, or, for "newest", its branches have different numbers of groups.
    """
    branches = {name: module.branch for name, module in model.named_modules() if isinstance(module, Grafted)}
    if not branches:
        raise PlanError(f"{type(model).__name__} has no branches. Apply the method 'graft' first.")
    counts = {len(branch.group_sizes): name for name, branch in branches.items()}
    if groups == "newest" and len(counts) > 1:
        listed = ", ".join(f"{count} at {name}" for count, name in sorted(counts.items()))
        raise PlanError(
            f"The branches have different numbers of groups ({listed}), which does not tell which of them grew last. "
            'Train all tokens (groups="all"), or grow the others too.'
        )
    model.requires_grad_(False)
    old_shapes: OldShapes = {}
    for name, branch in branches.items():
        for kind, parameter in branch.named_parameters():
            parameter.requires_grad_(True)
            old_shapes[f"{name}.branch.{kind}"] = (sum(branch.group_sizes[:-1]), parameter.shape[1])
    return [OldRates(0.0, old_shapes)] if groups == "newest" else []
