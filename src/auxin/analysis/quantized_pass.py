"""One run of a model in which what its operations give is followed from one to the next, and changed where integer
arithmetic would hold it (`auxin.analysis.quantized_sites` says where)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from auxin.analysis.quantized_sites import (
    ACTIVATIONS,
    CLIPS,
    FUSED,
    MOVES,
    NOTHING,
    PRODUCTS,
    SCALES,
    SUMMANDS,
    Change,
    Family,
    Mark,
    Site,
    Structure,
    aten,
    by_one_number,
    kind_of,
    tensors_in,
)
from auxin.analysis.quantized_weights import Weights
from auxin.errors import PlanError


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
            self._marks[tensor] = Mark(weight=name, grid=kind != "full", embedding=kind == "embedding")
        for value in inputs.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                self._marks[value] = Mark(hidden=True)

    # What modules do.

    def enter(self, path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A module is called."""
        self._inside.append(path)
        self._counted.append(Counter())
        if self._quiet == 0 and path in self._layers:
            self._in_layers = True
            arguments, named = self._on_grid(path, arguments, named)
        kind = kind_of(module)
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
        kind = kind_of(module)
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
        if packet.__name__.startswith(FUSED):
            raise PlanError(
                f"{self._inside[-1] if self._inside else 'The model'} computes attention in one kernel, in which "
                "nothing can be quantized. Measure a model whose attention has an eager implementation."
            )
        # Which entries are taken is no matter of grids.
        marks = [self._mark(x) for x in tensors_in(args) if x.is_floating_point()]
        if not any(mark.hidden or mark.weight for mark in marks):
            return func(*args, **kwargs)
        if self._quiet:
            return self._follow(func(*args, **kwargs), marks)
        if packet in PRODUCTS:
            return self._product(func, args, kwargs, *PRODUCTS[packet])
        result = func(*args, **kwargs)
        if packet in MOVES or (packet in SCALES and by_one_number(args)):
            source = next(x for x in tensors_in(args) if x.is_floating_point())
            return self._moved(result, source, marks, scaled=packet in SCALES)
        if packet is aten.embedding:
            return self._embedded(result, self._mark(args[0]))
        if packet in CLIPS and len(marks) == 1 and marks[0].probabilities:
            # Not those, but what is made of them, is what a product reads.
            return self._follow(result, marks, Mark(probabilities=marks[0].probabilities))
        if packet in (aten.add, aten.add_):
            return self._added(result, args, packet is aten.add_)
        if packet is aten._softmax or packet is aten._safe_softmax:
            return self._softmax(result)
        if packet in ACTIVATIONS:
            return self._behind_activation(marks[0].pending, result, packet.__name__.endswith("_"))
        kept = NOTHING
        if packet in SCALES:
            # A layer's scale: a factor for each unit.
            kept = next((Mark(part=mark.part, embedding=mark.embedding) for mark in marks if mark.hidden), kept)
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

    def _embedded(self, result: Tensor, weight: Mark) -> Any:
        name = weight.weight.removesuffix(".weight")
        if not weight.embedding:
            self._marks[result] = replace(weight, plain=False)
            return result
        return self._store(Site(name, "embedding"), 0, result, in_place=False, embedding=True)

    def _added(self, result: Tensor, args: Any, in_place: bool) -> Any:
        one, other = (self._mark(x) if isinstance(x, Tensor) else Mark() for x in args[:2])
        both = [one, other]
        for mark, bias in ((one, other), (other, one)):
            if mark.pending is not None and mark.family == "linear" and bias.weight and not bias.embedding:
                name, stage = self._pass_on(mark.pending)
                return self._store(Site(name, "linear"), stage + 1, result, in_place)
        if one.part and other.part:  # parallel parts, whose sum is added to the stream
            return self._follow(result, both, Mark(part=other.part))
        if (part := one.part or other.part) and one.hidden and other.hidden:
            return self._store(Site(f"{part}.sum", "sum"), 0, result, in_place)
        if one.embedding or other.embedding:
            stage = 0
            for mark in both:
                if mark.embedding and mark.pending is not None:
                    stage = max(stage, self._pass_on(mark.pending)[1] + 1)
            name = ".".join(filter(None, (self._inside[-1], "embeddings")))
            return self._store(Site(name, "embedding"), stage, result, in_place, embedding=True)
        if all(mark.hidden and mark.grid and mark.family in SUMMANDS for mark in both):
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
            self._marks[result] = Mark(hidden=True)
        self._marks[result] = replace(self._mark(result), probabilities=key)
        return result

    def _behind_activation(self, pending: tuple[str, int] | None, result: Tensor, in_place: bool) -> Tensor:
        if pending is None:
            self._marks[result] = Mark(hidden=True)
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
        self._marks[x] = Mark(hidden=True, grid=True, pending=pending, embedding=embedding, family=site.family)
        return x

    def _moved(self, result: Any, source: Tensor, marks: Sequence[Mark], scaled: bool) -> Any:
        marks = [mark for mark in marks if mark.hidden or mark.weight]
        mark = marks[0]
        if len(marks) > 1 and not scaled:
            hidden = any(one.hidden for one in marks)
            mark = Mark(
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
        for new in tensors_in((result,)):
            # A convolution's margin may have been cut off, but half of a matrix (a gate) is another thing.
            most = isinstance(result, Tensor) and 2 * new.numel() > source.numel()
            self._marks[new] = mark if most else replace(mark, pending=None)
        return result

    def _follow(self, result: Any, marks: Sequence[Mark], kept: Mark = NOTHING) -> Any:
        """What came of marked tensors otherwise."""
        hidden = any(mark.hidden for mark in marks)
        weight = "" if hidden else next(mark.weight for mark in marks if mark.weight)
        for new in tensors_in((result,)):
            self._marks[new] = replace(kept, hidden=hidden, weight=weight, plain=False)
            base = new._base
            if base is not None and hidden and not self._mark(base).hidden:
                self._marks[base] = Mark(hidden=True)
        return result

    def _numbered(self, family: str) -> str:
        """The name of what arises in the module that is run, by a number from the second of its kind on."""
        self._counted[-1][family] += 1
        count = self._counted[-1][family]
        return f"{self._inside[-1]}.{family}" + ("" if count == 1 else f".{count}")

    def _mark(self, x: Any) -> Mark:
        return self._marks.get(x, NOTHING) if isinstance(x, Tensor) else NOTHING
