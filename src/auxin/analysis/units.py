"""The units that could be cut out of a model: where they lie, and what passes through these places while it runs.

A unit's place is where a mask of it would sit. Heads and feed-forward units lie in the input of the matrix that gives
their part's output. An expert lies in its output, times the weight that the router gives it. A whole sublayer lies in
what it adds to the residual stream. A unit of the stream lies wherever something is added to it or takes its place: in
what enters the first layer, in the output of every part (behind its norm, where it has one), and in the outputs of
norms behind sums. What embeddings and heads have of the stream's width beside the layers (BERT's transform) is not
among these. Where the stream is wanted as layers see it, its units lie in the outputs of the layers' norms instead.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.measurement import wide
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.sublayers import Sublayer
from auxin.nn.calls import computing
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.paths import dotted
from auxin.words.roles import Segment
from auxin.words.widths import Stream

Kind = Literal["residual", "query", "key_value", "ffn", "expert_ffn", "shared_expert_ffn", "expert", "sublayer"]
"""A stream whose units are cut."""
Group = tuple[Kind, str]
"""Units that are cut by number together: those of a stream in a scope, as `auxin.planning.cutting` takes them."""
Residual = Literal["written", "normed"]
"""Where units of the residual lie: in what is written to it, or in the outputs of the layers' norms."""
WORDS: dict[Kind, str] = {
    "query": "query heads",
    "key_value": "key-value groups",
    "ffn": "feed-forward units",
    "expert_ffn": "units of experts",
    "shared_expert_ffn": "units of shared experts",
    "expert": "experts",
    "residual": "residual units",
    "sublayer": "attentions and feed-forward parts",
}
"""What the units are called, in the order in which a person reads of them."""


@dataclass(frozen=True)
class Place:
    """Where some units pass through."""

    group: Group
    entries: int
    """Consecutive entries of the last axis that make a unit; 0 where a whole row does, as of an expert or sublayer."""
    module: nn.Module
    where: Literal["input", "output", "inside"]
    """The module's input, its output, or, of experts, between their matrices or behind them."""
    decoder: bool
    """Whether the tokens are those of an encoder-decoder's decoder."""
    channels: bool = False
    """Whether units lie along the second axis, as those of maps (samples, channels, height, width) do, and not along
    the last one."""
    weights: Tensor | None = None
    """Squared lengths of the columns that read the entries, (experts, entries); one expert where there are none.
    None where the units' output isn't theirs times a column."""

    @property
    def experts(self) -> int:
        """How many there are; one where there are none."""
        return 1 if self.weights is None else len(self.weights)

    def of_units(self, entries: Tensor) -> Tensor:
        """What is added up over entries, (samples, experts, entries), by unit, (samples, units)."""
        if not self.entries:
            return entries.sum(-1)
        return entries.sum(1).unflatten(-1, (-1, self.entries)).sum(-1)


@dataclass(frozen=True)
class Rows:
    """What passes through a place in one run of it."""

    values: Tensor
    """(rows, entries): a row for each token, or for each token and expert chosen for it."""
    tokens: int
    """How many there are in all samples together; sample by sample they are numbered from 0."""
    token: Tensor | None = None
    """(rows,): which token a row is of; None: one row after the other."""
    expert: Tensor | None = None
    """(rows,): which expert a row is of."""
    experts: int = 1
    gates: Tensor | None = None
    """(rows, 1): the weight that the router gives to the expert for the token."""


class Reader(Protocol):
    """What is told of everything that passes through places."""

    def __call__(self, place: Place, rows: Rows) -> Tensor:
        """The values with which the model goes on, equal to `rows.values`."""


@dataclass
class Units:
    """The units of a model and their places."""

    counts: dict[Group, int] = field(default_factory=dict)
    """How many units each group has."""
    places: list[Place] = field(default_factory=list)
    groups_of_heads: dict[str, int] = field(default_factory=dict)
    """By scope the key-value heads, where several query heads read each. Query heads come group by group."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why units of some kind are not known to have places, by the kind's words."""

    @contextlib.contextmanager
    def read_by(self, reader: Reader, groups: Collection[Group] | None = None) -> Iterator[None]:
        """Within the context, `reader` is told of what passes through all places, or those of some `groups` alone."""

        def told(place: Place, rows: Rows) -> Tensor:
            return reader(place, rows) if groups is None or place.group in groups else rows.values

        places = [place for place in self.places if groups is None or place.group in groups]
        with contextlib.ExitStack() as stack:
            for place in places:
                if place.where == "input":
                    hook = partial(_through_input, place, reader)
                    stack.callback(place.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                elif place.where == "output":
                    stack.callback(place.module.register_forward_hook(partial(_through_output, place, reader)).remove)
            for module in dict.fromkeys(place.module for place in places if place.where == "inside"):
                within, behind = (place for place in self.places if place.where == "inside" and place.module is module)
                stack.enter_context(computing(module, partial(_run_experts, module, within, behind, told)))
            yield


def why_no_residual(model: PreTrainedModel, stream: Residual = "written") -> str:
    """Why units of the residual are not known to lie anywhere in `model`, in a sentence; empty where they are. Its
    weights are not looked at.

    Args:
        model: the model, on any device.
        stream: as in `units_of`.

    Raises:
        PlanError: the architecture is not known.
    """
    body = anatomy(model)
    if body.residual_blocks != "one":
        return "The residual stream has several blocks (AltUp), of which each layer sees one."
    if body.has_stages:
        return "It has stages, whose residual streams have a width each."
    if stream == "normed":
        known = next(_behind_norms(model, body), None)
        return "" if known else "The norms of its layers have no gains, by which they would be known."
    for stack in body.stacks:
        if stack.layers_shared:
            return f"The layers of {stack.path} share their parameters and are run several times."
        if stack.reader_of_entry:
            return f"{stack.reader_of_entry} changes the residual stream between layers of {stack.path}."
        if stranger := next((layer for layer, parts in _parts(model, stack) if not parts), None):
            return f"{stranger} is not built as its architecture is known to be."
    return ""


def units_of(model: PreTrainedModel, stream: Residual = "written") -> Units:
    """The units of `model`, which has its weights.

    Args:
        model: the model.
        stream: where the units of the residual lie.

    Raises:
        PlanError: the architecture is not known, has several towers, or is built of modules into which nobody sees.
    """
    body = anatomy(model)
    if body.towers:
        raise PlanError(
            f"The {body.family} model has several towers ({', '.join(body.towers)}), whose samples share one loss. "
            "Load one of them and measure that."
        )
    found = Units()
    reading: list[tuple[str, Segment, Place]] = []
    for name, parameter in model.named_parameters():
        if (read := body.role(name).units_read) is not None:
            reading += _places(model, body, name, parameter, *read)
    # What wraps a module takes the same input as it does, and so do several matrices of one module.
    paths = list(dict.fromkeys(path for path, _, _ in reading))
    for outermost in (path for path in paths if not any(path.startswith(f"{other}.") for other in paths)):
        at_path: dict[Group, list[tuple[Segment, Place]]] = {}
        for path, segment, place in reading:
            if path == outermost:
                at_path.setdefault(place.group, []).append((segment, place))
        wraps = any(path.startswith(f"{outermost}.") for path in paths)
        for group, ((segment, place), *others) in at_path.items():
            found.places.append(replace(place, weights=None) if wraps or others else place)
            found.counts[group] = place.experts if group[0] == "expert" else segment.count
            if group[0] == "query":
                _group_heads(found, body, group[1])
    if reason := why_no_residual(model, stream):
        found.missing[WORDS["residual"]] = reason
    else:
        found.places += _behind_norms(model, body) if stream == "normed" else _stream_places(model, body)
        found.counts["residual", ""] = body.sizes.residual
    if not found.places:
        raise PlanError(f"No unit of the {body.family} model is known to lie anywhere: {reason}")
    return found


def with_sublayers(model: PreTrainedModel, units: Units, chosen: Iterable[Sublayer]) -> Units:
    """`units` and, as one more group each, some sublayers of `model`, where they add to the stream.

    Args:
        model: the model.
        units: of the model.
        chosen: of its sublayers; none that is shared between layers.
    """
    body, groups = anatomy(model), dict[Group, int]()
    places = []
    for sublayer in chosen:
        group: Group = ("sublayer", sublayer.path)
        groups[group] = 1
        module = model.get_submodule(sublayer.output)
        places.append(Place(group, 0, module, "output", _is_decoder(body, sublayer.stack)))
    return replace(units, counts=units.counts | groups, places=[*units.places, *places])


def _places(
    model: PreTrainedModel, body: Anatomy, name: str, parameter: Tensor, axis: int, segment: Segment
) -> Iterator[tuple[str, Segment, Place]]:
    """The places in front of a matrix, with its module's path; of experts the one behind it, too."""
    stack = body.stack_of(name)
    if stack is None:
        return
    path = name.rpartition(".")[0]
    layer = ".".join(name.split(".")[: len(stack.path.split(".")) + 1])
    module, decoder = model.get_submodule(path), _is_decoder(body, stack)
    group: Group = (_kind(segment.stream), layer)
    writes = [
        other
        for other, (segments, access) in enumerate(zip(body.role(name).axes, body.role(name).access, strict=True))
        if access == "writes" and any(part.stream == "residual" for part in segments)
    ]
    squares = wide(parameter).square()
    if parameter.dim() == 3:
        _check_experts(module, path)
        yield path, segment, Place(group, segment.unit, module, "inside", decoder, weights=squares.sum(writes[0]))
        # An expert gives its output itself.
        whole = torch.ones(len(parameter), parameter.shape[writes[0]], dtype=squares.dtype, device=squares.device)
        yield path, segment, Place(("expert", layer), 0, module, "inside", decoder, weights=whole)
        return
    columns = squares.sum(writes[0])[None] if parameter.dim() == 2 and writes else None
    channels = isinstance(module, nn.Conv2d)
    yield path, segment, Place(group, segment.unit, module, "input", decoder, channels, columns)


def _kind(stream: Stream) -> Kind:
    assert stream != "vocabulary"
    return stream


def _is_decoder(body: Anatomy, stack: LayerStack) -> bool:
    return body.head is not None and stack.is_read_by(body.head)


def _group_heads(found: Units, body: Anatomy, layer: str) -> None:
    sizes = body.sizes.at(layer)
    if sizes.key_value_heads < sizes.query_heads:
        found.groups_of_heads[layer] = sizes.key_value_heads
        found.counts["key_value", layer] = sizes.key_value_heads


def _behind_norms(model: PreTrainedModel, body: Anatomy) -> Iterator[Place]:
    """The outputs of the norms of layers, those with gains."""
    for name, _ in model.named_parameters():
        stack, role = body.stack_of(name), body.role(name)
        if stack is not None and role.kind == "gain" and role.along("residual"):
            module = model.get_submodule(name.rpartition(".")[0])
            yield Place(("residual", ""), 1, module, "output", _is_decoder(body, stack))


def _parts(model: PreTrainedModel, stack: LayerStack) -> Iterator[tuple[str, list[str]]]:
    """By layer the modules whose outputs are added to the stream."""
    for number, layer in enumerate(model.get_submodule(stack.path).children()):
        path = f"{stack.path}.{number}"
        parameters = {name for name, _ in layer.named_parameters()}
        names = stack.output_norms if stack.norm_position == "after_output" else stack.parts(parameters)
        modules = dict(layer.named_modules())
        yield path, [dotted(path, name) for name in names if name in modules]


def _stream_places(model: PreTrainedModel, body: Anatomy) -> Iterator[Place]:
    for stack in body.stacks:
        decoder = _is_decoder(body, stack)

        def at(path: str, where: Literal["input", "output"], decoder: bool = decoder) -> Place:
            return Place(("residual", ""), 1, model.get_submodule(path), where, decoder)

        for number, (layer, parts) in enumerate(_parts(model, stack)):
            if number == 0:
                yield at(layer, "input")
            yield from (at(path, "output") for path in parts)
            if stack.norm_position == "after_residual":
                yield from (at(dotted(layer, name), "output") for name in stack.output_norms)


def _through_input(
    place: Place, reader: Reader, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    if given:
        return (_through(place, reader, given[0]), *given[1:]), named
    name = "hidden_states" if "hidden_states" in named else next(iter(named))
    return given, {**named, name: _through(place, reader, named[name])}


def _through_output(place: Place, reader: Reader, module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return _through(place, reader, output)
    return (_through(place, reader, output[0]), *output[1:])


def _through(place: Place, reader: Reader, values: Tensor) -> Tensor:
    last = values.movedim(1, -1) if place.channels else values
    passed = reader(place, Rows(flat := last.flatten(0, -2), len(flat))).view(last.shape)
    return passed.movedim(-1, 1) if place.channels else passed


def _check_experts(module: nn.Module, path: str) -> None:
    """PlanError unless the experts are such that transformers can run them in more than one way: `_run_experts` is one
    more."""
    if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        raise PlanError(
            f"{path} is a {type(module).__name__}, and nobody sees into it while it runs. Known are experts that "
            "transformers runs by its experts interface."
        )


def _run_experts(
    module: Any, within: Place, behind: Place, reader: Reader, hidden: Tensor, *routing: Tensor, **named: Tensor
) -> Tensor:
    """What transformers' implementations of experts compute, tokens of one expert together.

    Args:
        module: the experts, all in one tensor for each matrix.
        within: the place between their two matrices.
        behind: the place of what they give, times the router's weights.
        reader: is told of both.
        hidden: (tokens, width).
        routing, named: the experts chosen for each token, (tokens, k), and their weights, (tokens, k).
    """
    index, weights = (*routing, *named.values())
    order = index.flatten().argsort(stable=True)
    expert, token, gates = index.flatten()[order], order // index.shape[-1], weights.flatten()[order, None]
    counts = torch.bincount(expert, minlength=module.num_experts).tolist()

    def product(rows: Tensor, name: str) -> Tensor:
        matrices = getattr(module, name)
        matrices = matrices if module.is_transposed else matrices.mT
        result = torch.cat([part @ matrix for part, matrix in zip(rows.split(counts), matrices, strict=True)])
        return result + getattr(module, f"{name}_bias")[expert] if module.has_bias else result

    inner = product(hidden[token], "gate_up_proj" if module.has_gate else "up_proj")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    inner = reader(within, Rows(inner, len(hidden), token, expert, module.num_experts, gates))
    output = product(inner, "down_proj")
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    output = reader(behind, Rows(output * gates, len(hidden), token, expert, module.num_experts))
    # Back in the order in which tokens came: sums of a token's experts are the same on every device and in every run.
    apart = torch.empty_like(output).index_copy(0, order, output)
    return apart.unflatten(0, index.shape).sum(1).to(hidden.dtype)
