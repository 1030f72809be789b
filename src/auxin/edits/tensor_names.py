"""Names of a model's tensors: which of them are one tensor's, their shapes, the nearest to one that does not exist."""

import re
from collections.abc import Iterable, Set
from difflib import get_close_matches

from torch import nn

from auxin.words.paths import dotted


def tensor_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter and persistent buffer, by the first one; a tied parameter has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                names.setdefault(id(buffer), []).append(dotted(path, key))
    return {aliases[0]: aliases for aliases in names.values()}


def collapse(name: str) -> str:
    """`name` with its layer numbers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and persistent buffers by the first of their names."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tuple(tensors[name].shape) for name in tensor_names(model)}


def lies_below(name: str, paths: Set[str]) -> bool:
    """Whether `name` lies below one of `paths`, of which there may be thousands."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in paths for length in range(1, len(parts)))


def nearest_name(what: str, name: str, known: Iterable[str]) -> str:
    every = set(known)
    candidates = sorted({collapse(path) for path in every} if "*" in name else every)
    near = get_close_matches(name, candidates, n=1, cutoff=0.0)
    return f"no {what} has this path. The nearest is {near[0] if near else '(none)'}"
