"""Which tensors of a run integer arithmetic holds: what a model's operations give is followed from one to the next.

Where a product reads two operands, these have to be integers, and what it gives is stored as integers again. So the
tensors that are told are (Bondarenko et al. 2023, arXiv 2306.12929)

| family | the tensors |
|---|---|
| linear | what a linear layer, a convolution, an expert gives, behind its bias and activation function |
| norm | what a norm gives |
| embedding | the sum of the embeddings |
| scores | the product of queries and keys, before the mask |
| probabilities | the attention's probabilities |
| context | their product with the values |
| sum | the residual stream behind each part's addition |
| input | what a product or a layer reads that is none of these |

An activation function belongs to the linear layer before it where it reads all of that and nothing comes between. BERT
and OPT have nothing in `input`; it is rotated queries and keys, what the two halves of a gated feed-forward part give
together, pixels. The output head and gates (routers, weights of a single row) compute in floating point. Moving
entries about, and multiplying all of a tensor by one number, leaves it on its grid.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from auxin.analysis.quantized_weights import Weights
from auxin.errors import PlanError

Family = Literal["linear", "norm", "embedding", "scores", "probabilities", "context", "sum", "input"]
aten = torch.ops.aten
_PRODUCTS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.mv: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.addmv: (1, 2),
    aten.convolution: (0, 1),
    aten._grouped_mm: (0, 1),
}
"""Where the operands are."""
_MOVES = {
    *(aten.view, aten._unsafe_view, aten._reshape_alias, aten.expand, aten.t, aten.transpose, aten.permute),
    *(aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.unsqueeze, aten.squeeze),
    *(aten.clone, aten._to_copy, aten.alias, aten.detach, aten.lift_fresh, aten.as_strided, aten.unfold),
    *(aten.cat, aten.stack, aten.index, aten.index_select, aten.gather, aten.roll, aten.flip, aten.repeat),
    *(aten.constant_pad_nd, aten.diagonal),
}
"""What moves entries, or writes zeros beside them."""
_SCALES = {aten.mul, aten.mul_, aten.div, aten.div_, aten.neg}
_ACTIVATIONS = {
    *(aten.relu, aten.relu_, aten.gelu, aten.silu, aten.silu_, aten.tanh, aten.tanh_, aten.sigmoid, aten.sigmoid_),
    *(aten.elu, aten.elu_, aten.leaky_relu, aten.leaky_relu_, aten.hardtanh, aten.hardtanh_, aten.softplus),
    *(aten.hardswish, aten.hardswish_, aten.mish),
}
_CLIPS = {aten.clamp, aten.add, aten.add_, aten.mul, aten.mul_}
"""What, with numbers alone, makes other probabilities of a softmax's: clipped ones."""
_SUMMANDS = ("linear", "norm", "sum", "embedding", "input")
_FUSED = "_scaled_dot_product"
"""What the names of kernels begin with that compute a whole attention."""


@dataclass(frozen=True)
class Site:
    """A tensor that arises in every run."""

    name: str
    """The module or parameter that gives it, or where it arises."""
    family: Family


Change = Callable[[Site, Tensor], Tensor]
"""What is made of a tensor; itself, where nothing is."""


@dataclass(frozen=True)
class _Mark:
    """What is known of a tensor in a run."""

    weight: str = ""
    """The parameter that it is, or that it was made of."""
    plain: bool = True
    """Whether it is that parameter, or some of its entries, as they are."""
    hidden: bool = False
    """Whether it depends on the model's inputs."""
    grid: bool = False
    """Whether it is on a grid."""
    pending: tuple[str, int] | None = None
    """The site's stage that it is all of."""
    embedding: bool = False
    """Whether it is made of embeddings alone."""
    part: str = ""
    """The part of a layer that gave it, up to factors."""
    family: Family | Literal[""] = ""
    """Of the site that it was, or is some of."""
    probabilities: tuple[str, int] | None = None
    """The softmax that gave it."""


@dataclass
class Structure:
    """What one run of the model tells about all others."""

    passed_on: set[tuple[str, int]] = field(default_factory=set)
    """Stages of sites that are not stored: something that belongs to them is computed of them at once."""
    read: set[tuple[str, int]] = field(default_factory=set)
    """Softmaxes that a product reads."""


class Pass(TorchDispatchMode):
    """One run."""

    def __init__(
        self,
        weights: Weights,
        parts: dict[str, str],
        layers: set[str],
        change: Change,
        structure: Structure,
        tracing: bool,
    ) -> None:
        super().__init__()
        self._weights, self._parts, self._layers = weights, parts, layers
        self._change, self._structure, self._tracing = change, structure, tracing
        self._marks: Any = WeakTensorKeyDictionary()
        self._inside: list[str] = []
        self._counted: list[Counter[str]] = []
        self._quiet = 0
        self._in_layers = False
        self._activated: list[tuple[str, int] | None] = []

    def begin(self, inputs: dict[str, Any]) -> None:
        """Mark what the run begins with."""
        for name, tensor, kind in self._weights.tensors():
            self._marks[tensor] = _Mark(weight=name, grid=kind != "full", embedding=kind == "embedding")
        for value in inputs.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                self._marks[value] = _Mark(hidden=True)

    # What modules do.

    def enter(self, path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A module is called."""
        self._inside.append(path)
        self._counted.append(Counter())
        if self._quiet == 0 and path in self._layers:
            self._in_layers = True
            arguments, named = self._on_grid(path, arguments, named)
        kind = _kind_of(module)
        if kind == "activation" and self._quiet == 0:
            mark = self._mark(next((x for x in (*arguments, *named.values()) if isinstance(x, Tensor)), None))
            self._activated.append(mark.pending)
        if kind:
            self._quiet += 1
        return arguments, named

    def leave(self, path: str, module: nn.Module, arguments: Any, output: Any) -> Any:
        """It has given `output`."""
        self._inside.pop()
        self._counted.pop()
        kind = _kind_of(module)
        if kind:
            self._quiet -= 1
        if self._quiet or not isinstance(output, Tensor | tuple | list):
            return output
        first = output if isinstance(output, Tensor) else next(iter(output), None)
        if not isinstance(first, Tensor):
            return output
        new = first
        if kind == "norm" and self._mark(first).hidden:
            new = self._store(Site(path, "norm"), 0, first, in_place=False)
        elif kind == "activation":
            new = self._behind_activation(self._activated.pop(), first, in_place=False)
        if path in self._parts:
            self._marks[new] = replace(self._mark(new), part=self._parts[path])
        if new is first:
            return output
        return new if isinstance(output, Tensor) else (new, *output[1:])

    def _on_grid(
        self, path: str, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments, of which the stream that it reads is on a grid."""
        if arguments and isinstance(arguments[0], Tensor):
            return (self._operand(arguments[0], path), *arguments[1:]), named
        if isinstance(hidden := named.get("hidden_states"), Tensor):
            return arguments, {**named, "hidden_states": self._operand(hidden, path)}
        return arguments, named

    # What operations do.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet.__name__.startswith(_FUSED):
            raise PlanError(
                f"{self._inside[-1] if self._inside else 'The model'} computes attention in one kernel, in which "
                "nothing can be quantized. Measure a model whose attention has an eager implementation."
            )
        # Which entries are taken is no matter of grids.
        marks = [self._mark(x) for x in _tensors(args) if x.is_floating_point()]
        if not any(mark.hidden or mark.weight for mark in marks):
            return func(*args, **kwargs)
        if self._quiet:
            return self._follow(func(*args, **kwargs), marks)
        if packet in _PRODUCTS:
            return self._product(func, args, kwargs, *_PRODUCTS[packet])
        result = func(*args, **kwargs)
        if packet in _MOVES or (packet in _SCALES and _by_one_number(args)):
            source = next(x for x in _tensors(args) if x.is_floating_point())
            return self._moved(result, source, marks, scaled=packet in _SCALES)
        if packet is aten.embedding:
            return self._embedded(result, self._mark(args[0]))
        if packet in _CLIPS and len(marks) == 1 and marks[0].probabilities:
            # Not those, but what is made of them, is what a product reads.
            return self._follow(result, marks, _Mark(probabilities=marks[0].probabilities))
        if packet in (aten.add, aten.add_):
            return self._added(result, args, packet is aten.add_)
        if packet is aten._softmax or packet is aten._safe_softmax:
            return self._softmax(result)
        if packet in _ACTIVATIONS:
            return self._behind_activation(marks[0].pending, result, packet.__name__.endswith("_"))
        kept = _Mark()
        if packet in _SCALES:
            # A layer's scale: a factor for each unit.
            kept = next((_Mark(part=mark.part, embedding=mark.embedding) for mark in marks if mark.hidden), kept)
        return self._follow(result, marks, kept)

    def _product(self, func: Any, args: Any, kwargs: Any, left: int, right: int) -> Any:
        given = list(args)
        if not all(given[place].numel() for place in (left, right)):
            return func(*given, **kwargs)  # asked for what is computed on the way alone
        marks = {place: self._mark(given[place]) for place in (left, right)}
        weight = next((place for place in (right, left) if marks[place].weight and not marks[place].hidden), None)
        if weight is not None:
            other, mark = left if weight == right else right, marks[weight]
            full = self._weights.is_full(mark.weight) or any(path in self._weights.heads for path in self._inside)
            if not marks[other].hidden or full:
                return self._follow(func(*given, **kwargs), list(marks.values()))
            if not mark.plain:
                given[weight] = self._weights.rounded_as_computed(given[weight])
            name = mark.weight.partition(".parametrizations.")[0].removesuffix(".weight")
            given[other] = self._operand(given[other], name)
            return self._store(Site(name, "linear"), 0, func(*given, **kwargs), in_place=False)
        if not all(mark.hidden for mark in marks.values()) or self._inside[1:] == []:
            # Products that a whole model makes of its embeddings are its output.
            return self._follow(func(*given, **kwargs), list(marks.values()))
        softmaxes = [mark.probabilities for mark in marks.values() if mark.probabilities]
        if self._tracing:
            self._structure.read.update(softmaxes)
        family: Family = "context" if softmaxes else "scores"
        name = self._numbered(family)
        for place, side in ((left, "left"), (right, "right")):
            if (key := marks[place].probabilities) and not marks[place].grid:
                clipped = Site(self._pass_on(key)[0], "probabilities")
                given[place] = self._store(clipped, 1, given[place], in_place=False)
            given[place] = self._operand(given[place], f"{name}.{side}")
        return self._store(Site(name, family), 0, func(*given, **kwargs), in_place=False)

    def _operand(self, x: Tensor, name: str) -> Tensor:
        """What a product or a layer reads, on a grid."""
        mark = self._mark(x)
        if mark.grid or not mark.hidden:
            return x
        new = self._change(Site(f"{name}.input", "input"), x)
        # Who else reads the same tensor reads it as it was.
        new = x.detach() if new is x else new
        self._marks[new] = replace(mark, grid=True, family="input")
        return new

    def _embedded(self, result: Tensor, weight: _Mark) -> Any:
        name = weight.weight.removesuffix(".weight")
        if not weight.embedding:
            self._marks[result] = replace(weight, plain=False)
            return result
        return self._store(Site(name, "embedding"), 0, result, in_place=False, embedding=True)

    def _added(self, result: Tensor, args: Any, in_place: bool) -> Any:
        one, other = (self._mark(x) if isinstance(x, Tensor) else _Mark() for x in args[:2])
        both = [one, other]
        for mark, bias in ((one, other), (other, one)):
            if mark.pending is not None and mark.family == "linear" and bias.weight and not bias.embedding:
                name, stage = self._pass_on(mark.pending)
                return self._store(Site(name, "linear"), stage + 1, result, in_place)
        if one.part and other.part:  # parallel parts, whose sum is added to the stream
            return self._follow(result, both, _Mark(part=other.part))
        if (part := one.part or other.part) and one.hidden and other.hidden:
            return self._store(Site(f"{part}.sum", "sum"), 0, result, in_place)
        if one.embedding or other.embedding:
            stage = 0
            for mark in both:
                if mark.embedding and mark.pending is not None:
                    stage = max(stage, self._pass_on(mark.pending)[1] + 1)
            name = ".".join(filter(None, (self._inside[-1], "embeddings")))
            return self._store(Site(name, "embedding"), stage, result, in_place, embedding=True)
        if all(mark.hidden and mark.grid and mark.family in _SUMMANDS for mark in both):
            # A layer of which no parts are known, or the sum that enters the first one.
            return self._store(
                Site(self._numbered("sum"), "sum" if self._in_layers else "embedding"), 0, result, in_place
            )
        return self._follow(result, both)

    def _softmax(self, result: Tensor) -> Any:
        key = (self._numbered("probabilities"), 0)
        if self._tracing or key in self._structure.read:
            result = self._store(Site(key[0], "probabilities"), 0, result, in_place=False)
        else:
            self._marks[result] = _Mark(hidden=True)
        self._marks[result] = replace(self._mark(result), probabilities=key)
        return result

    def _behind_activation(self, pending: tuple[str, int] | None, result: Tensor, in_place: bool) -> Tensor:
        if pending is None:
            self._marks[result] = _Mark(hidden=True)
            return result
        name, stage = self._pass_on(pending)
        return self._store(Site(name, "linear"), stage + 1, result, in_place)

    def _pass_on(self, key: tuple[str, int]) -> tuple[str, int]:
        if self._tracing:
            self._structure.passed_on.add(key)
        return key

    def _store(self, site: Site, stage: int, x: Tensor, in_place: bool, embedding: bool = False) -> Tensor:
        """`x` as it is stored, which is a stage of a site."""
        key = (site.name, stage)
        if not self._tracing and key not in self._structure.passed_on:
            new = self._change(site, x)
            # Who has written in place may not look at what comes back.
            x = x.copy_(new) if in_place and new is not x else new
        pending = key if site.family in ("linear", "embedding") else None
        self._marks[x] = _Mark(hidden=True, grid=True, pending=pending, embedding=embedding, family=site.family)
        return x

    def _moved(self, result: Any, source: Tensor, marks: Sequence[_Mark], scaled: bool) -> Any:
        marks = [mark for mark in marks if mark.hidden or mark.weight]
        mark = marks[0]
        if len(marks) > 1 and not scaled:
            hidden = any(one.hidden for one in marks)
            mark = _Mark(
                weight="" if hidden else mark.weight,
                plain=all(one.plain for one in marks),
                hidden=hidden,
                grid=all(one.grid for one in marks),
                family=mark.family,
                embedding=any(one.embedding for one in marks),
                probabilities=next((one.probabilities for one in marks if one.probabilities), None),
            )
        elif scaled:
            mark = replace(mark, plain=False if mark.weight else mark.plain)
        for new in _tensors((result,)):
            # A convolution's margin may have been cut off, but half of a matrix (a gate) is another thing.
            most = isinstance(result, Tensor) and 2 * new.numel() > source.numel()
            self._marks[new] = mark if most else replace(mark, pending=None)
        return result

    def _follow(self, result: Any, marks: Sequence[_Mark], kept: _Mark = _Mark()) -> Any:
        """What came of marked tensors otherwise."""
        hidden = any(mark.hidden for mark in marks)
        weight = "" if hidden else next(mark.weight for mark in marks if mark.weight)
        for new in _tensors((result,)):
            self._marks[new] = replace(kept, hidden=hidden, weight=weight, plain=False)
            base = new._base
            if base is not None and hidden and not self._mark(base).hidden:
                self._marks[base] = _Mark(hidden=True)
        return result

    def _numbered(self, family: str) -> str:
        """The name of what arises in the module that is run, by a number from the second of its kind on."""
        self._counted[-1][family] += 1
        count = self._counted[-1][family]
        return f"{self._inside[-1]}.{family}" + ("" if count == 1 else f".{count}")

    def _mark(self, x: Any) -> _Mark:
        return self._marks.get(x, _NOTHING) if isinstance(x, Tensor) else _NOTHING


_NOTHING = _Mark()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _by_one_number(args: Any) -> bool:
    """Whether all but one of the factors are single numbers."""
    return sum(isinstance(x, Tensor) and x.numel() > 1 for x in args) <= 1 and len(args) <= 2


def _kind_of(module: nn.Module) -> Literal["norm", "activation", ""]:
    if next(module.children(), None) is not None:
        return ""
    cls = type(module)
    if "Norm" in cls.__name__:
        return "norm"
    in_place = cls.__module__ in ("transformers.activations", "torch.nn.modules.activation")
    if (in_place and "Softmax" not in cls.__name__) or "gelu" in cls.__name__.lower():
        return "activation"
    return ""
