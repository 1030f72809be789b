"""Changing one checkpoint, its books kept: the folder appears with weights, moments and ledger of one model."""

import time
from collections.abc import Callable
from pathlib import Path

from auxin.accounting import Cost, StageRecord
from auxin.accounting.ledger import books_in
from auxin.edits import Plan, Receipt, apply_to_checkpoint
from auxin.edits.probe import Probe
from auxin.edits.purpose import made_for_another
from auxin.errors import CheckpointError, OtherModelError, PlanError, PromiseError, reason
from auxin.models.loading import load_config
from auxin.objectives.measures import Measure
from auxin.sums import write_sums


def change_checkpoint(
    plan: Plan,
    source: str | Path,
    output: str | Path,
    *,
    probe: Probe | None = None,
    stage_name: str = "change",
    measure: Measure | None = None,
    value_of: Callable[[Path], float] | None = None,
    data_fingerprint: str | None = None,
) -> Receipt:
    """Apply `plan` to the checkpoint `source` and write the result to `output`, its ledger one stage longer.

    What making the plan took, as far as it was measured (`Plan.cost`), is booked with the stage.

    Args:
        plan: the change.
        source: the checkpoint to change.
        output: a folder that does not exist or is empty; it appears when all of it, the ledger too, is written.
        probe: on which the promise is checked, as for `apply_to_checkpoint`.
        stage_name: of the ledger's record.
        measure: what is measured before and after; None: nothing.
        value_of: measures a checkpoint's folder.
        data_fingerprint: of the data that it measures on, and that the plan was made with, if with any. None: that
            of the data which the plan names.

    Raises:
        CheckpointError, PlanError, PromiseError: as `apply_to_checkpoint`, or the output can't be written; nothing is
            left behind.
    """
    started = time.perf_counter()
    source, output = Path(source), Path(output)
    ledger = books_in(source)
    cost = plan.cost or Cost()

    def keep_books(folder: Path, receipt: Receipt) -> None:
        record = StageRecord(
            name=stage_name,
            kind="change",
            parameters=receipt.parameters_after,
            units=cost.units,
            unit=cost.unit,
            samples=cost.samples,
            flops=cost.flops,
            measure=None if measure is None else measure.kind,
            value_before=None if value_of is None else value_of(source),
            value_after=None if value_of is None else value_of(folder),
            plan=plan.model_dump(mode="json"),
            receipt=receipt.model_dump(mode="json", exclude={"plan"}),
            data_fingerprint=data_fingerprint or cost.data,
            seed=plan.seed,
            seconds=cost.seconds + time.perf_counter() - started,
        )
        ledger.append(record).save(folder)
        write_sums(folder)

    try:
        return apply_to_checkpoint(plan, source, output, probe, finish=keep_books)
    except OtherModelError:
        raise  # it says all
    except (PlanError, PromiseError) as error:
        if why := made_for_another(plan, load_config(source)):
            raise type(error)(f"{error} {why}") from error
        raise
    except OSError as error:
        raise CheckpointError(
            f"{output} can't be written: {reason(error)}. Nothing was left there. Free space, or choose another output "
            "folder."
        ) from error
