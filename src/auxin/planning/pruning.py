"""From scores of units to the units that stay: what every method that prunes widths does once it has its scores.

Units go in the order of their scores, the lowest first, of equal ones the last: what goes at some size goes at every
smaller one. Heads go by key-value groups, a key-value head with all query heads that read it; where all read a single
one, query heads go alone. Experts in groups go one of each at a time, so that the groups stay alike. In every layer
something stays.

* **uniform** (the default): every layer keeps as many, so that the family's own config says the size and any runtime
  loads the result. Sizes that the config can't say are none. Where it says none, since stages differ (SegFormer,
  ResNet), every layer of a stage keeps as many, and of all stages the same share.
* otherwise one ranking goes over all layers, by scores standardised within the layer (`normalised`: less their mean, by
  their standard deviation, as in FLAP, arXiv 2312.11983) or as they are. Layers then differ, which is kept as edits. A
  note names those that keep less than a tenth of their units. Scores by the root of their mean square would empty a
  layer in which a few are far above the others: those few are all that the scale tells of. Ranks within the layer
  would leave all layers alike.

Shares are rounded up to the next size that there is. A target takes from all chosen streams alike: the next unit goes
from the stream of which, without it, the largest share is left; at the end the smallest units make up the difference,
so that no unit more could stay. Where the scores of streams are of one kind, a method may have it take so that the
least of them is lost (`auxin.planning.shared_limit`), or by one ranking of all of them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from transformers import PreTrainedModel

from auxin.edits.kinds.architecture_edits import SetConfig
from auxin.edits.kinds.module_edits import ConfigureModule
from auxin.edits.plan import Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.compensation import Compensation
from auxin.planning.cutting import narrowest_scopes
from auxin.planning.folding import Folding
from auxin.planning.kept_paths import is_kept, refuse_impossible
from auxin.planning.pruned_sublayers import pruned_sublayers
from auxin.planning.pruning_settings import STREAMS, Part
from auxin.planning.pruning_settings import Pruning as Pruning
from auxin.planning.target import Removal
from auxin.planning.unit_order import Course, Line, Place, Scores, alike, line, ranked
from auxin.planning.width_removal import Courses, Split, Subject
from auxin.planning.width_targets import example_tower, refuse_without_tower
from auxin.words.anatomy import Anatomy
from auxin.words.paths import encloses
from auxin.words.widths import FEED_FORWARD, SETTINGS, Stream

COARSE = Fraction(2, 100)
"""Of the model: where more goes than that beyond a target, a finding says so."""
LEAST = 0.1
"""Of a layer's units: where a ranking leaves a smaller share, a note says so."""


class Prunable(Subject):
    """What of a model can go with some settings."""

    def plan(
        self,
        method: str,
        scores: Scores,
        seed: int = 0,
        split: Split = "alike",
        given_back: Compensation | None = None,
        folded: Folding | None = None,
        findings: Sequence[str] = (),
    ) -> Plan:
        """The plan that leaves the units with the highest scores.

        Args:
            method: its name.
            scores: by place, or by narrower places within.
            seed: of the plan.
            split: how a target takes from several streams.
            given_back: biases that what stays gets for what goes.
            folded: factors that what stays gets.
            findings: what was found beside the size.

        Raises:
            PlanError: scores that are missing or not finite, sizes that the architecture can't have, a target that
                can't be met, or nothing to prune.
        """
        given = given_back or Compensation(self.model)
        found = self._all_courses(scores, given)
        done = found.removal(method, split)
        gone = self.whole.gone(found.kept) if self.whole is not None else []
        shifts, files = given.shifts(found.kept)
        folds, factors = folded.edits(found.kept) if folded else ([], [])
        first = self.preparation
        files = [*(first.files if first else ()), *factors, *files]
        folder = first.folder if first else folded.folder if folded and factors else given.folder
        return Plan(
            method=method,
            settings=self.settings.model_dump(mode="json", exclude_defaults=True),
            promise="none",
            seed=seed,
            edits=[*folds, *done.edits, *shifts],
            files=files,
            notes=[
                *found.notes,
                *self._notes_on_emptied(found.kept, gone),
                *self._notes_on_config(done.edits),
                *given.notes,
            ],
            findings=[
                *done.findings(self.settings.target),
                *([f"Gone as a whole: {', '.join(gone)}."] if gone else []),
                *findings,
                *self._about_coarse_steps(done),
            ],
            made_for=config_values(self.model.config),
        ).beside(folder if files else None)

    def outline(self, method: str, given_back: Compensation | None = None) -> Plan:
        """A plan that leaves any units: sizes do not depend on which go where all layers keep as many.

        Args:
            method: its name.
            given_back: as in `plan`.

        Raises:
            PlanError: as `plan`.
        """
        return self.plan(method, self._no_scores(), given_back=given_back)

    def refuse_impossible(self, method: str, given_back: Compensation | None = None) -> list[Stream]:
        """What `plan` refuses whatever the scores are, for methods whose scores take long; it takes less than a plan.
        Returns the streams of which something can go: what nobody named may have to stay.

        Args:
            method: its name.
            given_back: as in `plan`.

        Raises:
            PlanError: as `plan`.
        """
        given = given_back or Compensation(self.model)
        return self._all_courses(self._no_scores(), given).refuse_impossible(method)

    def _no_scores(self) -> Scores:
        return {place: [0.0] * units for place, units in self.units.items()}

    def _all_courses(self, scores: Scores, given: Compensation) -> Courses:
        found, gone = [], list[str]()
        amount, target = self.settings.parts_left, self.settings.target
        if self.whole is not None and amount is not None:
            # A share of units is one of what stays, so that which sublayers go is told first.
            found = [self.whole.course(scores, amount)]
            gone = [] if target is not None else self.whole.gone(found[0].keep(len(found[0].moves)))
        courses = [course for place in self._streams() for course in self._courses(*place, scores, gone)]
        return Courses(self, [*courses, *found], given.edits)

    def _about_coarse_steps(self, done: Removal) -> Iterator[str]:
        """That much less is left than was asked for, since units go many at a time, and whether others would come
        nearer."""
        if self.settings.target is None:
            return
        gauge, left, parts = self.gauge, self.gauge.of(done), self.settings.chosen
        if gauge.limit - Fraction(left) <= COARSE * Fraction(gauge.have):
            return
        yield (
            f"{gauge.target} allows {gauge.target.in_words(gauge.limit)}, and {gauge.target.in_words(left)} "
            f"({left / gauge.have:.1%}) are left, since {' and '.join(parts)} go in large steps."
            + (" Feed-forward units alone come nearer: streams = [ffn]." if self._alone("ffn") else "")
        )

    def _alone(self, part: Part) -> bool:
        """Whether a target can be met by units of one part instead of several."""
        if part in self.refused or part not in self.settings.chosen or len(self.settings.chosen) == 1:
            return False
        try:
            settings = self.settings.model_copy(update={"streams": [part]})
            prunable(self.model, settings, self.refused).refuse_impossible("")
        except PlanError:
            return False
        return True

    def _notes_on_emptied(self, kept: Mapping[Place, Sequence[int]], gone: Collection[str]) -> Iterator[str]:
        """Which layers one ranking has left hardly anything of."""
        if self.settings.uniform:
            return
        few = []
        for (stream, scope), units in kept.items():
            if stream == "sublayer" or (self.whole is not None and self.whole.takes_along((stream, scope), gone)):
                continue
            have = self.body.sizes.units(stream, scope)
            if scope and have is not None and len(units) < LEAST * have:
                few.append(f"{scope} {len(units):,} of {have:,} ({SETTINGS[stream]})")
        if few:
            yield (
                f"The ranking leaves less than a tenth of some layers: {', '.join(few)}. Compare the loss with that of "
                "uniform = true."
            )

    def _notes_on_config(self, edits: Sequence[Any]) -> Iterator[str]:
        """What is to be known of the values that the config, or that of some modules, gets."""
        said = {name: value for edit in edits if isinstance(edit, SetConfig) for name, value in edit.values.items()}
        if (name := self.body.fields.unsaid_head_dim) in said:
            yield (
                f"The config gets {name} = {said[name]}, which it did not say before: hidden size / heads is another "
                f"number now. transformers' code for {self.body.family} reads it; another program, or an older "
                "release, may still divide, and would fail on the shapes of the weights. Try yours on the result."
            )
        yield from self._notes_on_experts(edits)

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

    def _courses(self, part: Part, stream: Stream, scores: Scores, gone: Collection[str]) -> Iterator[Course]:
        """The courses of a stream: one, or where layers shall be alike one for each stack with a config value, or with
        widths that no value says. Without the units of sublayers that are gone, where layers may differ."""
        scopes = [scope for found, scope in self.units if found == stream]
        if not self.settings.uniform:
            if self.whole is not None:
                scopes = [scope for scope in scopes if not self.whole.takes_along((stream, scope), gone)]
            if not scopes:
                return
            yield ranked(part, stream, [self._line(stream, s, scores) for s in scopes], self.settings.normalised)
            return
        homes = [home for home in self.body.fields.names(stream) if home]
        if self.body.fields.of_layers:
            homes = [stack.path for stack in self.body.stacks]
        by_home: dict[str, list[str]] = {}
        for scope in scopes:
            by_home.setdefault(next((home for home in homes if encloses(home, scope)), ""), []).append(scope)
        courses = [
            alike(part, stream, [self._line(stream, scope, scores) for scope in together])
            for together in by_home.values()
        ]
        # A stage of one head keeps it, whatever goes in others.
        yield from [course for course in courses if course.moves] or courses

    def _line(self, stream: Stream, scope: str, scores: Scores) -> Line:
        entries = self.body.sizes.units(stream, scope)
        assert entries is not None
        multiple = self.settings.multiple_of if stream in FEED_FORWARD else 1
        routing = self.body.routing if stream == "expert" else None
        apart, least = (routing.groups, routing.scored_by) if routing else (1, 1)
        found = line((stream, scope), scores, self.units[stream, scope], entries, multiple, apart, least)
        return replace(found, blocks=(), scores=(), standings=()) if is_kept(scope, self.settings.keep) else found


def prunable(model: PreTrainedModel, settings: Pruning, refused: Mapping[Part, str] | None = None) -> Prunable:
    """What of `model` is to be scored; weights are not looked at.

    Args:
        model: the model, on any device.
        settings: what stays.
        refused: what the method can't take from, and why, in sentences. Nobody is advised to ask for it.

    Raises:
        PlanError: an unknown architecture, a model of several towers without a `part`, units that it has not, or what
            is refused.
    """
    refused = refused or {}
    if other := next((part for part in settings.chosen if part in refused), None):
        raise PlanError(f"{other}: {refused[other]}")
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
    whole = pruned_sublayers(model, settings.keep) if settings.parts_left is not None else None
    parts = [one.path for one in whole.chosen] if whole is not None and not units else []
    refuse_impossible(settings.keep, [*(scope for _, scope in units), *parts], "a layer")
    _refuse_wider(settings, body, units, layers)
    if whole is not None:
        units |= whole.units
    if not units:
        raise PlanError(f"The {body.family} model has neither heads nor feed-forward units that could go.")
    return Prunable(model, settings, body, units, whole=whole, refused=refused)


def _refuse_wider(settings: Pruning, body: Anatomy, units: Iterable[Place], layers: Sequence[str]) -> None:
    """PlanError where something of what is to be kept can only go in several layers at once."""
    for pattern in settings.keep:
        named = [layer for layer in layers if is_kept(layer, [pattern])] or [pattern]
        for stream, scope in units:
            inside = next((path for path in named if encloses(scope, path)), None)
            if stream == "residual" or inside is None or is_kept(scope, [pattern]):
                continue
            part = next(part for part in settings.chosen if stream in STREAMS[part])
            where = scope or "the model"
            raise PlanError(
                f"keep: {pattern!r}: in the {body.family} architecture the {part} of {inside} can't stay while those "
                f"of other layers of {where} go. Leave {part} out"
                + (f", or keep {scope}." if scope else ", or keep nothing.")
            )


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
