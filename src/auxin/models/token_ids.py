"""Which values of configs are ids of tokens, and what they become where tokens get other ids."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from auxin.errors import PlanError

_IDS = re.compile(r"(?!codebook)(\w+_)?token_(id|ids|index)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids")
"""Values that are an id, or lists of ids, one in another or not."""
_BY_POSITION = ("forced_decoder_ids",)
"""Lists of pairs: a position, and the id there."""
_BY_WORD = ("lang_to_id", "task_to_id")
"""Ids by what they mean."""
_WEIGHED = ("sequence_bias",)
"""Pairs of a list of ids and a number."""


def is_token_id(name: str) -> bool:
    """Whether a config's value called `name` holds ids of tokens."""
    return _IDS.fullmatch(name) is not None or name in (*_BY_POSITION, *_BY_WORD, *_WEIGHED)


def named_ids(values: Mapping[str, Any]) -> dict[str, set[int]]:
    """The ids that a config's `values` name, by the name of the value; what is below 0 is none."""
    found: dict[str, set[int]] = {}
    for name, value in values.items():
        seen: set[int] = set()
        _each_id(name, value, lambda token, seen=seen: seen.add(token) or token)  # type: ignore[misc]
        if seen:
            found[name] = seen
    return found


def renumbered(values: Mapping[str, Any], new_ids: Mapping[int, int], length: int, where: str) -> dict[str, Any]:
    """Those of a config's `values` that name tokens which get other ids, with these.

    Args:
        values: by name.
        new_ids: the new id of every token that stays, by its old one.
        length: how many ids there were; what is not below it names no token, and stays.
        where: what holds the values, for the message.

    Raises:
        PlanError: a value names a token that does not stay.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():

        def new(token: int, name: str = name) -> int:
            if token < length and token not in new_ids:
                raise PlanError(
                    f"{where}: {name} names token {token}, which the plan takes away. Plan again for this model, or "
                    "change the value first."
                )
            return new_ids.get(token, token)

        changed = _each_id(name, value, new)
        if changed != value:
            found[name] = changed
    return found


def _each_id(name: str, value: Any, new: Callable[[int], int]) -> Any:
    """`value` with `new` of every id in it; the same where the value called `name` holds none."""
    if value is None or not is_token_id(name):
        return value
    if name in _BY_POSITION:
        return [[place, _every(token, new)] for place, token in value]
    if name in _WEIGHED:
        pairs = value.items() if isinstance(value, Mapping) else value
        changed = [(_every(ids, new), weight) for ids, weight in pairs]
        return dict(changed) if isinstance(value, Mapping) else [list(pair) for pair in changed]
    return _every(value, new)


def _every(value: Any, new: Callable[[int], int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return new(value) if value >= 0 else value
    if isinstance(value, list | tuple):
        return type(value)(_every(each, new) for each in value)
    if isinstance(value, Mapping):
        return {key: _every(each, new) for key, each in value.items()}
    return value
