"""What a stage learns: what is made of a batch for it, the loss, and what that costs.

An objective is written in two parts. Its settings (`ObjectiveSettings`) are data: they stand in a recipe, and tell
what kind of model can learn this. Bound to a model's config and to what the data's samples look like, they become an
`Objective`, which the loop, the prices, the measures and the calibration use and of which they know nothing more.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting.flops import BACKWARD_PER_FORWARD, forward_flops
from auxin.accounting.inputs import text_length
from auxin.data.dataset import SampleForm
from auxin.errors import ConfigError
from auxin.models.fingerprint import weights_fingerprint
from auxin.models.loading import REFUSALS, load_model, skeleton
from auxin.settings import Settings
from auxin.words.one_of import kinds_of
from auxin.words.registry import Registry

IGNORED = -100
"""The label of what is not predicted, as everywhere in transformers."""
NOT_A_NUMBER = -1
"""In place of a class, or of an answer's tokens, that a model has not named, since its logits are not numbers."""
Answers = Literal["classes", "spans"]
"""What a model's answers are: a class of several, or a part of a text."""
_LEARNT = {
    "start_positions": "question_answering",
    "labels": "classification",
    "input_ids": "causal (or masked_language, span_corruption)",
}
"""By something that samples hold, the objectives that learn from such."""
HELD_OUT_SEED = 0
"""The noise of held-out inputs is the same for every model and every seed of training."""


@dataclass(frozen=True)
class Reference:
    """Another model that an objective goes by, such as a teacher; it is frozen and put into evaluation mode."""

    model: PreTrainedModel
    """On the meta device where only a price is asked for."""
    fingerprint: str
    """Hex SHA-256 of its weights; it is part of what a run is."""
    layers: Mapping[int, int] | None = None
    """By a layer's number in the model that learns, the layer of this model that it was made from by the changes in
    between; None where no changes are known to lie between them. Layers are numbered as by `layer_paths`."""
    units: Sequence[int] | None = None
    """By a unit's number in the residual stream of the model that learns, the unit of this model's that it was made
    from; None where they are the same ones, some were made from none, or that is not known."""

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The model of a checkpoint's folder, in the type that its weights were saved in; CheckpointError where it
        can't be loaded."""
        model = load_model(folder)
        return cls(model, weights_fingerprint(model))


References = Mapping[str, Reference]
"""By the name that an objective's settings give."""


class Objective:
    """An objective for one model and one kind of sample. This base has what most share: inputs with `labels`, a model
    that computes the mean loss over them itself, and logits with one row for each label.

    Args:
        config: of the model that learns.
        form: of the samples.
    """

    target: ClassVar[str] = "token"
    """What a loss is a mean over, in the singular."""
    shifted: ClassVar[bool] = False
    """Whether the logits of a place are those of the label after it."""
    whole_text: ClassVar[bool] = False
    """Whether the losses are those of every token of a text given those before it, so that they measure compression."""
    answers: ClassVar[Answers] = "classes"
    """What measures may ask for: `predictions`, or `spans`."""
    noisy: ClassVar[bool] = False
    """Whether `inputs` draws from the noise."""
    adds_up: bool = True
    """Whether a batch's loss is the mean of that of its parts, weighed by their targets, so that how it is cut changes
    nothing but rounding."""
    sees_heads: bool = False
    """Whether it looks into attentions, so that a process that learns by it needs all their heads."""
    call: ClassVar[dict[str, Any]] = {}
    """Further keyword arguments of the model's forward pass."""

    def __init__(self, config: PreTrainedConfig, form: SampleForm) -> None:
        self.config, self.form = config, form

    def inputs(self, batch: Mapping[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        """What the model is called with to learn from a batch of samples, `labels` among it, the samples along the
        first axis of each.

        Args:
            batch: as the data gives it.
            noise: for what is random; each sample takes equally many numbers from it, so that batches of any size, one
                after the other, get the noise that they would get together.
        """
        raise NotImplementedError

    def example(self, samples: int) -> dict[str, Tensor]:
        """Inputs of the shapes that `inputs` gives, all zero, on which costs are counted."""
        raise NotImplementedError

    def targets(self, inputs: Mapping[str, Tensor]) -> int:
        """How many targets the loss of these inputs is a mean over."""
        return int(self.sample_targets(inputs).sum())

    def sample_targets(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """How many of them each sample has, (samples,)."""
        return (self._labels(inputs) != IGNORED)[:, None].flatten(1).sum(1)

    def loss(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean loss over the targets of `inputs`, in nats, to be minimized: that of the model's own head, with
        whatever the model adds to it. Times `targets` it is a sum, by which parts of a batch are put together."""
        loss: Tensor = model(**inputs, **self.call).loss
        return loss

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of each target in nats, float32, (targets,): what is measured on held-out data."""
        logits, labels = self._logits_and_labels(model, inputs)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    def predictions(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The likeliest class of each target, NOT_A_NUMBER where its logits are none, and the right one, (targets,)."""
        logits, labels = self._logits_and_labels(model, inputs)
        # The largest of numbers that are none is the first of them, which would pass for an answer.
        return logits.argmax(-1).masked_fill(logits.isnan().any(-1), NOT_A_NUMBER), labels

    def spans(self, model: nn.Module, inputs: Mapping[str, Tensor], context: Tensor) -> Tensor:
        """Where `answers` are spans: the first and the last token of the likeliest answer of each sample, (samples, 2),
        NOT_A_NUMBER where its logits are none.

        Args:
            model: the model.
            inputs: of it.
            context: 1 for tokens in which an answer may lie, else 0, (samples, tokens).
        """
        raise NotImplementedError

    def logits(self, output: Any) -> Tensor:
        """Of what a model gives, the logits over the classes of each label."""
        logits: Tensor = output.logits
        return logits

    def at_targets(self, logits: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the `logits` that a model gives for `inputs` those of the targets, (targets, classes), and the right
        classes, (targets,)."""
        labels = self._labels(inputs)
        logits = logits[:, :-1] if self.shifted else logits
        wanted = labels != IGNORED
        return logits[wanted], labels[wanted]

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model, with its weights, that would not learn what it is meant to; ConfigError says why."""

    @contextlib.contextmanager
    def learning(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the context, `model`, on its device, is what `loss` needs it to be; afterwards it is as it was."""
        yield

    def training_flops(self, model: nn.Module) -> float:
        """FLOPs of learning from one sample, forward and backward; counted on shapes."""
        return (1 + BACKWARD_PER_FORWARD) * forward_flops(model, {**self.example(1), **self.call})

    def describe(self) -> dict[str, str]:
        """What a report says about what is learnt, where the losses are not those of a text's next tokens."""
        return {}

    def identity(self) -> dict[str, str]:
        """What of it is not in the settings and must be the same when a stage is resumed."""
        return {}

    def _labels(self, inputs: Mapping[str, Tensor]) -> Tensor:
        labels = inputs["labels"]
        return labels[:, 1:] if self.shifted else labels

    def _logits_and_labels(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the targets alone: (targets, classes) and (targets,)."""
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        return self.at_targets(self.logits(model(**inputs, **self.call)), inputs)


class ObjectiveSettings(Settings):
    """The base of every objective's settings; each has a field `kind: Literal["its_name"]`.

    An objective is one module of `auxin.objectives` that holds its settings as `OBJECTIVE`; other packages name theirs
    in the entry point group "auxin.objectives".
    """

    kind: str
    """Which objective this is."""
    instead_of_room: ClassVar[str] = ""
    """What a tokenizer can name, so that no extra tokens are needed, in a clause; empty: nothing."""

    def auto_class(self, form: SampleForm) -> Any:
        """The Auto class of transformers whose models learn this from samples of `form`."""
        raise NotImplementedError

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse a model of `config` that can't learn this.

        Raises:
            ConfigError: what does not fit, and how to make it fit.
        """

    def check_form(self, form: SampleForm) -> None:
        """Refuse data that this can't be learnt from.

        Raises:
            ConfigError: what does not fit, and how to make it fit.
        """

    def extra_tokens(self, form: SampleForm) -> int:
        """How many ids after the tokenizer's own a model needs room for."""
        return 0

    def longest(self, form: SampleForm) -> int | None:
        """Tokens of the longest sequence that the model sees of a sample; None where it sees none."""
        return form.length

    def config_values(self, form: SampleForm) -> dict[str, Any]:
        """Fields of a new model's config that follow from what is learnt."""
        return {}

    def references(self) -> tuple[str, ...]:
        """The other models that this goes by, as "branch/stage" or a checkpoint's folder."""
        return ()

    def bind(self, config: PreTrainedConfig, form: SampleForm, references: References | None = None) -> Objective:
        """This objective for a model of `config` that learns from samples of `form`.

        Args:
            config: the model's.
            form: of the samples.
            references: the models that `references` names; None: those that are folders are read.

        Raises:
            ConfigError: model, data and objective do not fit together.
        """
        self.check_config(config)
        self.check_form(form)
        self._check_room(config, form)
        return self._bound(config, form, references or {})

    def _bound(self, config: PreTrainedConfig, form: SampleForm, references: References) -> Objective:
        raise NotImplementedError

    def has_room(self, config: PreTrainedConfig, form: SampleForm) -> bool:
        """Whether a model of `config` has rows for the ids after the tokenizer's own that this needs."""
        rows = vocabulary_rows(config)
        return form.vocab_size is None or rows is None or form.vocab_size + self.extra_tokens(form) <= rows

    def _check_room(self, config: PreTrainedConfig, form: SampleForm) -> None:
        """Refuse samples that are longer than the model's positions, or tokens that it does not have."""
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and positions < 0:  # XLNet says -1, for no limit
            positions = None
        longest = self.longest(form)
        if positions is not None and longest is not None and longest > (room := _room(config, positions, longest)):
            made = "" if longest == form.length else f" ({longest} after what {self.kind} makes of it)"
            holds = "" if room == positions else f", which has room for {room} tokens"
            raise ConfigError(
                f"data.context_length is {form.length}{made}, but the model's max_position_embeddings is "
                f"{positions}{holds}. Lower the first or raise the second."
            )
        rows = vocabulary_rows(config)
        if form.vocab_size is None or rows is None:
            return
        if form.vocab_size > rows:
            raise ConfigError(
                f"The data's tokenizer has {form.vocab_size} tokens, but the model's vocab_size is {rows}. Use the "
                "model's tokenizer for the data (data.tokenizer), or build the model with the data's vocabulary."
            )
        if not self.has_room(config, form):
            needed = form.vocab_size + self.extra_tokens(form)
            mends = [self.instead_of_room] if self.instead_of_room else []
            mends += [f"build the model with a vocab_size of {needed} or more"]
            mends += [f"give one that is there more rows, by the method vocabulary with rows = {needed - rows}"]
            mends[0] = mends[0][0].upper() + mends[0][1:]
            raise ConfigError(
                f"vocab_size: {rows} has no room for the {self.extra_tokens(form)} tokens that {self.kind} needs "
                f"after the tokenizer's {form.vocab_size}. {', or '.join(mends)}."
            )


def vocabulary_rows(config: PreTrainedConfig) -> int | None:
    """How many ids a model of `config` reads; None: it says no number."""
    rows: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return rows


def _room(config: PreTrainedConfig, positions: int, longest: int) -> int:
    """Tokens that a model of `config` has positions for; its skeleton is asked where it may have fewer than it says,
    since they begin behind the padding's (RoBERTa), and that matters for sequences of `longest` tokens."""
    padding = getattr(config, "pad_token_id", None)
    if longest > positions or padding is None or not 0 <= padding < positions or longest < positions - padding:
        return positions
    try:
        return text_length(skeleton(config), positions)
    except REFUSALS:
        return positions  # what can't be built is refused, with its reason, where that is done


def training_noise(seed: int, position: int) -> np.random.Generator:
    """The noise of a batch in training: it follows from `seed` and the batch's `position` in the data order alone."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(position,)))


def held_out_noise() -> np.random.Generator:
    """The noise of the held-out split, drawn from sample by sample from the first one on."""
    return np.random.default_rng(HELD_OUT_SEED)


def is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether models of `config` have an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def packed_text(settings: ObjectiveSettings, form: SampleForm) -> None:
    """Refuse data that is no packed text; ConfigError."""
    if form.tensors != ("input_ids",):
        raise ConfigError(
            f"objective: {settings.kind!r} learns from packed text, and a sample of this data holds "
            f"{', '.join(form.tensors)}. Set data.kind: text, or training.objective: {learnt_from(form)}."
        )


def learnt_from(form: SampleForm) -> str:
    """The objective of this package that learns from samples of `form`, for a message or a default."""
    return next((kind for name, kind in _LEARNT.items() if name in form.tensors), f"one for {form.unit}s")


def zeros(samples: int, length: int) -> Tensor:
    """Token ids (samples, length)."""
    return torch.zeros(samples, length, dtype=torch.long)


def _objectives_in(loaded: Any) -> Iterator[tuple[str, type[ObjectiveSettings]]]:
    found = getattr(loaded, "OBJECTIVE", None) if isinstance(loaded, ModuleType) else loaded
    if found is not None:
        if not (isinstance(found, type) and issubclass(found, ObjectiveSettings)):
            raise TypeError(f"{found!r} is no settings class of an objective (auxin.objectives.ObjectiveSettings)")
        for kind in kinds_of(found):
            yield kind, found


OBJECTIVES: Registry[type[ObjectiveSettings]] = Registry("objective", "auxin.objectives", _objectives_in)
