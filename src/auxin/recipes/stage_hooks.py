"""What takes part in the training of a stage: the hooks that it asks for, and those that changes bring along."""

from auxin.accounting import Ledger
from auxin.planning.hooks import Hook, HookContext, asked_by, made_hooks
from auxin.planning.lineage import changes_since_training
from auxin.recipes.schema import TrainStage


def stage_hooks(stage: TrainStage, ledger: Ledger) -> list[Hook]:
    """The hooks of `stage`, which trains the model that `ledger` is of.

    Those that the changes right before it bring along (masks that open, ...), then those that the stage asks for.

    Raises:
        ConfigError: it asks for something about old entries, and the ledger records no change.
        PlanError: the change does not tell old entries from new ones.
    """
    context = HookContext(f"{stage.name}: hooks", ledger)
    asked = [hook for plan in changes_since_training(ledger) for hook in asked_by(plan)]
    return made_hooks([*asked, *stage.hooks], context)
