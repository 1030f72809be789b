"""What methods share that take parts out of a model in some order, until so many are gone or the model is small enough.

The parts of a longer list are those of a shorter one and more, so that one order serves every size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.planning.kept_paths import KeptPaths, is_kept, refuse_impossible
from auxin.planning.target import Gauge, Target, removal
from auxin.settings import Settings

Edits = Callable[[Sequence[str]], list[Edit]]
"""(paths of what goes) -> the edits that take it out."""


class Going(NamedTuple):
    """One that goes."""

    path: str
    """Of the part or the layer."""
    about: str = ""
    """What is to be said about it: the number by which it was chosen."""
    margin: float | None = None
    """Half the width of that number's 95 % interval over the samples; None where it is not known."""


class HowMuch(Settings):
    """How much goes; give exactly one of the two."""

    removed: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How many of the candidates go: a share of them below 1 (0.25), rounded down, otherwise their number."""
    target: Target | None = None
    """How small or fast the model is to be; the first step that meets it is the last one."""
    keep: KeptPaths = ()
    """Paths of layers or parts that stay, `*` for any one part: "model.layers.0", "model.layers.*.self_attn"."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.removed is None) == (self.target is None):
            raise ValueError("give exactly one of removed (0.25, or how many) and target.")
        if self.removed is not None and self.removed >= 1 and self.removed != int(self.removed):
            raise ValueError(f"removed = {self.removed:g} is neither a share below 1 nor a whole number.")
        return self

    def spared_at_first(self, offered: Sequence[str]) -> Sequence[str]:
        """Those of the candidates that stay until more than as many are gone."""
        return []

    def kept(self, offered: Iterable[str]) -> set[str]:
        """Those of the candidates that stay by their paths."""
        return {path for path in offered if is_kept(path, self.keep)}

    def most(self, offered: Mapping[str, str]) -> list[str]:
        """As many of the candidates as can go one after the other. One of each stack stays; so do those that are kept,
        and those that are spared at first where the others are too few for their turn to come.

        Args:
            offered: what may go: the stack of layers of each, by its path.
        """
        spared, named = set(self.spared_at_first(list(offered))), self.kept(offered)
        order = sorted(offered, key=lambda path: (path in named, path in spared))  # these last
        kept = {*{offered[path]: path for path in order}.values(), *named}
        others = [path for path in order if path not in kept and path not in spared]
        return [path for path in order if path not in kept] if len(others) > len(spared) else others

    def count(self, offered: Mapping[str, str]) -> int | None:
        """How many of the candidates go; None: until the target is met.

        Args:
            offered: as of `most`.

        Raises:
            PlanError: none of them, or more than can.
        """
        total, most = len(offered), len(self.most(offered))
        if not most:
            raise PlanError(self._why_none())
        if self.removed is None:
            return None
        count = floor(total * Fraction(str(self.removed))) if self.removed < 1 else int(self.removed)
        if not 0 < count <= most:
            raise PlanError(
                f"removed = {self.removed:g} of {total} candidates is {count}{self._why_not(count, offered)}. Ask for "
                f"1 to {most}, or for a share from {ceil(10_000 / total) / 10_000:.4f} on."
            )
        return count

    def _why_none(self) -> str:
        """Why nothing can go, and what to do about it."""
        if "candidates" in type(self).model_fields:
            return "There are no two parts of which one could go. Choose other candidates, or another method."
        return (
            "There are no two layers of which one could go. Take parts of layers, by finercut, or widths, for example "
            "by taylor."
        )

    def _why_not(self, count: int, offered: Mapping[str, str]) -> str:
        if count > len(offered) - len(set(offered.values())):
            return ", and one of each stack of layers stays"
        if self.keep and 0 < count <= len(self.model_copy(update={"keep": ()}).most(offered)):
            return f", and {len(self.kept(offered))} of them stay by keep"
        spared = len(self.spared_at_first(list(offered)))
        return f", and {spared} are spared until more than {spared} others are gone" if count else ""


def _gauge(model: PreTrainedModel, wanted: HowMuch, offered: Mapping[str, str], edits: Edits) -> Gauge | None:
    """What tells whether a target is met, where there is one; PlanError when no number of removals is what was asked
    for, or what is to stay is no candidate."""
    refuse_impossible(wanted.keep, offered, "a layer or a part")
    wanted.count(offered)
    if (target := wanted.target) is None:
        return None
    gauge = Gauge(target, model)
    target.refuse_met(gauge.have)
    most = wanted.most(offered)
    smallest = gauge.of(removal(model, edits(most))) if most else gauge.have
    if smallest > gauge.limit:
        raise PlanError(
            f"{target} asks for at most {target.in_words(gauge.limit)} of {target.in_words(gauge.have)}, and with all "
            f"gone that can go {target.in_words(smallest)} would be left. Ask for at least that."
        )
    return gauge


def last_ones(offered: Mapping[str, str], gone: Iterable[str]) -> set[str]:
    """Of what may go, the paths of those that are the last ones of their stack; see `taken`."""
    left: dict[str, list[str]] = {}
    for path, stack in offered.items():
        left.setdefault(stack, []).extend([] if path in gone else [path])
    return {paths[0] for paths in left.values() if len(paths) == 1}


def from_the_top(offered: Mapping[str, str], wanted: HowMuch) -> Iterator[Going]:
    """An order for outlines: what may go, the last one first, but what is kept and one of each stack. Which ones a
    method takes is not known without weights."""
    named, gone = wanted.kept(offered), list[str]()
    for path in reversed(list(offered)):
        if path not in named and path not in last_ones(offered, gone):
            gone.append(path)
            yield Going(path)


def taken(
    model: PreTrainedModel,
    wanted: HowMuch,
    offered: Mapping[str, str],
    order: Iterable[Going],
    edits: Edits,
    method: str,
) -> Plan:
    """The plan that takes parts out in an order until as much is gone as is wanted.

    Args:
        model: the model, on any device; weights are not looked at.
        wanted: how much is to go.
        offered: what may go: the stack of layers of each, by its path.
        order: what goes; drawn from as long as more has to go.
        edits: what takes parts out.
        method: the method's name.

    Raises:
        PlanError: no number of removals is what was asked for, before anything is drawn; or the order ends before.
    """
    gauge = _gauge(model, wanted, offered, edits)
    count, target = wanted.count(offered), wanted.target
    gone: list[str] = []
    words: list[str] = []
    margins: list[float | None] = []
    for path, about, margin in order:
        gone.append(path)
        words.append(f"{path} ({about})" if about else path)
        margins.append(margin)
        if count is not None and len(gone) < count:
            continue
        found = removal(model, edits(gone))
        if gauge is None or gauge.of(found) <= gauge.limit:
            reached, *figures = replace(found, gauge=gauge).findings(target)
            return Plan(
                method=method,
                settings=wanted.model_dump(mode="json", exclude_defaults=True),
                promise="none",
                edits=list(found.edits),
                findings=[reached, f"Removed, in this order: {', '.join(words)}.", *_about(margins), *figures],
                made_for=config_values(model.config),
            )
    raise PlanError(
        f"After {len(gone)} of {len(offered)} candidates nothing more can go: one of each stack of layers stays, and "
        "what is spared. Ask for less."
    )


def _about(margins: Sequence[float | None]) -> list[str]:
    """How sure the numbers are by which parts were chosen."""
    known = [f"± {margin:.2g}" for margin in margins if margin is not None]
    return [f"Over the samples these numbers have margins (95 %) of {', '.join(known)}."] if known else []
