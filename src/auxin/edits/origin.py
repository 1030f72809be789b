"""Where the tensors of an edited model come from: expressions over the tensors of the model before."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from auxin.edits.kinds.fills import Fill
from auxin.edits.kinds.parameter_edits import ParameterEdit
from auxin.edits.kinds.rate import Rate
from auxin.nn.bricks import Making


@dataclass(frozen=True)
class Step:
    """One edit of one parameter."""

    index: int
    """Place of the edit in the plan, from 0."""
    edit: ParameterEdit
    name: str
    """What the parameter was called at that moment."""
    old_shape: tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """An old tensor, as it is."""

    name: str
    """The first of its names."""


@dataclass(frozen=True)
class Blend:
    """The weighted sum of old tensors."""

    terms: tuple[tuple[float, str], ...]
    """Weight and name of each."""


@dataclass(frozen=True)
class Joined:
    """Old tensors one behind the other."""

    names: tuple[str, ...]
    axis: int


@dataclass(frozen=True)
class Fresh:
    """Nothing old."""

    fill: Fill | None
    """Where its values come from; None: as the architecture initialises them."""


@dataclass(frozen=True, eq=False)
class Group:
    """The tensors that are made together out of those of one module."""

    path: str
    """The module's."""
    making: Making
    back: bool
    """Whether the module's own tensors are made again out of a brick's."""
    settings: Mapping[str, Any]
    """The brick's."""
    inputs: "Mapping[str, Origin]"
    """The tensors that they are made of, by their names in the module."""

    def makes_as(self, other: "Group") -> bool:
        """Whether both make the same of the same tensors, at two places where these are tied."""
        return (
            (self.making, self.back, self.settings) == (other.making, other.back, other.settings)
            and self.inputs.keys() == other.inputs.keys()
            and all(self.inputs[key] is other.inputs[key] for key in self.inputs)
        )


@dataclass(frozen=True)
class Made:
    """One of a group."""

    group: Group
    key: str
    """Its name in the module."""


Source = Kept | Blend | Joined | Fresh | Made


def _words(name: str) -> list[str]:
    """The words of a tensor's name, without that which says that it is no bias."""
    return name.replace(".", "_").removesuffix("weight").strip("_").split("_")


@dataclass(frozen=True)
class Origin:
    """Where a parameter (or a buffer) of the new model comes from."""

    shape: tuple[int, ...]
    """Its shape after all edits."""
    source: Source
    """What it begins as."""
    steps: tuple[Step, ...] = ()
    """What is then done to it, in order."""
    fresh_moments: bool = False
    """Whether its optimizer state starts anew although it has a source."""

    @property
    def kept(self) -> str | None:
        """The one old tensor that it is, changed or not; None when it is none."""
        return self.source.name if isinstance(self.source, Kept) else None

    def is_that_of(self, other: "Origin") -> bool:
        """Whether the values of both are made in the same way of the same tensors."""
        one, two = self.source, other.source
        alike = isinstance(one, Made) and isinstance(two, Made) and one.key == two.key and one.group.makes_as(two.group)
        return alike and self.steps == other.steps

    @property
    def is_fresh(self) -> bool:
        """Whether it owes nothing to an old tensor."""
        return isinstance(self.source, Fresh)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape before the first step."""
        return self.steps[0].old_shape if self.steps else self.shape

    @property
    def reads(self) -> tuple[str, ...]:
        """The old tensors that it is made of, each once."""
        return tuple(dict.fromkeys(self._reads()))

    def _reads(self) -> Iterator[str]:
        match self.source:
            case Kept(name):
                yield name
            case Blend(terms):
                yield from (name for _, name in terms)
            case Joined(names):
                yield from names
            case Made(group):
                for origin in group.inputs.values():
                    yield from origin.reads

    @property
    def relative(self) -> str | None:
        """The old tensor whose place in an optimizer's groups it takes: of those that it is made of the one that is
        called as it is or has as many axes (weight decay is often decided by those)."""
        if not isinstance(self.source, Made):
            return next(iter(self.reads), None)
        wanted, parts = _words(self.source.key), self.source.group.inputs

        def distance(name: str) -> tuple[bool, int, int]:
            words = _words(name)
            shared = next((i for i, (a, b) in enumerate(zip(words, wanted, strict=False)) if a != b), None)
            alike = min(len(words), len(wanted)) if shared is None else shared
            return words != wanted, -alike, abs(len(parts[name].shape) - len(self.shape))

        return parts[min(parts, key=distance)].relative if parts else None

    @property
    def rate(self) -> Rate:
        """How AdamW must go on with it."""
        if self.kept is None or self.fresh_moments:
            return Rate(exact=False)
        rate = Rate()
        for step in self.steps:
            rate = rate.then(step.edit.rate(step.old_shape))
        return rate
