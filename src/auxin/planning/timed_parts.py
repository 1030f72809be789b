"""Parts of a model, to be timed by themselves: its layers, what is around them, and the whole.

A layer is called with what the model calls it with. So that no more than one layer has to have weights, that is seen by
running a **frame**: the model around its layers, which give at once what they would give in form. What they give in
form is found on shapes. All weights have no meaning.

A layer is timed in a row with copies of itself, as many as the model has of it or fit into `ROW_BYTES`: as in the model
a weight is not in the processor's cache any more, where all don't fit, when it is its turn again.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from auxin.accounting.inputs import IDS, example_inputs, main_input, text_positions, without_cache
from auxin.accounting.latency import Conditions, Run
from auxin.accounting.shapes import shape_only_copy, without_data
from auxin.errors import AuxinError, PlanError
from auxin.models.layers import layer_paths
from auxin.models.weights_of_no_meaning import Memory
from auxin.words.paths import encloses

ROW_BYTES = 256 * 2**20
"""Weights and cache of the copies of a layer that are run in a row: more than the caches of processors hold."""
LONGEST_ROW = 8
INSTEAD = "Give the target in parameters or flops."
_NUMBERS = re.compile(r"(layer|block)?_?(idx|id|index|number)|layer|cache_layers|training")
"""Attributes that say which layer a module belongs to, which changes nothing about its time; and one that is the same
for all that is timed."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
Given = TypeVar("Given", Call, Cache)


class Part:
    """A part of a model.

    Args:
        signature: parts of the same one take as long.
        size: of its weights, in bytes.
        run: (memory for its weights) -> what is to be timed.
    """

    def __init__(self, signature: str, size: int, run: Callable[[Memory], Run]) -> None:
        self.signature, self.bytes, self.run = signature, size, run


class TimedParts:
    """The parts of one model under some conditions.

    Args:
        model: a skeleton; it is not changed.
        conditions: under which it is called.

    Raises:
        PlanError: no layers are found in it, or it can't be called so.
    """

    def __init__(self, model: PreTrainedModel, conditions: Conditions) -> None:
        dtype = getattr(torch, conditions.dtype)
        self.model = model if model.dtype == dtype else nn.Module.to(copy.deepcopy(model), dtype)
        self.conditions = conditions
        self.layers = layer_paths(model)
        """The paths of the layers."""
        self._device = torch.device(conditions.device)
        self._check()

    @cached_property
    def frame(self) -> Part:
        """What is around the layers: embeddings, head, masks, and whatever else is done once."""
        inner = {id(p) for path in self.layers for p in self.model.get_submodule(path).parameters()}
        outside = [parameter for parameter in self.model.parameters() if id(parameter) not in inner]
        return Part(_signature(self.model, self.model, self.layers), _bytes(outside), self._run_frame)

    @cached_property
    def whole(self) -> Part:
        """All of it."""
        return Part(_signature(self.model, self.model), _bytes(self.model.parameters()), self._run_whole)

    def layer(self, path: str) -> Part:
        """One of the layers."""
        module = self.model.get_submodule(path)
        return Part(
            _signature(self.model, module), _bytes(module.parameters()), lambda memory: self._run_layer(path, memory)
        )

    # What is run ------------------------------------------------------------------------------------------------------

    def _run_frame(self, memory: Memory) -> Run:
        frame = self._frame({})
        memory.fill([frame])
        return self._tried(Run(self._prepared([(frame, ((), self._inputs(shared=True)))])), "around its layers")

    def _run_whole(self, memory: Memory) -> Run:
        model = copy.deepcopy(self.model).eval()
        memory.fill([model])
        return self._tried(Run(self._prepared([(model, ((), self._inputs(shared=False)))])), "as a whole")

    def _run_layer(self, path: str, memory: Memory) -> Run:
        module, call = self.model.get_submodule(path), self._call(path, memory)
        if call is None:
            return Run(lambda: lambda: None)  # the model does not run it on such inputs, as a tower that sees no image
        stack = path.rpartition(".")[0]
        kept = {id(tensor) for tensor in _cached_tensors(call)}
        one = _bytes(module.parameters()) + _bytes(_cached_tensors(call))
        siblings = sum(other.rpartition(".")[0] == stack for other in self.layers)
        count = max(1, min(siblings, LONGEST_ROW, ROW_BYTES // max(one, 1)))
        row = [copy.deepcopy(module).eval() for _ in range(count)]
        memory.fill(row)
        # What a layer keeps of earlier tokens is its own, like its weights.
        calls = [_with_tensors(call, lambda t: t.clone() if id(t) in kept else t) for _ in row]
        return self._tried(Run(self._prepared(list(zip(row, calls, strict=True))), count), f"{path} of it")

    def _prepared(self, calls: list[tuple[nn.Module, Call]]) -> Callable[[], Callable[[], object]]:
        """What makes ready to call each module once, with caches as they were."""
        keep = any(True for _, call in calls for _ in _cached_tensors(call))

        def prepare() -> Callable[[], object]:
            ready = [(module, _with_tensors(call, lambda t: t) if keep else call) for module, call in calls]

            def timed() -> None:
                with torch.inference_mode():
                    for module, (args, kwargs) in ready:
                        module(*args, **kwargs)

            return timed

        return prepare

    def _tried(self, run: Run, what: str) -> Run:
        try:
            run.prepare()()
        except Exception as error:
            raise self._refusal(f"{what} does not run by itself", error) from error
        return run

    # The frame --------------------------------------------------------------------------------------------------------

    def _call(self, path: str, memory: Memory) -> Call | None:
        """What the model calls a layer with."""
        seen: dict[str, Call] = {}
        frame = self._frame(seen, path)
        memory.fill([frame])
        try:
            with torch.inference_mode():
                frame(**self._inputs(shared=True))
        except _Seen:
            pass
        except Exception as error:
            raise self._refusal("does not run", error) from error
        return seen.get(path)

    def _frame(self, seen: dict[str, Call], wanted: str | None = None) -> nn.Module:
        """The model with layers that give at once something of the form of what they would give.

        Args:
            seen: gets what the layer `wanted` was called with, whereupon `_Seen` is raised.
            wanted: a layer's path.
        """
        frame = copy.deepcopy(self.model).eval()
        for path in self.layers:
            layer = frame.get_submodule(path)
            # What it says of itself stays: models ask their layers for the kind of their attention.
            for own in (layer._modules, layer._parameters, layer._buffers):
                own.clear()
            layer.forward = self._stand_in(path, seen, path == wanted)
        return frame

    def _stand_in(self, path: str, seen: dict[str, Call], wanted: bool) -> Callable[..., Any]:
        result = tree_map(
            lambda value: self._real(value, self._drawn) if isinstance(value, _Form) else value,
            self._on_shapes[0].get(path),
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            if wanted:
                seen[path] = args, kwargs
                raise _Seen
            return result

        return forward

    def _real(self, form: "_Form", drawn: dict[Any, Tensor], *place: Any) -> Tensor:
        """Random numbers in some form: those that were drawn for that form and place before."""
        key = (form.shape, form.dtype, *place)
        if key not in drawn:
            zeros = torch.zeros(form.shape, dtype=form.dtype, device=self._device)
            drawn[key] = zeros.normal_() if form.dtype.is_floating_point else zeros
        return drawn[key]

    @cached_property
    def _drawn(self) -> dict[Any, Tensor]:
        return {}

    # On shapes --------------------------------------------------------------------------------------------------------

    @cached_property
    def _on_shapes(self) -> tuple[dict[str, Any], Cache | None]:
        """What the layers give in form, and the cache after the tokens that are there before decoding."""
        results: dict[str, Any] = {}

        def note(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, result: Any) -> None:
                results[path] = tree_map(lambda value: _Form(value) if isinstance(value, Tensor) else value, result)

            return hook

        plain, before = self._plain_inputs, None
        try:
            with shape_only_copy(self.model) as fake, torch.no_grad():
                assert isinstance(fake, PreTrainedModel)
                fake.eval().set_experts_implementation("batched_mm")  # which runs on shapes of any type
                inputs = without_data(plain)
                if self.conditions.phase == "decoding":
                    before = fake(**inputs, use_cache=True).past_key_values
                    if not isinstance(before, Cache):
                        raise self._refusal("keeps no cache of transformers for decoding")
                    inputs = self._next_token(_with_tensors(before, torch.empty_like), torch.device("cpu"))
                for path in self.layers:
                    fake.get_submodule(path).register_forward_hook(note(path))
                fake(**inputs)
        except AuxinError:
            raise
        except Exception as error:
            raise self._refusal("does not run on shapes", error) from error
        return results, before

    @cached_property
    def _plain_inputs(self) -> dict[str, Any]:
        """Inputs of whole sequences."""
        at = self.conditions
        inputs = example_inputs(self.model, at.batch_size, at.sequence_length, seed=0)
        return inputs if at.phase == "decoding" else {**inputs, **without_cache(self.model)}

    def _inputs(self, shared: bool) -> dict[str, Any]:
        """The model's inputs, on the device.

        Args:
            shared: whether all layers of a cache have the same memory, since no more than one is run.
        """
        if self.conditions.phase == "forward":
            return {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in self._plain_inputs.items()}
        cache = self._on_shapes[1]
        assert cache is not None
        drawn: dict[Any, Tensor] = {}
        memo: dict[int, Any] = {}
        for number, layer in enumerate(cache.layers):
            for place, tensor in enumerate(_tensors(layer)):
                memo[id(tensor)] = self._real(_Form(tensor), drawn, place, None if shared else number)
        return self._next_token(copy.deepcopy(cache, memo), self._device)

    def _next_token(self, cache: Cache, device: torch.device) -> dict[str, Any]:
        ids = torch.zeros(self.conditions.batch_size, 1, dtype=torch.long, device=device)
        return {IDS: ids, "past_key_values": cache, "use_cache": True}

    # Refusals ---------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        model, at = self.model, self.conditions
        decoding = at.phase == "decoding"
        if decoding and (not model.can_generate() or model.config.is_encoder_decoder or main_input(model) != IDS):
            raise PlanError(
                f"target.phase = decoding: a {type(model).__name__} is no decoder of text alone. Give phase: forward."
            )
        most = text_positions(model)
        if most is not None and at.sequence_length + decoding > most:
            raise PlanError(
                f"target.sequence_length = {at.sequence_length}: the model has positions for {most} tokens"
                f"{', the new one among them' * decoding}. Give at most {most - decoding}."
            )

    def _refusal(self, what: str, error: Exception | None = None) -> PlanError:
        why = f": {type(error).__name__}: {error}" if error is not None else ""
        return PlanError(f"Latency can't be measured: the {type(self.model).__name__} {what}{why}. {INSTEAD}")


class _Seen(BaseException):
    """What was looked for is there; nothing in a model catches it."""


class _Form:
    """Shape and type of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


def _signature(model: PreTrainedModel, module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """What the time of a part of `model` depends on: its modules, the shapes of its tensors, and the whole numbers and
    words that its modules hold, those that number layers left out.

    Args:
        model: the model.
        module: the part.
        without: paths of modules in it that don't count.
    """
    facts: list[Any] = [type(model).__name__, str(model.config._attn_implementation)]
    for path, inner in module.named_modules():
        if any(encloses(other, path) for other in without):
            continue
        own = {
            name: value
            for name, value in vars(inner).items()
            if not name.startswith("_") and not _NUMBERS.fullmatch(name) and _is_plain(value)
        }
        shapes = {name: [*p.shape, str(p.dtype)] for name, p in inner._parameters.items() if p is not None}
        facts.append([path, type(inner).__name__, sorted(own.items()), sorted(shapes.items())])
    return f"{type(module).__name__} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | str) or (isinstance(value, tuple) and all(isinstance(one, int) for one in value))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a cache, and in what else is given to a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Cache | CacheLayerMixin | LinearAttentionCacheLayerMixin):
        yield from _tensors(vars(value))
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _cached_tensors(call: Call) -> list[Tensor]:
    return [tensor for leaf in tree_leaves(call) if isinstance(leaf, Cache) for tensor in _tensors(leaf)]


def _with_tensors(given: Given, value: Callable[[Tensor], Tensor]) -> Given:
    """A copy of a cache, or of a call with the caches in it, whose tensors are what `value` makes of them."""
    return copy.deepcopy(given, {id(tensor): value(tensor) for tensor in _tensors(given)})
