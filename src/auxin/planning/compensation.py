"""Biases that give back, on average, what units that go have given (FLAP, arXiv 2312.11983).

A part gives y = W a + b for the activations a of its units. Without those that go, whose columns of W are W_g, and with

    b' = b + W_g mean(a_g),

the mean of y over the tokens on which the means were taken is what it was, and where a_g is constant, y is. A matrix
that has a bias gets another one. One that has none gets one where a switch of the config says so (Llama's
attention_bias and mlp_bias); other layers that the switch gives biases to get zeros. Elsewhere nothing is given back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from auxin.edits.kinds.architecture_edits import SetConfig
from auxin.edits.kinds.edit import Edit
from auxin.edits.kinds.file_edits import ShiftParameter
from auxin.edits.kinds.module_edits import MakeParameters
from auxin.edits.plan_files import PlanFile
from auxin.edits.structure import edited_config, edited_skeleton
from auxin.errors import PlanError
from auxin.models.configs import config_parts
from auxin.models.loading import REFUSALS
from auxin.planning.unit_order import Place
from auxin.words.anatomy import Anatomy
from auxin.words.paths import dotted, encloses, innermost
from auxin.words.roles import Segment
from auxin.words.widths import FEED_FORWARD, Stream

READ: tuple[Stream, ...] = ("query", *FEED_FORWARD)
"""The streams whose units one matrix reads, the output of their part."""


NOT_GIVEN_BACK = "the mean of what goes is not given back there, since"
"""Where nothing is given back; the reason follows."""


@dataclass(frozen=True)
class Reader:
    """A matrix that gives the output of a part."""

    path: str
    """Its module's."""
    axis: int
    """Of the weight, along which it reads the units."""
    segment: Segment


@dataclass(frozen=True)
class Compensation:
    """The biases of a model's parts."""

    model: PreTrainedModel
    readers: list[Reader] = field(default_factory=list)
    """Those that have a bias, or get one."""
    edits: list[Edit] = field(default_factory=list)
    """What gives them one, of zeros, after units are cut; the same whatever goes."""
    notes: list[str] = field(default_factory=list)
    """Where nothing can be given back."""
    means: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of what enters each reader, entry by entry, by its path; empty in an outline, which gives nothing back."""
    folder: Path = Path()
    """For the file of what is given back."""

    def filled(self, means: Mapping[str, Sequence[float]], folder: Path) -> "Compensation":
        """This one, with what is to be given back.

        Args:
            means: of what enters each reader, by its path; one that has none gives nothing back, with a note.
            folder: for the file of what is given back.
        """
        readers = [reader for reader in self.readers if reader.path in means]
        unknown = ", ".join(reader.path for reader in self.readers if reader.path not in means)
        note = [f"{unknown}: {NOT_GIVEN_BACK} means are measured within layers alone."] * bool(unknown)
        return replace(self, readers=readers, notes=[*self.notes, *note], means=means, folder=folder)

    def shifts(self, keep: Mapping[Place, Sequence[int]]) -> tuple[list[Edit], list[PlanFile]]:
        """The edits that give back what goes, and the file that they read.

        Args:
            keep: the units that stay, as `auxin.planning.cutting.cut` takes them.
        """
        found: dict[str, Tensor] = {}
        for reader in self.readers if self.means else []:
            gone = _gone(reader.segment, reader.path, keep)
            if gone:
                weight = self.model.get_parameter(f"{reader.path}.weight").detach()
                columns = weight.movedim(reader.axis, -1)[..., gone].double()
                mean = torch.tensor(self.means[reader.path], dtype=torch.float64, device=weight.device)[gone]
                wide = torch.promote_types(weight.dtype, torch.float32)
                found[f"{reader.path}.bias"] = (columns @ mean).to(wide).cpu().contiguous()
        if not found:
            return [], []
        file = PlanFile.write(self.folder, "biases.safetensors", save(found))
        return [
            ShiftParameter(parameter=name, file=file.name, tensor=name, shape=tuple(shift.shape))
            for name, shift in found.items()
        ], [file]


def compensation(model: PreTrainedModel, body: Anatomy, streams: Sequence[Stream]) -> Compensation:
    """Where the mean of what goes can be given back; nothing is, until the means are filled in.

    Args:
        model: the model; the meta device serves.
        body: its anatomy.
        streams: those whose units go.
    """
    readers, without, experts = list[Reader](), list[Reader](), dict[str, None]()
    names = dict(model.named_parameters())
    for name, reader in _readers(model, body, streams):
        if reader is None:
            experts[_everywhere(body, name)] = None
        else:
            (readers if f"{reader.path}.bias" in names else without).append(reader)
    switches, made = _switched_on(model, body, [reader.path for reader in without])
    readers += [reader for reader in without if reader.path in made]
    edits: list[Edit] = [SetConfig(values=dict.fromkeys(switches, True))] if switches else []
    edits += [MakeParameters(module=path, making="zero_bias") for path in _patterns(model, body, made)]
    notes = list[str]()
    if missing := dict.fromkeys(_everywhere(body, reader.path) for reader in without if reader.path not in made):
        notes.append(
            f"{', '.join(missing)}: {NOT_GIVEN_BACK} the config of a {body.family} model has no switch for a bias."
        )
    if experts:
        notes.append(f"{', '.join(experts)}: {NOT_GIVEN_BACK} every expert sees tokens of its own.")
    return Compensation(model, readers, edits, notes)


def _readers(model: PreTrainedModel, body: Anatomy, streams: Sequence[Stream]) -> Iterator[tuple[str, Reader | None]]:
    """The parameters that read units of some streams, and as what; None where that is no matrix of a module alone."""
    for name, parameter in model.named_parameters():
        role = body.role(name)
        for axis, (segments, access) in enumerate(zip(role.axes, role.access, strict=True)):
            if role.kind != "matrix" or access != "reads" or len(segments) != 1 or segments[0].stream not in streams:
                continue
            path, _, last = name.rpartition(".")
            plain = last == "weight" and parameter.dim() == 2
            yield (path if plain else name), Reader(path, axis, segments[0]) if plain else None


def _switched_on(model: PreTrainedModel, body: Anatomy, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The switches of the config with which linear layers at some of `paths` have biases, and all layers that they give
    one to."""
    within = body.fields.hidden_size.rpartition(".")[0]
    values = vars(config_parts(model.config)[within])
    before = {name: parameter.dim() for name, parameter in model.named_parameters()}
    switches, made = list[str](), list[str]()
    for name in (dotted(within, name) for name, value in values.items() if value is False and "bias" in name):
        if not (wanted := [path for path in paths if path not in made]):
            break
        try:
            after = edited_skeleton(edited_config(model.config, {name: True}), type(model))
        except (PlanError, *REFUSALS):
            continue  # a switch that does not go with the config's other values
        more = [new for new, _ in after.named_parameters() if new not in before]
        layers = [new.removesuffix(".bias") for new in more]
        plain = all(before.get(f"{layer}.weight") == 2 for layer in layers)
        if plain and set(layers) & set(wanted):
            switches.append(name)
            made += layers
    return switches, made


def _everywhere(body: Anatomy, path: str) -> str:
    """A path with `*` for the number of its layer."""
    stack = body.stack_of(path)
    if stack is None:
        return path
    rest = path.removeprefix(f"{stack.path}.").partition(".")[2]
    return dotted(stack.path, "*", rest)


def _patterns(model: PreTrainedModel, body: Anatomy, paths: Sequence[str]) -> list[str]:
    """Patterns that mean the modules at `paths` and no others, or the paths."""
    modules = [name for name, _ in model.named_modules()]
    found: dict[str, None] = {}
    for path in paths:
        pattern = _everywhere(body, path)
        meant = {name for name in modules if len(name.split(".")) == len(path.split(".")) and encloses(pattern, name)}
        found[pattern if meant <= set(paths) else path] = None
    return list(found)


def _gone(segment: Segment, path: str, keep: Mapping[Place, Sequence[int]]) -> list[int]:
    """The entries of a segment, read by the module at `path`, that are not among those that stay."""
    around = {scope: units for (stream, scope), units in keep.items() if stream == segment.stream}
    places = [scope for scope in around if encloses(scope, path)]
    if not places:
        return []
    kept = set(around[innermost(path, places)])
    gone = (unit for unit in range(segment.count) if unit not in kept)
    return [unit * segment.unit + entry for unit in gone for entry in range(segment.unit)]
