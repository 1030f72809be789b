"""Calibration data: a few samples that a method looks at or learns from before it changes a model.

Activations need inputs, importance needs labels and gradients, a learned operator needs a loss: so a calibration is
model inputs with labels, made by an objective. Where text is packed for training it is the training split, never
held-out documents: what a comparison is measured on must not have shaped one side of it.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import AutoModelForMaskedLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from auxin.accounting.inputs import text_length
from auxin.data import CorpusSettings, Dataset, prepare
from auxin.data.dataset import SampleForm
from auxin.data.loader import batch_order, samples_of
from auxin.data.question_source import ANSWER
from auxin.errors import ConfigError, DataError
from auxin.models.loading import task_classes
from auxin.objectives.causal import Causal
from auxin.objectives.given_batches import Batch, finds_answers, given_batches
from auxin.objectives.masked_language import MaskedLanguage
from auxin.objectives.objective import ObjectiveSettings, References, is_encoder_decoder, training_noise
from auxin.objectives.span_corruption import SpanCorruption
from auxin.settings import Settings

STANDARD_LENGTH = 128
"""Tokens per sample of a corpus that is prepared for calibration alone."""
STANDARD_BYTES = 4_000_000
"""How much of the standard library's source is read where no corpus is named."""


class CalibrationSettings(Settings):
    """How much data, in which pieces."""

    samples: int = Field(default=128, gt=0)
    """Contexts of one pass over the data. Where the data has fewer, it is read again in another order, as training does
    it."""
    length: int | None = Field(default=None, ge=2)
    """Tokens per sample, the first ones of the data's contexts; None: whole contexts."""
    batch_size: int = Field(default=8, gt=0)
    """Samples per batch; the last batch may have fewer."""
    seed: int = Field(default=0, ge=0)
    """Seed of which contexts, in which order, and of the objective's noise; a seed that is not set is the run's."""

    def shortened(self, form: SampleForm, field: str) -> SampleForm:
        """`form` of samples of this length; ConfigError where that is longer than they are, which `field` sets, or
        would cut off answers."""
        if self.length is None:
            return form
        if set(ANSWER) & set(form.tensors) and self.length != form.length:
            raise ConfigError(
                f"calibration.length: of {self.length} tokens samples would lose their answers. Leave it out, or "
                f"set {field}."
            )
        if form.length is None or self.length > form.length:
            raise ConfigError(
                f"calibration.length is {self.length}, but {field} is {form.length}. Give at most that, or leave it "
                "out."
            )
        return replace(form, length=self.length, units=self.length if form.unit == "token" else form.units)


class CorpusCalibration(CalibrationSettings):
    """The same, and where the text comes from, for a model that belongs to no run."""

    corpus: CorpusSettings | None = None
    """The text, of which the training split is read: fields of a corpus, or the path of a file or folder alone. None:
    the standard library's source. The tokenizer is the model's own where it names none."""

    @field_validator("corpus", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"paths": value} if isinstance(value, str | Path) else value


@dataclass(frozen=True)
class Calibration:
    """Samples as model inputs with labels; made by `of_split`, `of_corpus` or `of_batches`."""

    settings: CalibrationSettings
    """How much, in which pieces."""
    objective: ObjectiveSettings | None
    """What the labels ask for; None where they were given with the inputs and nobody said it."""
    fingerprint: str
    """Hex SHA-256 of the data, the settings and the objective."""
    read: Callable[[], Iterator[dict[str, Tensor]]]
    """Begins a new pass over the batches."""
    unit: str = "token"
    """What the data counts, in the singular."""
    units_per_sample: int | None = None
    """Of those in a sample; None: the tokens that a batch holds."""
    text: str | None = None
    """Whose text the samples are of, in words; None where that is not known."""
    distinct: int | None = None
    """How many different samples the data has; beyond them it is read again. None: every sample was given."""
    watch: Callable[[int, int], None] | None = None
    """Told of every batch that is drawn: its samples and its units."""

    @property
    def samples(self) -> int:
        """Samples of one pass."""
        return self.settings.samples

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """One pass: the model's inputs by name and `labels`, or where answers begin and end, on the CPU; the same
        batches at every call."""
        for batch in self.read():
            if self.watch is not None:
                self.watch(*self.size(batch))
            yield batch

    def count_known(self, samples: int, units: int) -> None:
        """Count samples and their units as drawn, which are not drawn again: what was found on them is known."""
        if self.watch is not None:
            self.watch(samples, units)

    def size(self, batch: Mapping[str, Tensor]) -> tuple[int, int]:
        """Samples and units in a batch."""
        samples = len(next(iter(batch.values())))
        if self.units_per_sample is not None:
            return samples, samples * self.units_per_sample
        return samples, batch["input_ids"].numel() if "input_ids" in batch else 0

    @classmethod
    def of_split(
        cls,
        data: Dataset,
        config: PreTrainedConfig,
        settings: CalibrationSettings | None = None,
        objective: ObjectiveSettings | None = None,
        seed: int = 0,
        references: References | None = None,
    ) -> "Calibration":
        """Samples of the training split of prepared data, whose tokens have to be the model's.

        Args:
            data: the data; its held-out split is not opened.
            config: the model's.
            settings: how much; default: the defaults.
            objective: what the labels ask for; default: what models of this kind are trained with here.
            seed: where the settings set none.
            references: other models that the objective goes by.

        Raises:
            ConfigError: the samples are longer than the contexts or the model's positions, the model can't learn the
                objective, or the data has tokens that the model does not know.
        """
        settings = _seeded(settings or CalibrationSettings(), seed)
        objective = objective or objective_for(config)
        form, split = data.form, data.split("train")
        form = settings.shortened(form, "the data's context_length")
        bound = objective.bind(config, form, references)

        def read() -> Iterator[dict[str, Tensor]]:
            order = batch_order(split, settings.batch_size, settings.seed)
            for position, start in enumerate(range(0, settings.samples, settings.batch_size)):
                rows = order.batch(position)[: settings.samples - start]
                batch = {name: _shortened(tensor, form.length) for name, tensor in split.rows(rows).items()}
                yield bound.inputs(batch, training_noise(settings.seed, position))

        facts: dict[str, Any] = {"data": data.fingerprint, "split": "train", **bound.identity()}
        # Noise goes by batches; without it their size changes nothing but how many samples come at once.
        facts |= {"batch_size": settings.batch_size} if bound.noisy else {}
        found = _fingerprint(settings, objective, facts)
        return cls(settings, objective, found, read, form.unit, form.units, distinct=samples_of(split))

    @classmethod
    def of_corpus(
        cls,
        model: PreTrainedModel,
        tokenizer: Path,
        settings: CorpusCalibration | None = None,
        objective: ObjectiveSettings | None = None,
        seed: int = 0,
        labelled: bool = True,
    ) -> "Calibration":
        """Contexts of the training split of a corpus, in the tokens of the model's own tokenizer.

        The corpus is prepared in a temporary folder; the samples are kept in memory.

        Args:
            model: the model; its weights are not looked at.
            tokenizer: the folder of its tokenizer, for a corpus that names none.
            settings: the corpus, and how much of it; default: the standard library's source.
            objective: what the labels ask for; default: what models of this class are trained with here.
            seed: as `of_split`.
            labelled: whether labels are looked at. Where they are not, the texts of a masked language model come whole
                if it has no room for the mask token that its tokenizer lacks.

        Raises:
            ConfigError: as `of_split`.
            DataError: the model is neither a language model nor an encoder-decoder, there is no tokenizer, or the
                corpus can't be prepared.
        """
        wanted, objective = settings or CorpusCalibration(), objective or _text_objective(model)
        corpus = _corpus(wanted, model, tokenizer)
        asked = CalibrationSettings.parse(wanted.model_dump(exclude={"corpus"}, exclude_unset=True))
        with tempfile.TemporaryDirectory() as folder:
            try:
                data = prepare(corpus, Path(folder) / "corpus", needed=("train",))
            except DataError as error:
                raise DataError(
                    f"There is no data to look at: {error} Save the model with its tokenizer, name another corpus, or "
                    "make a calibration of batches in Python (Calibration.of_batches)."
                ) from error
            if (
                not labelled
                and isinstance(objective, MaskedLanguage)
                and not objective.has_room(model.config, data.form)
            ):
                objective = objective.model_copy(update={"mask_share": 0.0, "random_share": 0.0})
            made = cls.of_split(data, model.config, asked, objective, seed)
            batches = tuple(made.read())
        return replace(made, read=lambda: (dict(batch) for batch in batches), text=corpus.text)

    @classmethod
    def of_batches(
        cls, model: PreTrainedModel, batches: Iterable[Batch], objective: ObjectiveSettings | None = None
    ) -> "Calibration":
        """Batches that a Python user gives; they are kept in memory.

        Args:
            model: the model that they are for; its weights are not looked at.
            batches: token ids (batch, length), or mappings of the model's inputs, with `labels` unless the model is a
                causal language model, whose labels are its inputs, or finds answers in texts: those have
                `start_positions` and `end_positions`, (batch,).
            objective: what the labels ask for, where that is known.

        Raises:
            DataError: there is no batch, or one can't be read by the model; see `given_batches`.
        """
        kept = given_batches(model, batches)
        sizes = [len(next(iter(batch.values()))) for batch in kept]
        settings = CalibrationSettings(samples=sum(sizes), batch_size=max(sizes))
        digest = hashlib.sha256()
        for batch in kept:
            for name in sorted(batch):
                digest.update(f"{name} {batch[name].dtype} {list(batch[name].shape)}\n".encode())
                digest.update(batch[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
        fingerprint = _fingerprint(settings, objective, {"batches": digest.hexdigest()})
        return cls(settings, objective, fingerprint, lambda: (dict(batch) for batch in kept))


def objective_for(config: PreTrainedConfig) -> ObjectiveSettings:
    """What models of `config` learn where nothing else is said: span corruption, or each next token."""
    return SpanCorruption() if is_encoder_decoder(config) else Causal()


def _text_objective(model: PreTrainedModel) -> ObjectiveSettings:
    """What a model learns from text alone, by its class.

    Raises:
        DataError: its labels are of another kind.
    """
    if isinstance(model, GenerationMixin):
        return objective_for(model.config)
    if isinstance(model, task_classes(AutoModelForMaskedLM, model.config)):
        return MaskedLanguage()
    lacking, names = ("answers", ANSWER) if finds_answers(model) else ("labels", ("labels",))
    given = ", ".join(f'"{name}": {name}' for name in names)
    raise DataError(
        f"Text has no {lacking} for a {type(model).__name__}: alone it is for language models, causal or masked, and "
        f'encoder-decoders. Give batches with {lacking} in Python, data=[{{"input_ids": ids, {given}}}] of '
        "`auxin.plan` (elsewhere Calibration.of_batches(model, batches)), or do it in a recipe, whose data has "
        f"{lacking}."
    )


def _corpus(wanted: CorpusCalibration, model: PreTrainedModel, tokenizer: Path) -> CorpusSettings:
    """The corpus to prepare: in contexts of the length that is wanted, which a model may have too few positions for."""
    corpus = wanted.corpus or CorpusSettings(max_bytes=STANDARD_BYTES)
    changes: dict[str, Any] = {} if corpus.tokenizer is not None else {"tokenizer": tokenizer}
    if "context_length" not in corpus.model_fields_set:
        changes["context_length"] = wanted.length or text_length(model, STANDARD_LENGTH)
    return corpus.model_copy(update=changes)


def _shortened(tensor: Tensor, length: int | None) -> Tensor:
    """The first `length` tokens of each sample; what has no tokens along its second axis stays as it is."""
    return tensor if length is None or tensor.dim() != 2 else tensor[:, :length]


def _seeded(settings: CalibrationSettings, seed: int) -> CalibrationSettings:
    return settings if "seed" in settings.model_fields_set else settings.model_copy(update={"seed": seed})


def _fingerprint(settings: CalibrationSettings, objective: ObjectiveSettings | None, facts: Mapping[str, Any]) -> str:
    content = {
        "settings": settings.model_dump(mode="json", exclude={"batch_size"}),
        "objective": None if objective is None else objective.model_dump(mode="json"),
        **facts,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
