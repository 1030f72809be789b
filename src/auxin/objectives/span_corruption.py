"""Span corruption: write back the spans that were cut out of a text, as T5 is pretrained; see `spans`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig

from auxin.data.dataset import SampleForm
from auxin.errors import ConfigError
from auxin.objectives.objective import (
    Objective,
    ObjectiveSettings,
    References,
    is_encoder_decoder,
    packed_text,
    zeros,
)
from auxin.objectives.spans import MEAN_SPAN_LENGTH, NOISE_DENSITY, SpanCutter, SpanLengths, span_lengths


class SpanCorruption(ObjectiveSettings):
    """Write back the spans that were cut out of a text, with an encoder-decoder. Losses are nats per token that the
    decoder writes; tokens and FLOPs go by the text."""

    kind: Literal["span_corruption"] = "span_corruption"
    """Says that this is span corruption."""
    noise_density: float = Field(default=NOISE_DENSITY, gt=0, lt=1)
    """Share of a context's tokens that is cut out, rounded to whole tokens."""
    mean_span_length: float = Field(default=MEAN_SPAN_LENGTH, ge=1)
    """Tokens per span on average, rounded so that there are whole spans."""

    def lengths(self, form: SampleForm) -> SpanLengths:
        """What encoder and decoder see of a context.

        Raises:
            ConfigError: as `span_lengths`.
        """
        packed_text(self, form)
        assert form.length is not None
        return span_lengths(form.length, self.noise_density, self.mean_span_length)

    def auto_class(self, form: SampleForm) -> Any:
        """Encoder-decoders."""
        return AutoModelForSeq2SeqLM

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse what is no encoder-decoder, or does not know where a text begins and ends; ConfigError."""
        if not is_encoder_decoder(config):
            raise ConfigError(
                f"objective: 'span_corruption' is for encoder-decoders, and {config.model_type} is none. Set training."
                "objective: causal, or give an encoder-decoder (t5, ...)."
            )
        for name in ("decoder_start_token_id", "eos_token_id"):
            if getattr(config, name, None) is None:
                raise ConfigError(
                    f"{name}: the model's config has none, so that its decoder can't know where a text "
                    f"{'begins' if name.startswith('decoder') else 'ends'}. Set it in the config."
                )

    def check_form(self, form: SampleForm) -> None:
        """Refuse what is no packed text, or contexts that are too short for a span; ConfigError."""
        self.lengths(form)

    def extra_tokens(self, form: SampleForm) -> int:
        """A sentinel for each span."""
        return self.lengths(form).spans

    def longest(self, form: SampleForm) -> int:
        """Of what the encoder and what the decoder sees."""
        lengths = self.lengths(form)
        return max(lengths.inputs, lengths.targets)

    def _bound(self, config: PreTrainedConfig, form: SampleForm, references: References) -> Objective:
        return SpanCorruptionObjective(self, config, form)


class SpanCorruptionObjective(Objective):
    """Inputs with sentinels; labels are what the decoder writes."""

    noisy: ClassVar[bool] = True
    call: ClassVar[dict[str, Any]] = {"use_cache": False}

    def __init__(self, settings: SpanCorruption, config: PreTrainedConfig, form: SampleForm) -> None:
        super().__init__(config, form)
        self.lengths = settings.lengths(form)

    def inputs(self, batch: Mapping[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        """`input_ids` (batch, lengths.inputs) and `labels` (batch, lengths.targets)."""
        end: Any = self.config.eos_token_id
        assert self.form.vocab_size is not None  # known once there is data
        cutter = SpanCutter(self.lengths, self.form.vocab_size, int(end[0] if isinstance(end, (list, tuple)) else end))
        pair = cutter.corrupt(batch["input_ids"].numpy(), noise)
        return dict(zip(("input_ids", "labels"), map(torch.from_numpy, pair), strict=True))

    def describe(self) -> dict[str, str]:
        """How contexts are cut."""
        cut = f"{self.lengths.noise:,} of {self.lengths.context:,} tokens cut out, spans: {self.lengths.spans:,}"
        seen = f"encoder {self.lengths.inputs:,} tokens, decoder {self.lengths.targets:,}"
        return {"span corruption": f"{cut}; {seen}"}

    def example(self, samples: int) -> dict[str, Tensor]:
        """Of the lengths that encoder and decoder see."""
        return {"input_ids": zeros(samples, self.lengths.inputs), "labels": zeros(samples, self.lengths.targets)}


OBJECTIVE = SpanCorruption
