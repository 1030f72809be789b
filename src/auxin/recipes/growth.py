"""Growing one checkpoint outside of a recipe, its books kept."""

from pathlib import Path

from auxin.accounting import Ledger, StageRecord
from auxin.accounting.ledger import LEDGER_FILE
from auxin.edits import Plan, Receipt, apply_to_checkpoint


def grow_checkpoint(plan: Plan, source: str | Path, output: str | Path) -> Receipt:
    """Apply `plan` to the checkpoint `source` and write the result to `output`, its ledger one stage longer.

    Raises:
        CheckpointError, PlanError, PromiseError: as `apply_to_checkpoint`; nothing is written.
    """
    receipt = apply_to_checkpoint(plan, source, output)
    ledger = Ledger.load(source) if (Path(source) / LEDGER_FILE).exists() else Ledger()
    record = StageRecord(
        name="grow",
        kind="grow",
        parameters=receipt.parameters_after,
        seconds=receipt.seconds,
        seed=plan.seed,
        plan=plan.model_dump(mode="json"),
        receipt=receipt.model_dump(mode="json", exclude={"plan"}),
    )
    ledger.append(record).save(output)
    return receipt
