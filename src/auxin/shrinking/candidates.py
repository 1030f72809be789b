"""The ways to try: one method alone, or several after one another, each of which goes a part of the way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Any

from auxin.methods import method as find_method
from auxin.planning.target import Target

DEPTH, WIDTH, PRODUCTS = "depth", "width", "products"
ORDER = (DEPTH, WIDTH, PRODUCTS)
"""What is done first: whole layers and sublayers, then units of those that are left, then products in place of what is
left. The other way round, a method would see modules that it does not know."""
STANDARD = {
    "finercut": DEPTH,
    "shortgpt": DEPTH,
    "taylor": WIDTH,
    "fisher": WIDTH,
    "wanda-structured": WIDTH,
    "fluctuation": WIDTH,
    "minitron": WIDTH,
    "magnitude": WIDTH,
    "slicegpt": WIDTH,
    "greenformers": PRODUCTS,
    "factorised-embedding": PRODUCTS,
    "structured-ffn": PRODUCTS,
}
"""Methods that are tried where none are named, and what each is."""
KIND_OF_OTHERS = {"factorize": PRODUCTS}
"""Of methods that are not listed, by what they are for; those that are for something else are a width's."""
VARIANTS: tuple[dict[str, Any], ...] = ({"uniform": False}, {"one_shot": True})
"""Settings that are tried beside the default ones, of methods that have them."""
NONE = "none"


def kind_of(name: str) -> str:
    """What the method called `name` takes from a model."""
    return STANDARD.get(name) or KIND_OF_OTHERS.get(find_method(name).intent, WIDTH)


@dataclass(frozen=True)
class Step:
    """A method, and how far it goes."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Beside the target."""
    until: float = 1.0
    """The part of the way that is behind when it is done, of the logarithm of what the target is given in."""

    @property
    def name(self) -> str:
        """The method, and what is set."""
        return ", ".join([self.method, *(f"{key} {str(value).lower()}" for key, value in self.settings.items())])


@dataclass(frozen=True)
class Candidate:
    """Steps that together reach the target."""

    steps: tuple[Step, ...]

    def targets(self, asked: Target, have: float) -> list[dict[str, Any]]:
        """Fields of each step's target, where the last one's is what is `asked` for.

        What is asked for as a share is a number for a step that meets a smaller model than the first does.

        Args:
            asked: the target of all of them together.
            have: what the model has, before the first step, of what that is given in.
        """
        plain = asked.model_dump(exclude_unset=True)
        if len(self.steps) == 1:
            return [plain]
        limit = float(asked.limit(have))
        others = {name: value for name, value in plain.items() if name != asked.name}
        found = []
        for step in self.steps:
            number = have * (limit / have) ** step.until
            if asked.is_latency:
                found.append({**others, "latency_ms": number})
            else:
                found.append({**others, asked.name: floor(limit) if step is self.steps[-1] else ceil(number)})
        return found

    @property
    def is_plain(self) -> bool:
        """Whether it is one method at its default settings."""
        return len(self.steps) == 1 and not self.steps[0].settings

    @property
    def title(self) -> str:
        """In words: the methods in their order, and how much of the way each goes."""
        if len(self.steps) == 1:
            return self.steps[0].name
        before, parts = 0.0, []
        for step in self.steps:
            parts.append(f"{step.name} ({step.until - before:.0%})")
            before = step.until
        return " then ".join(parts)

    def dump(self) -> list[dict[str, Any]]:
        """As plain values."""
        return [{"method": step.method, "settings": dict(step.settings), "until": step.until} for step in self.steps]

    @classmethod
    def load(cls, values: list[dict[str, Any]]) -> "Candidate":
        """Of plain values."""
        return cls(tuple(Step(**step) for step in values))


class Space:
    """All ways that can be tried with some methods.

    Args:
        methods: their names; None: `STANDARD`.
    """

    def __init__(self, methods: list[str] | None) -> None:
        self.methods = list(STANDARD) if methods is None else methods
        self.choices: dict[str, dict[str, Step]] = {kind: {} for kind in ORDER}
        """For each kind, the steps by their names."""
        for name in self.methods:
            fields = find_method(name).settings.model_fields
            variants = [values for values in VARIANTS if set(values) <= set(fields)]
            for values in ({}, *variants):
                step = Step(name, values)
                self.choices[kind_of(name)][step.name] = step

    def plain(self) -> Iterator[Candidate]:
        """Every method alone."""
        for name in self.methods:
            yield Candidate((Step(name),))

    def parameters(self, candidate: Candidate) -> dict[str, Any]:
        """What a search calls `candidate` by: the choice for each kind, and the share of the way of those chosen."""
        found: dict[str, Any] = dict.fromkeys(self.kinds, NONE)
        before = 0.0
        for step in candidate.steps:
            kind = kind_of(step.method)
            found[kind] = step.name
            found[f"{kind}_share"] = max(step.until - before, SHARES[0])
            before = step.until
        return found

    @property
    def kinds(self) -> list[str]:
        """Those that have a choice."""
        return [kind for kind in ORDER if self.choices[kind]]

    def candidate(self, parameters: Mapping[str, Any]) -> Candidate | None:
        """The way that a search calls by `parameters`; None: nothing is chosen."""
        chosen = [
            (self.choices[kind][parameters[kind]], parameters[f"{kind}_share"])
            for kind in self.kinds
            if parameters[kind] != NONE
        ]
        if not chosen:
            return None
        total, behind, steps = sum(share for _, share in chosen), 0.0, []
        for number, (step, share) in enumerate(chosen, 1):
            behind += share
            # Rounded, so that what is written down says all of it.
            until = 1.0 if number == len(chosen) else round(behind / total, 3)
            steps.append(Step(step.method, step.settings, until))
        return Candidate(tuple(steps))


SHARES = (0.1, 1.0)
"""Of the way that a chosen kind goes, before they are made to add up to one."""
