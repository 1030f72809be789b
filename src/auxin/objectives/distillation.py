"""Distillation: learn from what a teacher answers, beside what the text says.

With student logits s and teacher logits t at a target, and a temperature T, the loss of a target is

    (1 - weight) * loss of the wrapped objective + weight * T^2 * KL(softmax(t / T) || softmax(s / T))

which is Hinton et al. (arXiv 1503.02531, section 2; their cross-entropy and this KL have one gradient, and T^2 keeps
its size whatever T is). To it are added, as they are asked for,

- `hidden_states` times the mean squared difference of the layers' outputs, the term of TinyBERT (arXiv 1909.10351,
  equation 8): of equal widths, of units that the changes between the two models made of one another, or with
  `projected` of what the best affine map makes of the student's. TinyBERT learns that map beside the student; here it
  is fitted on each batch, which is where the learning of a map ends, and leaves no state behind;
- `attentions` times that of their attention maps, which need equally many heads. TinyBERT's equation 7 takes the scores
  before the softmax; the maps are what all of transformers' models give;
- `relations` times the distance of MiniLM, for models of any widths and numbers of heads: `auxin.objectives.relations`.

Layers are those that the changes between the two models made one of the other, as DistilBERT (arXiv 1910.01108) takes
every second one; what is compared is the mean over layers, where TinyBERT sums. Relations are those of one layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting.flops import forward_flops
from auxin.data.dataset import SampleForm
from auxin.errors import CheckpointError, ConfigError
from auxin.models.eager import eager_attention
from auxin.models.loading import task_classes
from auxin.objectives.layer_matching import (
    check_shapes,
    fitted,
    layers_of,
    mean_squared_distance,
    paired_layers,
    watched_layers,
)
from auxin.objectives.objective import Objective, Reference, References
from auxin.objectives.relations import Relations
from auxin.objectives.wrapping import Wrapping, WrappingSettings


class Distillation(WrappingSettings):
    """Learn from a teacher's answers and, where asked for, from its layers. Losses that are measured are those of the
    wrapped objective; FLOPs count the teacher's forward pass."""

    kind: Literal["distillation"] = "distillation"
    """Says that this is distillation."""
    teacher: str = Field(min_length=1)
    """The model to learn from: "branch/stage" of the recipe, done before, or a checkpoint's folder. It has to know the
    student's tokens; of a larger vocabulary the first rows count."""
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """T: the logits of both are divided by it; above 1 the unlikely answers count more."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Of the teacher's answers; the rest is that of the wrapped objective's own loss."""
    hidden_states: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Factor on the mean squared difference between the outputs of paired layers, which have to be equally wide; or the
    student's units are cut or copied from the teacher's by the changes in between, and are compared with those."""
    projected: bool = False
    """Whether the student's hidden states are mapped to the teacher's, by the best affine map on the batch, before they
    are compared: widths may differ. A batch, or a part of one, should have several times as many tokens as the student
    has units, or the map fits whatever is there."""
    attentions: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Factor on the mean squared difference between the attention maps of paired layers, which need equally many heads.
    While the student learns, attention of both models is computed eagerly, which is slower."""
    layers: dict[NonNegativeInt, NonNegativeInt] | None = None
    """Which layers are paired, student's first, counted from 0 and an encoder's before its decoder's. None: those that
    the changes between teacher and student made one of the other; where none are known, equal numbers."""
    relations: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Factor on the divergence of the relations of tokens (MiniLMv2) in one attention of each model: of their queries,
    of their keys and of their values among each other. Widths and numbers of heads may differ."""
    relation_heads: PositiveInt | None = None
    """Into how many relation heads queries, keys and values of both models are split, of which it has to divide the
    widths; more of them say more, and take memory each. None: the greatest number that divides the numbers of heads,
    those of keys and values too, of both."""
    relation_layers: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """The layers whose relations are compared, the student's and the teacher's, numbered as in `layers`. None: the
    last of each."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.layers is not None and not (self.hidden_states or self.attentions):
            raise ValueError("layers says what hidden_states and attentions compare, and both are 0. Leave it out")
        if self.projected and not self.hidden_states:
            raise ValueError("projected says how hidden_states are compared, which is 0. Leave it out, or set it to 1")
        for name in ("relation_heads", "relation_layers"):
            if getattr(self, name) is not None and not self.relations:
                raise ValueError(f"{name} says what relations compares, which is 0. Leave it out, or set relations: 1")
        if self.objective.references():
            raise ValueError(
                f"objective: {self.objective.kind!r} goes by another model itself. Give one that does not, such as "
                "causal"
            )
        return self

    @property
    def asks_the_teacher(self) -> bool:
        """Whether anything of the teacher's counts."""
        return bool(self.weight or self.hidden_states or self.attentions or self.relations)

    def references(self) -> tuple[str, ...]:
        """The teacher."""
        return (self.teacher,)

    def _bound(self, config: PreTrainedConfig, form: SampleForm, references: References) -> Objective:
        wrapped = self.objective.bind(config, form)
        reference = references.get(self.teacher) or self._read()
        teacher = reference.model
        where = f"objective: teacher: {self.teacher!r}: "
        try:
            self.objective.bind(teacher.config, form)
        except ConfigError as error:
            raise ConfigError(where + str(error)) from error
        expected = task_classes(self.objective.auto_class(form), teacher.config)
        if expected and not isinstance(teacher, expected):
            raise ConfigError(
                f"{where}a {type(teacher).__name__} does not answer what {self.objective.kind!r} asks. Give a teacher "
                "that has learnt that."
            )
        if form.labels is not None and teacher.config.num_labels != config.num_labels:
            raise ConfigError(
                f"{where}it tells {teacher.config.num_labels} classes apart, and the student {config.num_labels}. Give "
                "a teacher of the same classes."
            )
        return DistillationObjective(self, wrapped, reference)

    def _read(self) -> Reference:
        try:
            return Reference.read(self.teacher)
        except CheckpointError as error:
            raise ConfigError(f"objective: teacher: {error}") from error


class DistillationObjective(Wrapping):
    """The wrapped objective's inputs, on which a teacher is asked too.

    Args:
        settings: the settings.
        wrapped: the wrapped objective, bound to the student.
        reference: the teacher.
    """

    def __init__(self, settings: Distillation, wrapped: Objective, reference: Reference) -> None:
        super().__init__(wrapped)
        self.adds_up &= not settings.projected  # a map is fitted to each part
        self.sees_heads |= bool(settings.attentions or settings.relations)
        self.settings, self.reference, self.teacher = settings, reference, reference.model
        self._watch: _Watch | None = None

    def loss(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean loss over the targets, as the module says it."""
        settings = self.settings
        if not settings.asks_the_teacher:
            return self.wrapped.loss(model, inputs)
        if self._watch is None:
            assert isinstance(model, PreTrainedModel), "What stands for a model learns within `learning`."
            with self.learning(model):
                return self.loss(model, inputs)
        watch = self._watch
        maps = {"output_attentions": True} if settings.attentions else {}
        answers: list[Any] = []

        def overheard(**arguments: Any) -> Any:
            answers.append(model(**arguments, **maps))
            return answers[-1]

        loss = (1 - settings.weight) * self.wrapped.loss(overheard, inputs)
        with torch.no_grad():
            told = self.teacher(**inputs, **self.call, **maps)
        if settings.weight:
            loss = loss + settings.weight * self.soft_loss(self.logits(answers[-1]), self.logits(told), inputs)
        weights, mask = self.sample_targets(inputs), inputs.get("attention_mask")
        if watch.pairs:
            loss = loss + watch.distance(settings, answers[-1], told, weights, mask)
        if watch.relations is not None:
            loss = loss + settings.relations * watch.relations(weights, mask)
        return loss

    def soft_loss(self, logits: Tensor, told: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """T^2 KL(teacher || student) at temperature T, the mean over the targets, float32.

        Args:
            logits: the student's.
            told: the teacher's. Of more classes than the student's the first ones count; classes that the teacher lacks
                are impossible to it.
            inputs: of both.
        """
        temperature = self.settings.temperature
        ours = (self.at_targets(logits, inputs)[0].float() / temperature).log_softmax(-1)
        theirs = self.at_targets(told, inputs)[0][:, : ours.shape[-1]].float()
        log_told = (theirs / temperature).log_softmax(-1)
        divergence = log_told.exp() * (log_told - ours[:, : log_told.shape[-1]])
        return temperature**2 * divergence.sum(-1).mean()

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a student or a teacher that the wrapped objective refuses; ConfigError."""
        self.wrapped.check(model)
        try:
            self.wrapped.check(self.teacher)
        except ConfigError as error:
            raise ConfigError(f"objective: teacher: {self.settings.teacher!r}: {error}") from error

    def training_flops(self, model: nn.Module) -> float:
        """FLOPs of learning from one sample: the wrapped objective's, the teacher's forward pass, and the products that
        maps and relations are.

        Raises:
            ConfigError: layers that are to be compared can't be.
        """
        inputs = {**self.example(1), **self.call}
        mapped = 0.0
        if pairs := self._pairs(model):
            assert isinstance(model, PreTrainedModel)
            hidden, attentions = bool(self.settings.hidden_states), bool(self.settings.attentions)
            units, projected = self.reference.units, self.settings.projected
            mapped = check_shapes(model, self.teacher, pairs, inputs, hidden, attentions, units, projected)
        asked = forward_flops(self.teacher, inputs) if self.settings.asks_the_teacher else 0.0
        if (relations := self._relations(model)) is not None:
            asked += relations.flops(inputs)
        return self.wrapped.training_flops(model) + asked + mapped

    def describe(self) -> dict[str, str]:
        """Whom the student learns from."""
        return {**self.wrapped.describe(), "teacher": self.settings.teacher}

    def identity(self) -> dict[str, str]:
        """The teacher's weights."""
        return {**self.wrapped.identity(), "teacher": self.reference.fingerprint}

    @contextlib.contextmanager
    def learning(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the context, the teacher is on the student's device and layers that are compared are listened to."""
        nn.Module.to(self.teacher, model.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.wrapped.learning(model))
            if self.settings.attentions:
                for either in (model, self.teacher):
                    stack.enter_context(eager_attention(either))
            self._watch = _Watch(model, self.reference, self._pairs(model), self._relations(model), stack)
            try:
                yield
            finally:
                self._watch = None

    def _pairs(self, model: nn.Module) -> dict[int, int]:
        """The layers that are compared."""
        if not (self.settings.hidden_states or self.settings.attentions):
            return {}
        assert isinstance(model, PreTrainedModel)
        return paired_layers(model, self.teacher, self.settings.layers, self.reference.layers)

    def _relations(self, model: nn.Module) -> Relations | None:
        """What is compared of one attention of each; None where nothing is."""
        if not self.settings.relations:
            return None
        assert isinstance(model, PreTrainedModel)
        return Relations(model, self.teacher, self.settings.relation_layers, self.settings.relation_heads)


class _Watch:
    """Listens to the paired layers of two models, and to the attentions whose relations are compared."""

    def __init__(
        self,
        student: PreTrainedModel,
        reference: Reference,
        pairs: dict[int, int],
        relations: Relations | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.student, self.reference, self.pairs = student, reference, pairs
        self.ours = stack.enter_context(watched_layers(student, list(pairs))) if pairs else {}
        self.theirs = stack.enter_context(watched_layers(reference.model, list(pairs.values()))) if pairs else {}
        self.relations = None if relations is None else stack.enter_context(relations.watched())

    def distance(self, settings: Distillation, answer: Any, told: Any, weights: Tensor, mask: Tensor | None) -> Tensor:
        """What the layers of the run before add to the loss."""
        pairs, maps = self.pairs, bool(settings.attentions)
        ours = layers_of(self.student, self.ours, answer if maps else None, list(pairs), "student")
        theirs = layers_of(self.reference.model, self.theirs, told if maps else None, list(pairs.values()), "teacher")
        if not settings.projected:
            theirs = theirs.of_units(self.reference.units)
        device = next(iter(ours.hidden.values())).device
        weights = weights.to(device)
        total = torch.zeros((), device=device)
        if settings.hidden_states:
            hidden = fitted(ours.hidden, theirs.hidden, pairs, weights, mask) if settings.projected else ours.hidden
            distance = mean_squared_distance(hidden, theirs.hidden, pairs, weights, mask)
            total = total + settings.hidden_states * distance
        if settings.attentions:
            distance = mean_squared_distance(ours.attentions, theirs.attentions, pairs, weights, mask)
            total = total + settings.attentions * distance
        return total


OBJECTIVE = Distillation
