"""Plans: ordered edits with the promise they make, readable as a table and as YAML, checked before anything changes."""

import shutil
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting import Cost, count_parameters, flops_per_token
from auxin.accounting.inputs import counted_length, unit_of_cost
from auxin.edits.kinds.architecture_edits import ChangeArchitecture, SetConfig
from auxin.edits.kinds.edit import Edit, describe_edit
from auxin.edits.kinds.file_edits import FileEdit
from auxin.edits.kinds.parameter_edits import ParameterEdit
from auxin.edits.origin import Fresh, Made, Origin
from auxin.edits.plan_files import CheckpointFile, PlanFile
from auxin.edits.resolution import ResolvedPlan, resolve
from auxin.edits.structure import config_from_values, edited_skeleton, structural_edits
from auxin.edits.tensor_names import collapse, shapes_of, together
from auxin.errors import PlanError, placed, reason
from auxin.settings import Settings
from auxin.yaml_files import LARGE

Promise = Literal["exact", "approximate", "none"]
REPLAYED = "The result loads after `import auxin`; its config alone can't say what it is."
"""What a plan says of a result that keeps edits in its config."""
LINE = 80
"""Characters of an edit in a line of a table."""


class Plan(Settings):
    """What a method wants done to a model; pure data, to be read, edited by hand, saved and applied."""

    largest_file: ClassVar[int] = LARGE
    method: str
    """The method that made the plan."""
    settings: dict[str, Any] = {}
    """The method's settings."""
    promise: Promise
    """What holds at the moment of the edit: `exact` (the same function, checked by `apply`), `approximate`, `none`."""
    vocabulary: int | None = Field(default=None, gt=0)
    """What the promise speaks of: texts of the token ids below this, and the logits of these. None: all."""
    kept_tokens: list[int] | None = None
    """Where tokens go and the others get other ids: the old id of each that stays, in the order of the new ids. The
    promise then speaks of texts of these, and of their logits. The ids that a generation config names follow."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of all random numbers that the edits draw."""
    edits: list[Edit]
    """The edits, in order."""
    files: list[PlanFile] = []
    """Files that belong to the plan; they lie beside it."""
    drops: list[CheckpointFile] = []
    """Files of the checkpoint that go, since they would describe the old model beside the new one."""
    hooks: list[dict[str, Any]] = []
    """What takes part in the training after the plan, without which the method is not complete: kinds of hooks with
    their settings, see `auxin.planning.hooks`. Recipes obey it; `hooks_of` makes them for a loop of one's own."""
    notes: list[str] = []
    """What whoever trains the new model should know before."""
    findings: list[str] = []
    """What the method found when it chose what to do, and what that comes to; shown with the plan."""
    made_for: dict[str, Any] | None = None
    """The config of the model that the plan was made for. It shows the plan without a model; a model of another
    architecture, or of another size where the plan changes it, is refused."""
    estimate: bool = False
    """Whether this was made without the weights that the method looks at: it tells a likely size, and is refused where
    a plan is applied."""
    cost: Cost | None = None
    """What making the plan took, where the method looked at data; measured. None: nothing worth a line in the books."""

    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        kept = self.kept_tokens
        if kept is not None and (not kept or kept[0] < 0 or any(one >= next_ for one, next_ in pairwise(kept))):
            raise ValueError("kept_tokens: must be old ids, each larger than the one before")
        if kept is not None and self.vocabulary is not None:
            raise ValueError("kept_tokens and vocabulary both say what the promise speaks of; leave one out")
        return self

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever their files lie."""
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment] # as of all that holds lists

    @property
    def folder(self) -> Path | None:
        """Where the plan's files lie; None where nobody said it."""
        return self._folder

    def beside(self, folder: str | Path | None) -> Self:
        """The same plan, whose files lie in `folder`; None: that is not known."""
        found = self.model_copy()
        found._folder = None if folder is None else Path(folder).absolute()
        return found

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a plan whose files lie beside it; errors as of all settings."""
        return super().from_yaml(path).beside(Path(path).parent)

    def to_yaml(self, path: str | Path) -> None:
        """Write the plan, and its files beside it; the folder is made where there is none.

        Raises:
            PlanError: a file of it is not where it should be, or has other content.
        """
        folder = Path(path).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in self.files:
                source = file.find(self._folder)
                if source.parent.resolve() != folder.resolve():
                    shutil.copyfile(source, folder / file.name)
            super().to_yaml(path)
        except OSError as error:
            raise PlanError(f"The plan can't be written to {path}: {reason(error)}. Give another path.") from error

    def located(self) -> list[Any]:
        """The edits, each of which knows where its file is.

        Raises:
            PlanError: a file of the plan is not beside it, or has other content.
        """
        paths = {file.name: file.find(self._folder) for file in self.files}
        edits: list[Any] = []
        for edit in self.edits:
            if isinstance(edit, FileEdit):
                if edit.file not in paths:
                    known = ", ".join(paths) or "none"
                    raise PlanError(f"{describe_edit(edit)}: the plan has no file {edit.file!r}. Its files: {known}.")
                edit = edit.located(paths[edit.file])
            edits.append(edit)
        return edits

    def refuse_estimate(self) -> None:
        """Raise PlanError where this is an estimate."""
        if self.estimate:
            raise PlanError(
                f"The plan of {self.method} is an estimate (estimate: true), made without the model's weights: it "
                "tells a size and can't be applied. Plan again with the model's weights."
            )

    def summary(self) -> str:
        """The plan without its edits: the method, what it promises and found, and what is to be known."""
        return "\n".join([self._head(), *self._about()])

    def _head(self) -> str:
        head = f"{self.method}: promise {self.promise}, seed {self.seed}"
        if self.estimate:
            head += " (an estimate: made without the model's weights, the plan with them may have other sizes)"
        return head

    def _about(self) -> list[str]:
        """What is said after the edits, in lines."""
        notes = [f"Files beside it: {', '.join(file.name for file in self.files)}"] if self.files else []
        notes += [f"Hook in the training after: {_hook_in_words(hook)}" for hook in self.hooks]
        notes += [f"Note: {note}" for note in self.notes]
        notes += self.findings
        if self.cost is not None:
            notes.append(f"Planning took {self.cost}")
        return notes

    def __str__(self) -> str:
        head, notes = self._head(), self._about()
        if self.made_for is None:
            return "\n".join([head, *(f"  {describe_edit(edit)}" for edit in self.edits), *notes])
        with placed("made_for: "):
            before = edited_skeleton(config_from_values(self.made_for))
        resolved = resolve(self.edits, before)
        if structural_edits(resolved.after.config):
            notes.append(REPLAYED)
        return "\n".join([head, self._table(resolved), *notes])

    def table(self, model: PreTrainedModel | PreTrainedConfig, sequence_length: int | None = None) -> str:
        """The plan as a table for `model` (or a config): edits, parameters and FLOPs per token before and after.

        The FLOPs of a row are those of the matrix products with its parameters, where there is one for each token;
        those of experts and of convolutions are in the last row alone, which counts the whole model, attention at
        `sequence_length` (default: the model's context length, at most 1024) included. Of a model whose inputs are
        more than tokens it counts a whole sample.

        Raises:
            PlanError: the plan does not fit.
        """
        before = edited_skeleton(model) if isinstance(model, PreTrainedConfig) else model
        return self._table(resolve(self.edits, before), sequence_length)

    def _table(self, resolved: ResolvedPlan, sequence_length: int | None = None) -> str:
        before = resolved.before
        rows = [["module", "edit", "parameters", "FLOPs per token, forward"]]
        rows += [*_structure_rows(self), *_parameter_rows(resolved)]
        if sequence_length is None:
            sequence_length = counted_length(before, 1024)
        counts = [count_parameters(m).total for m in (resolved.before, resolved.after)]
        flops = [flops_per_token(m, sequence_length).forward for m in (resolved.before, resolved.after)]
        unit = unit_of_cost(before)
        counted = f"{sequence_length} {unit}s" if unit != "sample" else "per sample"
        rows.append([f"(model, {counted})", "", _arrow(*counts), _arrow(*map(round, flops))])
        lines = [line for row in rows for line in _broken(row)]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _hook_in_words(hook: dict[str, Any]) -> str:
    settings = ", ".join(f"{name} = {value}" for name, value in hook.items() if name != "kind")
    return str(hook.get("kind")) + (f" ({settings})" if settings else "")


def _broken(row: list[str]) -> list[list[str]]:
    """The lines of a row whose edit is longer than a line."""
    first, *more = textwrap.wrap(row[1], LINE, break_long_words=False, break_on_hyphens=False) or [""]
    return [[row[0], first, *row[2:]], *(["", f"  {line}", "", ""] for line in more)]


def _structure_rows(plan: Plan) -> list[list[str]]:
    """The edits that change no single parameter, one row for what happens alike to modules of several layers."""
    alike: dict[tuple[str, str], list[str]] = {}
    for edit in plan.edits:
        if not isinstance(edit, ParameterEdit):
            whole = isinstance(edit, SetConfig | ChangeArchitecture)
            place = "(config)" if whole else getattr(edit, "layers", getattr(edit, "module", ""))
            alike.setdefault((collapse(place), str(edit)), []).append(place)
    return [
        [place, what, "", ""]
        for (form, what), places in alike.items()
        # One that holds a pattern itself means several already.
        for place in (together(places) if form not in places else places)
    ]


def _parameter_rows(resolved: ResolvedPlan) -> list[list[str]]:
    """One row for the parameters of all layers to which the same happens, if to other units; those that only move have
    none."""
    looked_up = _only_looked_up(resolved.after)
    old_shapes = shapes_of(resolved.before)
    same: dict[tuple[str, ...], list[str]] = {}
    for name, origin in resolved.origins.items():
        if origin.steps or isinstance(origin.source, Fresh | Made):
            same.setdefault((collapse(name), *_what_happens(origin, which=False)), []).append(name)
    rows = []
    for names in same.values():
        what = _what_happens_to_all([resolved.origins[name] for name in names])
        for place, group in together(names, resolved.origins).items():
            sums, uncounted = [0, 0, 0, 0], False
            for name in group:
                origin = resolved.origins[name]
                old_shape = old_shapes[origin.reads[0]] if not isinstance(origin.source, Fresh | Made) else (0,)
                for column, shape in enumerate((old_shape, origin.shape)):
                    sums[column] += prod(shape)
                    # How many tokens an expert gets, or places a convolution, the shape does not say.
                    uncounted |= len(shape) > 2
                    if len(shape) == 2 and name not in looked_up:
                        sums[2 + column] += 2 * prod(shape)
            rows.append([place, what, _arrow(*sums[:2]), "" if uncounted else _arrow(*sums[2:])])
    return rows


def _what_happens_to_all(origins: Sequence[Origin]) -> str:
    """The steps of parameters that differ in the units that are taken at most."""
    alike, every = _what_happens(origins[0], which=False), zip(*map(_what_happens, origins), strict=True)
    return "; ".join(step if len(set(told)) > 1 else told[0] for step, told in zip(alike, every, strict=True))


def _what_happens(origin: Origin, which: bool = True) -> list[str]:
    """The steps in words, with or without the numbers of units that are taken."""
    begun = []
    if isinstance(origin.source, Fresh):
        begun = [f"new: {origin.source.fill or 'initialised'}"]
    elif isinstance(origin.source, Made):
        begun = [f"made of {', '.join(origin.source.group.inputs)}"]
    return [*begun, *(step.edit.shown(step.name, which) for step in origin.steps)]


def _only_looked_up(model: PreTrainedModel) -> set[str]:
    """Parameters of tables from which rows are taken and that no product uses."""
    tables = {
        id(parameter)
        for module in model.modules()
        if (rows := getattr(module, "num_embeddings", None)) is not None  # nn.Embedding, and bricks in its place
        for parameter in module.parameters(recurse=False)
        if parameter.shape[0] == rows
    }
    if (head := model.get_output_embeddings()) is not None:
        tables -= {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


def _arrow(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}"
