"""How many units of each stream go, where several do: to shares and counts that go together, or to a target.

A stream goes along its course (`auxin.planning.unit_order`), a unit at a time; a state says how far each has gone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from math import floor
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from auxin.edits.plan_files import PlanFile
from auxin.errors import PlanError
from auxin.planning.cutting import cut
from auxin.planning.pruned_sublayers import NAME, PrunedSublayers
from auxin.planning.pruning_settings import ALONE, Part, Pruning
from auxin.planning.shared_limit import SharedLimit
from auxin.planning.target import Gauge, Removal, first_that_meets, least_removal, removal
from auxin.planning.unit_order import Course, Place
from auxin.words.anatomy import Anatomy
from auxin.words.widths import FEED_FORWARD, SETTINGS, Stream

Split = Literal["alike", "worth", "score"]
"""How a target takes from several streams: from all "alike", of which the largest share is left first; so that the sum
of the scores that stay is largest ("worth"); or by one ranking of the scores of all of them ("score")."""


@dataclass(frozen=True)
class Preparation:
    """Edits of a model that leave its function as it is and make it one whose units are cut."""

    edits: tuple[Any, ...]
    """The edits."""
    after: PreTrainedModel
    """The model after them, of which units are cut; a skeleton serves."""
    files: tuple[PlanFile, ...] = ()
    """Those that they read."""
    folder: Path = Path()
    """Where these lie."""


@dataclass(frozen=True)
class Subject:
    """A model that is pruned, and what of it can go."""

    model: PreTrainedModel
    settings: Pruning
    body: Anatomy
    units: dict[Place, int]
    """How many units can go on their own, by place: what is to be scored. Of "query" they are key-value groups, or the
    query heads of a single key-value head."""
    preparation: Preparation | None = None
    """What comes before units are cut; None: nothing."""
    whole: PrunedSublayers | None = None
    """The sublayers that may go, too; None: none."""
    refused: Mapping[Part, str] = field(default_factory=dict)
    """What the method can't take from, and why: it is never advised to."""

    @cached_property
    def gauge(self) -> Gauge:
        """What tells whether the target, which is asked for, is met.

        Raises:
            ConfigError, PlanError: what is asked for can't be told of the model.
        """
        assert self.settings.target is not None
        return Gauge(self.settings.target, self.model)


class Courses:
    """The courses of all streams that are pruned, and which states go together.

    Args:
        found: what is pruned.
        courses: of its streams.
        after: edits that follow those that cut, whatever goes.
    """

    def __init__(self, found: Subject, courses: list[Course], after: Sequence[Any]) -> None:
        self.found, self.courses, self.after, self.notes = found, courses, after, list[str]()
        self.kept: dict[Place, list[int]] = {}
        """The units that stay, once it is known."""

    def removal(self, method: str, split: Split) -> Removal:
        """What is removed."""
        if self.found.settings.target is None:
            asked = self._asked()
            return self._settled(removal(self.found.model, self._edits(asked)), asked)
        self._leave_what_stays()
        kinds, everything = self._kinds(), range(len(self.courses))
        shared = split == "worth" and all(kinds)
        chain = self._by_worth(kinds) if shared else self._chain(everything, by_score=split == "score")
        found, gauge = self._least(chain, method), self.found.gauge
        chain = chain[: found.amount]
        if shared:
            done = self._filled(gauge, found, chain[-1], sorted(kinds[1]) if len(kinds[1]) > 1 else ())
        elif split == "score":
            done = self._filled(gauge, found, chain[-1], self._many_first())
        else:
            done = self._exactly(gauge, chain, found)
        return replace(done, gauge=gauge)

    def refuse_impossible(self, method: str) -> list[Stream]:
        """PlanError for what can't be removed, or not so much of it; else the streams of which something can go."""
        if self.found.settings.target is None:
            self._edits(self._asked())
        else:
            self._leave_what_stays()
            self._least(self._chain(range(len(self.courses)))[-1:], method)
        return [course.stream for course in self.courses]

    def _leave_what_stays(self) -> None:
        self.courses = [course for course in self.courses if self._can_go(course)]
        if not self.courses:
            raise PlanError(f"Nothing of what a target takes from by itself can go. {' '.join(self.notes)}")

    def _least(self, chain: Sequence[Sequence[int]], method: str) -> Removal:
        try:
            return least_removal(
                self.found.gauge, lambda amount: self._edits(chain[amount - 1]), len(chain), method, self._more()
            )
        except PlanError as error:
            raise PlanError(" ".join([str(error), *self.notes])) from error

    def _more(self) -> str:
        """What a target takes from, and what it could take from, too, by this method; empty where that is all."""
        body, chosen = self.found.body, list(self.found.settings.chosen)
        possible: dict[Part, bool] = {
            "heads": not body.heads_stay,
            "ffn": any(body.sizes.units(stream) for stream in FEED_FORWARD),
            "experts": bool(body.sizes.experts),
            "hidden": not body.residual_stays,
        }
        more = [part for part, can_go in possible.items() if can_go and self._could_go(part)]
        if not more:
            return ""
        return (
            f"It takes from {' and '.join(chosen)}, and smaller are models that lose {' or '.join(more)}, too: streams "
            f"= [{', '.join([*chosen, *more])}]."
        )

    def _could_go(self, part: Part) -> bool:
        """Whether the method could take from `part`, too, and was not asked to."""
        return part not in self.found.settings.chosen and part not in self.found.refused

    def _exactly(self, gauge: Gauge, chain: Sequence[list[int]], found: Removal) -> Removal:
        """The removal that leaves no room for one unit more. A step of the chain may be one of large units, which goes
        further than it had to: then as many of the smallest stay as there is room for, with that step or without it,
        whichever leaves shares that are more alike; and of the others what there is still room for.

        Args:
            gauge: tells whether what is asked for is met.
            chain: ever smaller states; the last alone meets the target.
            found: what the last removes.
        """
        places = self._many_first()
        before = chain[-2] if len(chain) > 1 else [0] * len(self.courses)
        options, last = [(found, chain[-1])], len(self.courses[places[0]].left) - 1
        stepped = [place for place, pair in enumerate(zip(before, chain[-1], strict=True)) if pair[0] != pair[1]]
        if stepped != places[:1]:
            options = [
                option for states in (before, chain[-1]) for option in self._most_left(gauge, states, places[0], last)
            ]
        found, states = min(options, key=lambda option: self._unlike(option[1]))
        return self._filled(gauge, found, states, places[1:])

    def _filled(self, gauge: Gauge, found: Removal, states: Sequence[int], places: Iterable[int]) -> Removal:
        """What is removed where of the courses at some places, one after the other, as much stays as there is room for.

        Args:
            gauge: tells whether what is asked for is met.
            found: what is removed.
            states: of all courses, to which that comes.
            places: of courses.
        """
        for place in places:
            found, states = next(self._most_left(gauge, states, place, states[place]), (found, states))
        return self._settled(found, states)

    def _most_left(
        self, gauge: Gauge, states: Sequence[int], place: int, last: int
    ) -> Iterator[tuple[Removal, list[int]]]:
        """What is removed where of the course at `place` as much is left as the target has room for, and the states; up
        to its state `last`. Nothing where none of them meets it."""
        every = [[*states[:place], state, *states[place + 1 :]] for state in range(last + 1)]
        tries = [tried for tried in every if any(tried) and self._together(tried, tried)]
        if not tries:
            return
        last = len(tries) - 1
        first, final = (self._tried(tries[number], number) for number in (0, last))
        if (less := gauge.of(final)) > gauge.limit:
            return
        if (more := gauge.of(first)) <= gauge.limit:
            yield first, tries[0]
            return
        between = (0, more), (last, less, final)
        done = first_that_meets(gauge, lambda number: self._tried(tries[number], number), *between)
        assert done.amount is not None
        yield done, tries[done.amount]

    def _tried(self, states: Sequence[int], number: int) -> Removal:
        return removal(self.found.model, self._edits(states), number)

    def _many_first(self) -> list[int]:
        """The places of the courses, that of the most and so the smallest steps first."""
        return sorted(range(len(self.courses)), key=lambda place: -len(self.courses[place].left))

    def _unlike(self, states: Sequence[int]) -> Fraction:
        """How far apart the shares are that the courses have left."""
        shares = [course.share(state) for course, state in zip(self.courses, states, strict=True)]
        return max(shares) - min(shares)

    def _settled(self, done: Removal, states: Sequence[int]) -> Removal:
        self.kept = self._keep(states)
        return done

    def _keep(self, states: Sequence[int]) -> dict[Place, list[int]]:
        keep: dict[Place, list[int]] = {}
        for course, state in zip(self.courses, states, strict=True):
            keep |= course.keep(state) if state else {}
        return keep

    def _edits(self, states: Sequence[int]) -> list[Any]:
        before, keep = self.found.preparation, self._keep(states)
        model = self.found.model if before is None else before.after
        gone, units = self._without_sublayers(states, keep)
        done = () if gone and not units else cut(model, units, part=self.found.settings.part).edits
        return [*(before.edits if before is not None else ()), *done, *self.after, *gone]

    def _without_sublayers(
        self, states: Sequence[int], keep: dict[Place, list[int]]
    ) -> tuple[list[Any], dict[Place, list[int]]]:
        """The edits that take whole sublayers out, and what is cut beside them: none of their own units; but where
        layers keep as many, the config says of all of them how many."""
        whole = self.found.whole
        if whole is None:
            return [], keep
        gone, units = whole.gone(keep), dict[Place, list[int]]()
        for course, state in zip(self.courses, states, strict=True):
            found = course.keep(state) if state and course.stream != "sublayer" else {}
            left = {place: kept for place, kept in found.items() if not whole.takes_along(place, gone)}
            units |= found if left and self.found.settings.uniform else left
        cuts = any(len(kept) < (self.found.body.sizes.units(*place) or 0) for place, kept in units.items())
        return whole.edits(gone), units if cuts or not gone else {}

    def _asked(self) -> list[int]:
        """The states for the shares and counts of the settings."""
        amounts: dict[str, int | float] = {
            part: getattr(self.found.settings, part) for part in self.found.settings.chosen
        }
        if (left := self.found.settings.parts_left) is not None:
            amounts[NAME] = left
        asked = [self._state(course, amounts[course.name]) for course in self.courses]
        if not any(asked):
            mend = " Ask for less." if any(self._smaller(course) for course in self.courses) else ""
            raise PlanError(f"There is nothing to prune: {', '.join(map(self._whole, self.courses))}.{mend}")
        self._refuse_bound(course for course, state in zip(self.courses, asked, strict=True) if state)
        wanted = [self._possible(place, asked, amounts[course.name]) for place, course in enumerate(self.courses)]
        heads = self._place("heads")
        states = self._together([state if place == heads else 0 for place, state in enumerate(wanted)], wanted)
        for course, state, other in zip(self.courses, wanted, states or wanted, strict=True):
            if state != other and isinstance(amounts[course.name], int):
                raise PlanError(
                    f"{course.name} = {course.left[state]} does not go with these heads, whose number divides it in "
                    f"this architecture. The nearest possible: {course.left[other]}."
                )
        return states or wanted  # those that do not go together are refused by `cut`, with what would do

    def _state(self, course: Course, amount: int | float) -> int:
        """The state for an amount, whether the architecture takes it or not."""
        if isinstance(amount, float):
            return course.state(amount)
        sizes = sorted({other.left[0] for other in self.courses if other.name == course.name})
        if len(sizes) > 1:
            raise PlanError(f"{course.name} = {amount}: this model has several sizes of it ({sizes}). Give a share.")
        if amount not in course.left:
            raise PlanError(self._nearest_sizes(course, amount, course.left))
        return course.left.index(amount)

    def _possible(self, place: int, asked: Sequence[int], amount: int | float) -> int:
        """The state of the course at `place` that the architecture takes: that which is asked for or, for a share, the
        last one before."""
        course, sizes = self.courses[place], self._sizes(self.courses[place])
        if course.left[asked[place]] in sizes:
            return asked[place]
        before = max(state for state in range(asked[place]) if course.left[state] in sizes)
        if before and isinstance(amount, float):
            return before
        self._edits(asked)  # whose refusal has the reason
        raise PlanError(self._nearest_sizes(course, course.left[asked[place]], sizes))

    def _whole(self, course: Course) -> str:
        smaller = self._smaller(course)
        following = f" (the next possible: {max(smaller)})" if smaller else self._why_whole(course)
        routing = self.found.body.routing if course.name == "experts" else None
        if routing is not None and routing.groups > 1 and not smaller:
            following += f": {routing.groups} groups must keep at least {routing.scored_by} each"
        return f"all of {course.left[0]} {_called(course)} would stay{following}"

    def _smaller(self, course: Course) -> set[int]:
        """The smaller sizes of a course that the architecture takes."""
        return self._sizes(course) - {course.left[0]}

    def _why_whole(self, course: Course) -> str:
        """Why no smaller size is possible; where others would be if the heads went otherwise, which."""
        why = ", since no other number is possible"
        if course.name in ALONE or len(course.left) == 1:
            return why
        body, states = self.found.body, range(1, len(course.left))
        if not body.fields.heads_are_bound:  # the config wants heads that divide the hidden size
            return f"{why} beside the other widths ({body.sizes.query_heads} heads, hidden size {body.sizes.residual})"
        heads, dim = {course.left[state] for state in states}, body.sizes.head_dim
        if course.name == "hidden":
            heads = {size // dim for size in heads if size % dim == 0}
        found = " or ".join(f"heads = {n} with hidden = {n * dim}" for n in sorted(heads, reverse=True)[:3])
        return f"{why} alone, where hidden size = heads x dimension" + (f". Ask for {found}" if found else "")

    def _nearest_sizes(self, course: Course, size: int, sizes: Iterable[int]) -> str:
        """Why some number of units is none that can stay."""
        if size > course.left[0]:
            return (
                f"{course.name} = {size}: the model has only {course.left[0]} {_called(course)}. Give at most "
                f"{course.left[0]}, or a share (0.5)."
            )
        near = sorted(sorted(set(sizes) - {course.left[0]}, key=lambda other: abs(other - size))[:2])
        divided = course.name not in ALONE and size in course.left
        mend = self._mend_of_heads(course, size) if divided and course.name == "heads" else ""
        return (
            f"{course.name} = {size}: that many of {course.left[0]} {_called(course)} can't stay"
            f"{' beside the other widths' * divided}{self._why_together(course, size)}. The nearest possible: "
            f"{' or '.join(map(str, near)) or 'none'}."
            f"{mend}"
        )

    def _why_together(self, course: Course, size: int) -> str:
        """Why units of a course go several at a time, where that is what speaks against a size."""
        if size in course.left:
            return ""
        sizes = self.found.body.sizes
        if course.name == "heads" and (group := sizes.query_heads // sizes.key_value_heads) > 1:
            return f", since heads go by groups of {group} that share keys and values"
        multiple = self.found.settings.multiple_of
        return f", since multiple_of is {multiple}" if course.name == "ffn" and multiple > 1 else ""

    def _mend_of_heads(self, course: Course, size: int) -> str:
        """What goes with a number of heads that does not divide the present hidden size."""
        residual, share = self.found.body.sizes.residual, floor(10_000 * size / course.left[0]) / 10_000
        apart = f"heads = {share:g} with uniform = false, by which layers differ"
        if not self._could_go("hidden"):
            return f" Or ask for {apart}."
        return f" Prune hidden, too (hidden = {(residual - 1) // size * size}), or ask for {apart}."

    def _kinds(self) -> list[dict[int, Course]]:
        """The courses of heads, and those of others, by place."""
        courses = dict(enumerate(self.courses))
        heads = {place: course for place, course in courses.items() if course.name == "heads"}
        return [heads, {place: course for place, course in courses.items() if place not in heads}]

    def _by_worth(self, kinds: Sequence[Mapping[int, Course]]) -> list[list[int]]:
        """Ever smaller states with the heads with which the least is lost."""
        found = self.found
        shared = SharedLimit(found.model, found.body, found.units, found.settings.part)
        return shared.chain(found.gauge, kinds, [[[0] * len(self.courses), *self._chain(kind)] for kind in kinds])

    def _chain(self, places: Iterable[int], by_score: bool = False) -> list[list[int]]:
        """Ever smaller states of some courses, by one step of one stream at a time where they go alone; the others stay
        as they are. The next step is that of the lowest score, or of the stream of which the largest share is left."""
        scores = [course.scores() for course in self.courses] if by_score else []
        steps = sorted(
            (scores[place][state - 1] if by_score else -self.courses[place].share(state), place, state)
            for place in places
            for state in range(1, len(self.courses[place].left))
        )
        chain, wanted = [[0] * len(self.courses)], [0] * len(self.courses)
        for _, place, state in steps:
            wanted[place] = state
            states = self._together(chain[-1], wanted)
            if states is not None and states != chain[-1]:
                chain.append(states)
        return chain[1:]

    def _can_go(self, course: Course) -> bool:
        """Whether some of its units can go; where they can't and need not, the reason becomes a note."""
        try:
            self._check(course)
        except PlanError as error:
            if not self.found.settings.optional:
                raise
            self.notes.append(f"{course.name} stay: {error}")
            return False
        return True

    def _check(self, course: Course) -> None:
        """PlanError when the architecture takes no smaller size, with the reason."""
        if len(course.left) == 1:
            raise PlanError(f"{self._whole(course).capitalize()}.")
        self._refuse_bound([course])
        least = [int(other is course) for other in self.courses]
        states = self._nearest(least)
        self._edits(states or least)
        if states is None:
            other = ", or let the target take from hidden" if self._could_go("hidden") else ""
            raise PlanError(f"{self._whole(course).capitalize()}. Set uniform = false{other}.")

    def _refuse_bound(self, courses: Iterable[Course]) -> None:
        """PlanError where heads can go only together with units of the residual, or these with heads, and the method
        takes none of the others."""
        partners: dict[str, Part] = {"heads": "hidden", "hidden": "heads"}
        for course in courses if self.found.body.fields.heads_are_bound else ():
            partner = partners.get(course.name)
            if partner in self.found.refused:
                raise PlanError(
                    f"{course.name}: in this architecture hidden size = heads x dimension, so that {course.name} can't "
                    f"go without {partner}, and this method takes nothing from {partner}. Leave {course.name} out, or "
                    "choose a method that takes both, such as magnitude."
                )

    # Which numbers of heads go with which hidden sizes ---------------------------------------------------------------

    def _place(self, part: str) -> int | None:
        return next((place for place, course in enumerate(self.courses) if course.name == part), None)

    def _fits(self, heads: int, hidden: int) -> bool:
        """Whether the config takes them, and says them where layers shall be alike."""
        body = self.found.body
        if body.fields.heads_are_bound:
            return hidden == heads * body.sizes.head_dim
        if not body.heads_divide_hidden_size:
            return True
        return hidden % (heads if self.found.settings.uniform else body.sizes.query_heads) == 0

    def _pairs(self, heads: Iterable[int], hidden: Iterable[int]) -> Iterator[dict[int, int]]:
        """The states of heads and residual that go together, by their places among the courses.

        Args:
            heads: states of the heads, where they are pruned.
            hidden: those of the residual, where it is.
        """
        sizes, hidden = self.found.body.sizes, list(hidden)
        head_place, hidden_place = self._place("heads"), self._place("hidden")
        for head_state in heads if head_place is not None else [0]:
            count = sizes.query_heads if head_place is None else self.courses[head_place].left[head_state]
            for hidden_state in hidden if hidden_place is not None else [0]:
                size = sizes.residual if hidden_place is None else self.courses[hidden_place].left[hidden_state]
                if self._fits(count, size):
                    states = {head_place: head_state, hidden_place: hidden_state}
                    yield {place: state for place, state in states.items() if place is not None}

    def _states(self, part: str) -> range:
        place = self._place(part)
        return range(0 if place is None else len(self.courses[place].left))

    def _sizes(self, course: Course) -> set[int]:
        """The sizes of a course that the architecture takes, with some of its partner."""
        body, place = self.found.body, self._place(course.name)
        free = not body.fields.heads_are_bound and not body.heads_divide_hidden_size
        if free or course.name in ALONE or place is None or self.courses[place] is not course:
            return set(course.left)
        return {course.left[pair[place]] for pair in self._pairs(self._states("heads"), self._states("hidden"))}

    def _nearest(self, least: Sequence[int]) -> list[int] | None:
        """The first states from `least` on that go together; None where there are none."""
        heads, hidden = self._place("heads"), self._place("hidden")
        ranges = [
            range(0) if place is None else range(least[place], len(self.courses[place].left))
            for place in (heads, hidden)
        ]
        pair = next(self._pairs(*ranges), None)
        return None if pair is None else [pair.get(place, state) for place, state in enumerate(least)]

    def _together(self, least: Sequence[int], most: Sequence[int]) -> list[int] | None:
        """The furthest states from `least` to `most` that go together; None where there are none."""
        heads, hidden = self._place("heads"), self._place("hidden")
        ranges = [range(0) if place is None else range(most[place], least[place] - 1, -1) for place in (heads, hidden)]
        pair = next(self._pairs(*ranges), None)
        return None if pair is None else [pair.get(place, state) for place, state in enumerate(most)]


def _called(course: Course) -> str:
    """What its units are called in settings."""
    return SETTINGS.get(course.stream, course.name)
