"""What must be zero in a layer for it to pass hidden states on as they are, found by trying; any architecture.

A layer of each kind is filled with random numbers and run on inputs of the shapes that it gets in its model. With all
matrices zeroed that could write to the residual stream it must return what it was given; then each, in the order in
which they run, gets its numbers back, and those without which the layer is no identity any more stay zero: the last
ones on each way to the residual. Where a norm stands between such a matrix and the residual, its gain is what has to be
zero: it would make anything of a small output.
"""

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from auxin.accounting.inputs import example_inputs
from auxin.accounting.shapes import shape_only_copy
from auxin.errors import PlanError
from auxin.models.building import likeness
from auxin.models.layout import plain_skeleton
from auxin.nn.calls import forward_arguments
from auxin.words.anatomy import LayerStack

DTYPE = torch.float32
"""What layers are tried in: some keep their residual in it whatever the type of their weights. x + 0 is x in any."""
LARGEST = 2**31
"""Parameters of a layer that is still tried; it takes 8 bytes for each, its numbers and a copy of them."""


@dataclass(frozen=True)
class ZeroedOutputs:
    """What is zeroed in the layers of a stack that shall be identities."""

    stack: LayerStack
    """The stack with its outputs, norms behind them, and where its norms sit. An output may be a parameter itself."""
    gain_offset: float = 0.0
    """What the norms behind the outputs add to their stored gain."""


def zeroed_outputs(model: PreTrainedModel, stack: LayerStack, copied: Collection[int]) -> ZeroedOutputs:
    """Find the outputs of the layers of `stack`, of which no more than its path need be known.

    Args:
        model: the model or its skeleton; weights are not looked at.
        stack: one of its stacks.
        copied: the numbers of the layers of which identities shall be made.

    Raises:
        PlanError: the layers can be no identities, or can't be tried; the message says why.
    """
    plain = plain_skeleton(model)
    layers = cast(nn.ModuleList, plain.get_submodule(stack.path))
    kinds: dict[str, int] = {}
    for number in sorted(copied):
        seen = likeness(layers[number])
        outline = {key: value for key, value in seen.items() if isinstance(value, type | tuple)}
        kinds.setdefault(repr(outline), number)
    given = _given(plain, [f"{stack.path}.{number}" for number in kinds.values()])
    found = []
    for path, arguments in given.items():
        try:
            found.append(_Trial(plain, path, arguments).outputs())
        except PlanError:
            raise
        except Exception as error:  # whatever a layer raises on numbers that mean nothing
            raise PlanError(f"{path} does not run by itself, so that its outputs are not known: {error}") from error
    outputs = tuple(dict.fromkeys(name for one in found for name in one.stack.outputs))
    norms = tuple(dict.fromkeys(name for one in found for name in one.stack.output_norms))
    if norms and any(not one.stack.output_norms for one in found):
        raise PlanError(f"{stack.path}: some of its layers have norms behind their outputs and others have none")
    position = found[0].stack.norm_position
    return ZeroedOutputs(
        replace(stack, outputs=outputs, output_norms=norms, norm_position=position), found[0].gain_offset
    )


@dataclass
class _Given:
    """What a layer is called with: shapes and types in place of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    dtype: torch.dtype


def _given(model: PreTrainedModel, paths: list[str]) -> dict[str, _Given]:
    """What the layers at `paths` are called with when the model runs on example inputs."""
    found: dict[str, _Given] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(path, _Given(_shapes(args), _shapes(kwargs)))

        return hook

    def _shapes(value: Any) -> Any:
        return tree_map(
            lambda leaf: (
                _Shape(tuple(leaf.shape), leaf.dtype)
                if isinstance(leaf, Tensor)
                else None
                if isinstance(leaf, Cache)
                else leaf
            ),
            value,
        )

    failures: list[str] = []
    for part in _parts_around(model, paths[0]):
        if len(found) == len(paths):
            break
        try:
            with shape_only_copy(model) as fake:
                whole = cast(PreTrainedModel, fake).eval()
                whole.set_experts_implementation("batched_mm")  # which runs on shapes of any type
                for path in paths:
                    whole.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True)
                runs = cast(PreTrainedModel, whole.get_submodule(part))
                options = {"use_cache": False} if runs.can_generate() else {}
                runs(**example_inputs(runs, 2, 5, decoder_length=4), **options)
        except Exception as error:  # an architecture whose inputs are not known here may raise anything
            failures.append(str(error))
    if missing := [path for path in paths if path not in found]:
        why = f": {failures[0]}" if failures else ""
        raise PlanError(f"{missing[0]} does not run on example inputs, so that its outputs are not known{why}")
    return found


def _parts_around(model: PreTrainedModel, path: str) -> list[str]:
    """The paths of the models around a module, from the whole one to the innermost: an image's encoder takes inputs of
    its own."""
    parts = path.split(".")
    around = [".".join(parts[:length]) for length in range(len(parts))]
    return [name for name in around if isinstance(model.get_submodule(name), PreTrainedModel)]


@dataclass(frozen=True)
class _Unit:
    """Parameters of one module that are zeroed together."""

    names: tuple[str, ...]
    """In the layer."""
    outputs: tuple[str, ...]
    """What a stack calls them: the module, or parameters of it."""
    zeros: tuple[float, ...]
    """The values at which they contribute nothing: a norm that adds 1 to its gain is zero at -1."""


class _Trial:
    """A layer with random numbers in it."""

    def __init__(self, model: PreTrainedModel, path: str, given: _Given) -> None:
        self.path = path
        layer = copy.deepcopy(model.get_submodule(path)).eval()
        count = sum(parameter.numel() for parameter in layer.parameters())
        if count > LARGEST:
            raise PlanError(
                f"{path} has {count} parameters, too many to find its outputs by trying; its architecture's anatomy is "
                "not known"
            )
        self.draw = torch.Generator().manual_seed(0)
        for module in layer.modules():
            if (config := getattr(module, "config", None)) is not None:
                config._experts_implementation = "eager"
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    numbers = self._random(tuple(parameter.shape)) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0)
                    module._parameters[name] = nn.Parameter(numbers, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self._filled(buffer, name in module._non_persistent_buffers_set)
        self.layer = layer
        self.args = tuple(self._made("", value) for value in given.args)
        self.kwargs = {name: self._made(name, value) for name, value in given.kwargs.items()}
        self.first = forward_arguments(layer)[0]
        self.hidden = self.args[0] if self.args else self.kwargs[self.first]
        self.kept = {name: parameter.clone() for name, parameter in layer.named_parameters()}
        self.order = self._running_order()

    def outputs(self) -> ZeroedOutputs:
        """What is zeroed; PlanError when nothing makes an identity of the layer."""
        matrices, norms = self._matrices(), self._norms()
        found = self._needed(matrices)
        if found is not None and all(self._is_linear(unit, found) for unit in found):
            return ZeroedOutputs(LayerStack(self.path, "", tuple(name for unit in found for name in unit.outputs)))
        behind = self._needed([*matrices, *norms])
        if behind is None:
            raise PlanError(self._reason([*matrices, *norms]))
        last = [unit for unit in behind if unit in norms]
        if len(last) != len(behind):
            raise PlanError(
                f"{self.path}: no set of output modules is found: with {', '.join(u.names[0] for u in behind)} zeroed "
                "it is an identity, of which some have a norm behind them and others have none"
            )
        outputs = tuple(name for unit in found or () for name in unit.outputs)
        gains = tuple(name for unit in last for name in unit.outputs)
        return ZeroedOutputs(LayerStack(self.path, "", outputs, gains, "after_output"), abs(last[0].zeros[0]))

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=DTYPE)

    def _filled(self, buffer: Tensor, derived: bool) -> Tensor:
        """Numbers for a buffer: what loading fills it with, ones where that is done by a module around the layer, and
        random ones for what checkpoints hold."""
        if not buffer.is_floating_point():
            return torch.ones(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer
        if derived:
            return buffer.to(DTYPE) if not buffer.is_meta and buffer.any() else torch.ones(buffer.shape)
        return 1 + 0.3 * self._random(tuple(buffer.shape)).abs()

    def _made(self, name: str, value: Any) -> Any:
        """Numbers for what a layer gets: random ones, nothing hidden by masks, and 0 for whole numbers."""

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, _Shape):
                return leaf
            if leaf.dtype == torch.bool:
                return torch.ones(leaf.size, dtype=torch.bool)
            if not leaf.dtype.is_floating_point:
                return torch.zeros(leaf.size, dtype=leaf.dtype)
            return torch.zeros(leaf.size, dtype=DTYPE) if "mask" in name else self._random(leaf.size)

        return tree_map(made, value)

    def _result(self, hidden: Tensor) -> Tensor:
        args, kwargs = self.args, dict(self.kwargs)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs[self.first] = hidden
        with torch.no_grad():
            made = self.layer(*args, **kwargs)
        made = made[0] if isinstance(made, tuple) else made
        if not isinstance(made, Tensor) or made.shape != hidden.shape:
            raise PlanError(f"{self.path} makes no hidden states of hidden states")
        return made

    def _running_order(self) -> list[str]:
        """The paths of the modules in the layer: those whose parameters others use, and then those that run, in the
        order in which they do."""
        ran: list[str] = []
        hooks = [
            module.register_forward_hook(lambda module, args, output, path=path: ran.append(path))
            for path, module in self.layer.named_modules()
        ]
        self._result(self.hidden)
        for hook in hooks:
            hook.remove()
        return [*(path for path, _ in self.layer.named_modules() if path not in ran), *dict.fromkeys(ran)]

    def _modules(self) -> Iterable[tuple[str, str, nn.Module]]:
        """Path, prefix of the parameters' names and module, in running order."""
        for path in self.order:
            yield path, f"{path}." if path else "", self.layer.get_submodule(path)

    def _matrices(self) -> list[_Unit]:
        """The matrices that could write hidden states, with their biases."""
        width, units = self.hidden.shape[-1], []
        for path, prefix, module in self._modules():
            own = {name: value for name, value in module._parameters.items() if value is not None}
            for name, value in own.items():
                if value.dim() < 2 or width not in value.shape:
                    continue
                biases = [other for other in own if other == "bias"] if name == "weight" else []
                biases += [other for other in own if other.startswith(f"{name}_")]
                names = [name, *biases]
                whole = len(names) == len(own) and path != ""
                outputs = [path] if whole else [f"{prefix}{one}" for one in names]
                units.append(_Unit(tuple(f"{prefix}{one}" for one in names), tuple(outputs), (0.0,) * len(names)))
        return units

    def _norms(self) -> list[_Unit]:
        """The modules of vectors that make zero of anything at some value of their gain."""
        width, units = self.hidden.shape[-1], []
        for path, prefix, module in self._modules():
            own = {name: value for name, value in module._parameters.items() if value is not None}
            if not own or path == "" or any(tuple(value.shape) != (width,) for value in own.values()):
                continue
            names = tuple(f"{prefix}{name}" for name in own)
            for zero in (0.0, -1.0):
                zeros = tuple(zero if name == "weight" else 0.0 for name in own)
                self._set([_Unit(names, (path,), zeros)])
                with torch.no_grad():
                    try:
                        silent = not bool(module(self.hidden).any())
                    except (TypeError, RuntimeError):
                        silent = False
                if silent:
                    units.append(_Unit(names, (path,), zeros))
                    break
        self._set([])
        return units

    def _set(self, zeroed: Sequence[_Unit]) -> None:
        """Zero these; all else has its numbers."""
        zeros = {name: zero for unit in zeroed for name, zero in zip(unit.names, unit.zeros, strict=True)}
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                if name in zeros:
                    parameter.fill_(zeros[name])
                else:
                    parameter.copy_(self.kept[name])

    def _is_identity(self, zeroed: Sequence[_Unit]) -> bool:
        self._set(zeroed)
        return torch.equal(self._result(self.hidden), self.hidden)

    def _needed(self, units: list[_Unit]) -> list[_Unit] | None:
        """Those of `units` that must be zero for an identity; None where it is none with all of them."""
        if not units or not self._is_identity(units):
            return None
        left = list(units)
        for unit in units:
            without = [other for other in left if other is not unit]
            if self._is_identity(without):
                left = without
        return left

    def _is_linear(self, unit: _Unit, units: list[_Unit]) -> bool:
        """Whether what `unit` adds to the residual, alone, is multiplied when its parameters are."""
        self._set([other for other in units if other is not unit])
        whole = self._result(self.hidden) - self.hidden
        with torch.no_grad():
            for name in unit.names:
                self.layer.get_parameter(name).mul_(0.25)
        part = self._result(self.hidden) - self.hidden
        return torch.allclose(4 * part, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))

    def _reason(self, units: list[_Unit]) -> str:
        self._set([unit for unit in units if self.kept[unit.names[0]].dim() > 1])
        one, other = self._result(self.hidden), self._result(3 * self.hidden)
        if torch.allclose(one, other, rtol=0.05, atol=0.05):
            return (
                f"{self.path}: an identity block is impossible in this architecture, whose norms come after the "
                "residual sum: norm(x + 0) is not x, whatever the new layer's weights are. Use a method without that "
                "promise, for example stacking, or one that masks the new layers."
            )
        scaling = self._scaling_buffers(units)
        why = f", by {' and '.join(scaling)}, which no edit sets to 1" if scaling else ""
        return (
            f"{self.path}: no set of output modules is found: with every matrix zeroed that could write to the "
            f"residual stream it still changes what passes through it{why}. Use a method without that promise, for "
            "example stacking."
        )

    def _scaling_buffers(self, units: list[_Unit]) -> list[str]:
        """The buffers of checkpoints that alone keep the layer from being an identity."""
        found = []
        for _, prefix, module in self._modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                    buffer.fill_(1.0)
                    found.append(f"{prefix}{name}")
        return found if self._is_identity(units) else []
