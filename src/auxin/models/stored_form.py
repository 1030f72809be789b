"""In what form transformers keeps a model's tensors in files: some under other names, experts one by one.

`from_pretrained` renames and merges what it reads (`get_model_conversion_mapping`), and `save_pretrained` does the same
backwards. This is the same for one tensor at a time, and says which tensors can't be had back from a file.
"""

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, dot_natural_key

from auxin.errors import CheckpointError


class StoredForm:
    """The names and pieces of a model's tensors in files.

    Args:
        model: the model, also on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._names = set(model.state_dict())
        transforms = get_model_conversion_mapping(model)
        self._renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        self._converters = [item for item in transforms if isinstance(item, WeightConverter)]

    @cached_property
    def _back(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        """As transformers saves a model that it did not load: names of earlier times and prefixes don't come back."""
        back = [
            item.reverse_transform()
            for item in reversed(get_model_conversion_mapping(self._model, add_legacy=False))
            if not isinstance(item, PrefixChange)
        ]
        return (
            [item for item in back if isinstance(item, WeightRenaming)],
            [item for item in back if isinstance(item, WeightConverter)],
        )

    def loaded_as(self, stored: str) -> str:
        """The name in the model of a tensor in a file that is renamed at most."""
        return stored if stored in self._names else _renamed(stored, self._renamings)

    def pieces(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """By the names in the model, the tensors in files that are merged into one: experts, which lie one by one."""
        found: dict[str, list[str]] = {}
        for name in sorted(set(stored) - self._names, key=dot_natural_key):
            whole, _, converter = _converted(_renamed(name, self._renamings), self._converters)
            if converter is not None and len(converter.target_patterns) == 1 and whole in self._names:
                found.setdefault(whole, []).append(name)
        return found

    def incomplete(self) -> dict[str, list[str]]:
        """By the name in files, the model's tensors that would be merged into one there, were it not that others of
        those are missing; a file written of them could not be taken apart again."""
        found: dict[str, tuple[int, dict[str, str]]] = {}
        for name in sorted(self._names):
            stored, pattern, converter = _converted(name, self._back[1])
            if converter is not None:
                found.setdefault(stored, (len(converter.source_patterns), {}))[1][name] = pattern
        return {stored: list(of) for stored, (needed, of) in found.items() if len(set(of.values())) < needed}

    def merged(self, name: str, pieces: Mapping[str, Tensor]) -> Tensor:
        """The model's tensor `name`, made of its pieces, by their names in files, in the order of `pieces`.

        Raises:
            CheckpointError: they don't fit together.
        """
        mapping: WeightConverter | None = None
        for stored, tensor in pieces.items():
            _, pattern, converter = _converted(_renamed(stored, self._renamings), self._converters)
            assert converter is not None
            mapping = mapping or copy.deepcopy(converter)
            mapping.add_tensor(name, stored, pattern, cast(Any, tensor))  # as transformers does when it saves
        assert mapping is not None
        try:
            (value,) = mapping.convert(name, model=self._model, config=self._model.config).values()
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{name} can't be made of what the folder holds of it ({next(iter(pieces))} and {len(pieces) - 1} "
                f"more): {error}. The checkpoint is incomplete."
            ) from error
        return value[0] if isinstance(value, list) else value

    def saved(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What transformers writes of the model's tensor `name`, by the names in files: itself, or its pieces."""
        renamings, converters = self._back
        renamed, pattern, converter = _converted(name, converters)
        if converter is None:
            stored = _renamed(name, renamings)
            return {stored if self.loaded_as(stored) == name else name: tensor}
        mapping = copy.deepcopy(converter)
        mapping.add_tensor(renamed, name, pattern, cast(Any, tensor))
        parts = mapping.convert(renamed, model=self._model, config=self._model.config)
        return {
            _renamed(stored, renamings): part[0] if isinstance(part, list) else part for stored, part in parts.items()
        }


def _renamed(name: str, renamings: Iterable[WeightRenaming]) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def _converted(name: str, converters: Iterable[WeightConverter]) -> tuple[str, str, WeightConverter | None]:
    """The name after the first converter that takes it, the pattern by which it does, and the converter."""
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return renamed, pattern, converter
    return name, "", None
