"""Relations of tokens in one attention of each of two models, which have a size that no width has a part in.

Of the queries of an attention, split into r relation heads of d entries whatever the model's own heads are, A of each,

    R = softmax(A A^T / sqrt(d))

says how like each token's are those of every token that it may see; so it is for keys and for values. The distance of a
student from its teacher is KL(R of the teacher || R of the student), the mean over relation heads and tokens, the sum
over queries, keys and values: MiniLMv2 (arXiv 2012.15828) with its weights, all 1, of which MiniLM (arXiv 2002.10957)
has the values' beside the attention maps. Rotating the entries of a relation head changes nothing.

The paper's models see all tokens. A causal attention's relations are those to no later token, padding has none; windows
of an attention are not looked at.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.accounting.flops import BACKWARD_PER_FORWARD, countable_kernels
from auxin.accounting.shapes import shape_only_copy, without_data
from auxin.errors import ConfigError, PlanError
from auxin.models.layers import layer_paths
from auxin.models.projections import PARTS, Attention, Projection, self_attention
from auxin.nn.autocast import without_autocast
from auxin.objectives.layer_matching import mean_by_sample
from auxin.words.roles import HeadPart

Vectors = dict[HeadPart, Tensor]
"""Queries, keys and values, (samples, places, width) each."""


class Relations:
    """The attentions of two models that are compared, one of each.

    Args:
        student, teacher: the models; skeletons will do until they are listened to.
        layers: the numbers of the layers that have them, the student's first; None: the last of each.
        heads: r, the relation heads; None: the greatest number that divides the numbers of heads of both.

    Raises:
        ConfigError: a layer that does not exist, one whose queries, keys and values are not found, or heads that don't
            divide the width of some of them.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, int] | None, heads: int | None
    ) -> None:
        ours, theirs = layers or (None, None)
        self.models = student, teacher
        self.attentions = _attention(student, ours, "student"), _attention(teacher, theirs, "teacher")
        projections = [attention.parts[part] for attention in self.attentions for part in PARTS]
        self.heads = heads or math.gcd(*(projection.heads for projection in projections))
        self.causal = any(attention.causal for attention in self.attentions)
        for whose, attention in zip(("student", "teacher"), self.attentions, strict=True):
            for part, projection in attention.parts.items():
                if projection.width % self.heads:
                    common = math.gcd(*(projection.width for projection in projections))
                    raise ConfigError(
                        f"relation_heads: {self.heads} does not divide the {projection.width} numbers of the "
                        f"{whose}'s {part} ({projection.module}). Give a divisor of {common}, or leave it out."
                    )

    def flops(self, inputs: Mapping[str, Any]) -> float:
        """FLOPs of the products A A^T of one sample: of the teacher forward, of the student backward, too.

        Args:
            inputs: keyword arguments of a call of either, of one sample; of tensors only shape and type count.

        Raises:
            ConfigError: the models don't have equally many places there, or an attention gives something else than
                queries, keys and values.
        """
        shapes = [_shapes(*pair, inputs) for pair in zip(self.models, self.attentions, strict=True)]
        places = [shape["query"][1] for shape in shapes]
        if places[0] != places[1]:
            raise ConfigError(
                f"relations: the student's attention is over {places[0]} places, and the teacher's over {places[1]}: "
                "only equal ones can be compared. Set relations: 0, or name other relation_layers."
            )
        ours, theirs = (sum(2 * n * n * width for _, n, width in shape.values()) for shape in shapes)
        return float((1 + BACKWARD_PER_FORWARD) * ours + theirs)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[Tensor, Tensor | None], Tensor]]:
        """Within the context, what tells the distance of the last runs of both models, a scalar.

        It takes how much each sample counts, (samples,), and the mask, (samples, places), 0 at padding; None, or one of
        another number of places: no place is padding.
        """
        with _listening(*self._pair(0)) as ours, _listening(*self._pair(1)) as theirs:

            def distance(weights: Tensor, mask: Tensor | None) -> Tensor:
                with without_autocast():
                    by_place = relation_divergence(ours, theirs, self.heads, self.causal, mask)
                ours.clear()
                theirs.clear()
                return mean_by_sample(by_place, weights.to(by_place.device), mask)

            yield distance

    def _pair(self, number: int) -> tuple[PreTrainedModel, Attention]:
        return self.models[number], self.attentions[number]


def relation_divergence(ours: Vectors, theirs: Vectors, heads: int, causal: bool, mask: Tensor | None) -> Tensor:
    """KL(teacher || student) of each place's relations, the mean over relation heads, the sum over queries, keys and
    values: (samples, places), float32 or the vectors' type where that is finer.

    Args:
        ours, theirs: the student's and the teacher's, equally many samples and places.
        heads: r; it divides all widths.
        causal: whether a place has relations to itself and those before it only.
        mask: (samples, places), 0 at padding, to which nothing has relations; what padding itself has means nothing.
            None, or one of another number of places: there is none.
    """
    samples, places, _ = ours["query"].shape
    device = ours["query"].device
    seen = torch.ones(places, places, dtype=torch.bool, device=device)
    seen = (seen.tril() if causal else seen).expand(samples, 1, places, places)
    if mask is not None and mask.shape == (samples, places):
        # A place sees itself, so that those of padding have numbers, too.
        seen = seen & mask.bool()[:, None, None] | torch.eye(places, dtype=torch.bool, device=device)
    total = torch.zeros((), device=device)
    for part in PARTS:
        told, learnt = (_log_relations(vectors[part], heads, seen) for vectors in (theirs, ours))
        divergence = told.exp() * (told - learnt).masked_fill(~seen, 0)
        total = total + divergence.sum(-1).mean(1)
    return total


def _log_relations(vectors: Tensor, heads: int, seen: Tensor) -> Tensor:
    """The logarithms of R, (samples, heads, places, places), -inf where nothing is seen."""
    finer = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    by_head = finer.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = by_head @ by_head.transpose(-1, -2) / math.sqrt(by_head.shape[-1])
    return scores.masked_fill(~seen, -torch.inf).log_softmax(-1)


def _attention(model: PreTrainedModel, number: int | None, whose: str) -> Attention:
    """That of a layer, None: of the last one."""
    try:
        paths = layer_paths(model)
        if number is not None and number >= len(paths):
            raise ConfigError(
                f"relation_layers: the {whose} has no layer {number}; its layers are 0 to {len(paths) - 1}."
            )
        return self_attention(model, paths[-1 if number is None else number])
    except PlanError as error:
        raise ConfigError(
            f"relations: the {whose}: {error} Set relations: 0, or name other relation_layers."
        ) from error


@contextlib.contextmanager
def _listening(model: PreTrainedModel, attention: Attention) -> Iterator[Vectors]:
    """Within the context, the queries, keys and values of the last run; whoever has read them clears them."""
    seen: Vectors = {}

    def keep(part: HeadPart, projection: Projection) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[part] = projection.of(output)

        return hook

    with contextlib.ExitStack() as stack:
        for part, projection in attention.parts.items():
            module = model.get_submodule(projection.module)
            stack.callback(module.register_forward_hook(keep(part, projection)).remove)
        yield seen


def _shapes(
    model: PreTrainedModel, attention: Attention, inputs: Mapping[str, Any]
) -> dict[HeadPart, tuple[int, int, int]]:
    """Those of what it gives, (samples, places, width), found without data."""
    with shape_only_copy(model) as copied, countable_kernels(copied):
        copy = cast(PreTrainedModel, copied).eval()
        with _listening(copy, attention) as seen:
            copy(**without_data(inputs))
    for part, projection in attention.parts.items():
        shape = tuple(seen[part].shape) if part in seen else None
        if shape is None or len(shape) != 3 or shape[-1] != projection.width:
            raise ConfigError(
                f"relations: {projection.module} gives {shape} where (samples, places, {projection.width}) is "
                f"expected of the {part}. Set relations: 0, or name other relation_layers."
            )
    return {part: cast(tuple[int, int, int], tuple(vectors.shape)) for part, vectors in seen.items()}
