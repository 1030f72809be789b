"""Classes of labelled data: the settings that name them, what a label in a source stands for, what can't be learnt."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator

from auxin.data.settings import SourceSettings, without_stdlib
from auxin.errors import DataError, listed, shown


class LabelSettings(SourceSettings):
    """Where labelled samples come from, and their classes."""

    source: Literal["files", "huggingface"] = "files"
    """`files`: those that `paths` name. `huggingface`: the dataset `name`."""
    label_field: str = "label"
    """The field of a row that holds the class: text, a whole number, true or false. A row with null is skipped."""
    labels: tuple[StrictBool | StrictInt | StrictStr, ...] | None = Field(default=None, min_length=2)
    """The classes in the order of their numbers. Where none of them is a number itself, a number in the rows is the
    place of one in this list, counted from 0. None: the distinct ones of the source, sorted; a price before the data is
    prepared is then that of two classes."""

    @field_validator("source", mode="before")
    @classmethod
    def _has_labels(cls, value: Any) -> Any:
        return without_stdlib(value, "labels")

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        names = self.label_names or ()
        if len(set(names)) != len(names):
            raise ValueError(f"labels must differ; given: {listed(names)}")
        return self

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """`labels` as text."""
        return None if self.labels is None else tuple(map(_written, self.labels))

    def label_name(self, value: Any, row: str) -> str:
        """The name of the class that a row's label stands for.

        Raises:
            DataError: it is none of `labels`, or no class at all.
        """
        if isinstance(value, float) and value.is_integer():  # columns of whole numbers with gaps are read so
            value = int(value)
        if not isinstance(value, bool | int | str):
            raise DataError(
                f"{row}: {self.label_field} is {shown(value)}, and a class is text, a whole number, true or false. Set "
                "`label_field` to a field of classes."
            )
        name, known = _written(value), self.label_names
        if known is None or name in known:
            return name
        is_place = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(known)
        # Places among numbers would make one class of two: 0 and 1 of the classes 1, 2 and 3.
        if is_place and not any(other.removeprefix("-").isdecimal() for other in known):
            return known[int(value)]
        raise DataError(
            f"{row}: {self.label_field} is {shown(value)}, which is none of `labels` ({listed(known)}). Add it there, "
            "or leave the row out."
        )


def classes_of(
    settings: LabelSettings, counts: Mapping[str, Counter[str]], samples: str, otherwise: str = ""
) -> tuple[str, ...]:
    """The classes in the order of their numbers: those of the settings, or those found, sorted.

    Args:
        settings: the settings.
        counts: of "train" and "validation", how many samples each class has.
        samples: what messages call them, in the plural.
        otherwise: what else mends data of one class.

    Raises:
        DataError: there is one class only, or one without a training example.
    """
    labels = settings.label_names or _sorted_labels(counts["train"] | counts["validation"])
    if len(labels) == 1:
        raise DataError(
            f"All {samples} have the {settings.label_field} {shown(labels[0])}: there is nothing to tell apart. Give "
            f"{samples} of two classes or more{otherwise}."
        )
    if missing := [label for label in labels if not counts["train"][label]]:
        held_out = counts["validation"][missing[0]]
        raise DataError(
            f"The class {shown(missing[0])} has no training example ({held_out} held out), so that it can't be "
            "learnt. Give more of them, a smaller validation_fraction or another seed, or leave the class out."
        )
    return labels


def counted(samples: int, labels: Sequence[str], counts: Sequence[int]) -> str:
    """How many samples there are, and how many of each class."""
    return f"{samples:,} ({', '.join(f'{label} {n:,}' for label, n in zip(labels, counts, strict=True))})"


def _sorted_labels(found: Counter[str]) -> tuple[str, ...]:
    """Whole numbers by size, all else by the alphabet."""
    try:
        return tuple(sorted(found, key=lambda label: (int(label), label)))  # 0 and 00 are two
    except ValueError:
        return tuple(sorted(found))


def _written(label: bool | int | str) -> str:
    """As YAML writes it."""
    return str(label).lower() if isinstance(label, bool) else str(label)
