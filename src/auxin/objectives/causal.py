"""Causal language modelling: predict each next token of a text."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from auxin.data.dataset import SampleForm
from auxin.errors import ConfigError
from auxin.models.evaluating import evaluating
from auxin.objectives.objective import (
    Objective,
    ObjectiveSettings,
    References,
    is_encoder_decoder,
    packed_text,
    zeros,
)

_PROBE_LENGTH = 8
_CAUSALITY_TOLERANCE = 1e-4
"""Relative; a mixture of experts may round otherwise when another token is routed otherwise."""


class Causal(ObjectiveSettings):
    """Predict each next token, with a decoder. Losses are nats per token."""

    kind: Literal["causal"] = "causal"
    """Says that this is causal language modelling."""

    def auto_class(self, form: SampleForm) -> Any:
        """Causal language models."""
        return AutoModelForCausalLM

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse encoder-decoders; ConfigError."""
        if is_encoder_decoder(config):
            raise ConfigError(
                f"objective: 'causal' is for decoders, and {config.model_type} is an encoder-decoder. Set training."
                "objective: span_corruption, or give a decoder (llama, gpt_neox, ...)."
            )

    def check_form(self, form: SampleForm) -> None:
        """Refuse what is no packed text; ConfigError."""
        packed_text(self, form)

    def _bound(self, config: PreTrainedConfig, form: SampleForm, references: References) -> Objective:
        return CausalObjective(config, form)


class CausalObjective(Objective):
    """Labels are the inputs; the model shifts them."""

    shifted: ClassVar[bool] = True
    whole_text: ClassVar[bool] = True
    call: ClassVar[dict[str, Any]] = {"use_cache": False}

    def inputs(self, batch: Mapping[str, Tensor], noise: np.random.Generator) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (batch, length) each."""
        return {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}

    def example(self, samples: int) -> dict[str, Tensor]:
        """Of whole contexts."""
        assert self.form.length is not None
        ids = zeros(samples, self.form.length)
        return {"input_ids": ids, "labels": ids}

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model whose logits depend on later tokens (an encoder): it would learn to copy, at a loss near zero.

        Raises:
            ConfigError: it is one.
        """
        vocabulary = getattr(model.config, "vocab_size", None) or self.form.vocab_size
        length = min(_PROBE_LENGTH, self.form.length or _PROBE_LENGTH)
        if length < 2 or not vocabulary or vocabulary < 2 or len({p.dtype for p in model.parameters()}) > 1:
            return  # nothing to compare, or weights of several types, which only the loop's autocast brings together
        tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
        changed = tokens.clone()
        changed[0, -1] = (tokens[0, -1] + 1) % vocabulary
        devices = [model.device] if model.device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices=devices):
            before, after = (model(input_ids=ids, use_cache=False).logits[0, :-1].float() for ids in (tokens, changed))
        difference = float((before - after).abs().max() / before.abs().max())
        # Not a number where a weight is none: the guard on the loss will say so.
        if difference > _CAUSALITY_TOLERANCE:
            raise ConfigError(
                f"{type(model).__name__} is not causal: another last token changes the logits before it (by "
                f"{difference:.1e} relative), so that it sees what it is to predict. Give a decoder (configs of the "
                "BERT family become one with is_decoder: true), or set training.objective: masked_language."
            )


OBJECTIVE = Causal
