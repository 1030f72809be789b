"""Continue a prompt."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from auxin.errors import DataError


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
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
        max_new_tokens: tokens to write, at most.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that hold this share of the probability, in (0, 1].
        seed: of sampling.

    Raises:
        DataError: nothing to start from, prompt and continuation exceed the model's positions, or a number is out of
            range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise DataError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}: give max_new_tokens >= 1, "
            "temperature >= 0 and top_p in (0, 1]."
        )
    ids = _prompt_ids(tokenizer, prompt)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise DataError(
            f"The prompt's {len(ids)} tokens and max_new_tokens {max_new_tokens} exceed the model's {limit} positions. "
            "Shorten one of them."
        )
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
                **sampling,
            )
    finally:
        model.train(training)
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids and start is None:
        raise DataError("The prompt is empty and the tokenizer has no bos or eos token to start from. Give a prompt.")
    return ids or [start]
