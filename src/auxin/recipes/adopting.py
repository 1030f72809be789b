"""Taking a checkpoint over into a run: as it is, or with a new head for what the run learns."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from auxin.accounting import Ledger, StageRecord, count_parameters
from auxin.accounting.ledger import books_in
from auxin.data.dataset import Dataset
from auxin.edits.folder_store import TRAINING_FOLDER
from auxin.edits.structure import edited_skeleton
from auxin.foreign import refuse_links_out_anywhere
from auxin.models.loading import load_config, load_model, load_with_new_head
from auxin.sums import refuse_damaged_tensors
from auxin.training import write_checkpoint_folder
from auxin.training.checkpoint import copy_checkpoint
from auxin.training.fit import refuse_non_finite


def adopt(source: Path, output: Path, config: PreTrainedConfig, data: Dataset, name: str, seed: int) -> Path:
    """Copy the checkpoint `source` into the run, its moments and books along with it.

    Where `config` names another class than the checkpoint's, the model gets that class's head: what the checkpoint's
    own class does not have is drawn anew, its moments are left behind, and the ledger's notes say both.

    Args:
        source: the checkpoint.
        output: a folder that does not exist; it appears complete.
        config: what the model shall be.
        data: the run's.
        name: of the stage.
        seed: of the new head.

    Raises:
        CheckpointError: it is damaged, can't be loaded, lacks a weight that its own class has, holds one that is not
            finite, or has a link that leads out of it.
    """
    changed = refuse_damaged_tensors(source)
    ledger = books_in(source)
    saved, notes = load_config(source), [f"started from {source}"]
    keeps_its_head = saved.architectures == config.architectures
    if keeps_its_head:
        model = load_model(source)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, drawn = load_with_new_head(source, config, edited_skeleton(saved))
        notes.append(_about_head(saved, type(model).__name__, drawn, seed))
        if (source / TRAINING_FOLDER).exists():
            notes.append("the optimizer's moments are left behind: they are those of another task")
    refuse_non_finite(model, None, str(source))
    if changed is not None:
        notes.append(f"not as it was written: {changed}")
    if half := sorted({str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}):
        notes.append(f"its weights are {', '.join(half)}; they are trained in float32")
    if others := sorted(other_data(ledger, data.fingerprint)):
        notes.append(
            f"trained before on other data (fingerprint {', '.join(others)}): held-out documents may have been seen"
        )
    record = StageRecord(
        name=name,
        kind="build",
        parameters=count_parameters(model).total,
        notes=notes,
        seed=None if keeps_its_head else seed,
    )
    if not keeps_its_head:
        return write_checkpoint_folder(output, model, processor=data.processor(), ledger=ledger.append(record))
    refuse_links_out_anywhere(source)
    return copy_checkpoint(source, output, ledger.append(record))


def _about_head(saved: PreTrainedConfig, class_name: str, drawn: list[str], seed: int) -> str:
    before = (saved.architectures or ["model without a named class"])[0]
    new = f"new random weights from seed {seed}: {', '.join(drawn)}" if drawn else "no weight of it is new"
    return f"a {before} became a {class_name}; {new}"


def other_data(ledger: Ledger, fingerprint: str) -> set[str]:
    """Fingerprints of the data other than that of `fingerprint` on which stages of `ledger` were trained."""
    return {
        record.data_fingerprint or "unknown"
        for record in ledger.stages
        if record.units and record.data_fingerprint != fingerprint
    }
