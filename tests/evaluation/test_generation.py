"""Continuing a prompt: greedy by argmax, sampling by seed, and nothing else disturbed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from auxin.data.tokenizer import train_tokenizer
from auxin.errors import DataError
from auxin.evaluation import generate_text

TOKENIZER = train_tokenizer(["the cat sat on the mat and the hat"] * 3, 280, 32)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def test_greedy_takes_the_likeliest_token(model: LlamaForCausalLM) -> None:
    ids = TOKENIZER("the cat")["input_ids"]
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(model.eval()(torch.tensor([ids + expected])).logits[0, -1].argmax()))
    assert 0 not in expected
    found = generate_text(model, TOKENIZER, "the cat", max_new_tokens=6, temperature=0)
    assert found == TOKENIZER.decode(expected)


def test_the_seed_decides_and_nothing_else_changes(model: LlamaForCausalLM) -> None:
    model.train()
    before = torch.random.get_rng_state()
    first, again, other = (generate_text(model, TOKENIZER, "the", 12, seed=seed) for seed in (4, 4, 5))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training


def test_an_empty_prompt_starts_from_the_first_token(model: LlamaForCausalLM) -> None:
    assert generate_text(model, TOKENIZER, "", 8)
    bare = train_tokenizer(["the cat"], 260, 32)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(DataError, match="The prompt is empty"):
        generate_text(model, bare, "")


@pytest.mark.parametrize(
    "arguments", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 32}]
)
def test_wrong_arguments(model: LlamaForCausalLM, arguments: dict[str, float]) -> None:
    with pytest.raises(DataError, match="max_new_tokens"):
        generate_text(model, TOKENIZER, "the", **arguments)  # type: ignore[arg-type]
