"""Classification: tell which of several classes a sample has, be it a text, a pair of texts or an image."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from auxin.accounting.inputs import image_shape
from auxin.data.dataset import SampleForm
from auxin.errors import ConfigError
from auxin.models.loading import task_classes
from auxin.objectives.objective import Objective, ObjectiveSettings, References, is_encoder_decoder, zeros

PROBLEM = "single_label_classification"
PIXELS, LABELS, SEGMENTS = "pixel_values", "labels", "token_type_ids"


class Classification(ObjectiveSettings):
    """Tell which of several classes a text, a pair of texts or an image has, with an encoder or a decoder. Losses are
    nats per example."""

    kind: Literal["classification"] = "classification"
    """Says that this is classification."""

    def auto_class(self, form: SampleForm) -> Any:
        """Image classifiers where samples hold pixels, sequence classifiers elsewhere."""
        return AutoModelForImageClassification if PIXELS in form.tensors else AutoModelForSequenceClassification

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse encoder-decoders, and models whose examples have several classes or a number; ConfigError."""
        if is_encoder_decoder(config):
            raise ConfigError(
                f"objective: 'classification' is for encoders and decoders, and {config.model_type} is an "
                "encoder-decoder. Give another model (bert, llama, vit, ...)."
            )
        if config.problem_type not in (None, PROBLEM):
            raise ConfigError(
                f"problem_type: the model's config says {config.problem_type!r}, and here each example has one class. "
                f"Set it to {PROBLEM!r}, or give another model."
            )

    def check_form(self, form: SampleForm) -> None:
        """Refuse samples without a class, such as packed text; ConfigError."""
        if LABELS not in form.tensors:
            raise ConfigError(
                f"objective: 'classification' needs a class for each sample, and a sample of this data holds "
                f"{', '.join(form.tensors)} alone. Set data.kind: labelled_text (or labelled_images), or "
                "training.objective: causal (or masked_language, span_corruption)."
            )

    def config_values(self, form: SampleForm) -> dict[str, Any]:
        """The classes, where they are known."""
        if form.labels is None:
            return {}
        names = dict(enumerate(form.labels))
        return {"id2label": names, "label2id": {name: n for n, name in names.items()}, "problem_type": PROBLEM}

    def _bound(self, config: PreTrainedConfig, form: SampleForm, references: References) -> Objective:
        auto = self.auto_class(form)
        classes = task_classes(auto, config)
        if not classes:
            raise ConfigError(
                f"objective: 'classification': {config.model_type} has no class that learns this ({auto.__name__}). "
                "Give another model_type."
            )
        _check_labels(config, form)
        _check_padding(config, form)
        _check_images(config, form)
        arguments = tuple(inspect.signature(classes[0].forward).parameters)
        unknown = [name for name in form.tensors if name not in arguments and name != SEGMENTS]
        if unknown:
            raise ConfigError(
                f"objective: 'classification': a {classes[0].__name__} takes no {unknown[0]}, which the samples hold. "
                "Give another model_type."
            )
        # GPT-2 takes segments too, and would add the embeddings of the tokens 0 and 1.
        left_out = () if getattr(config, "type_vocab_size", 0) > 1 and SEGMENTS in arguments else (SEGMENTS,)
        bound = UncachedClassification if "use_cache" in arguments else ClassificationObjective
        return bound(config, form, classes, tuple(name for name in form.tensors if name not in left_out))


class ClassificationObjective(Objective):
    """Samples as they are; the model computes the loss.

    Args:
        config, form: as of every objective.
        classes: of the models that learn this.
        names: of what they are called with. Models without embeddings of segments are not given `token_type_ids`.
    """

    target: ClassVar[str] = "example"

    def __init__(
        self,
        config: PreTrainedConfig,
        form: SampleForm,
        classes: tuple[type[PreTrainedModel], ...],
        names: tuple[str, ...],
    ) -> None:
        super().__init__(config, form)
        self.classes, self.names = classes, names

    def inputs(self, batch: Mapping[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        """What the model takes of the batch; `labels` (batch,)."""
        return {name: batch[name] for name in self.names}

    def example(self, samples: int) -> dict[str, Tensor]:
        """Of whole contexts, nothing of which is padding, or of images of the model's size."""

        def made(name: str) -> Tensor:
            if name == PIXELS:
                return torch.zeros(samples, *image_shape(self.config))
            if name == LABELS:
                return torch.zeros(samples, dtype=torch.long)
            assert self.form.length is not None  # what is neither pixels nor labels goes by tokens
            ids = zeros(samples, self.form.length)
            return torch.ones_like(ids) if name == "attention_mask" else ids

        return {name: made(name) for name in self.names}

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model with another head; ConfigError."""
        if not isinstance(model, self.classes):
            raise ConfigError(
                f"objective: 'classification' is learnt by a {self.classes[0].__name__}, and this is a "
                f"{type(model).__name__}. Load it as that class; a build stage with `checkpoint` does it."
            )

    def describe(self) -> dict[str, str]:
        """The classes."""
        labels = self.form.labels or ()
        return {"classes": f"{len(labels)} ({', '.join(labels)})"}


class UncachedClassification(ClassificationObjective):
    """The same for decoders, whose keys and values nobody asks for again."""

    call: ClassVar[dict[str, Any]] = {"use_cache": False}


def _check_labels(config: PreTrainedConfig, form: SampleForm) -> None:
    """Refuse a head of other classes; ConfigError."""
    if form.labels is None:
        return
    if config.num_labels != len(form.labels):
        raise ConfigError(
            f"num_labels: the model tells {config.num_labels} classes apart, and the data has {len(form.labels)} "
            f"({', '.join(form.labels)}). Give data of the model's classes, a checkpoint without a classification "
            "head, or a new model."
        )
    named: Any = config.id2label
    own = tuple(named[number] for number in range(config.num_labels))
    unnamed = tuple(f"LABEL_{number}" for number in range(config.num_labels))
    if own not in (form.labels, unnamed):
        raise ConfigError(
            f"id2label: the model's classes are {', '.join(own)}, and the data's {', '.join(form.labels)}, so that "
            "what it has learnt would be taken for something else. Set data.labels to the model's, in its order."
        )


def _check_padding(config: PreTrainedConfig, form: SampleForm) -> None:
    """Refuse a model of text that would take padding for text: decoders classify by the last token that is no padding,
    and some encoders number positions by it; ConfigError."""
    padding, own = form.config_values.get("pad_token_id"), getattr(config.get_text_config(), "pad_token_id", None)
    if form.length is not None and padding is not None and own != padding:
        raise ConfigError(
            f"pad_token_id: the model's config has {own}, and the data is padded with {padding}, which the model would "
            f"take for text. Set pad_token_id: {padding} in the model's config, or use its own tokenizer."
        )


def _check_images(config: PreTrainedConfig, form: SampleForm) -> None:
    """Refuse a model of other images than the data's, and patches that would leave a border out; ConfigError."""
    part = getattr(config, "vision_config", config)
    for name in ("image_size", "num_channels"):
        own, given = getattr(part, name, None), form.config_values.get(name)
        if own is not None and given is not None and _sides(own) != _sides(given):
            raise ConfigError(
                f"{name}: the model's is {own}, and the data's {given}. Set data.{name}: {own}, or give a new model."
            )
    size, patch = form.config_values.get("image_size"), getattr(part, "patch_size", None)
    if size is None or patch is None:
        return
    for side, step in zip(_sides(size), _sides(patch), strict=True):
        if side % step:
            whole = " or ".join(f"{count * step}" for count in (side // step, side // step + 1) if count)
            raise ConfigError(
                f"patch_size: images of {side} pixels are not cut evenly into patches of {step}, and the model would "
                f"not see the rest. Set data.image_size: {whole}, or a patch_size that divides {side}."
            )


def _sides(size: Any) -> tuple[int, ...]:
    """Height and width."""
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


OBJECTIVE = Classification
