"""From scores of units to the units that stay: what every method that prunes widths does once it has its scores.

Units go in the order of their scores, the lowest first, of equal ones the last: what goes at some size goes at every
smaller one. Heads go by key-value groups, a key-value head with all query heads that read it; where all read a single
one, query heads go alone. In every layer something stays.

* **uniform** (the default): every layer keeps as many, so that the family's own config says the size and any runtime
  loads the result. Sizes that the config can't say are none.
* otherwise one ranking goes over all layers, by scores divided by the root of their mean square in the layer
  (`normalised`) or as they are. Layers then differ, which is kept as edits.

Shares are rounded up to the next size that there is. A target takes from all chosen streams alike: the next unit goes
from the stream of which, without it, the largest share is left.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import ceil, isfinite, sqrt
from typing import Any, Literal, Self

from pydantic import Field, StrictFloat, StrictInt, model_validator
from transformers import PreTrainedModel

from auxin.edits.plan import Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.cutting import cut, narrowest_scopes
from auxin.planning.target import Removal, Target, least_removal, removal
from auxin.planning.width_targets import example_tower, refuse_without_tower
from auxin.settings import Settings
from auxin.words.anatomy import Anatomy
from auxin.words.paths import encloses
from auxin.words.widths import FEED_FORWARD, SETTINGS, Stream

Part = Literal["heads", "ffn", "hidden"]
Place = tuple[Stream, str]
"""A stream and a scope."""
Scores = Mapping[Place, Sequence[float]]
"""What every unit is worth, by stream and scope. Of "query" one for each query head, which are added up over a
key-value group, or one for each key-value head with its group. Scores of narrower scopes are added up over a wider one
whose units go together."""
STREAMS: dict[Part, tuple[Stream, ...]] = {"heads": ("query",), "ffn": FEED_FORWARD, "hidden": ("residual",)}
DEFAULT: tuple[Part, ...] = ("heads", "ffn")
"""What a target shrinks where nothing else is said."""


class Pruning(Settings):
    """What stays: shares (0.5, at most 1.0) or counts (whole numbers) of `heads`, `ffn` and `hidden`; or a `target`."""

    heads: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Query heads of a layer that stay. They go with their key-value heads."""
    ffn: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Feed-forward units of a layer that stay; of experts, those of each. Where a model has several sizes (of experts
    and of others), a share of each."""
    hidden: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Units of the residual that stay, the same in all layers."""
    target: Target | None = None
    """How small the model shall be, instead: `target.parameters` or `target.flops`."""
    streams: list[Part] | None = Field(default=None, min_length=1)
    """What the target takes from; None: heads and feed-forward units, where they can go."""
    uniform: bool = True
    """Whether every layer keeps as many."""
    normalised: bool = True
    """Where layers may differ, whether scores are divided by the root of their mean square in the layer."""
    multiple_of: int = Field(default=1, gt=0)
    """The number of feed-forward units that stay is a multiple of this."""
    part: str | None = None
    """Of a model of several towers the one that is pruned: "text" or "vision"."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {name: amount for name in STREAMS if (amount := getattr(self, name)) is not None}
        if self.target is not None and given:
            raise ValueError(f"give target, or {' and '.join(given)}, not both.")
        if self.target is None and not given:
            raise ValueError("give what stays (heads, ffn, hidden), or a target.")
        if self.streams is not None and self.target is None:
            raise ValueError("streams says what a target takes from, and there is no target. Leave it out.")
        if self.streams is not None and len(set(self.streams)) < len(self.streams):
            raise ValueError("streams names one more than once.")
        for name, amount in given.items():
            if isinstance(amount, float) and not amount <= 1:
                raise ValueError(f"{name} = {amount} is no share. Give one up to 1.0, or a whole number of units.")
            if isinstance(amount, int) and not self.uniform and name != "hidden":
                raise ValueError(f"{name} = {amount} would be that of every layer. Give a share, or uniform = true.")
        return self

    @property
    def chosen(self) -> tuple[Part, ...]:
        """What is pruned."""
        if self.target is not None:
            return tuple(self.streams or DEFAULT)
        return tuple(name for name in STREAMS if getattr(self, name) is not None)

    @property
    def optional(self) -> bool:
        """Whether what can't go may stay, since nobody named it."""
        return self.target is not None and self.streams is None


@dataclass(frozen=True)
class Prunable:
    """What of a model can go with some settings."""

    model: PreTrainedModel
    settings: Pruning
    body: Anatomy
    units: dict[Place, int]
    """How many units can go on their own, by place: what is to be scored. Of "query" they are key-value groups, or the
    query heads of a single key-value head."""

    def plan(self, method: str, scores: Scores, seed: int = 0) -> Plan:
        """The plan that leaves the units with the highest scores.

        Args:
            method: its name.
            scores: by place, or by narrower places within.
            seed: of the plan.

        Raises:
            PlanError: scores that are missing or not finite, sizes that the architecture can't have, a target that
                can't be met, or nothing to prune.
        """
        found = _Courses(self, [course for place in self._streams() for course in self._courses(*place, scores)])
        done = found.removal(method)
        return Plan(
            method=method,
            settings=self.settings.model_dump(mode="json", exclude_defaults=True),
            promise="none",
            seed=seed,
            edits=list(done.edits),
            notes=[*found.notes, f"Pruned: {done.reached(self.settings.target)}"],
            made_for=config_values(self.model.config),
        )

    def _streams(self) -> list[tuple[Part, Stream]]:
        pairs = [(part, stream) for part in self.settings.chosen for stream in STREAMS[part]]
        return [(part, stream) for part, stream in pairs if any(found == stream for found, _ in self.units)]

    def _courses(self, part: Part, stream: Stream, scores: Scores) -> "Iterator[_Course]":
        """The courses of a stream: one, or where layers shall be alike one for each stack with a config value."""
        scopes = [scope for found, scope in self.units if found == stream]
        if not self.settings.uniform:
            yield _ranked(part, stream, [self._line(stream, s, scores) for s in scopes], self.settings.normalised)
            return
        homes = [home for home in self.body.fields.names(stream) if home]
        by_home: dict[str, list[str]] = {}
        for scope in scopes:
            by_home.setdefault(next((home for home in homes if encloses(home, scope)), ""), []).append(scope)
        for together in by_home.values():
            yield _alike(part, stream, [self._line(stream, scope, scores) for scope in together])

    def _line(self, stream: Stream, scope: str, scores: Scores) -> "_Line":
        groups = self.units[stream, scope]
        entries = self.body.sizes.units(stream, scope)
        assert entries is not None
        found = _scores_at(stream, scope, scores, groups, entries)
        size = entries // groups
        order = sorted(range(groups), key=lambda group: (found[group], -group))
        multiple = self.settings.multiple_of if stream in FEED_FORWARD else 1
        # The first block leaves a multiple; the last one stays.
        ends = list(range((groups - 1) % multiple + 1, groups, multiple)) if groups > multiple else []
        blocks = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        means = [sum(found[group] for group in block) / len(block) for block in blocks]
        return _Line(
            stream,
            scope,
            entries,
            tuple(tuple(group * size + one for group in block for one in range(size)) for block in blocks),
            tuple(accumulate(means, max)),  # sorted also where rounding of the means says otherwise
            sqrt(sum(score**2 for score in found) / groups),
        )


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
    tries: list[dict[str, Any]] = [{"heads": 0.5, "ffn": 0.5}, {"ffn": 0.5}, {"heads": 0.5, "hidden": 0.5}]
    for values in tries:
        try:
            found = prunable(model, Pruning.parse({**values, **tower}))
            found.plan("", {place: [0.0] * units for place, units in found.units.items()})
        except PlanError as error:
            last = error
        else:
            return {**values, **tower}
    raise last


@dataclass(frozen=True)
class _Line:
    """The units of a stream in one scope, in the order in which they go."""

    stream: Stream
    scope: str
    units: int
    blocks: tuple[tuple[int, ...], ...]
    """What goes at every step; what is in none stays."""
    scores: tuple[float, ...]
    """Of the blocks, rising."""
    scale: float
    """The root of the mean square of all scores."""

    @cached_property
    def left(self) -> tuple[int, ...]:
        """How many units are left after every number of steps, from none on."""
        return tuple(accumulate((-len(block) for block in self.blocks), initial=self.units))

    def kept(self, steps: int) -> list[int]:
        """The units that are left."""
        gone = {unit for block in self.blocks[:steps] for unit in block}
        return [unit for unit in range(self.units) if unit not in gone]


@dataclass(frozen=True)
class _Course:
    """Ever smaller states of a stream, the first of which is the present one."""

    part: Part
    stream: Stream
    lines: tuple[_Line, ...]
    left: tuple[int, ...]
    """Units in every state: of a layer where layers are alike (of the widest before), else of all layers."""
    steps: Callable[[int], list[int]]
    """(state) -> steps of every line."""

    def keep(self, state: int) -> dict[Place, list[int]]:
        """The units that stay in a state."""
        steps = self.steps(state)
        return {(self.stream, line.scope): line.kept(n) for line, n in zip(self.lines, steps, strict=True)}

    def share(self, state: int) -> Fraction:
        """What part of the units is left."""
        return Fraction(self.left[state], self.left[0])

    def state(self, amount: int | float, sizes: Collection[int]) -> int:
        """The state for an amount that stays.

        Args:
            amount: a share, or a number of units.
            sizes: those that the architecture takes.
        """
        if isinstance(amount, float):
            least = ceil(Fraction(str(amount)) * self.left[0])
            return max(state for state, left in enumerate(self.left) if left >= least and left in sizes)
        if amount not in sizes:
            near = sorted(sorted(sizes, key=lambda size: abs(size - amount))[:2])
            raise PlanError(
                f"{self.part} = {amount}: the {SETTINGS[self.stream]} of {self.left[0]} can't become that here. The "
                f"nearest possible: {' or '.join(map(str, near))}."
            )
        return self.left.index(amount)


def _alike(part: Part, stream: Stream, lines: list[_Line]) -> _Course:
    """Every layer keeps as many; those that have fewer already keep what they have."""
    widest = max(lines, key=lambda line: line.units)

    def steps(state: int) -> list[int]:
        size = widest.left[state]
        return [
            next(step for step, left in enumerate(line.left) if left <= size or left == line.left[-1]) for line in lines
        ]

    return _Course(part, stream, tuple(lines), widest.left, steps)


def _ranked(part: Part, stream: Stream, lines: list[_Line], normalised: bool) -> _Course:
    """The blocks of all layers in one ranking."""
    scored = [
        (score / line.scale if normalised and line.scale else score, place, step)
        for place, line in enumerate(lines)
        for step, score in enumerate(line.scores)
    ]
    ranking = [(place, step) for _, place, step in sorted(scored)]
    total = sum(line.units for line in lines)
    gone = (-len(lines[place].blocks[step]) for place, step in ranking)

    def steps(state: int) -> list[int]:
        counts = Counter(place for place, _ in ranking[:state])
        return [counts[place] for place, _ in enumerate(lines)]

    return _Course(part, stream, tuple(lines), tuple(accumulate(gone, initial=total)), steps)


class _Courses:
    """The courses of all streams that are pruned, and which states go together."""

    def __init__(self, found: Prunable, courses: list[_Course]) -> None:
        self.found, self.notes = found, list[str]()
        self.courses = courses
        self.courses = [course for course in courses if self._can_go(course)]
        if not self.courses:
            raise PlanError(" ".join(self.notes))

    def removal(self, method: str) -> Removal:
        """What is removed."""
        model, target = self.found.model, self.found.settings.target
        if target is None:
            return removal(model, self._edits(self._asked()))
        chain = self._chain()
        return least_removal(model, target, lambda amount: self._edits(chain[amount - 1]), len(chain), method)

    def _edits(self, states: Sequence[int]) -> list[Any]:
        keep: dict[Place, list[int]] = {}
        for course, state in zip(self.courses, states, strict=True):
            keep |= course.keep(state) if state else {}
        return cut(self.found.model, keep, part=self.found.settings.part).edits

    def _asked(self) -> list[int]:
        """The states for the shares and counts of the settings."""
        amounts = {part: getattr(self.found.settings, part) for part in self.found.settings.chosen}
        for part, amount in amounts.items():
            sizes = sorted({course.left[0] for course in self.courses if course.part == part})
            if isinstance(amount, int) and len(sizes) > 1:
                raise PlanError(f"{part} = {amount}: this model has several sizes of it ({sizes}). Give a share.")
        wanted = [course.state(amounts[course.part], self._sizes(course)) for course in self.courses]
        heads = self._place("heads")
        states = self._together([state if place == heads else 0 for place, state in enumerate(wanted)], wanted)
        for course, state, other in zip(self.courses, wanted, states or wanted, strict=True):
            if state != other and isinstance(amounts[course.part], int):
                raise PlanError(
                    f"{course.part} = {course.left[state]} does not go with these heads, whose number divides it in "
                    f"this architecture. The nearest possible: {course.left[other]}."
                )
        if not any(states or wanted):
            told = [f"{course.left[0]} {SETTINGS[course.stream]} would stay" for course in self.courses]
            raise PlanError(f"There is nothing to prune: all of {', '.join(told)}. Ask for less.")
        return states or wanted  # those that do not go together are refused by `cut`, with what would do

    def _chain(self) -> list[list[int]]:
        """Ever smaller states of all courses, by one step of one stream at a time where they go alone."""
        steps = sorted(
            (-course.share(state), place, state)
            for place, course in enumerate(self.courses)
            for state in range(1, len(course.left))
        )
        chain, wanted = [[0] * len(self.courses)], [0] * len(self.courses)
        for _, place, state in steps:
            wanted[place] = state
            states = self._together(chain[-1], wanted)
            if states is not None and states != chain[-1]:
                chain.append(states)
        return chain[1:]

    def _can_go(self, course: _Course) -> bool:
        """Whether some of its units can go; where they can't and need not, the reason becomes a note."""
        try:
            self._check(course)
        except PlanError as error:
            if not self.found.settings.optional:
                raise
            self.notes.append(f"{course.part} stay: {error}")
            return False
        return True

    def _check(self, course: _Course) -> None:
        if len(course.left) == 1:
            multiple = f" that are a multiple of {self.found.settings.multiple_of}" * (course.part == "ffn")
            raise PlanError(f"{course.part}: {course.left[0]} {SETTINGS[course.stream]} can't become fewer{multiple}.")
        least = [int(other is course) for other in self.courses]
        states = self._nearest(least)
        cut(
            self.found.model,
            {
                place: units
                for other, state in zip(self.courses, states or least, strict=True)
                if state
                for place, units in other.keep(state).items()
            },
            part=self.found.settings.part,
        )
        if states is None:
            raise PlanError(
                f"{course.part}: no smaller number than {course.left[0]} goes with the hidden size of "
                f"{self.found.body.sizes.residual}, which heads divide in this architecture's config. Prune hidden, "
                "too, or set uniform = false."
            )

    # Which numbers of heads go with which hidden sizes ---------------------------------------------------------------

    def _place(self, part: Part) -> int | None:
        return next((place for place, course in enumerate(self.courses) if course.part == part), None)

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

    def _states(self, part: Part) -> range:
        place = self._place(part)
        return range(0 if place is None else len(self.courses[place].left))

    def _sizes(self, course: _Course) -> set[int]:
        """The sizes of a course that the architecture takes, with some of its partner."""
        if course.part == "ffn":
            return set(course.left)
        place = self._place(course.part)
        pairs = self._pairs(self._states("heads"), self._states("hidden"))
        return {course.left[pair[place]] for pair in pairs if place is not None}

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


def _scores_at(stream: Stream, scope: str, scores: Scores, groups: int, entries: int) -> list[float]:
    """What the units that go together are worth in a scope."""
    inner = [found for (name, place), found in scores.items() if name == stream and encloses(scope, place)]
    given = [scores[stream, scope]] if (stream, scope) in scores else inner
    where = f"{stream} of {scope}" if scope else stream
    if not given:
        raise PlanError(f"There are no scores for the units of {where}.")
    total = [0.0] * groups
    for found in given:
        if len(found) not in (groups, entries):
            raise PlanError(f"There are {len(found)} scores for the units of {where}, of which there are {groups}.")
        size = len(found) // groups
        total = [total[group] + sum(found[group * size : (group + 1) * size]) for group in range(groups)]
    if not all(map(isfinite, total)):
        raise PlanError(f"Scores for the units of {where} are not finite, so that none can be called the lowest.")
    return total
