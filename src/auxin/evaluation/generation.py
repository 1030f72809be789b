"""Continue a prompt."""

import math
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from auxin.accounting.inputs import text_positions
from auxin.errors import DataError
from auxin.evaluation.perplexity import refuse_no_causal_model

DEFAULT_NEW_TOKENS = 64
SMALLEST_TEMPERATURE = 1e-6


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continue `prompt` and return the continuation without the prompt.

    The same seed gives the same text; torch's global random state is left as it was. Generation ends early at the
    tokenizer's eos token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: may be empty when the tokenizer has a bos or eos token to start from.
        max_new_tokens: tokens to write, at most; None is 64, or fewer where the model's positions end before.
        temperature: of sampling, 0 or at least 1e-6; 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that hold this share of the probability, in (0, 1].
        seed: of sampling, 0 ... 2**63 - 1.

    Raises:
        DataError: nothing to start from, a prompt that is no valid text, prompt and continuation exceed the model's
            positions, a number is out of range, or the model predicts no next token.
    """
    refuse_no_causal_model(model, "continues no text: its decoder writes what is missing in what its encoder reads")
    _check_numbers(max_new_tokens, temperature, top_p, seed)
    ids = _prompt_ids(tokenizer, prompt)
    max_new_tokens = _fitting_tokens(model, len(ids), max_new_tokens)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    input_ids = torch.tensor([ids], device=model.device)
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            # Causal models mix GenerationMixin in; the base class does not say so.
            output = cast(Any, model).generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                trust_remote_code=False,
                **sampling,
            )
    finally:
        model.train(training)
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _check_numbers(max_new_tokens: int | None, temperature: float, top_p: float, seed: int) -> None:
    # Logits divided by a temperature that is smaller still overflow.
    warm = temperature == 0 or (math.isfinite(temperature) and temperature >= SMALLEST_TEMPERATURE)
    if not warm or (max_new_tokens is not None and max_new_tokens < 1) or not 0 < top_p <= 1 or not 0 <= seed < 2**63:
        raise DataError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}, seed {seed}: give "
            f"max_new_tokens >= 1, a finite temperature that is 0 or >= {SMALLEST_TEMPERATURE}, top_p in (0, 1] and a "
            "seed in 0 ... 2**63 - 1."
        )


def _fitting_tokens(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int | None) -> int:
    limit = text_positions(model)
    if limit is None:
        return max_new_tokens or DEFAULT_NEW_TOKENS
    wanted = max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, limit - prompt_tokens))
    if prompt_tokens + wanted > limit:
        raise DataError(
            f"The prompt's {prompt_tokens} tokens and max_new_tokens {wanted} exceed the model's {limit} positions. "
            "Shorten one of them."
        )
    return wanted


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The prompt is no valid Unicode text ({error.reason} at {error.start}). Give UTF-8."
        ) from error
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids and start is None:
        raise DataError("The prompt is empty and the tokenizer has no bos or eos token to start from. Give a prompt.")
    return ids or [start]
