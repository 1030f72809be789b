"""Whether a model and data can be trained together."""

import torch
from transformers import PreTrainedModel

from auxin.data import PackedData
from auxin.errors import ConfigError
from auxin.evaluation.perplexity import evaluating
from auxin.objectives import ObjectiveSettings

_PROBE_LENGTH = 8
_CAUSALITY_TOLERANCE = 1e-4
"""Relative; a mixture of experts may round otherwise when another token is routed otherwise."""


def check_fit(model: PreTrainedModel, data: PackedData, objective: ObjectiveSettings | None = None) -> None:
    """Refuse combinations of model, data and objective that would fail later, or worse, not fail.

    Args:
        model: the model.
        data: what it shall learn.
        objective: how; None is the default, causal.

    Raises:
        ConfigError: what does not fit, and how to make it fit.
    """
    wrong = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)}
    if wrong:
        raise ConfigError(
            f"The model's weights are {', '.join(sorted(wrong))}; updates would be lost to rounding. Load it with "
            "dtype=torch.float32; precision='bfloat16' computes in bfloat16 all the same."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("The model has no trainable parameter: requires_grad is False everywhere.")
    objective = objective or ObjectiveSettings()
    objective.check_architecture(model.config)
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary is not None and data.vocab_size > vocabulary:
        raise ConfigError(
            f"The data's tokenizer has {data.vocab_size} tokens, but the model's vocab_size is {vocabulary}. "
            "Use the model's tokenizer for the data, or build the model with the data's vocabulary."
        )
    objective.check_positions(model.config, data.context_length, "The data's context_length")
    if objective.corruption(model.config, data.vocab_size, data.context_length) is not None:
        return  # an encoder sees all of its inputs; what it is to predict is not among them
    _check_causality(model, min(_PROBE_LENGTH, data.context_length), vocabulary or data.vocab_size)


def _check_causality(model: PreTrainedModel, length: int, vocabulary: int) -> None:
    """Refuse a model whose logits depend on later tokens (an encoder): it would learn to copy, at a loss near zero."""
    if length < 2 or vocabulary < 2 or len({p.dtype for p in model.parameters()}) > 1:
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
            f"{difference:.1e} relative), so that it sees what it is to predict. Give a decoder (configs of the BERT "
            "family become one with is_decoder: true)."
        )
