"""Applying a plan to a checkpoint folder: tensors stream from the old files to the new ones, one at a time."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from auxin.accounting import count_parameters
from auxin.edits import replay  # noqa: F401 - edited checkpoints load
from auxin.edits.carry import carry, check_tensors
from auxin.edits.executor import Receipt, continuation
from auxin.edits.folder_store import FolderStore
from auxin.edits.plan import Plan
from auxin.edits.promise import Probe, default_probe, edited_outputs, measured_change, probe_outputs, tolerance
from auxin.edits.resolution import resolve
from auxin.edits.structure import edited_skeleton
from auxin.errors import CheckpointError
from auxin.files import new_folder
from auxin.models.loading import load_config, load_model

OLD_WEIGHTS = (".bin", ".bin.index.json", ".pth")


def apply_to_checkpoint(
    plan: Plan,
    source_dir: str | Path,
    output_dir: str | Path,
    probe: Probe | None = None,
    finish: Callable[[Path, Receipt], None] | None = None,
) -> Receipt:
    """Write the checkpoint that `plan` makes of the one in `source_dir` to `output_dir`.

    Weights (`*.safetensors`, in one file or several) and the optimizer's state (`training/*.safetensors`, tensors named
    `optimizer.<state>.<parameter>`) are read, changed and written one tensor at a time, bit by bit as `apply` would
    have it; every other file (tokenizer, ledger, ...) is copied, but for older copies of the weights (`*.bin`, `*.pth`)
    in the folder itself. The folder appears under its name when it is complete
    and the promise was checked, by loading the old model and, after it, the new one.

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
    before = edited_skeleton(load_config(source))
    for file in plan.files:
        file.check(source)
    resolved = resolve(plan.located(), before)
    store = FolderStore(source, resolved)
    store.check()
    check_tensors(resolved, store, store.names())
    probe = default_probe(plan, before) if probe is None else probe
    # The old model is gone before the new one is loaded.
    model = load_model(source)
    reference, allowed = probe_outputs(model, probe, plan.vocabulary), tolerance(model)
    del model
    with new_folder(output) as folder:
        _copy_other_files(source, folder, store)
        store.open(folder)
        carry(resolved, plan.seed, store)
        store.close(folder)
        for name in plan.drops:
            (folder / name).unlink(missing_ok=True)
        for file in plan.files:
            file.put(plan.folder, folder)
        config = resolved.after.config
        same_class = type(resolved.after) is type(before)
        config.architectures = before.config.architectures if same_class else [type(resolved.after).__name__]
        config.save_pretrained(folder)
        change = measured_change(plan, reference, edited_outputs(plan, load_model(folder), probe), allowed)
        receipt = Receipt(
            plan=plan,
            parameters_before=count_parameters(before).total,
            parameters_after=count_parameters(resolved.after).total,
            max_relative_change=change,
            tolerance=allowed,
            continuation=continuation(resolved),
            seconds=time.perf_counter() - start,
        )
        if finish is not None:
            finish(folder, receipt)
    return receipt


def _check_folders(source: Path, output: Path) -> None:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} is no checkpoint: it holds no config.json. Give the folder of a saved model.")
    if not any(source.glob("*.safetensors")):
        raise CheckpointError(
            f"{source} holds no *.safetensors file. Convert its weights first: load the model and call save_pretrained."
        )
    if output.resolve().is_relative_to(source.resolve()) and output.resolve() != source.resolve():
        raise CheckpointError(f"{output} lies in the folder that is read, {source}. Choose another output folder.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty. Choose another output folder, or remove it.")


def _copy_other_files(source: Path, target: Path, store: FolderStore) -> None:
    rewritten = store.files()

    def ignore(folder: str, names: list[str]) -> list[str]:
        stale = names if Path(folder) == source else []  # weights that would stay those of the old model
        return [
            *(name for name in names if (Path(folder) / name).relative_to(source) in rewritten),
            *(name for name in stale if name.endswith(OLD_WEIGHTS)),
        ]

    shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)
