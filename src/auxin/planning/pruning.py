"""From scores of units to the units that stay: what every method that prunes widths does once it has its scores.

Units go in the order of their scores, the lowest first, of equal ones the last: what goes at some size goes at every
smaller one. Heads go by key-value groups, a key-value head with all query heads that read it; where all read a single
one, query heads go alone. Experts in groups go one of each at a time, so that the groups stay alike. In every layer
something stays.

* **uniform** (the default): every layer keeps as many, so that the family's own config says the size and any runtime
  loads the result. Sizes that the config can't say are none.
* otherwise one ranking goes over all layers, by scores divided by the root of their mean square in the layer
  (`normalised`) or as they are. Layers then differ, which is kept as edits.

Shares are rounded up to the next size that there is. A target takes from all chosen streams alike: the next unit goes
from the stream of which, without it, the largest share is left; at the end the smallest units make up the difference,
so that no unit more could stay. Where the scores of heads and feed-forward units are of one kind, a method may have it
take so that the least of them is lost (`auxin.planning.shared_limit`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import Any, Literal

from transformers import PreTrainedModel

from auxin.edits.kinds.architecture_edits import SetConfig
from auxin.edits.kinds.module_edits import ConfigureModule
from auxin.edits.plan import Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.compensation import Compensation
from auxin.planning.cutting import cut, narrowest_scopes
from auxin.planning.pruning_settings import ALONE, STREAMS, Part
from auxin.planning.pruning_settings import Pruning as Pruning
from auxin.planning.shared_limit import Shared
from auxin.planning.target import Gauge, Removal, Target, first_that_meets, least_removal, removal
from auxin.planning.unit_order import Course, Line, Place, Scores, alike, line, ranked
from auxin.planning.width_targets import example_tower, refuse_without_tower
from auxin.words.anatomy import Anatomy
from auxin.words.paths import encloses
from auxin.words.widths import FEED_FORWARD, SETTINGS, Stream

Split = Literal["alike", "worth"]


@dataclass(frozen=True)
class Prunable:
    """What of a model can go with some settings."""

    model: PreTrainedModel
    settings: Pruning
    body: Anatomy
    units: dict[Place, int]
    """How many units can go on their own, by place: what is to be scored. Of "query" they are key-value groups, or the
    query heads of a single key-value head."""

    def plan(
        self,
        method: str,
        scores: Scores,
        seed: int = 0,
        split: Split = "alike",
        given_back: Compensation | None = None,
    ) -> Plan:
        """The plan that leaves the units with the highest scores.

        Args:
            method: its name.
            scores: by place, or by narrower places within.
            seed: of the plan.
            split: how a target takes from heads and feed-forward units: from all streams "alike", or so that the sum of
                the scores that stay is largest ("worth").
            given_back: biases that what stays gets for what goes.

        Raises:
            PlanError: scores that are missing or not finite, sizes that the architecture can't have, a target that
                can't be met, or nothing to prune.
        """
        given = given_back or Compensation(self.model)
        found = self._all_courses(scores, given)
        done = found.removal(method, split)
        shifts, files = given.shifts(found.kept)
        return Plan(
            method=method,
            settings=self.settings.model_dump(mode="json", exclude_defaults=True),
            promise="none",
            seed=seed,
            edits=[*done.edits, *shifts],
            files=files,
            notes=[*found.notes, *self._notes_on_experts(done.edits), *given.notes],
            findings=done.findings(self.settings.target),
            made_for=config_values(self.model.config),
        ).beside(given.folder if files else None)

    def outline(self, method: str, given_back: Compensation | None = None) -> Plan:
        """A plan that leaves any units: sizes do not depend on which go where all layers keep as many.

        Args:
            method: its name.
            given_back: as in `plan`.

        Raises:
            PlanError: as `plan`.
        """
        return self.plan(method, self._no_scores(), given_back=given_back)

    def refuse_impossible(self, method: str) -> None:
        """What `plan` refuses whatever the scores are, for methods whose scores take long; it takes less than a plan.

        Args:
            method: its name.

        Raises:
            PlanError: as `plan`.
        """
        self._all_courses(self._no_scores(), Compensation(self.model)).refuse_impossible(method)

    def _no_scores(self) -> Scores:
        return {place: [0.0] * units for place, units in self.units.items()}

    def _all_courses(self, scores: Scores, given: Compensation) -> "_Courses":
        courses = [course for place in self._streams() for course in self._courses(*place, scores)]
        return _Courses(self, courses, given.edits)

    def _notes_on_experts(self, edits: Sequence[Any]) -> Iterator[str]:
        """What becomes of routing where few experts are left, or other numbers in some layers."""
        fields, routing = self.body.fields.undotted, self.body.routing
        if routing is None or not any(stream == "expert" for stream, _ in self.units):
            return
        said = [edit.values for edit in edits if isinstance(edit, SetConfig | ConfigureModule)]
        named = [(name.rpartition(".")[2], value) for values in said for name, value in values.items()]
        if lowered := sorted({value for name, value in named if name == fields.experts_per_token}):
            fewer = " or ".join(map(str, lowered))
            yield (
                f"{fields.experts_per_token} goes from {routing.per_token} to {fewer}: where so few experts are left "
                "to choose from, a token gets all of them."
            )
        if any(isinstance(edit, ConfigureModule) and fields.experts in edit.values for edit in edits):
            if getattr(self.model.config, "output_router_logits", False):
                raise PlanError(
                    "Layers would have different numbers of experts, and the loss that balances them "
                    "(output_router_logits) takes the same number in all. Set uniform = true, or that value of the "
                    "config to false."
                )
            yield (
                "Layers have different numbers of experts; the loss that balances them (output_router_logits) can't be "
                "had."
            )

    def _streams(self) -> list[tuple[Part, Stream]]:
        pairs = [(part, stream) for part in self.settings.chosen for stream in STREAMS[part]]
        return [(part, stream) for part, stream in pairs if any(found == stream for found, _ in self.units)]

    def _courses(self, part: Part, stream: Stream, scores: Scores) -> Iterator[Course]:
        """The courses of a stream: one, or where layers shall be alike one for each stack with a config value."""
        scopes = [scope for found, scope in self.units if found == stream]
        if not self.settings.uniform:
            yield ranked(part, stream, [self._line(stream, s, scores) for s in scopes], self.settings.normalised)
            return
        homes = [home for home in self.body.fields.names(stream) if home]
        by_home: dict[str, list[str]] = {}
        for scope in scopes:
            by_home.setdefault(next((home for home in homes if encloses(home, scope)), ""), []).append(scope)
        for together in by_home.values():
            yield alike(part, stream, [self._line(stream, scope, scores) for scope in together])

    def _line(self, stream: Stream, scope: str, scores: Scores) -> Line:
        entries = self.body.sizes.units(stream, scope)
        assert entries is not None
        multiple = self.settings.multiple_of if stream in FEED_FORWARD else 1
        routing = self.body.routing if stream == "expert" else None
        apart, least = (routing.groups, routing.scored_by) if routing else (1, 1)
        return line((stream, scope), scores, self.units[stream, scope], entries, multiple, apart, least)


def prunable(model: PreTrainedModel, settings: Pruning) -> Prunable:
    """What of `model` is to be scored; weights are not looked at.

    Raises:
        PlanError: an unknown architecture, a model of several towers without a `part`, or units that it has not.
    """
    found = anatomy(model, part=settings.part)
    refuse_without_tower(found)
    if settings.part is not None and not any(stack.tower for stack in found.stacks):
        raise PlanError(f"part = {settings.part!r}: the model is no model of several towers. Leave it out.")
    layers = [
        f"{stack.path}.{place}"
        for stack in found.stacks
        for place, _ in enumerate(model.get_submodule(stack.path).children())
    ]
    body = anatomy(model, scopes=layers, part=settings.part)
    units: dict[Place, int] = {}
    for part in settings.chosen:
        places = [(stream, scope) for stream in STREAMS[part] for scope in narrowest_scopes(body, stream)]
        for stream, scope in places:
            groups = body.sizes.at(scope).key_value_heads if stream == "query" else 1
            count = groups if groups > 1 else body.sizes.units(stream, scope)
            assert count is not None
            units[stream, scope] = count
        if not places and not settings.optional:
            raise PlanError(f"{part}: the {body.family} model has no such units. Leave it out.")
    if not units:
        raise PlanError(f"The {body.family} model has neither heads nor feed-forward units that could go.")
    return Prunable(model, settings, body, units)


def pruning_example(model: PreTrainedModel) -> dict[str, Any]:
    """Settings that suit a small model, for the examples of methods: half of the heads and feed-forward units, or what
    of that its architecture takes.

    Raises:
        PlanError: it takes none.
    """
    _, tower = example_tower(model)
    tries: list[tuple[Part, ...]] = [("heads", "ffn"), ("ffn",), ("heads", "hidden"), ("heads", "ffn", "hidden")]
    errors = []
    for parts in tries:
        values: dict[str, Any] = {**tower, **dict.fromkeys(parts, 0.5)}
        try:
            found = prunable(model, Pruning.parse(values))
            found.outline("")
        except PlanError as error:
            errors.append(error)
        else:
            return values
    raise errors[1]


class _Courses:
    """The courses of all streams that are pruned, and which states go together."""

    def __init__(self, found: Prunable, courses: list[Course], after: Sequence[Any]) -> None:
        self.found, self.courses, self.after, self.notes = found, courses, after, list[str]()
        self.kept: dict[Place, list[int]] = {}
        """The units that stay, once it is known."""

    def removal(self, method: str, split: Split) -> Removal:
        """What is removed."""
        target = self.found.settings.target
        if target is None:
            asked = self._asked()
            return self._settled(removal(self.found.model, self._edits(asked)), asked)
        self._leave_what_stays()
        kinds = self._kinds()
        shared = split == "worth" and all(kinds)
        chain = self._by_worth(target, kinds) if shared else self._chain(range(len(self.courses)))
        found = self._least(target, chain, method)
        chain = chain[: found.amount]
        gauge = found.gauge
        assert gauge is not None
        if shared:
            done = self._filled(gauge, found, chain[-1], sorted(kinds[1]) if len(kinds[1]) > 1 else ())
        else:
            done = self._exactly(gauge, chain, found)
        return replace(done, gauge=gauge)

    def refuse_impossible(self, method: str) -> None:
        """PlanError for what can't be removed, or not so much of it."""
        target = self.found.settings.target
        if target is None:
            self._edits(self._asked())
            return
        self._leave_what_stays()
        self._least(target, self._chain(range(len(self.courses)))[-1:], method)

    def _leave_what_stays(self) -> None:
        self.courses = [course for course in self.courses if self._can_go(course)]
        if not self.courses:
            raise PlanError(f"Nothing of what a target takes from by itself can go. {' '.join(self.notes)}")

    def _least(self, target: Target, chain: Sequence[Sequence[int]], method: str) -> Removal:
        model = self.found.model
        try:
            return least_removal(model, target, lambda amount: self._edits(chain[amount - 1]), len(chain), method)
        except PlanError as error:
            raise PlanError(" ".join([str(error), *self.notes])) from error

    def _exactly(self, gauge: Gauge, chain: Sequence[list[int]], found: Removal) -> Removal:
        """The removal that leaves no room for one unit more. A step of the chain may be one of large units, which goes
        further than it had to: then as many of the smallest stay as there is room for, with that step or without it,
        whichever leaves shares that are more alike; and of the others what there is still room for.

        Args:
            gauge: tells whether what is asked for is met.
            chain: ever smaller states; the last alone meets the target.
            found: what the last removes.
        """
        places = sorted(range(len(self.courses)), key=lambda place: -len(self.courses[place].left))
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
        if gauge.of(final) > gauge.limit:
            return
        if (more := gauge.of(first)) <= gauge.limit:
            yield first, tries[0]
            return
        done = first_that_meets(gauge, lambda number: self._tried(tries[number], number), (0, more), (last, final))
        assert done.amount is not None
        yield done, tries[done.amount]

    def _tried(self, states: Sequence[int], number: int) -> Removal:
        return removal(self.found.model, self._edits(states), number)

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
        done = cut(self.found.model, self._keep(states), part=self.found.settings.part)
        return [*done.edits, *self.after]

    def _asked(self) -> list[int]:
        """The states for the shares and counts of the settings."""
        amounts: dict[str, int | float] = {
            part: getattr(self.found.settings, part) for part in self.found.settings.chosen
        }
        asked = [self._state(course, amounts[course.name]) for course in self.courses]
        if not any(asked):
            raise PlanError(f"There is nothing to prune: {', '.join(map(self._whole, self.courses))}. Ask for less.")
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
        smaller = self._sizes(course) - {course.left[0]}
        following = f" (the next possible: {max(smaller)})" if smaller else ", since no other number is possible"
        routing = self.found.body.routing if course.name == "experts" else None
        if routing is not None and routing.groups > 1 and not smaller:
            following += f": {routing.groups} groups must keep at least {routing.scored_by} each"
        return f"all of {course.left[0]} {SETTINGS[course.stream]} would stay{following}"

    def _nearest_sizes(self, course: Course, size: int, sizes: Iterable[int]) -> str:
        """Why some number of units is none that can stay."""
        near = sorted(sorted(set(sizes) - {course.left[0]}, key=lambda other: abs(other - size))[:2])
        divided = course.name not in ALONE and size in course.left
        mend = self._mend_of_heads(course, size) if divided and course.name == "heads" else ""
        return (
            f"{course.name} = {size}: that many of {course.left[0]} {SETTINGS[course.stream]} can't stay"
            f"{' beside the other widths' * divided}. The nearest possible: {' or '.join(map(str, near)) or 'none'}."
            f"{mend}"
        )

    def _mend_of_heads(self, course: Course, size: int) -> str:
        """What goes with a number of heads that does not divide the present hidden size."""
        residual, share = self.found.body.sizes.residual, floor(10_000 * size / course.left[0]) / 10_000
        apart = f"heads = {share:g} with uniform = false, by which layers differ"
        if self._place("hidden") is not None:
            return f" Or ask for {apart}."
        return f" Prune hidden, too (hidden = {(residual - 1) // size * size}), or ask for {apart}."

    def _kinds(self) -> list[dict[int, Course]]:
        """The courses of heads, and those of others, by place."""
        courses = dict(enumerate(self.courses))
        heads = {place: course for place, course in courses.items() if course.name == "heads"}
        return [heads, {place: course for place, course in courses.items() if place not in heads}]

    def _by_worth(self, target: Target, kinds: Sequence[Mapping[int, Course]]) -> list[list[int]]:
        """Ever smaller states with the heads with which the least is lost."""
        found = self.found
        shared = Shared(found.model, found.body, found.units, found.settings.part)
        return shared.chain(target, kinds, [[[0] * len(self.courses), *self._chain(kind)] for kind in kinds])

    def _chain(self, places: Iterable[int]) -> list[list[int]]:
        """Ever smaller states of some courses, by one step of one stream at a time where they go alone; the others stay
        as they are."""
        steps = sorted(
            (-self.courses[place].share(state), place, state)
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
        least = [int(other is course) for other in self.courses]
        states = self._nearest(least)
        self._edits(states or least)
        if states is None:
            raise PlanError(
                f"{self._whole(course).capitalize()}. Set uniform = false, or let the target take from hidden."
            )

    # Which numbers of heads go with which hidden sizes ---------------------------------------------------------------

    def _place(self, part: str) -> int | None:
        return next((place for place, course in enumerate(self.courses) if course.name == part), None)

    def _fits(self, heads: int, hidden: int) -> bool:
        """Whether the config takes them, and says them where layers shall be alike."""
        body = self.found.body
        if body.fields.head_dim is None:
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
        free = body.fields.head_dim is not None and not body.heads_divide_hidden_size
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
