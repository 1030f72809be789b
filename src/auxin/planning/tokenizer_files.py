"""The tokenizer of a plan that changes it: where the old one lies, and the files that take its place."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from auxin.data.tokenizer import TOKENIZER_FILES, read_tokenizer
from auxin.edits.plan import Plan
from auxin.edits.plan_files import PlanFile, sha256
from auxin.errors import PlanError

STALE = (*TOKENIZER_FILES, "merges.txt", "added_tokens.json", "special_tokens_map.json")
"""Files that would go on describing the old vocabulary beside the new tokenizer.json."""


def tokenizer_folder(model: PreTrainedModel, given: Path | None) -> Path:
    """Where the tokenizer of `model` lies: `given`, or the folder that the model comes from.

    Raises:
        PlanError: it comes from none.
    """
    folder = given or Path(model.name_or_path or "")
    if given is None and not (model.name_or_path and folder.is_dir()):
        raise PlanError("The model comes from no local folder, so that its tokenizer is unknown. Set `tokenizer`.")
    return folder


def with_tokenizer(plan: Plan, tokenizer: PreTrainedTokenizerFast, folder: Path, old: Path | None) -> Plan:
    """The plan, to which the files of `tokenizer` belong, and which drops those that would describe the old one.

    Args:
        plan: the plan.
        tokenizer: the changed one.
        folder: where its files are written.
        old: the folder of the tokenizer whose files are the only ones that they take the place of; None: any.

    Raises:
        PlanError: the files can't be written, or the tokenizer that is read from them is another one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        paths = sorted(path for path in Path(temporary).rglob("*") if path.is_file())
        names = {path.relative_to(temporary).as_posix(): path.read_bytes() for path in paths}
        if read_tokenizer(Path(temporary)).get_vocab() != tokenizer.get_vocab():
            raise PlanError(
                f"A {type(tokenizer).__name__} that is saved and loaded again gives its tokens other ids, so that the "
                "model would read others. Save it in transformers' general class (PreTrainedTokenizerFast) first."
            )
    replaced = {name: sha256(old / name) for name in names if old is not None and (old / name).is_file()}
    files = [
        PlanFile.write(folder, Path(name).name, content, into=name, instead_of=replaced.get(name))
        for name, content in names.items()
    ]
    drops = [name for name in STALE if name not in names]
    return plan.model_copy(update={"files": files, "drops": drops}).beside(folder)
