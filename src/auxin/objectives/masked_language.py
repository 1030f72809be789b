"""Masked language modelling: name the tokens of a text that were hidden, as BERT is pretrained (arXiv 1810.04805,
section 3.1, "Masked LM", and appendix A.1).

BERT chooses each token with probability 0.15; here every context has equally many, so that batches weigh the same and
each sample takes equally many random numbers. What is done to a chosen token is drawn for each one alone.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForMaskedLM, PreTrainedConfig

from auxin.data.dataset import SampleForm
from auxin.errors import ConfigError
from auxin.objectives.objective import (
    IGNORED,
    Objective,
    ObjectiveSettings,
    References,
    is_encoder_decoder,
    packed_text,
    zeros,
)


class MaskedLanguage(ObjectiveSettings):
    """Name the hidden tokens of a text, with an encoder. Losses are nats per hidden token; tokens and FLOPs go by the
    whole text."""

    kind: Literal["masked_language"] = "masked_language"
    """Says that this is masked language modelling."""
    instead_of_room: ClassVar[str] = (
        "name one of the tokenizer's tokens as its mask token (mask_token: [MASK] in tokenizer_config.json)"
    )
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of a context's tokens that are to be named, rounded to whole tokens, at least one."""
    mask_share: float = Field(default=0.8, ge=0, le=1)
    """Of those, the share that the mask token stands for."""
    random_share: float = Field(default=0.1, ge=0, le=1)
    """Of those, the share that a random token of the tokenizer stands for; the rest is left as it is."""

    @model_validator(mode="after")
    def _shares_of_one(self) -> Self:
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share ({self.mask_share}) and random_share ({self.random_share}) are more than 1 together. "
                "Lower one of them."
            )
        return self

    def hidden(self, form: SampleForm) -> int:
        """How many tokens of a context are to be named."""
        assert form.length is not None
        return min(form.length, max(1, round(self.mask_probability * form.length)))

    def auto_class(self, form: SampleForm) -> Any:
        """Encoders that name tokens."""
        return AutoModelForMaskedLM

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse decoders and encoder-decoders, as far as the config tells; ConfigError."""
        what = None
        if is_encoder_decoder(config):
            what = "an encoder-decoder. Set training.objective: span_corruption"
        elif getattr(config, "is_decoder", False):
            what = "a decoder by its config (is_decoder: true). Set is_decoder: false, or training.objective: causal"
        elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in AutoModelForMaskedLM._model_mapping:
            what = "a decoder. Set training.objective: causal"
        if what is not None:
            raise ConfigError(
                f"objective: 'masked_language' is for encoders, and {config.model_type} is {what}, or give an encoder "
                "(bert, ...)."
            )

    def check_form(self, form: SampleForm) -> None:
        """Refuse what is no packed text; ConfigError."""
        packed_text(self, form)

    def extra_tokens(self, form: SampleForm) -> int:
        """A mask token, where the tokenizer has none and one is shown."""
        return int(form.mask_token_id is None and self.mask_share > 0)

    def _bound(self, config: PreTrainedConfig, form: SampleForm, references: References) -> Objective:
        return MaskedLanguageObjective(self, config, form)


class MaskedLanguageObjective(Objective):
    """Inputs with hidden tokens; labels are what they were, and nothing elsewhere."""

    noisy: ClassVar[bool] = True

    def __init__(self, settings: MaskedLanguage, config: PreTrainedConfig, form: SampleForm) -> None:
        super().__init__(config, form)
        self.settings, self.hidden = settings, settings.hidden(form)

    def inputs(self, batch: Mapping[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (batch, length) each."""
        tokens = batch["input_ids"].numpy().astype(np.int64)
        rows, length = tokens.shape
        # One draw for all, so that a row takes a whole number of numbers from the generator.
        numbers = noise.random((rows, length + 2 * self.hidden))
        places = np.argsort(numbers[:, :length], axis=1, kind="stable")[:, : self.hidden]
        kind, other = numbers[:, length : length + self.hidden], numbers[:, length + self.hidden :]
        originals = np.take_along_axis(tokens, places, axis=1)
        labels = np.full_like(tokens, IGNORED)
        np.put_along_axis(labels, places, originals, axis=1)
        np.put_along_axis(tokens, places, self._shown(originals, kind, other), axis=1)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}

    def _shown(self, originals: np.ndarray, kind: np.ndarray, other: np.ndarray) -> np.ndarray:
        """What the model sees in place of `originals`, by one random number each for what is done and for which token
        takes the place; (batch, hidden) all."""
        vocabulary = self.form.vocab_size
        assert vocabulary is not None  # known once there is data
        # The id after the tokenizer's own is room that the model was built with.
        mask = vocabulary if self.form.mask_token_id is None else self.form.mask_token_id
        random = np.floor(other * vocabulary).astype(np.int64)
        up_to_random = self.settings.mask_share + self.settings.random_share
        return np.where(kind < self.settings.mask_share, mask, np.where(kind < up_to_random, random, originals))

    def example(self, samples: int) -> dict[str, Tensor]:
        """Of whole contexts."""
        assert self.form.length is not None
        ids = zeros(samples, self.form.length)
        return {"input_ids": ids, "labels": ids}

    def describe(self) -> dict[str, str]:
        """How much of a context is hidden."""
        return {"masked language": f"{self.hidden:,} of {self.form.length:,} tokens to be named"}


OBJECTIVE = MaskedLanguage
