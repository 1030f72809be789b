"""Similarity of hidden states: how much of its direction the residual stream keeps across each part of each layer.

A part (attention, cross-attention, feed-forward) reads the residual stream x, (tokens, width), and adds its output o to
it. Its similarity is the cosine of what enters the addition and what leaves it,

    cos(x, x + o) = <x, x + o> / (|x| |x + o|),

for every token, averaged over a sample's tokens and then over samples. 1: the part leaves the direction as it is, as
one that gives zero does exactly. A layer's similarity is that of its input and its output; 1 minus it is the block
influence of ShortGPT (Men et al., arXiv 2403.03853). What is compared, by architecture:

| norms | x of a part | o |
|---|---|---|
| before parts (Llama, GPT-2, T5, ViT, TokenFormer) | layer's input plus the o of parts before | output of the part |
| behind parts (OLMo 2) | the same | output of the norm behind the part |
| behind sums (BERT) | layer's input, or output of the norm before | output of the part |
| any, parts in parallel (GPT-NeoX) | layer's input | output of the part |

So a part of BERT is compared without the norm behind its sum, which stays when the part is taken out; its whole layers
are compared with all their norms, as ShortGPT does. Padding (`kept_tokens`) doesn't count. Sums and cosines are in
float32 at least.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, Measurement, Needs, Result, Table, Tap, token_means, wide
from auxin.analysis.parts import SERIES, WHOLE, Kind, StackParts, part_in_words, refuse_blocks, refuse_maps, stack_parts
from auxin.analysis.spread import Estimate, Spread
from auxin.errors import PlanError
from auxin.report.forest import Mark, Panel, Row, forest_svg
from auxin.settings import Settings

LISTED = 3
"""How many parts the findings name."""


class PartSimilarity(Settings):
    """One part of a layer."""

    module: str
    """The module whose output is added to the residual stream: "model.layers.0.self_attn.o_proj"."""
    kind: Kind
    similarity: Estimate
    """Of the stream before and after the addition."""


class LayerSimilarity(Settings):
    """One layer."""

    path: str
    """The layer's module: "model.layers.0"."""
    parts: list[PartSimilarity]
    """In the order in which they are run."""
    similarity: Estimate
    """Of what enters the layer and what leaves it."""

    @property
    def influence(self) -> float:
        """ShortGPT's block influence: 0 where the layer changes no direction, at most 2."""
        return 1 - self.similarity.mean


class StackSimilarity(Settings):
    """One stack of layers: a decoder's, or an encoder's."""

    path: str
    """The list of layers: "model.layers"."""
    layers: list[LayerSimilarity]


class Similarities(Result):
    """The similarities of all parts and layers of a model."""

    stacks: list[StackSimilarity]

    def parts(self) -> Iterator[PartSimilarity]:
        """All parts of all stacks."""
        for stack in self.stacks:
            for layer in stack.layers:
                yield from layer.parts

    def tables(self) -> list[Table]:
        """A table for each stack, a row for each layer."""
        tables = []
        for stack in self.stacks:
            columns = list(dict.fromkeys(part.kind for layer in stack.layers for part in layer.parts))
            rows = []
            for number, layer in enumerate(stack.layers):
                cells = {part.kind: str(part.similarity) for part in layer.parts}
                rows.append([str(number), *(cells.get(kind, "") for kind in columns), str(layer.similarity)])
            tables.append(Table(stack.path, ["layer", *columns, WHOLE], rows))
        return tables

    def findings(self) -> list[str]:
        """The parts and the layers that change the stream least."""
        layers = sorted((layer for stack in self.stacks for layer in stack.layers), key=lambda layer: layer.influence)
        placed = [(part, layer.path) for stack in self.stacks for layer in stack.layers for part in layer.parts]
        alike = sorted(placed, key=lambda found: -found[0].similarity.mean)[:LISTED]
        said = ", ".join(f"{part_in_words(part.kind, path)} ({part.similarity})" for part, path in alike)
        return [
            *([f"Parts that change the stream least: {said}."] if said else []),
            "Layers that change it least: "
            + ", ".join(f"{layer.path} ({layer.similarity})" for layer in layers[:LISTED])
            + ".",
        ]

    def picture(self, title: str) -> str:
        """A row for each layer, a mark for each of its parts and one for the whole, with 95% intervals."""
        panels = []
        for stack in self.stacks:
            rows = []
            for number, layer in enumerate(stack.layers):
                marks = [Mark(part.kind, part.similarity.mean, part.similarity.margin) for part in layer.parts]
                marks.append(Mark(WHOLE, layer.similarity.mean, layer.similarity.margin))
                rows.append(Row(str(number), marks))
            panels.append(Panel(stack.path, rows))
        return forest_svg(
            title,
            "Cosine of the residual stream before and after each part, with 95% intervals. To the right a part changes "
            "less; the axis is logarithmic.",
            panels,
            list(SERIES.values()),
        )


class Similarity(Measurement[Similarities]):
    """Cosine similarity of the residual stream before and after each part of each layer, and each layer."""

    name: ClassVar[str] = "similarity"
    title: ClassVar[str] = "cosine of the residual stream before and after each part of each layer, and each layer"
    needs: ClassVar[Needs] = "layers"
    version: ClassVar[int] = 2
    result_type: ClassVar[type[Result]] = Similarities

    parts: bool = True
    """Whether parts are measured, and not whole layers alone, which may be built in any way."""

    def observe(self, model: PreTrainedModel) -> "SimilarityObserver":
        """An observer of all stacks of `model`.

        Raises:
            PlanError: the architecture is not known, or its residual stream has several blocks.
        """
        return SimilarityObserver(model, self.parts)


MEASUREMENT = Similarity


class SimilarityObserver:
    """Follows the residual stream through every layer.

    Args:
        model: of a known architecture.
        parts: whether parts of layers are measured.

    Raises:
        PlanError: as `Similarity.observe`.
    """

    def __init__(self, model: PreTrainedModel, parts: bool = True) -> None:
        refuse_blocks(model)
        refuse_maps(model)
        self._stacks = [_StackObserver(found if parts else found.without_parts) for found in stack_parts(model)]
        self._spread = Spread()
        self.taps = [tap for stack in self._stacks for layer in stack.layers for tap in layer.taps()]

    def before(self, batch: Batch) -> None:
        """Note which tokens count."""
        for stack in self._stacks:
            kept = stack.kept(batch)
            for layer in stack.layers:
                layer.kept = kept

    def after(self, batch: Batch, output: Any) -> None:
        """Add the batch's samples: a row for each, with the means over its tokens."""
        means = [mean for stack in self._stacks for layer in stack.layers for mean in layer.means()]
        self._spread.add(torch.stack(means, dim=1))

    def result(self) -> Similarities:
        """The estimates in the order in which the means were given."""
        estimates = iter(self._spread.estimates())
        return Similarities(stacks=[stack.result(estimates) for stack in self._stacks])


class _StackObserver:
    """The layers of one stack."""

    def __init__(self, parts: StackParts) -> None:
        self.path, self.kept = parts.stack.path, parts.kept
        self.kinds = parts.kinds[: len(parts.stack.outputs)]
        self.layers = [_LayerObserver(path, layer, parts) for path, layer in parts.layers.items()]

    def result(self, estimates: Iterator[Estimate]) -> StackSimilarity:
        """The stack's part of the result."""
        found = []
        for layer in self.layers:
            measured = [
                PartSimilarity(module=f"{layer.path}.{name}", kind=kind, similarity=next(estimates))
                for name, kind in zip(layer.stack.outputs, self.kinds, strict=True)
            ]
            found.append(LayerSimilarity(path=layer.path, parts=measured, similarity=next(estimates)))
        return StackSimilarity(path=self.path, layers=found)


class _LayerObserver:
    """One layer: the stream as it is while a batch runs through, and the means that this gave."""

    def __init__(self, path: str, layer: nn.Module, parts: StackParts) -> None:
        self.path, self.stack = path, parts.stack
        self._added = parts.added
        self.kept: Tensor | None = None
        self._layer = layer
        self._entered: Tensor | None = None
        self._stream: Tensor | None = None
        self._means: dict[str, Tensor] = {}
        self._checked = False

    def taps(self) -> Iterator[Tap]:
        """Its input, what each part adds to the stream, the norms behind sums, and its output, in this order."""
        yield Tap(self._layer, "input", self._enter)
        for part, name in zip(self.stack.outputs, self._added, strict=True):
            yield Tap(self._layer.get_submodule(name), "output", partial(self._add, part))
        if self.stack.norm_position == "after_residual":
            for name in self.stack.output_norms:
                yield Tap(self._layer.get_submodule(name), "input", self._same)
                yield Tap(self._layer.get_submodule(name), "output", self._replace)
        yield Tap(self._layer, "output", self._leave)

    def means(self) -> list[Tensor]:
        """Of the batch that went through: for each part and then the whole layer the means over tokens, (samples,)."""
        places = [*self.stack.outputs, WHOLE]
        if missing := next((place for place in places if place not in self._means), None):
            raise self._other_build(f"{missing} was not run")
        means = [self._means[place] for place in places]
        self._means, self._checked = {}, True
        return means

    def _enter(self, hidden: Tensor) -> None:
        self._entered = self._stream = wide(hidden)

    def _add(self, part: str, output: Tensor) -> None:
        entered, stream = self._inside()
        output = wide(output)
        if output.shape != stream.shape:
            raise self._other_build(f"{part} gives {tuple(output.shape)}, and not the stream's shape")
        read = entered if self.stack.parallel else stream
        self._means[part] = token_means(_cosine(read, read + output), self.kept)
        self._stream = stream + output

    def _same(self, hidden: Tensor) -> None:
        """The stream as the model has it must be what was added up here; looked at once, on the first batch."""
        if self._checked or not self.stack.outputs:
            return
        entered, stream = self._inside()
        # A sum's rounding is relative to its largest term, and the model may add in another order and type.
        scale = max(entered.abs().max().item(), stream.abs().max().item())
        allowed = _ROUNDINGS * torch.finfo(hidden.dtype).eps * scale
        if hidden.shape != stream.shape or (wide(hidden) - stream).abs().max().item() > allowed:
            raise self._other_build("the stream is something else than its input plus what its parts give")

    def _replace(self, hidden: Tensor) -> None:
        self._stream = wide(hidden)

    def _leave(self, hidden: Tensor) -> None:
        self._same(hidden)
        entered, _ = self._inside()
        self._means[WHOLE] = token_means(_cosine(entered, wide(hidden)), self.kept)
        self._entered = self._stream = None

    def _inside(self) -> tuple[Tensor, Tensor]:
        if self._entered is None or self._stream is None:
            raise self._other_build("a part was run outside of it")
        return self._entered, self._stream

    def _other_build(self, reason: str) -> PlanError:
        return PlanError(
            f"{self.path} is not built as its architecture is known to be: {reason}. Measure the model before the edit "
            "that changed it, or describe it in an anatomy of its own."
        )


_ROUNDINGS = 16


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosines of (..., width), (...). Of what is equal it is exactly 1; where only one of the two is zero it is 0."""
    lengths = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
    cosine = torch.where(lengths == 0, 0, (before * after).sum(-1) / lengths)
    return torch.where((before == after).all(-1), 1, cosine)
