"""What a model learns to predict: the next token of a text, or the spans that were cut out of it."""

from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting import FlopsPerToken, flops_per_token
from auxin.errors import ConfigError
from auxin.objectives.span_corruption import MEAN_SPAN_LENGTH, NOISE_DENSITY, SpanCorruption, SpanLengths, span_lengths
from auxin.settings import Settings


class ObjectiveSettings(Settings):
    """The objective, which the architecture decides, and how much of a text it hides."""

    objective: Literal["causal", "span_corruption"] = "causal"
    """causal: predict each next token, for decoders. span_corruption: write back the spans that were cut out of the
    text, for encoder-decoders, as T5 is pretrained; losses are then nats per token that the decoder writes."""
    noise_density: float = Field(default=NOISE_DENSITY, gt=0, lt=1)
    """Of span corruption: share of a context's tokens that is cut out, rounded to whole tokens."""
    mean_span_length: float = Field(default=MEAN_SPAN_LENGTH, ge=1)
    """Of span corruption: tokens per span on average, rounded so that there are whole spans."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        for name in ("noise_density", "mean_span_length"):
            value = getattr(self, name)
            if self.objective == "causal" and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} ({value}) belongs to span corruption, but objective is 'causal'. Set objective: "
                    f"span_corruption, or leave out {name}."
                )
        return self

    def lengths(self, context_length: int) -> SpanLengths | None:
        """What encoder and decoder see of a context; None where a decoder sees all of it.

        Raises:
            ConfigError: as `span_lengths`.
        """
        if self.objective == "causal":
            return None
        return span_lengths(context_length, self.noise_density, self.mean_span_length)

    def check_architecture(self, config: PreTrainedConfig) -> None:
        """Refuse a model of `config` that can't learn this.

        Raises:
            ConfigError: what does not fit, and how to make it fit.
        """
        both = is_encoder_decoder(config)
        if self.objective == "causal" and both:
            raise ConfigError(
                f"objective: 'causal' is for decoders, and {config.model_type} is an encoder-decoder. Set training."
                "objective: span_corruption, or give a decoder (llama, gpt_neox, ...)."
            )
        if self.objective == "span_corruption" and not both:
            raise ConfigError(
                f"objective: 'span_corruption' is for encoder-decoders, and {config.model_type} is none. Set training."
                "objective: causal, or give an encoder-decoder (t5, ...)."
            )
        for name in ("decoder_start_token_id", "eos_token_id") if both else ():
            if getattr(config, name, None) is None:
                raise ConfigError(
                    f"{name}: the model's config has none, so that its decoder can't know where a text "
                    f"{'begins' if name.startswith('decoder') else 'ends'}. Set it in the config."
                )

    def check_positions(self, config: PreTrainedConfig, context_length: int, field: str) -> None:
        """Refuse contexts that are longer than the positions of a model of `config`.

        Raises:
            ConfigError: they are; `field` names where their length was set.
        """
        positions = getattr(config, "max_position_embeddings", None)
        lengths = self.lengths(context_length)
        longest = context_length if lengths is None else max(lengths.inputs, lengths.targets)
        if positions is not None and longest > positions:
            corrupted = "" if lengths is None else f" ({longest} after span corruption)"
            raise ConfigError(
                f"{field} is {context_length}{corrupted}, but the model's max_position_embeddings is {positions}. "
                "Lower the first or raise the second."
            )

    def corruption(self, config: PreTrainedConfig, tokenizer_size: int, context_length: int) -> SpanCorruption | None:
        """How contexts become inputs and targets of a model of `config`; None for a causal model, which learns them as
        they are.

        Args:
            config: the model's; its `eos_token_id` ends the targets.
            tokenizer_size: every token of the contexts is below it; the ids from there on are the sentinels.
            context_length: tokens per context.

        Raises:
            ConfigError: the vocabulary has no room for the sentinels, or as `span_lengths`.
        """
        lengths = self.lengths(context_length)
        if lengths is None:
            return None
        rows: int = config.get_text_config().vocab_size
        if tokenizer_size + lengths.spans > rows:
            raise ConfigError(
                f"vocab_size: {rows} has no room for the {lengths.spans} sentinels that span corruption needs at a "
                f"context_length of {context_length} after the tokenizer's {tokenizer_size} tokens. Build the model "
                f"with a vocab_size of {tokenizer_size + lengths.spans} or more, or give a shorter context_length."
            )
        end: Any = config.eos_token_id
        return SpanCorruption(lengths, tokenizer_size, int(end[0] if isinstance(end, (list, tuple)) else end))


def is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether models of `config` have an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def objective_flops(model: PreTrainedModel, objective: ObjectiveSettings, context_length: int) -> FlopsPerToken:
    """FLOPs per token of text with the lengths that encoder and decoder really see.

    Raises:
        ConfigError: as `span_lengths`.
    """
    lengths = objective.lengths(context_length)
    if lengths is None:
        return flops_per_token(model, context_length)
    return flops_per_token(model, context_length, encoder_length=lengths.inputs, decoder_length=lengths.targets)


def model_inputs(contexts: Tensor, corruption: SpanCorruption | None, seed: int, position: int) -> dict[str, Tensor]:
    """What the model is called with to learn from a batch: `input_ids` and `labels`, both (batch, length).

    Args:
        contexts: token ids (batch, context_length).
        corruption: None for a causal model, whose labels are its inputs.
        seed: of the noise.
        position: of the batch in the data order; with the seed it decides the noise.
    """
    if corruption is None:
        return {"input_ids": contexts, "labels": contexts}
    pair: tuple[np.ndarray, np.ndarray] = corruption.training_batch(contexts.numpy(), seed, position)
    return dict(zip(("input_ids", "labels"), map(torch.from_numpy, pair), strict=True))
