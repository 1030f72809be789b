"""Where a layer's queries, keys and values arise: the modules that give them, and which of their outputs are which.

They are the vectors of all heads one after the other, as the matrices leave them: with what an adapter or a brick on a
matrix adds, before norms on heads, before rotation by position, and before biases that are not the matrix's own
(DeBERTa's first version).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.errors import PlanError
from auxin.models.adapters import without_adapter
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import Brick
from auxin.words.roles import HeadPart, ParameterRole, Segment, laid_out

PARTS: tuple[HeadPart, ...] = get_args(HeadPart)


@dataclass(frozen=True)
class Projection:
    """What gives the queries, the keys or the values of an attention."""

    module: str
    """The path of the module, with all that is wrapped around it."""
    entries: tuple[int, ...]
    """Which of its outputs they are, head after head."""
    outputs: int
    """How many it has."""
    heads: int

    @property
    def width(self) -> int:
        """Entries of all heads together."""
        return len(self.entries)

    def of(self, output: Tensor) -> Tensor:
        """Of the module's `output`, (..., outputs), the vectors, (..., width)."""
        first, last = self.entries[0], self.entries[-1]
        if last - first + 1 == self.width:
            return output[..., first : last + 1]
        return output[..., list(self.entries)]


@dataclass(frozen=True)
class Attention:
    """The attention of a layer that sees the layer's own tokens."""

    parts: dict[HeadPart, Projection]
    causal: bool
    """Whether a token sees none after it."""


def self_attention(model: PreTrainedModel, layer: str) -> Attention:
    """The first attention of the layer at the path `layer`: of several the one that sees the layer's own tokens.

    Args:
        model: a skeleton will do; it may carry an adapter.
        layer: as `auxin.models.layers.layer_paths` gives it.

    Raises:
        PlanError: the architecture is not known, or not all three are given by matrices of the layer.
    """
    with without_adapter(model) as bare:
        body = anatomy(bare)
        stack = body.stack_of(layer)
        if stack is not None and stack.tower:
            # The widths of towers are told one tower at a time.
            body = anatomy(bare, part=stack.tower)
        modules = dict(bare.named_modules())
        found: dict[str, dict[HeadPart, Projection]] = {}
        names = [f"{layer}.{name}" for name, _ in modules[layer].named_parameters()]
        # A brick's own parameters serve where it stands in the matrix's place.
        for name, role in sorted(((name, body.role(name)) for name in names), key=lambda named: named[1].added):
            path = _outermost(modules, name.rpartition(".")[0])
            for part, projection in _projections(path, role):
                found.setdefault(path.rpartition(".")[0], {}).setdefault(part, projection)
    place, parts = next(((place, parts) for place, parts in found.items() if "query" in parts), ("", {}))
    if missing := [part for part in PARTS if part not in parts]:
        raise PlanError(f"{layer}: no matrix is known that gives the {missing[0]} of each head.")
    size = {part: parts[part].width // parts[part].heads for part in PARTS}
    if size["query"] != size["key"]:
        raise PlanError(
            f"{layer}: keys are put together of several vectors (latent attention): a matrix gives {size['key']} of "
            f"their {size['query']} entries."
        )
    says = bool(getattr(model.get_submodule(place), "is_causal", False))
    return Attention({part: parts[part] for part in PARTS}, causal=says or (stack is not None and stack.causal))


def _outermost(modules: dict[str, nn.Module], path: str) -> str:
    """The path of the outermost wrapper around the module at `path`, which gives what the rest of the model gets."""
    while path:
        above = path.rpartition(".")[0]
        parent = modules[above]
        if not (isinstance(parent, Brick) and parent.wrapped is modules[path]):
            break
        path = above
    return path


def _projections(module: str, role: ParameterRole) -> Iterator[tuple[HeadPart, Projection]]:
    """What a parameter of the module gives."""
    if role.kind != "matrix":
        return
    for segments, access in zip(role.axes, role.access, strict=True):
        if access != "writes":
            continue
        counts = [segment.count for segment in segments]
        places = laid_out(segments, counts, [segment.unit for segment in segments])
        along = list(_along(segments))
        for part in PARTS:
            entries = tuple(place for place, entry in enumerate(places) if along[entry] == part)
            if entries:
                heads = next(segment.count for segment in segments if part in segment.parts)
                yield part, Projection(module, entries, len(places), heads)


def _along(segments: tuple[Segment, ...]) -> Iterator[HeadPart | None]:
    """What each entry of the segments, one after the other, belongs to."""
    for segment in segments:
        parts = zip(segment.parts, segment.sizes_of_parts, strict=True) if segment.parts else [(None, segment.unit)]
        unit = [part for part, size in parts for _ in range(size)]
        yield from unit * segment.count
