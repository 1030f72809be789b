"""Which linear layers of a model a method changes: those that a user names, or all inside the stacks of layers."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel

from auxin.edits.plan import collapse
from auxin.errors import PlanError
from auxin.nn.linear import LAYERS, linear_class
from auxin.words.paths import path_pattern


def linear_layers(
    model: PreTrainedModel,
    patterns: Sequence[str],
    done: str,
    also: tuple[type[nn.Module], ...] = (),
    none: str = "",
) -> dict[str, nn.Module]:
    """The layers by their paths; weights are not looked at.

    Args:
        model: any transformer.
        patterns: dotted paths or ends of paths; `*` stands for any one part. Empty: all inside the stacks of
            layers.
        done: what is done with them, for messages: "grafted".
        also: further classes whose modules count as linear layers, too.
        none: what to do with a model that has none, in a sentence.

    Raises:
        PlanError: there are none, adapters are in the way, or one is the head.
    """
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise PlanError(
            f"The model carries PEFT adapters, which stand where what is {done} would. Merge or remove them "
            "(merge_and_unload) first, and add adapters afterwards."
        )
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, also) or linear_class(module) is not None
    }
    stacks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    inside = {name: module for name, module in layers.items() if name.startswith(stacks)}
    if not inside:
        raise PlanError(_why_none(model, stacks, done, none))
    if not patterns:
        return inside
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        found = {name: module for name, module in layers.items() if _ends_with(name, pattern)}
        if not found:
            ends = {collapse(name).split(".*.", 1)[-1] for name in inside} | {collapse(name) for name in inside}
            near = get_close_matches(pattern, sorted(ends), n=3, cutoff=0.0)
            raise PlanError(f"targets: no linear layer is called {pattern!r}. The nearest: {', '.join(near)}.")
        chosen |= found
    for name, module in chosen.items():
        if module is model.get_output_embeddings():
            raise PlanError(
                f"targets: {name} is the output head, which transformers rebuilds when the vocabulary changes, without "
                f"what is {done}. Choose layers inside the layer stacks."
            )
    return chosen


def merged_paths(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], kind: Callable[[str], Hashable]
) -> Iterator[tuple[str, str]]:
    """One path for the same layer of all blocks where the same happens to it, else one for each, and the path of one of
    the layers that it means.

    Args:
        model: the model.
        layers: by path.
        kind: (path of a layer) -> all that decides what happens to it.
    """
    blocks: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        blocks.setdefault(collapse(name), []).append(name)
    done: set[str] = set()
    for name in layers:
        path = collapse(name)
        alike = [other for other in blocks[path] if other in layers and kind(other) == kind(name)]
        path = path if alike == blocks[path] else name
        if path not in done:
            done.add(path)
            yield path, name


def _ends_with(name: str, pattern: str) -> bool:
    """Whether the last parts of `name` are those of `pattern`."""
    return path_pattern(pattern, before=r"(?:.+\.)?").fullmatch(name) is not None


def _why_none(model: PreTrainedModel, stacks: tuple[str, ...], done: str, none: str) -> str:
    others = ((name, module) for name, module in model.named_modules() if isinstance(module, LAYERS))
    name, other = next(((name, module) for name, module in others if name.startswith(stacks)), ("", None))
    if other is not None:
        return (
            f"{name} is a {type(other).__name__}, which does not compute what nn.Linear and Conv1D do, or whose weight "
            "is read without it being called, and there are no other linear layers inside the layer stacks, so that "
            f"nothing can be {done}. Dequantize the model first if that is why."
        )
    what = f"{type(model).__name__} has no nn.Linear or Conv1D inside its layer stacks"
    return f"{what}, so there is nothing to be {done}. {none}".rstrip()
