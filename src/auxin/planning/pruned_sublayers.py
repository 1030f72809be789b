"""Whole attentions and feed-forward parts that go beside units: which may, in which order, and by which edits.

They are ranked over all layers of all stacks, whether or not layers keep as many units. What can't be taken out alone,
what is to be kept, and of each stack the one of the highest score stay (`auxin.planning.removed_sublayers`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from transformers import PreTrainedModel

from auxin.edits.kinds.edit import Edit
from auxin.errors import PlanError
from auxin.models.sublayers import Kind, Sublayer, refuse_run_again, refuse_shared, sublayers
from auxin.planning.kept_paths import is_kept
from auxin.planning.removed_sublayers import refusals, without_sublayers
from auxin.planning.unit_order import Course, Place, Scores, line, ranked
from auxin.words.widths import IN_FEED_FORWARD, Stream

NAME = "sublayers"
"""Of the course, and of the setting that asks for it."""


@dataclass(frozen=True)
class PrunedSublayers:
    """The sublayers of a model, and which of them can go."""

    model: PreTrainedModel
    of_stacks: Mapping[str, Sequence[Sublayer]]
    """By the path of the stack, in the order in which it runs them."""
    offered: Collection[str]
    """The paths of those that can go."""
    _edits: dict[frozenset[str], list[Edit]] = field(default_factory=dict)

    @property
    def chosen(self) -> list[Sublayer]:
        """Those that can go."""
        return [one for found in self.of_stacks.values() for one in found if one.path in self.offered]

    @property
    def units(self) -> dict[Place, int]:
        """What is to be scored: one at the place of each that can go."""
        return {("sublayer", one.path): 1 for one in self.chosen}

    def course(self, scores: Scores, at_least: int | float) -> Course:
        """The order in which they go, one at a time.

        Args:
            scores: among them one for each that can go.
            at_least: how many stay, or what share of them.

        Raises:
            PlanError: there are not so many.
        """
        lines, highest = [], max((scores[place][0] for place in self.units), default=0.0)
        for path, known in self.of_stacks.items():
            # What can't go is the one that stays.
            worth = [scores["sublayer", one.path][0] if one.path in self.offered else highest + 1 for one in known]
            found = line(("sublayer", path), {("sublayer", path): worth}, len(known), len(known))
            may = [step for step, (unit,) in enumerate(found.blocks) if known[unit].path in self.offered]
            blocks = tuple(found.blocks[step] for step in may)
            scored, standings = (tuple(values[step] for step in may) for values in (found.scores, found.standings))
            lines.append(replace(found, blocks=blocks, scores=scored, standings=standings))
        whole = ranked(NAME, "sublayer", lines, standardised=False)
        if at_least > whole.left[0]:
            raise PlanError(
                f"{NAME} = {at_least}: the model has only {whole.left[0]} attentions and feed-forward parts. Give at "
                "most that, or a share (0.75)."
            )
        share = at_least if isinstance(at_least, float) else at_least / whole.left[0]
        last = whole.state(share)
        return replace(whole, left=whole.left[: last + 1], moves=whole.moves[:last])

    def gone(self, keep: Mapping[Place, Sequence[int]]) -> list[str]:
        """The paths of those that go, where these units stay."""
        return [
            one.path
            for path, found in self.of_stacks.items()
            for number, one in enumerate(found)
            if ("sublayer", path) in keep and number not in keep["sublayer", path]
        ]

    def takes_along(self, place: Place, gone: Collection[str]) -> bool:
        """Whether the units of a place go with sublayers: all that hold units of its stream in its layer are gone."""
        stream, scope = place
        holding = [
            one.path
            for found in self.of_stacks.values()
            for one in found
            if one.layer == scope and stream in _units_in(one.kind)
        ]
        return bool(holding) and all(path in gone for path in holding)

    def edits(self, gone: Sequence[str]) -> list[Edit]:
        """The edits that take some of them out; they hold whatever units go before.

        Raises:
            PlanError: as `auxin.planning.removed_sublayers.without_sublayers`.
        """
        key = frozenset(gone)
        if key not in self._edits:
            self._edits[key] = without_sublayers(self.model, gone) if gone else []
        return self._edits[key]


def pruned_sublayers(model: PreTrainedModel, keep: Sequence[str]) -> PrunedSublayers:
    """The sublayers of `model`; weights are not looked at.

    Args:
        model: the model, on any device.
        keep: paths of layers or parts that stay.

    Raises:
        PlanError: the architecture is not known, layers share a sublayer, or none can go.
    """
    refuse_run_again(model)
    known, of_stacks = sublayers(model), dict[str, list[Sublayer]]()
    refuse_shared(model, [one.output for one in known])
    for one in known:
        of_stacks.setdefault(one.stack.path, []).append(one)
    needed = refusals(model)
    offered = {one.path for one in known if one.path not in needed and not is_kept(one.path, keep)}
    if not offered:
        raise PlanError(
            f"{NAME}: no attention or feed-forward part of this {type(model).__name__} can go alone. Leave it out."
        )
    return PrunedSublayers(model, of_stacks, offered)


def _units_in(kind: Kind) -> tuple[Stream, ...]:
    return IN_FEED_FORWARD if kind == "feed-forward" else cast(tuple[Stream, ...], ("query", "key_value"))
