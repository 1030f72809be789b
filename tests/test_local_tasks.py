"""The multiple-choice tasks of the benchmarks: what they ask, and that a model's choice is the one of the largest log
probability per byte."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from training.tiny import tiny_llama

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from local_tasks import answers, held_out_topics, questions


class Bytes:
    """A tokenizer whose tokens are bytes, of a vocabulary of 256."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@pytest.fixture(scope="module")
def asked():
    return questions(120)


def test_every_task_has_questions_with_one_right_answer(asked):
    assert {name: len(found) for name, found in asked.items()} == dict.fromkeys(asked, 120)
    assert asked == questions(120)
    assert asked["lines"][:7] == questions(7)["lines"]
    for found in asked.values():
        for question in found:
            assert len(set(question.choices)) == len(question.choices) == 4
            assert question.choices[question.answer] not in question.beginning.splitlines()
        places = [sum(question.answer == place for question in found) for place in range(4)]
        assert min(places) > 10, "no place is right much more often than the others"
    manual = " ".join(" ".join(text.split()) for text in held_out_topics())
    for question in asked["sentences"]:
        assert question.beginning + question.choices[question.answer] in manual


def test_the_likeliest_choice_per_byte_is_taken(asked):
    model = tiny_llama(vocab_size=256, max_position_embeddings=1024).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that choices differ by more than their lengths
    for found in asked.values():
        taken = answers(model, Bytes(), found[:8])
        for question, right in zip(found[:8], taken, strict=True):
            losses = [loss_per_byte(model, question.beginning, choice) for choice in question.choices]
            assert right == (losses.index(min(losses)) == question.answer)


@torch.no_grad()
def loss_per_byte(model, beginning: str, choice: str) -> float:
    ids = torch.tensor([list((beginning + choice).encode())])
    count = len(choice.encode())
    return float(cross_entropy(model(input_ids=ids, use_cache=False).logits[0, -count - 1 : -1], ids[0, -count:]))
