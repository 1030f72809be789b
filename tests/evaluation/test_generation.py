"""Continuing a prompt: greedy by argmax, sampling by seed, and nothing else disturbed."""

import codecs
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, RobertaConfig, RobertaForCausalLM

from auxin.data.tokenizer import train_tokenizer
from auxin.errors import DataError
from auxin.evaluation import generate_text, perplexity
from auxin.evaluation.files import score_files
from tiny_models import fresh_llama

TOKENIZER = train_tokenizer(["the cat sat on the mat and the hat"] * 3, 280, 32)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return fresh_llama(seed=1, vocab_size=280, num_hidden_layers=1, eos_token_id=0)


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
    "arguments",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 32},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-45},
        {"top_p": float("nan")},
        {"seed": 99999999999999999999},
        {"seed": -1},
    ],
)
def test_wrong_arguments(model: LlamaForCausalLM, arguments: dict[str, float]) -> None:
    with pytest.raises(DataError, match="max_new_tokens"):
        generate_text(model, TOKENIZER, "the", **arguments)  # type: ignore[arg-type]


def test_without_a_number_the_text_ends_where_the_positions_do(model: LlamaForCausalLM) -> None:
    ids = TOKENIZER("the cat")["input_ids"]
    expected = generate_text(model, TOKENIZER, "the cat", max_new_tokens=32 - len(ids), temperature=0)
    assert generate_text(model, TOKENIZER, "the cat", temperature=0) == expected
    with pytest.raises(DataError, match="exceed the model's 32 positions"):
        generate_text(model, TOKENIZER, "the cat " * 40)


def test_a_prompt_that_is_no_text(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="no valid Unicode text"):
        generate_text(model, TOKENIZER, "the \udcff cat")


def test_files_are_scored_byte_by_byte(model: LlamaForCausalLM, tmp_path: Path) -> None:
    text = "the cat\r\nsat on\rthe mat\n"
    (tmp_path / "dos.txt").write_bytes(text.encode())
    (score,) = score_files(model, TOKENIZER, [tmp_path / "dos.txt"]).values()
    assert score == perplexity(model, TOKENIZER, text, 32)
    assert score.bytes == len(text)
    (tmp_path / "marked.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert list(score_files(model, TOKENIZER, [tmp_path / "marked.txt"]).values()) == [score]


def test_positions_that_begin_behind_the_padding_are_not_counted(tmp_path: Path) -> None:
    """RoBERTa's: 18 of them hold 16 tokens where the padding is token 1."""
    values = {"vocab_size": 280, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "eos_token_id": 0}
    config = RobertaConfig(**values, max_position_embeddings=18, pad_token_id=1, is_decoder=True)
    model = RobertaForCausalLM(config).eval()
    ids = TOKENIZER("the cat")["input_ids"]
    expected = generate_text(model, TOKENIZER, "the cat", max_new_tokens=16 - len(ids), temperature=0)
    assert generate_text(model, TOKENIZER, "the cat", temperature=0) == expected
    with pytest.raises(DataError, match="exceed the model's 16 positions"):
        generate_text(model, TOKENIZER, "the cat", max_new_tokens=17 - len(ids))
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 9)
    assert score_files(model, TOKENIZER, [tmp_path / "text.txt"])
    with pytest.raises(DataError, match="context_length is 17, but the model has 16 positions"):
        score_files(model, TOKENIZER, [tmp_path / "text.txt"], context_length=17)
