"""What takes part in the training of a stage: the hooks that it asks for, and those that changes bring along."""

from collections.abc import Sequence

from auxin.accounting import Ledger
from auxin.errors import ConfigError
from auxin.planning.hooks import Hook, HookContext, HookSettings, asked_by, made_hooks
from auxin.planning.lineage import changes_since_training
from auxin.recipes.schema import TrainStage


def stage_hooks(stage: TrainStage, ledger: Ledger) -> list[Hook]:
    """The hooks of `stage`, which trains the model that `ledger` is of.

    Those that the changes right before it bring along (masks that open, ...), then those that the stage asks for.

    Raises:
        ConfigError: it asks for something about old entries, and the ledger records no change; or it trains a LoRA,
            which leaves alone what hooks work on.
        PlanError: the change does not tell old entries from new ones.
    """
    asked = asked_hooks(stage, ledger)
    refuse_with_lora(stage, [hook.kind for hook in asked])
    return made_hooks(asked, HookContext(f"{stage.name}: hooks", ledger))


def asked_hooks(stage: TrainStage, ledger: Ledger) -> list[HookSettings]:
    """What the hooks of `stage` are made from; of the ledger the plans of changes are enough."""
    return [*(hook for plan in changes_since_training(ledger) for hook in asked_by(plan)), *stage.hooks]


def refuse_with_lora(stage: TrainStage, hooks: Sequence[str]) -> None:
    """Refuse a LoRA beside hooks, given by their kinds; ConfigError."""
    if stage.lora is not None and hooks:
        raise ConfigError(
            f"lora: the stage has the hook {hooks[0]!r}, its own or of the change before, which works on the model's "
            "own parameters, and a LoRA leaves these alone. Train without lora first, or leave one of them out."
        )
