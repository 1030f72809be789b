"""The executor: the only code that changes a model."""

import time
import warnings

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.accounting import count_parameters
from auxin.edits.carry import carry, check_tensors
from auxin.edits.kinds.rate import Rate
from auxin.edits.module_store import ModuleStore
from auxin.edits.plan import REPLAYED, Plan
from auxin.edits.probe import Probe, probe_and_outputs, settings_kept
from auxin.edits.promise import measured_change, tolerance
from auxin.edits.purpose import refuse_other_model
from auxin.edits.renumbering import change_generation, check_kept_tokens, generation_changes
from auxin.edits.resolution import ResolvedPlan, resolve
from auxin.edits.room import refuse_too_large
from auxin.edits.structure import structural_edits
from auxin.edits.tree import Undo, rebuild_tree
from auxin.edits.unread import about_unread, outputs_and_unread
from auxin.errors import PlanError
from auxin.models.evaluating import about_inference_tensors, training_flags
from auxin.settings import Settings


class Receipt(Settings):
    """What the executor did and measured."""

    plan: Plan
    parameters_before: int
    """Parameters before, tied ones once."""
    parameters_after: int
    """Parameters after, tied ones once."""
    max_relative_change: float | None
    """max |change of a logit| / max |logit| on the probe, or of what the model has in their place: of that output which
    moved most. None on the meta device, where there is no data, and where a plan promises nothing and the outputs can't
    be compared: of another shape, or all zero before."""
    tolerance: float
    """The change up to which an exact plan counts as kept, in the parameters' data type."""
    unread: list[str] = []
    """Changed parameters that the edited model did not read on the probe, so that nothing is known of them: what is for
    training alone, or, with a warning where something was promised, parts of layers that the probe did not reach."""
    continuation: dict[str, Rate] = {}
    """How AdamW must go on with those parameters for which it is not as before, by name; see `continue_exactly`."""
    fresh_moments: list[str] = []
    """Parameters that are made of others and start with fresh moments, since those of the others can't follow."""
    notes: list[str] = []
    """Of a folder: what was left out of the new one since it is of the old model, and why; given as warnings, too."""
    replayed: bool = False
    """Whether the result's config keeps edits, so that it loads after `import auxin` alone."""
    seconds: float
    """Wall time, the probe included."""

    @property
    def overshoot(self) -> float:
        """How many times too far the first steps move the function if the old learning rates are kept: the largest
        factor among the parameters, also of those that no rate serves exactly; 1 says that they can be kept."""
        return max([1.0, *(rate.overshoot for rate in self.continuation.values())])

    @property
    def continues_exactly(self) -> bool:
        """Whether `continue_exactly` makes the next steps those of the smaller model."""
        return self.plan.promise == "exact" and all(rate.exact for rate in self.continuation.values())

    def __str__(self) -> str:
        change = self.max_relative_change
        moved = "were not compared with those before" if change is None else f"moved by {change:.1e} relative"
        promised = change is not None and self.plan.promise != "none"
        allowed = f" (allowed for an exact plan: {self.tolerance:.0e})" if promised else ""
        first, count = next(iter(self.fresh_moments), ""), len(self.fresh_moments)
        fresh = f" {count} parameters start with fresh moments ({first}{', ...' * (count > 1)})." if count else ""
        return (
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters in {self.seconds:.1f} s. "
            f"Promise {self.plan.promise!r}: the outputs on the probe {moved}{allowed}.{fresh}"
        ) + f" {REPLAYED}" * self.replayed


@torch.inference_mode(False)
@settings_kept()
def apply(
    plan: Plan, model: PreTrainedModel, optimizer: Optimizer | None = None, probe: Probe | None = None
) -> Receipt:
    """Change `model` in place as `plan` says, and the state of `optimizer` with it.

    Parameters that live on keep their identity, so the optimizer's groups, tied weights and hooks stay valid; new ones
    join the group of their nearest relative. Gradients of changed parameters are dropped, and a loss computed before
    can't be differentiated any more. A DistributedDataParallel wrapper holds buckets of the old shapes: edit the model
    inside and wrap it again; compile it again too. On any error, a broken promise included, model and optimizer are as
    before.

    Parameters are changed one at a time: the peak is the new model, the new optimizer state and one tensor. Where old
    entries can't be had back bit by bit from the new ones (values divided between copies, moments of copied units), the
    old tensors stay until the promise was checked: up to the old model and state more.

    The plan's notes are given as warnings.

    Args:
        plan: what to do.
        model: the model, or what torch.compile made of it; on the meta device only the structure changes and no promise
            is checked.
        optimizer: the optimizer that trains the model, any of torch's whose state has the parameters' shape.
        probe: token ids (batch, sequence) on which the promise is checked, or the model's inputs by name; default:
            three random samples of the kind that the model takes.

    Raises:
        PlanError: the plan is an estimate or does not fit the model, which may be sharded or made within
            torch.inference_mode(), or the memory, or a weight is not finite; found before anything changes.
        PromiseError: the plan promised to keep the function and did not, or the logits are not finite after it.
    """
    undo = Undo()
    try:
        return _applied(plan, getattr(model, "_orig_mod", model), optimizer, probe, undo)  # torch.compile wraps
    except BaseException:
        undo.everything()
        raise


def _applied(
    plan: Plan, model: PreTrainedModel, optimizer: Optimizer | None, probe: Probe | None, undo: Undo
) -> Receipt:
    """As `apply`, which puts everything back by `undo` when any line of this raises."""
    start = time.perf_counter()
    plan.refuse_estimate()
    parameters = dict(model.named_parameters())
    _refuse_sharded(parameters)
    if reason := about_inference_tensors(model):
        raise PlanError(reason)
    refuse_other_model(plan, model.config)
    resolved = resolve(plan.located(), model)
    check_kept_tokens(plan, resolved)
    generation = generation_changes(plan, model)
    store = ModuleStore(model, resolved, optimizer, undo)
    store.check()
    refuse_too_large(resolved, parameters, optimizer)
    check_tensors(resolved, store, parameters)
    rates = continuation(resolved)
    has_data = not any(parameter.is_meta for parameter in parameters.values())
    count, allowed = count_parameters(model).total, tolerance(model)
    undo.add(training_flags(model))  # the probe's evaluation mode, too, may be interrupted
    if has_data:
        probe, reference = probe_and_outputs(plan, model, probe)
    change: float | None = None
    unread: list[str] = []
    fresh = carry(resolved, plan.seed, store)
    rebuild_tree(model, resolved, store.tensors, undo)
    change_generation(model, generation, undo)
    store.join_groups()
    torch.clear_autocast_cache()  # it may hold the weights of before, where the caller has autocast on
    if has_data and probe is not None:
        outputs, unread = outputs_and_unread(plan, resolved, model, probe)
        change = measured_change(plan, reference, outputs, allowed)
    receipt = Receipt(
        plan=plan,
        parameters_before=count,
        parameters_after=count_parameters(model).total,
        max_relative_change=change,
        tolerance=allowed,
        unread=unread,
        continuation=rates,
        replayed=bool(structural_edits(model.config)),
        fresh_moments=fresh,
        seconds=time.perf_counter() - start,
    )
    for note in (*plan.notes, *about_unread(plan, unread)):
        warnings.warn(note, stacklevel=5)  # `apply` and its two contexts, too, are between this and the caller
    return receipt


def continuation(resolved: ResolvedPlan) -> dict[str, Rate]:
    """The rates of all parameters that AdamW can't go on with as before."""
    parameters = {name for name, _ in resolved.after.named_parameters()}
    rates = {name: origin.rate for name, origin in resolved.origins.items() if name in parameters}
    return {name: rate for name, rate in rates.items() if rate != Rate()}


def _refuse_sharded(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise PlanError(
                f"{name} is distributed over several processes (DTensor). Call auxin.training.apply_in_pieces in all "
                "of them, or edit the model before it is sharded, or its checkpoint."
            )
