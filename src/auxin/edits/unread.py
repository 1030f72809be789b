"""Which of the parameters that a plan changes a run of the model never read: of those its outputs tell nothing."""

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from auxin.edits.plan import Plan
from auxin.edits.probe import Outputs, Probe, edited_outputs
from auxin.edits.resolution import ResolvedPlan
from auxin.nn.bricks import Brick


class _Reads(TorchDispatchMode):
    """Within the context, notes where the tensors lie that any operation takes.

    Hooks would not do: modules use each other's parameters without calling each other.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`."""
        leaves = tree_leaves((args, kwargs or {}))
        self.addresses |= {leaf.data_ptr() for leaf in leaves if type(leaf) in (Tensor, nn.Parameter)}
        return func(*args, **(kwargs or {}))


def outputs_and_unread(
    plan: Plan, resolved: ResolvedPlan, model: PreTrainedModel, probe: Probe
) -> tuple[Outputs, list[str]]:
    """`edited_outputs`, and the parameters that are not what they were, or not where, and that the edited `model` did
    not read for them, but for those that a brick leaves out for now. None are named of a model that is compiled, whose
    graphs can't be looked into.

    Raises:
        PlanError: as `edited_outputs`.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return edited_outputs(plan, model, probe), []
    reads = _Reads()
    with reads:
        outputs = edited_outputs(plan, model, probe)
    unread = {name for name, value in model.named_parameters() if value.data_ptr() not in reads.addresses}
    bricks = {path: module for path, module in model.named_modules() if isinstance(module, Brick)}
    unread -= {f"{path}.{name}" for path, module in bricks.items() for name in module.idle()}
    changed = (name for name, origin in resolved.origins.items() if origin.kept != name or origin.steps)
    return outputs, [name for name in changed if name in unread]


def about_unread(plan: Plan, unread: list[str]) -> list[str]:
    """A warning, where a plan's promise could not be checked for parts of layers.

    What stands beside the layers is often read in training alone, as the vector of a masked patch.
    """
    layers = [name for name in unread if any(part.isdigit() for part in name.split("."))]
    if plan.promise == "none" or not layers:
        return []
    return [
        f"{len(layers)} of the parameters that the plan of {plan.method} changes ({layers[0]}, ...) took no part in "
        "the probe: the promise was not checked for them. Give auxin.apply a probe on which the "
        'model uses them: probe={"name": tensor, ...}.'
    ]
