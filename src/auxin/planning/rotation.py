"""A rotation of the residual stream that keeps the function of a model (SliceGPT, Ashkboos et al. 2024, arXiv
2401.15024, section 3).

An RMSNorm without a gain commutes with every orthogonal Q: RMS(x Q) = RMS(x) Q. With a gain g behind it, which goes
into what reads the norm first, and y = W x,

    readers W' = W diag(g) Q, gains 1      writers W' = Q^T W, b' = Q^T b      embeddings E' = E Q

make a model whose stream is x Q everywhere, and whose logits are what they were. One Q serves all layers, since what
each adds is added to what the others did. So the result is a model of the family's own config.

It takes a model of which all that touches the stream is known: RMSNorms before the parts and before the head, matrices
that read their outputs, and matrices, biases and tables that write. Which matrix reads which norm is seen in a run on
shapes. A head that is the token embedding gets a table of its own, since only one of the two has the last gain in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.edits.kinds.architecture_edits import SetConfig
from auxin.edits.kinds.edit import Edit
from auxin.edits.kinds.file_edits import MultiplyParameter, ProjectParameter, SetParameter
from auxin.edits.kinds.module_edits import MakeParameters
from auxin.edits.plan_files import PlanFile
from auxin.edits.resolution import resolve
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.places import running_on_shapes
from auxin.models.ties import TIED
from auxin.nn.calls import first_argument
from auxin.words.anatomy import Anatomy
from auxin.words.roles import Kind, ParameterRole

MATRICES: tuple[Kind, ...] = ("matrix", "head")
ROTATED: tuple[Kind, ...] = (*MATRICES, "bias", "embedding")


@dataclass(frozen=True)
class Rotatable:
    """A model whose residual stream can be rotated."""

    model: PreTrainedModel
    untied: PreTrainedModel
    """The model with a head of its own: itself, or a skeleton."""
    untying: tuple[Edit, ...]
    """The edits that give it one; none where it has one."""
    body: Anatomy
    """Of the model with a head of its own."""
    readers: Mapping[str, tuple[str, ...]]
    """By the path of every norm over the stream the parameters that read it, in the order in which norms run."""

    def is_of_decoder(self, norm: str) -> bool:
        """Whether the tokens that pass a norm are those that reach the head."""
        places = (stack for stack in self.body.stacks if norm == stack.end or norm.startswith(f"{stack.path}."))
        stack = next(places, None)
        return stack is None or self.body.head is None or stack.is_read_by(self.body.head)

    def edits(self, rotation: Tensor, folder: Path) -> tuple[list[Edit], list[PlanFile]]:
        """The edits that rotate the stream, those that untie the head included, and the file that they read.

        Args:
            rotation: Q, (hidden, hidden), orthogonal; unit i of the new stream is x Q[:, i].
            folder: for the file.
        """
        tensors = {"rotation": rotation.mT, **{norm: self._gain(norm) for norm in self.readers}}
        tensors["ones"] = torch.full((len(rotation),), 1 - self.body.gain_offset)
        wide = torch.promote_types(self.model.dtype, torch.float32)
        content = {name: tensor.to(wide).cpu().contiguous() for name, tensor in tensors.items()}
        file = PlanFile.write(folder, "rotation.safetensors", save(content))
        size = (len(rotation),)
        found: list[Edit] = [*self.untying]
        for norm, readers in self.readers.items():
            found += [
                MultiplyParameter(
                    parameter=name, axis=self._axis(name, "reads"), file=file.name, tensor=norm, shape=size
                )
                for name in readers
            ]
            found.append(SetParameter(parameter=f"{norm}.weight", file=file.name, tensor="ones", shape=size))
        found += [
            ProjectParameter(parameter=role.pattern, axis=axis, file=file.name, tensor="rotation", shape=(*size, *size))
            for role in self.body.roles
            if role.kind in ROTATED
            for axis in _along_residual(role)
        ]
        return found, [file]

    def _gain(self, norm: str) -> Tensor:
        return self.model.get_submodule(norm).get_parameter("weight").detach().double() + self.body.gain_offset

    def _axis(self, name: str, access: str) -> int:
        role = self.body.role(name)
        return next(axis for axis in _along_residual(role) if role.access[axis] == access)


def rotatable(model: PreTrainedModel) -> Rotatable:
    """How the residual stream of `model` can be rotated; weights are not looked at.

    Raises:
        PlanError: the architecture is not known, or something on the stream does not commute with a rotation, or is
            not known to.
    """
    body = anatomy(model)
    _refuse_build(body)
    untied, untying = _untied(model, body)
    body = anatomy(untied)
    norms = _norms(untied, body)
    _refuse_roles(body)
    return Rotatable(model, untied, untying, body, _readers(untied, body, norms))


def _refuse_build(body: Anatomy) -> None:
    """PlanError for what is known of a whole architecture."""
    why = ""
    if body.towers or body.residual_blocks != "one":
        what = "several towers" if body.towers else "several blocks in its residual stream (AltUp)"
        why = f"has {what}, and one rotation is of one stream"
    elif body.has_stages:
        why = "has stages with a residual stream each, and one rotation is of one stream"
    elif body.norm != "rms":
        why = "has LayerNorms, which take off the mean over units first, so that units can't be mixed"
    elif not body.norm_has_gain or body.final_norm is None:
        why = "has norms without gains, which could not make up for the units that go"
    elif after := next((stack for stack in body.stacks if stack.norm_position != "before"), None):
        why = f"has norms behind the parts of {after.path}, whose gains multiply single units of the stream"
    elif body.embedding_norm is not None or body.before_norms:
        why = f"has {body.embedding_norm or body.before_norms[0]} before its layers, whose gain multiplies single units"
    elif body.head is None:
        why = "has no head: it gives the stream itself, whose units would be others"
    if why:
        raise PlanError(
            f"The {body.family} model {why}. Take a method that cuts units as they are: minitron, taylor or magnitude."
        )


def _refuse_roles(body: Anatomy) -> None:
    for role in body.roles:
        axes = list(_along_residual(role))
        if axes and (
            role.kind not in (*ROTATED, "gain")
            or any(len(role.axes[axis]) > 1 or role.access[axis] is None for axis in axes)
        ):
            raise PlanError(
                f"{role.pattern} holds something of single units of the stream ({role.kind}), which a rotation mixes. "
                "Take a method that cuts units as they are: minitron, taylor or magnitude."
            )


def _untied(model: PreTrainedModel, body: Anatomy) -> tuple[PreTrainedModel, tuple[Edit, ...]]:
    if not body.tied:
        return model, ()
    assert body.head is not None
    edits: tuple[Edit, ...] = (
        SetConfig(values={TIED: False}),
        MakeParameters(module=body.head, making="own_tensors"),
    )
    try:
        untied = resolve(edits, model).after
    except PlanError as error:
        raise PlanError(
            f"The head of the {body.family} model is its token embedding, and would need a table of its own, which its "
            "config can't say. Take a method that cuts units as they are: minitron, taylor or magnitude."
        ) from error
    return untied, edits


def _norms(model: PreTrainedModel, body: Anatomy) -> list[str]:
    """The paths of the norms over the stream, which have a gain."""
    names = dict.fromkeys(name for name, _ in model.named_parameters() if body.role(name).kind == "gain")
    return [name.rpartition(".")[0] for name in names if body.role(name).along("residual")]


def _readers(model: PreTrainedModel, body: Anatomy, norms: list[str]) -> dict[str, tuple[str, ...]]:
    """By norm the parameters that read it.

    Raises:
        PlanError: one reads something else.
    """
    reading = [name for name, _ in model.named_parameters() if _reads(body.role(name))]
    made, given = dict[str, list[Tensor]](), dict[str, list[Tensor]]()

    def note_made(path: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        made.setdefault(path, []).append(output)

    def note_given(path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.setdefault(path, []).append(first_argument(arguments, named))

    with running_on_shapes(model) as (fake, inputs):
        for path in norms:
            fake.get_submodule(path).register_forward_hook(partial(note_made, path))
        for path in dict.fromkeys(name.rpartition(".")[0] for name in reading):
            fake.get_submodule(path).register_forward_pre_hook(partial(note_given, path), with_kwargs=True)
        fake(**inputs)
        # Views of what a norm gave are it, too: experts get tokens in a row, a head the last ones.
        norm_of = {_storage(output): path for path, outputs in made.items() for output in outputs}
        read = {
            name: {norm_of.get(_storage(tensor), "") for tensor in given.get(name.rpartition(".")[0], [])}
            for name in reading
        }
    if odd := next((name for name, found in read.items() if len(found) != 1 or "" in found), None):
        raise PlanError(
            f"{odd} does not read what one norm gives, so that it is not known what a rotation of the stream is there. "
            "Take a method that cuts units as they are: minitron, taylor or magnitude."
        )
    return {path: tuple(name for name, found in read.items() if path in found) for path in made}


def _storage(tensor: Tensor) -> int:
    found: int = tensor.untyped_storage()._cdata
    return found


def _reads(role: ParameterRole) -> bool:
    return role.kind in MATRICES and any(role.access[axis] == "reads" for axis in _along_residual(role))


def _along_residual(role: ParameterRole) -> Iterator[int]:
    return (
        axis for axis, segments in enumerate(role.axes) if any(segment.stream == "residual" for segment in segments)
    )
