"""Which of the parameters that a plan changes a run of the model never read: of those its outputs tell nothing."""

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from auxin.edits.plan import Plan
from auxin.edits.resolution import ResolvedPlan


class Reads(TorchDispatchMode):
    """Within the context, notes which tensors any operation takes.

    Hooks would not do: modules use each other's parameters without calling each other.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._addresses: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`."""
        leaves = tree_leaves((args, kwargs or {}))
        self._addresses |= {leaf.data_ptr() for leaf in leaves if type(leaf) in (Tensor, nn.Parameter)}
        return func(*args, **(kwargs or {}))

    def unread(self, resolved: ResolvedPlan, model: nn.Module) -> list[str]:
        """The parameters of the edited `model` that are not what they were, or not where, and were not read."""
        unread = {name for name, value in model.named_parameters() if value.data_ptr() not in self._addresses}
        return [
            name
            for name, origin in resolved.origins.items()
            if name in unread and (origin.kept != name or origin.steps)
        ]


def about_unread(plan: Plan, unread: list[str]) -> str | None:
    """A warning, where a plan's promise could not be checked for parts of layers; None where it was or there is none.

    What stands beside the layers is often read in training alone, as the vector of a masked patch.
    """
    layers = [name for name in unread if any(part.isdigit() for part in name.split("."))]
    if plan.promise == "none" or not layers:
        return None
    return (
        f"{len(layers)} of the parameters that the plan of {plan.method} changes ({layers[0]}, ...) took no part in "
        "the probe: the promise was not checked for them. Give auxin.apply one on which the model uses "
        'them: probe={"name": tensor, ...}.'
    )
