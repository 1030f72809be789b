"""Factors of units worked into the weights: W diag(f) x for W (f x), where a matrix reads the units, and f y for what
writes to the residual stream.

The factors lie where `auxin.analysis.units` has the places of units: in front of the matrix that reads heads or
feed-forward units; of a whole sublayer, in what it adds; and, of the residual, in what enters the first layer, in the
output of every part, and in that of norms behind sums. All of the stream's places have the same factors, and what reads
the stream finds them there. A head that is tied to the embedding reads them twice, so that the gain of the norm in
front of it is divided by them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.edits.kinds.edit import Edit
from auxin.edits.kinds.file_edits import MultiplyParameter
from auxin.edits.plan_files import PlanFile
from auxin.errors import PlanError
from auxin.models.sublayers import Sublayer
from auxin.planning.unit_order import Place
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.paths import dotted, encloses

MEND = 'Leave hidden out, or let what goes go without factors on the rest (masks = "hard").'


@dataclass(frozen=True)
class _Fold:
    """An axis of a parameter that takes up factors."""

    parameter: str
    """Its name."""
    axis: int
    place: Place
    """Whose factors."""
    entries: int
    """Consecutive entries of the axis that share a factor."""
    offset: float = 0.0
    divide: bool = False

    @property
    def tensor(self) -> str:
        """The name of its factors in the file."""
        return f"{dotted(self.place[1], self.place[0])}.{self.entries}"


@dataclass(frozen=True)
class Folding:
    """Where a model's weights take up factors."""

    folds: Sequence[_Fold]
    factors: Mapping[Place, Sequence[float]] = field(default_factory=dict)
    """Of all units, by place; empty in an outline, which changes no weight."""
    folder: Path = Path()
    """For the file of the factors."""

    def filled(self, factors: Mapping[Place, Sequence[float]], folder: Path) -> "Folding":
        """This one, with factors.

        Args:
            factors: of the units of every place that it was made for.
            folder: for their file.
        """
        return replace(self, factors=factors, folder=folder)

    def edits(self, keep: Mapping[Place, Sequence[int]]) -> tuple[list[Edit], list[PlanFile]]:
        """The edits that work the factors into the whole model, before units go, and the file that they read.

        Args:
            keep: the units that stay, as `auxin.planning.cutting.cut` takes them; the factors of others are 1, so that
                nothing is divided by one that is nearly zero.
        """
        if not self.factors:
            return [], []
        # What a sublayer adds to the stream has its factor and the stream's: one axis is multiplied once.
        at: dict[tuple[str, int, bool], list[_Fold]] = {}
        for fold in self.folds:
            at.setdefault((fold.parameter, fold.axis, fold.divide), []).append(fold)
        tensors: dict[str, Tensor] = {}
        names = {key: " ".join(fold.tensor for fold in folds) for key, folds in at.items()}
        for key, folds in at.items():
            if names[key] not in tensors:
                tensors[names[key]] = torch.stack([self._entries(fold, keep) for fold in folds]).prod(0)
        file = PlanFile.write(self.folder, "gates.safetensors", save(tensors))
        return [
            MultiplyParameter(
                parameter=parameter,
                axis=axis,
                file=file.name,
                tensor=names[parameter, axis, divide],
                shape=(len(tensors[names[parameter, axis, divide]]),),
                offset=folds[0].offset,
                divide=divide,
                made_up_for=False,
            )
            for (parameter, axis, divide), folds in at.items()
        ], [file]

    def _entries(self, fold: _Fold, keep: Mapping[Place, Sequence[int]]) -> Tensor:
        """A factor for every entry of an axis."""
        factors = torch.tensor(self.factors[fold.place], dtype=torch.float32)
        if fold.place in keep and fold.place[0] == "residual":
            gone = torch.ones(len(factors), dtype=torch.bool).index_fill_(0, torch.tensor(keep[fold.place]), False)
            factors = factors.masked_fill(gone, 1.0)
        return factors.repeat_interleave(fold.entries)


def folding(
    model: PreTrainedModel, body: Anatomy, counts: Mapping[Place, int], whole: Iterable[Sublayer] = ()
) -> Folding:
    """Where the weights of `model` take up factors of units; none are, until they are filled in.

    Args:
        model: the model; the meta device serves.
        body: its anatomy.
        counts: how many factors each place has: heads ("query", one for each key-value group or each head) and
            feed-forward units by layer, and the residual, ("residual", "").
        whole: sublayers that have one factor each, at ("sublayer", path).

    Raises:
        PlanError: the residual or a sublayer is among them, and what writes to the stream, or reads the embedding
            beside it, is not known to take up factors without a change of anything else.
    """
    folds = [
        fold for place, count in counts.items() if place[0] != "residual" for fold in _read(model, body, place, count)
    ]
    for sublayer in whole:
        added = _by_module(model, body, sublayer.output, "sublayers")
        # One factor for all of what it adds.
        folds += [replace(f, place=("sublayer", sublayer.path), entries=f.entries * body.sizes.residual) for f in added]
    if ("residual", "") in counts:
        folds += dict.fromkeys(fold for stack in body.stacks for fold in _written(model, body, stack))
        folds += _taken_back(model, body, folds)
    return Folding(folds)


def _read(model: PreTrainedModel, body: Anatomy, place: Place, count: int) -> Iterator[_Fold]:
    """The matrices of a layer that read its heads or feed-forward units."""
    stream, scope = place
    for name in [name for name, _ in model.named_parameters() if encloses(scope, name)]:
        read = body.role(name).units_read
        if read is not None and read[1].stream == stream:
            yield _Fold(name, read[0], place, read[1].size // count)


def _written(model: PreTrainedModel, body: Anatomy, stack: LayerStack) -> Iterator[_Fold]:
    """What writes to the residual stream of a stack."""
    if body.embedding_norm is not None and not any(
        encloses(body.embedding_norm, n) for n, _ in model.named_parameters()
    ):
        raise PlanError(
            f"hidden: {body.embedding_norm}, behind the embeddings, has no gain that could take up factors. {MEND}"
        )
    for entry in stack.entries:
        yield from _by_module(model, body, entry)
    names = {name for layer in model.get_submodule(stack.path).children() for name, _ in layer.named_parameters()}
    parts = stack.output_norms if stack.norm_position == "after_output" else stack.parts(names)
    if stack.norm_position == "after_residual":
        parts = (*parts, *stack.output_norms)
    for part in parts:
        yield from _by_module(model, body, dotted(stack.path, "*", part))


def _by_module(model: PreTrainedModel, body: Anatomy, path: str, asked: str = "hidden") -> Iterator[_Fold]:
    """What in the modules at `path`, whose results go into the residual stream, takes up factors of these results: the
    norm that ends them, or else all that writes to the stream.

    Args:
        model: the model.
        body: its anatomy.
        path: of the modules, `*` for one part. There may be none.
        asked: the setting that wants factors there, for messages.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    within = [name for name, _ in model.named_modules() if encloses(path, name)]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if encloses(path, name)]
    roles = {name: body.role(first[id(model.get_parameter(name))]) for name in names}
    written = [name for name in names if roles[name].along("residual", "writes")]
    ends = {_below(path, name) for name in written if roles[name].kind == "gain"}
    if ends:
        written = [name for name in written if _below(path, name) in ends]
    if (
        len(ends) > 1
        or any(roles[name].kind not in ("gain", "offset", "matrix", "bias", "embedding") for name in written)
        or any(isinstance(model.get_submodule(name), nn.Conv1d) for name in within)
        or (within and not written)
    ):
        raise PlanError(
            f"{asked}: {path} writes to the residual stream, and factors of what it writes are not known to fit into "
            f"its parameters. {MEND.replace('hidden', asked)}"
        )
    for name in dict.fromkeys(first[id(model.get_parameter(name))] for name in written):
        yield from _along_residual(body, name)


def _below(path: str, name: str) -> str:
    """The module of a parameter, relative to one of those that `path` means."""
    return ".".join(name.split(".")[len(path.split(".")) : -1])


def _along_residual(body: Anatomy, name: str, divide: bool = False) -> Iterator[_Fold]:
    role = body.role(name)
    for axis, (segments, access) in enumerate(zip(role.axes, role.access, strict=True)):
        if access == "writes" and any(segment.stream == "residual" for segment in segments):
            (segment,) = segments
            offset = body.gain_offset if role.kind == "gain" else 0.0
            yield _Fold(name, axis, ("residual", ""), segment.unit, offset, divide)


def _taken_back(model: PreTrainedModel, body: Anatomy, folds: Sequence[_Fold]) -> Iterator[_Fold]:
    """Where a head is tied to an embedding that takes up factors, the norm in front of it, divided by them."""
    named = dict(model.named_parameters(remove_duplicate=False))
    head = None if body.head is None else named.get(f"{body.head}.weight")
    if head is None or not any(model.get_parameter(fold.parameter) is head for fold in folds):
        return
    norm = body.final_norm
    if norm is None or body.stack_of(norm) is not None:
        raise PlanError(
            "hidden: the head is tied to the token embedding, which takes up factors, and no norm with a gain of its "
            f"own stands in front of it, which could take them back. Untie it first. {MEND}"
        )
    for name in named:
        if name.rpartition(".")[0] == norm:
            yield from _along_residual(body, name, divide=True)
