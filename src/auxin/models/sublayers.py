"""The parts of the layers that add to the residual stream, sublayers: attentions and feed-forward parts.

A sublayer is known by what it adds. That may be the result of a whole module (Llama's `mlp`), of the last matrix alone
(BERT, whose modules hold the sum and the norm behind it, too) or of the norm between the two (OLMo 2).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.places import running_on_shapes
from auxin.nn.stand_ins import StandIn
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.paths import encloses, shared_parts

Kind = Literal["attention", "cross-attention", "feed-forward"]


@dataclass(frozen=True)
class Sublayer:
    """One part of one layer."""

    path: str
    """The outermost module whose result is what the sublayer adds, by which it is called: "model.layers.3.mlp"."""
    output: str
    """The innermost one: "model.layers.3.mlp.down_proj"."""
    layer: str
    """The layer's path: "model.layers.3"."""
    number: int
    """The layer's number in its stack, from 0."""
    stack: LayerStack
    """The stack of layers."""
    kind: Kind


def sublayers(model: PreTrainedModel) -> list[Sublayer]:
    """All sublayers of `model`, stack by stack, layer by layer, in the order in which a layer runs them.

    Those that are gone, since a stand-in has their place, are left out. Only shapes are looked at.

    Raises:
        PlanError: the architecture is not known.
    """
    found = list(_outputs(model, anatomy(model)))
    paths = _outermost(model, [one.output for one in found])
    return [Sublayer(paths[one.output], *one.rest) for one in found]


def kinds(model: PreTrainedModel, stack: LayerStack, names: tuple[str, ...]) -> list[Kind]:
    """What each of the parts `names` of a layer is: an attention reads heads. The second one of a layer reads another
    stack."""
    # The widths of towers, and with them what their parameters read, are told one tower at a time.
    body = anatomy(model, part=stack.tower or None)
    found: list[Kind] = []
    for name in names:
        of_part = [role for role in body.roles if role.pattern.startswith(f"{stack.path}.*.{name}.")]
        if any(role.along("query", "reads") for role in of_part):
            found.append("cross-attention" if "attention" in found else "attention")
        else:
            found.append("feed-forward")
    return found


def nearest_output(path: str, outputs: Sequence[str]) -> str | None:
    """Of the `outputs` of a layer's parts the one of the part in which the module at `path` lies, the one with which it
    shares the most parts of its path, of several the first; None where there are none.

    Args:
        path: relative to the layer: "attention.self".
        outputs: so, too, in the order in which they are run: "attention.output.dense", "output.dense".
    """
    names = path.split(".")
    return max(outputs, key=lambda output: shared_parts(names, output.split(".")), default=None)


def refuse_shared(model: PreTrainedModel, outputs: Iterable[str]) -> None:
    """PlanError when one of the modules at `outputs`, those of sublayers, is the very same one at another of a layer's
    places, so that it can't be taken out of one, or changed at one, alone."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    for output in outputs:
        if len(same := names[model.get_submodule(output)]) > 1:
            raise PlanError(
                f"{' and '.join(same)} are one module, which can't be changed at one place alone. Give each layer "
                "its own (copy.deepcopy)."
            )


def about_none(model: PreTrainedModel, kinds: str = "sublayers") -> str:
    """What is said where `model` has none of `kinds` that could be removed, and what to do."""
    return (
        f"No {kinds} of this {type(model).__name__} are known that could be removed alone. Take widths instead, for "
        "example by taylor."
    )


def refuse_run_again(model: PreTrainedModel) -> None:
    """PlanError when layers of `model` share their parameters and are run several times (ALBERT), so that neither one
    of them nor a part of one can be taken out alone, or be told from the others by what it does."""
    if shared := next((stack for stack in anatomy(model).stacks if stack.layers_shared), None):
        raise PlanError(
            f"The layers of {shared.path} share their parameters and are run several times, so that no layer, and no "
            "part of one, can go alone. Prune the widths that all of them share, for example by taylor, or factorise "
            "their matrices by greenformers."
        )


def add_nothing(module: nn.Module, arguments: Any, result: Any) -> Any:
    """A forward hook that masks a sublayer by its `output`: what it gives, or gives first, becomes zeros."""
    # Not a product with zero: what is not finite must go, too.
    return (torch.zeros_like(result[0]), *result[1:]) if isinstance(result, tuple) else torch.zeros_like(result)


@dataclass(frozen=True)
class _Output:
    output: str
    rest: tuple[str, str, int, LayerStack, Kind]


def _outputs(model: PreTrainedModel, body: Anatomy) -> Iterator[_Output]:
    for stack in body.stacks:
        layers = model.get_submodule(stack.path)
        names = stack.parts({name for layer in layers.children() for name, _ in layer.named_parameters()})
        added = stack.output_norms if stack.norm_position == "after_output" else names
        of_kind = kinds(model, stack, names)
        for number, layer in enumerate(layers.children()):
            have = dict(layer.named_modules(remove_duplicate=False))
            for name, output, kind in zip(names, added, of_kind, strict=True):
                if name in have and output in have and not isinstance(have[output], StandIn):
                    path = f"{stack.path}.{number}"
                    whole = f"{path}.{output}"
                    yield _Output(whole, (whole, path, number, stack, kind))


def _outermost(model: PreTrainedModel, outputs: list[str]) -> dict[str, str]:
    """By the path of each module the one of the outermost module around it that gives the very same tensor."""
    around = {
        output: [path for path, _ in model.named_modules(remove_duplicate=False) if encloses(path, output) and path]
        for output in outputs
    }
    given: dict[str, Tensor | None] = {}

    def note(path: str, module: nn.Module, arguments: Any, result: Any) -> None:
        first = result[0] if isinstance(result, tuple) and result else result
        given[path] = first if isinstance(first, Tensor) else None

    with running_on_shapes(model) as (fake, inputs):
        for path in {path for paths in around.values() for path in paths}:
            fake.get_submodule(path).register_forward_hook(partial(note, path))
        fake(**inputs)
        return {
            output: next((path for path in paths if _same(given.get(path), given.get(output))), output)
            for output, paths in around.items()
        }


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether the two are one tensor, whatever was made of it without copying."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
