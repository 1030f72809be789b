"""Applying a plan to a checkpoint folder: tensors stream from the old files to the new ones, one at a time."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

from auxin.accounting import count_parameters
from auxin.edits import replay  # noqa: F401 - edited checkpoints load
from auxin.edits.carry import carry, check_tensors
from auxin.edits.executor import Receipt, continuation
from auxin.edits.folder_store import FolderStore
from auxin.edits.other_files import ADAPTER, WITHOUT_MOMENTS, copy_other_files, forget_best
from auxin.edits.plan import Plan
from auxin.edits.probe import Probe, probe_and_outputs, settings_kept
from auxin.edits.promise import measured_change, tolerance
from auxin.edits.purpose import refuse_other_model
from auxin.edits.renumbering import (
    check_kept_tokens,
    new_generation_file,
    refuse_old_tokenizer,
    write_generation_file,
)
from auxin.edits.resolution import ResolvedPlan, resolve
from auxin.edits.room import refuse_too_large_for_folder
from auxin.edits.saved import complete
from auxin.edits.sentence_modules import followed_modules
from auxin.edits.structure import edited_skeleton, structural_edits
from auxin.edits.trainer_optimizer import FILE as TRAINER_OPTIMIZER
from auxin.edits.trainer_optimizer import carry_trainer_optimizer
from auxin.edits.unread import about_unread, outputs_and_unread
from auxin.errors import CheckpointError, PlanError
from auxin.files import new_folder
from auxin.foreign import refuse_links_out_anywhere
from auxin.models.folders import model_folder
from auxin.models.loading import load_config, load_model
from auxin.models.weight_files import refuse_pieces, weight_files
from auxin.sums import refuse_damaged_tensors, remove_sums


@settings_kept()
def apply_to_checkpoint(
    plan: Plan,
    source_dir: str | Path,
    output_dir: str | Path,
    probe: Probe | None = None,
    finish: Callable[[Path, Receipt], None] | None = None,
) -> Receipt:
    """Write the checkpoint that `plan` makes of the one in `source_dir` to `output_dir`.

    Weights (the `*.safetensors` that `from_pretrained` reads) and the optimizer's state (`training/*.safetensors`,
    tensors named `optimizer.<state>.<parameter>`) are read, changed and written one tensor at a time, bit by bit as
    `apply` would have it. The moments in the `optimizer.pt` of transformers' Trainer follow, too, so that it can resume
    in the new folder; that state is in memory as a whole. Every other file (tokenizer, ledger, random generators, ...)
    is copied, but for those that are of the old model: other copies of its weights, adapters, optimizers' states that
    can't be followed. These are left out, with a warning and a note in the receipt for each. Modules of
    sentence-transformers follow the hidden size (`auxin.edits.sentence_modules`). The folder appears under its name
    when it is complete and the promise was checked, by loading the old model and, after it, the new one.

    Args:
        plan: what to do.
        source_dir: a checkpoint folder of a transformers model, as `save_pretrained` writes it.
        output_dir: a folder that does not exist or is empty, and does not lie in `source_dir`.
        probe: token ids (batch, sequence) on which the promise is checked, or the model's inputs by name; default:
            three random samples of the kind that the model takes.
        finish: called with the complete folder, before it takes its name, and the receipt; writes what else belongs
            into it.

    Raises:
        CheckpointError: the source can't be read or the output is in use.
        PlanError, PromiseError: as `apply`; nothing is left behind.
    """
    start = time.perf_counter()
    plan.refuse_estimate()
    source, output = Path(source_dir), Path(output_dir)
    _check_folders(source, output)
    changed = refuse_damaged_tensors(source)
    before = edited_skeleton(load_config(source))
    for file in plan.files:
        file.check(source)
    refuse_other_model(plan, before.config)
    resolved = resolve(plan.located(), before)
    check_kept_tokens(plan, resolved)
    refuse_old_tokenizer(plan, source)
    generation = new_generation_file(plan, source, before.config)
    refuse_too_large_for_folder(resolved, source, output)
    store = FolderStore(source, resolved)
    store.check()
    check_tensors(resolved, store, store.names())
    followed = followed_modules(source, resolved)
    # The old model is gone before the new one is loaded.
    model = load_model(source)
    (probe, reference), allowed = probe_and_outputs(plan, model, probe), tolerance(model)
    del model
    with new_folder(output) as folder:
        notes = [] if changed is None else [f"{source} is not as it was written: {changed}."]
        notes += copy_other_files(source, folder, {*store.files(), Path(TRAINER_OPTIMIZER)})
        remove_sums(folder)
        notes += forget_best(folder)
        store.open(folder)
        fresh = carry(resolved, plan.seed, store)
        store.close(folder)
        notes += _carry_trainer_optimizer(plan, source, folder, resolved, store, fresh)
        for name, content in followed.items():
            (folder / name).write_bytes(content)
        write_generation_file(folder, generation)
        for name in plan.drops:
            (folder / name).unlink(missing_ok=True)
        for file in plan.files:
            file.put(plan.folder, folder)
        config = resolved.after.config
        same_class = type(resolved.after) is type(before)
        config.architectures = before.config.architectures if same_class else [type(resolved.after).__name__]
        config.save_pretrained(folder)
        notes += complete(folder, config)
        model = load_model(folder)
        outputs, unread = outputs_and_unread(plan, resolved, model, probe)
        change = measured_change(plan, reference, outputs, allowed)
        del model
        receipt = Receipt(
            plan=plan,
            parameters_before=count_parameters(before).total,
            parameters_after=count_parameters(resolved.after).total,
            max_relative_change=change,
            tolerance=allowed,
            unread=unread,
            continuation=continuation(resolved),
            fresh_moments=fresh,
            notes=notes,
            replayed=bool(structural_edits(config)),
            seconds=time.perf_counter() - start,
        )
        if finish is not None:
            finish(folder, receipt)
    for note in (*notes, *about_unread(plan, unread)):
        warnings.warn(note, stacklevel=3)  # the context is between this and the caller
    return receipt


def _carry_trainer_optimizer(
    plan: Plan, source: Path, target: Path, resolved: ResolvedPlan, store: FolderStore, fresh: list[str]
) -> list[str]:
    """Carry the optimizer's state of transformers' Trainer along, where there is one; a sentence where it can't be.
    Parameters that start without any are added to `fresh`."""
    path = source / TRAINER_OPTIMIZER
    if not path.is_file():
        return []
    try:
        anew = carry_trainer_optimizer(path, target / TRAINER_OPTIMIZER, resolved, plan.seed, store)
    except (CheckpointError, PlanError) as error:
        return [f"{TRAINER_OPTIMIZER} was left out. {error} {WITHOUT_MOMENTS}"]
    fresh += [name for name in anew if name not in fresh]
    return []


def _check_folders(source: Path, output: Path) -> None:
    model_folder(source)
    if (source / ADAPTER).is_file():
        raise CheckpointError(
            f"{source} holds an adapter ({ADAPTER}), which is a part of the model that transformers loads from it. "
            "Merge it into the weights (merge_and_unload) and save that, or take the adapter's files out."
        )
    refuse_pieces(source)
    if not weight_files(source):
        raise CheckpointError(
            f"{source} holds no *.safetensors file. Convert its weights first: load the model and call save_pretrained."
        )
    if output.resolve().is_relative_to(source.resolve()) and output.resolve() != source.resolve():
        raise CheckpointError(f"{output} lies in the folder that is read, {source}. Choose another output folder.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty. Choose another output folder, or remove it.")
    refuse_links_out_anywhere(source)
