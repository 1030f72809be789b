"""Names of a model's tensors: which of them are one tensor's, their shapes, the nearest to one that does not exist."""

import re
from collections.abc import Iterable, Iterator, Set
from difflib import get_close_matches
from itertools import groupby

from torch import nn
from transformers import PreTrainedModel

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


def saved_name(model: PreTrainedModel, aliases: list[str]) -> str:
    """The name, of the several of one tensor, under which transformers saves it."""
    shared = model.all_tied_weights_keys
    return next((alias for alias in aliases if alias not in shared), aliases[0])


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""A part of a name that is a number, not its first."""


def collapse(name: str) -> str:
    """`name` with its layer numbers replaced by `*`."""
    return _NUMBER.sub("*", name)


def together(names: Iterable[str], known: Iterable[str] = ()) -> dict[str, list[str]]:
    """`names` by what says all of them at once: `model.layers.{10,21,30-32}.norm.weight`.

    Args:
        names: of parameters or modules.
        known: all names that there are. Where every one of them that differs in a number alone is meant, the number is
            `*`; without them that is not known.
    """
    meant, there = _by_form(names), _by_form(known)
    return {
        _filled(form, parts): [members[numbers] for numbers in group]
        for form, members in meant.items()
        for parts, group in _products(sorted(members), there.get(form, {}).keys())
    }


def _by_form(names: Iterable[str]) -> dict[str, dict[tuple[int, ...], str]]:
    """`names` by their numbers, by what they are without them."""
    forms: dict[str, dict[tuple[int, ...], str]] = {}
    for name in names:
        forms.setdefault(collapse(name), {})[tuple(map(int, _NUMBER.findall(name)))] = name
    return forms


def _filled(form: str, parts: list[str]) -> str:
    texts = iter(parts)
    return ".".join(next(texts) if part == "*" else part for part in form.split("."))


def _products(
    meant: list[tuple[int, ...]], there: Set[tuple[int, ...]]
) -> Iterator[tuple[list[str], list[tuple[int, ...]]]]:
    """`meant` cut into products of sets of numbers: the sets, as text, and the members."""
    if not meant[0]:
        yield [], meant
        return
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, run in groupby(meant, key=lambda numbers: numbers[0]):
        groups.setdefault(tuple(numbers[1:] for numbers in run), []).append(first)
    for rests, firsts in groups.items():
        # Those that could have been meant with the same rest.
        same = {numbers[0] for numbers in there if numbers[1:] in rests}
        part = "*" if same == set(firsts) else _listed(firsts)
        below = {numbers[1:] for numbers in there if numbers[0] in firsts}
        for parts, members in _products(list(rests), below):
            yield [part, *parts], [(first, *rest) for first in firsts for rest in members]


def _listed(numbers: list[int]) -> str:
    """Ascending numbers, those in a row by their ends: {0,1,4-7}."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return texts[0] if len(numbers) == 1 else f"{{{','.join(texts)}}}"


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
