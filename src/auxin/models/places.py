"""What a place in a model must return, found by running the model on shapes; any architecture, no table of names."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, LinearAttentionCacheLayerMixin

from auxin.accounting.inputs import example_inputs
from auxin.accounting.shapes import shape_only_copy
from auxin.errors import PlanError
from auxin.nn.calls import forward_arguments
from auxin.nn.stand_ins import HIDDEN, NOTHING, Identity, Zeros
from auxin.words.paths import encloses

BATCH, LENGTH, DECODER_LENGTH = 3, 5, 4
"""Of the inputs; the batch is longer than any tuple that is taken apart by mistake."""


@contextmanager
def running_on_shapes(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, dict[str, Tensor]]]:
    """Within the context, a copy of `model` that has shapes and no data, in evaluation mode, and inputs for it."""
    with shape_only_copy(model) as fake:
        copy = cast(PreTrainedModel, fake).eval()
        copy.set_experts_implementation("batched_mm")  # which runs on shapes of any type
        yield copy, example_inputs(copy, BATCH, LENGTH, decoder_length=DECODER_LENGTH)


def what_is_returned(model: PreTrainedModel, paths: Iterable[str]) -> dict[str, list[str]]:
    """What stand-ins (`auxin.nn.stand_ins`) must return in the places at `paths`, so that the model runs without the
    modules that are there: their setting `returns`.

    Args:
        model: the model; only shapes are looked at, so it may be on the meta device.
        paths: of modules that take hidden states first and return such, as a bare tensor or first in a tuple.

    Raises:
        PlanError: a module does not run at all, or no stand-in can do its work: it gives hidden states of another
            shape, or makes something that modules need which stay (T5's first attention makes the position bias of all
            layers).
    """
    wanted, modules = list(dict.fromkeys(paths)), dict(model.named_modules(remove_duplicate=False))
    if not wanted:
        return {}
    if strange := next((path for path in wanted if path not in modules), None):
        raise PlanError(f"{type(model).__name__} has no module at {strange!r}.")
    with running_on_shapes(model) as (copy, inputs):
        for parameter in copy.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # to see what comes from parameters
        with _Watch(copy, wanted) as watch:
            whole = _run(copy, inputs, f"{type(model).__name__} does not run on shapes")
        found = {path: watch.returns(path) for path in wanted}
        for path, returns in found.items():
            if not _is_inside(path, set(wanted) - {path}):
                copy.set_submodule(path, Zeros.replacing(copy.get_submodule(path), returns))
        without = f"{type(model).__name__} does not run without {', '.join(wanted[:3])}{', ...' if wanted[3:] else ''}"
        if _state(_run(copy, inputs, without)) != _state(whole):
            raise PlanError(f"{without}: its cache does not come out as before. Leave what fills it in its place.")
    return found


def refuse_broken(model: PreTrainedModel, gone: Sequence[tuple[str, str, Sequence[str]]]) -> None:
    """Raise PlanError when a model does not run with stand-ins in some places.

    Args:
        model: the model; only shapes are looked at.
        gone: of each place its path, "zeros" or "identity", and what must be returned there.
    """
    with running_on_shapes(model) as (copy, inputs):
        for path, leaves, returns in gone:
            stand_in = Zeros if leaves == "zeros" else Identity
            copy.set_submodule(path, stand_in.replacing(copy.get_submodule(path), returns))
        _run(copy, inputs, f"{gone[0][0]} can't be taken out: the {type(model).__name__} does not run without it")


@dataclass
class _Made:
    """A tensor that a module returned behind its hidden states and that was no argument of it."""

    tensor: Tensor
    path: str
    """The module's."""
    place: int
    """Where in the tuple."""
    unasked: frozenset[str]
    """The module's arguments that were None."""
    given_to: dict[str, set[str]] = field(default_factory=dict)
    """Modules that got it, and as which argument."""
    used_in: set[str] = field(default_factory=set)
    """Modules in which something was computed from it."""


class _Watch(TorchFunctionMode):
    """Sees what the modules at `paths` return while the model runs, and who computes with it."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        super().__init__()
        self._modules = dict(model.named_modules())
        self._names = {module: path for path, module in self._modules.items()}
        """A module may have several paths; the first is its name here."""
        self._wanted = {self._names[model.get_submodule(path)] for path in paths}
        self._model = model
        self._results: dict[str, list[str]] = {}
        self._made: dict[int, _Made] = {}  # by their tensor's id
        self._running: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Watch":
        for path, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leaving(path), with_kwargs=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._made and getattr(func, "__name__", "") != "__get__":  # shapes and types are not what it holds
            for leaf in tree_leaves((args, kwargs)):
                if (made := self._made.get(id(leaf))) is not None:
                    made.used_in.add(self._running[-1])
        return func(*args, **(kwargs or {}))

    def returns(self, path: str) -> list[str]:
        """What was found for one of the paths; PlanError when something else needs what is made there."""
        name = self._names[self._model.get_submodule(path)]
        if name not in self._results:
            raise PlanError(f"{path} does not run when the model does, so that what it returns is not known.")
        for made in self._made.values():
            needed = [user for user in sorted(made.used_in) if not self._can_do_without(user, made)]
            if made.path == name and needed:
                raise PlanError(
                    f"{path} can't be removed: {needed[0] or 'the model'} needs what it returns behind its hidden "
                    f"states (place {made.place}, shape {list(made.tensor.shape)}). Leave it in its place, or remove "
                    "what needs it, too."
                )
        return self._results[name]

    def _can_do_without(self, user: str, made: _Made) -> bool:
        """Whether the user is removed, too, or makes such a constant itself, like another module of its class did: one
        that no parameter and no activation has a share in, where that argument was None."""
        if _is_inside(user, self._wanted):
            return True
        names = made.given_to.get(user, set())
        alike = type(self._modules[user]) is type(self._modules[made.path])
        return alike and not made.tensor.requires_grad and bool(names) and names <= made.unasked

    def _entering(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(path)
            if self._made:
                for name, value in _named(module, args, kwargs).items():
                    if (made := self._made.get(id(value))) is not None:
                        made.given_to.setdefault(path, set()).add(name)

        return hook

    def _leaving(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._running.pop()
            if path not in self._wanted:
                return
            found = self._found(path, module, args, kwargs, output)
            if self._results.setdefault(path, found) != found:
                raise PlanError(
                    f"{path} runs several times and returns {self._results[path]} and {found}. A stand-in returns the "
                    "same each time; leave the module in its place."
                )

        return hook

    def _found(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[str]:
        given = _named(module, args, kwargs)
        hidden = (
            args[0] if args else next((given[name] for name in forward_arguments(module)[:1] if name in given), None)
        )
        first, *others = output if type(output) is tuple and output else (output,)
        if not isinstance(hidden, Tensor) or not isinstance(first, Tensor) or hidden.shape != first.shape:
            raise PlanError(
                f"{path} ({type(module).__name__}) can't be removed: it makes {_in_words(first)} of "
                f"{_in_words(hidden)}, and a stand-in gives hidden states of the shape that it gets."
            )
        if type(output) is not tuple:
            return []
        returns = [HIDDEN]
        unasked = frozenset(name for name in forward_arguments(module) if given.get(name) is None)
        for place, other in enumerate(others, start=1):
            same = (name for name, value in given.items() if value is other and isinstance(value, Tensor | Cache))
            name = next(same, NOTHING)
            returns.append(name)
            for leaf in tree_leaves(other) if name == NOTHING else ():
                if isinstance(leaf, Tensor):
                    self._made[id(leaf)] = _Made(leaf, path, place, unasked)
        return returns


def _is_inside(path: str, others: Iterable[str]) -> bool:
    """Whether the module at `path` is one of the others, or lies in one."""
    return any(encloses(other, path) for other in others)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(forward_arguments(module), args, strict=False)) | kwargs


def _run(model: PreTrainedModel, inputs: dict[str, Tensor], failure: str) -> Any:
    # What torch would print of an operation that fails on shapes stands in our message.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    loud, log.disabled = log.disabled, True
    try:
        return model(**inputs)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(f"{failure}: {error}") from error
    finally:
        log.disabled = loud


def _state(result: Any) -> list[Any]:
    """What the layers of the cache have seen, as far as a result has one."""
    cache = result.get("past_key_values")
    if isinstance(cache, EncoderDecoderCache):
        parts: list[Cache] = [cache.self_attention_cache, cache.cross_attention_cache]
    else:
        parts = [cache] if isinstance(cache, Cache) else []
    return [
        (
            layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else None,
            dict(layer.has_previous_state) if isinstance(layer, LinearAttentionCacheLayerMixin) else None,
        )
        for part in parts
        for layer in part.layers
    ]


def _in_words(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
