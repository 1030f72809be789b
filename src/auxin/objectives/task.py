"""Objectives of one task, whose samples are a model's inputs as they are and whose models have a head for it."""

import inspect
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting.inputs import PIXELS, image_shape
from auxin.data.dataset import SampleForm
from auxin.data.padding import SEGMENTS
from auxin.errors import ConfigError
from auxin.models.loading import task_classes
from auxin.objectives.objective import Objective, ObjectiveSettings, References, is_encoder_decoder, zeros


class TaskSettings(ObjectiveSettings):
    """The base of the settings of objectives of one task."""

    bound: ClassVar[type["TaskObjective"]]
    """What they become for a model."""
    of_samples: ClassVar[tuple[str, ...]] = ()
    """What a batch holds of each sample that is one number."""
    for_measures: ClassVar[tuple[str, ...]] = ()
    """What a batch holds for measures, and no model takes."""

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse encoder-decoders; ConfigError."""
        if is_encoder_decoder(config):
            raise ConfigError(
                f"objective: {self.kind!r} is for encoders and decoders, and {config.model_type} is an "
                "encoder-decoder. Give another model (bert, llama, ...)."
            )

    def _bound(self, config: PreTrainedConfig, form: SampleForm, references: References) -> Objective:
        auto = self.auto_class(form)
        classes = task_classes(auto, config)
        if not classes:
            raise ConfigError(
                f"objective: {self.kind!r}: {config.model_type} has no class that learns this ({auto.__name__}). "
                "Give another model_type."
            )
        self._check_both(config, form)
        _check_padding(config, form)
        arguments = tuple(inspect.signature(classes[0].forward).parameters)
        names = tuple(name for name in form.tensors if name not in self.for_measures)
        unknown = [name for name in names if name not in arguments and name != SEGMENTS]
        if unknown:
            raise ConfigError(
                f"objective: {self.kind!r}: a {classes[0].__name__} takes no {unknown[0]}, which the samples hold. "
                "Give another model_type."
            )
        # GPT-2 takes segments too, and would add the embeddings of the tokens 0 and 1.
        if not (getattr(config, "type_vocab_size", 0) > 1 and SEGMENTS in arguments):
            names = tuple(name for name in names if name != SEGMENTS)
        return self.bound(self, config, form, classes, names)

    def _check_both(self, config: PreTrainedConfig, form: SampleForm) -> None:
        """Refuse a model that doesn't fit the samples of this task; ConfigError."""


class TaskObjective(Objective):
    """Samples as they are; the model computes the loss.

    Args:
        settings: the settings.
        config, form: as of every objective.
        classes: of the models that learn this.
        names: of what they are called with. Models without embeddings of segments are not given `token_type_ids`.
    """

    target: ClassVar[str] = "example"

    def __init__(
        self,
        settings: TaskSettings,
        config: PreTrainedConfig,
        form: SampleForm,
        classes: tuple[type[PreTrainedModel], ...],
        names: tuple[str, ...],
    ) -> None:
        super().__init__(config, form)
        self.settings, self.classes, self.names = settings, classes, names
        if "use_cache" in inspect.signature(classes[0].forward).parameters:
            # Of decoders, whose keys and values nobody asks for again; said of this one, not of its class.
            vars(self)["call"] = {"use_cache": False}

    def inputs(self, batch: Mapping[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        """What the model takes of the batch."""
        return {name: batch[name] for name in self.names}

    def example(self, samples: int) -> dict[str, Tensor]:
        """Of whole contexts, nothing of which is padding, or of images of the model's size."""

        def made(name: str) -> Tensor:
            if name == PIXELS:
                return torch.zeros(samples, *image_shape(self.config))
            if name in self.settings.of_samples:
                return torch.zeros(samples, dtype=torch.long)
            assert self.form.length is not None  # what is neither pixels nor of a whole sample goes by tokens
            ids = zeros(samples, self.form.length)
            return torch.ones_like(ids) if name == "attention_mask" else ids

        return {name: made(name) for name in self.names}

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model with another head; ConfigError."""
        if not isinstance(model, self.classes):
            raise ConfigError(
                f"objective: {self.settings.kind!r} is learnt by a {self.classes[0].__name__}, and this is a "
                f"{type(model).__name__}. Load it as that class; a build stage with `checkpoint` does it."
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
