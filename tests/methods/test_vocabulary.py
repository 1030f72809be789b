"""Vocabulary growth: rows and moments by the oracle, old logits to the bit, model and tokenizer both or neither."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from auxin.data.vocabulary import EnlargedTokenizer
from auxin.edits import Plan, apply, apply_to_checkpoint, inverse_plan
from auxin.errors import ConfigError, DataError, PlanError, PromiseError
from auxin.methods import method
from auxin.methods.grow import vocabulary as module
from auxin.methods.grow.vocabulary import METHOD, VocabularyGrowth, grow_vocabulary, plan_vocabulary
from auxin.models.loading import load_model, skeleton
from auxin.planning.bench import Bench
from auxin.planning.method import plan_for
from edits.models import assert_same, everything
from oracles.vocabulary import new_rows, table_length
from tiny_models import FAMILIES, inputs, tiny
from tiny_tokenizers import TEXT, tiny_tokenizer

LANGUAGE = [family for family in FAMILIES if family != "vit"]
KIND = {"t5": "unigram", "bert": "wordpiece", "gpt2": "gpt2", "qwen2": "separate_special_tokens"}
WORDS = ["photosynthesis", "Zweifel", "Blaubeerkuchen"]


def tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Everything that the vocabulary indexes, by transformers' own account."""
    found = {"embedding": model.get_input_embeddings().weight}
    head = model.get_output_embeddings()
    found["head"] = head.weight
    if getattr(head, "bias", None) is not None:
        found["bias"] = head.bias
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer, key: str) -> dict[str, torch.Tensor]:
    head = model.get_output_embeddings()
    parameters = {"embedding": model.get_input_embeddings().weight, "head": head.weight, "bias": head.bias}
    return {
        name: optimizer.state[parameter][key].clone()
        for name, parameter in parameters.items()
        if parameter is not None and parameter in optimizer.state
    }


def trained(model: PreTrainedModel, below: int) -> torch.optim.Optimizer:
    """An AdamW with moments of two real steps on tokens below `below`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        batch = {name: ids % below for name, ids in inputs(model, 10 + step).items()}
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    return optimizer


def as_column(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.double().reshape(len(tensor), -1).tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", LANGUAGE)
@settings(max_examples=5)
@given(
    length=st.integers(8, 40),
    unused=st.integers(0, 6),
    count=st.integers(1, 20),
    rule=st.sampled_from(["mean", "pieces"]),
    multiple=st.sampled_from([None, 1, 8, 64]),
    seed=st.integers(0, 3),
)
def test_rows_and_moments_against_the_oracle(family, tied, length, unused, count, rule, multiple, seed):
    first = length - unused
    pieces = [[(seed + 3 * new + k) % first for k in range(new % 4)] for new in range(count)]
    model = tiny(family, seed, vocab_size=length, tie_word_embeddings=tied)
    optimizer = trained(model, first)
    old, old_first, old_second = (
        tables(model),
        moments(model, optimizer, "exp_avg"),
        moments(model, optimizer, "exp_avg_sq"),
    )
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if p.shape[0] != length}
    batch = {name: ids % first if "type" not in name else ids for name, ids in inputs(model).items()}
    with torch.no_grad():
        before = model(**batch).logits
    wanted = VocabularyGrowth(rows=count, rule=rule, multiple=multiple)
    receipt = apply(plan_vocabulary(model, first, pieces, wanted), model, optimizer, batch)

    size = table_length(length, first, count, multiple)
    assert model.config.vocab_size == size
    new = tables(model)
    assert (
        model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ) == model.config.tie_word_embeddings
    for name, table in new.items():
        assert table.shape == (size, *old[name].shape[1:])
        expected = torch.tensor(new_rows(as_column(old[name]), first, pieces, rule), dtype=torch.float64)
        assert torch.equal(table[:first], old[name][:first])
        torch.testing.assert_close(table[first : first + count].reshape(count, -1), expected, rtol=1e-12, atol=1e-12)
        # Rows that still hold no token stay, or are the mean.
        assert torch.equal(table[first + count : length], old[name][first + count :])
        mean = old[name][:first].mean(0)
        for row in table[max(length, first + count) :]:
            torch.testing.assert_close(row, mean, rtol=1e-12, atol=1e-12)
    for moment, start in (
        (moments(model, optimizer, "exp_avg"), old_first),
        (moments(model, optimizer, "exp_avg_sq"), old_second),
    ):
        assert moment.keys() == start.keys()
        for name, tensor in moment.items():
            fresh = torch.zeros_like(tensor[0]) if start is old_first else start[name][:first].mean(0)
            assert tensor.shape == new[name].shape
            assert torch.equal(tensor[:first], start[name][:first])
            assert torch.equal(tensor[first + count : length], start[name][first + count :])
            for row in (*tensor[first : first + count], *tensor[length:]):
                torch.testing.assert_close(row, fresh, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        if name in rest:
            assert torch.equal(parameter, rest[name])
    with torch.no_grad():
        after = model(**batch).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :first], before[..., :first], rtol=1e-13, atol=1e-13)
    assert receipt.max_relative_change < 1e-13
    trained(model, size)  # goes on training, new rows included


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LANGUAGE)
def test_old_logits_are_the_same_to_the_last_bit(family, dtype):
    model = tiny(family, dtype=dtype, vocab_size=64)
    batch = {name: ids % 50 for name, ids in inputs(model).items()}
    with torch.no_grad():
        before = model(**batch).logits
        # First into unused rows, then beyond.
        for first, count, length in ((50, 9, 64), (59, 9, 128)):
            receipt = apply(plan_vocabulary(model, first, [[1, 2]] * count, VocabularyGrowth(rows=count)), model)
            assert model.config.vocab_size == length
            assert receipt.max_relative_change == 0
        assert torch.equal(model(**batch).logits[..., :50], before[..., :50])


@pytest.mark.parametrize("family", LANGUAGE)
def test_probabilities_change_by_what_the_new_tokens_take(family):
    """A new token with the mean of all rows takes no more than an average old one's probability (Jensen)."""
    model = tiny(family, vocab_size=48)
    batch = inputs(model)
    with torch.no_grad():
        before = model(**batch).logits.log_softmax(-1)
        apply(plan_vocabulary(model, 48, [[]] * 6, VocabularyGrowth(rows=6, multiple=1)), model)
        after = model(**batch).logits.log_softmax(-1)
    lost = (before - after[..., :48]).max().item()
    assert 0 < lost <= torch.log(torch.tensor(1 + 6 / 48)).item() + 1e-6


def grown_pair(family, **config):
    tokenizer = tiny_tokenizer(KIND.get(family, "byte_level"))
    model = tiny(family, dtype=torch.float32, vocab_size=-(-len(tokenizer) // 16) * 16, **config)
    return model, tokenizer


def grow_and_save(family, folder):
    """Grow model and tokenizer, save both, and note what the loaded ones must give."""
    model, tokenizer = grown_pair(family)
    old_size, identity = len(tokenizer), id(tokenizer)
    receipt = grow_vocabulary(model, tokenizer, WORDS, special_tokens=["<tool>"], optimizer=trained(model, old_size))
    assert id(tokenizer) == identity
    assert len(tokenizer) == old_size + 4
    assert model.config.vocab_size % 16 == 0
    assert receipt.max_relative_change <= receipt.tolerance
    ids = tokenizer("photosynthesis Zweifel <tool> leaf", return_tensors="pt")["input_ids"]
    assert ids.max() >= old_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    with torch.no_grad():
        torch.save({"ids": ids, "batch": batch, "logits": model(**batch).logits}, folder / "expected.pt")


def test_model_and_tokenizer_grow_together_and_load_in_a_new_process(tmp_path):
    for family in LANGUAGE:
        grow_and_save(family, tmp_path / family)
    # Without the package: a grown vocabulary is said in the config alone. TokenFormers are the package's own.
    code = f"""
import sys, torch, transformers
from pathlib import Path
torch.set_num_threads(1)
for folder in sorted(Path({str(tmp_path)!r}).iterdir(), key=lambda folder: folder.name == "tokenformer"):
    if folder.name == "tokenformer":
        assert "auxin" not in sys.modules
        import auxin
    expected = torch.load(folder / "expected.pt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name, transformers.AutoModelForCausalLM).from_pretrained(folder)
    ids = tokenizer("photosynthesis Zweifel <tool> leaf", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, expected["ids"]), folder
    with torch.no_grad():
        assert torch.equal(model(**expected["batch"]).logits, expected["logits"]), folder
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("where", ["tokenizer", "promise"])
def test_on_failure_both_are_as_before(where, monkeypatch):
    model, tokenizer = grown_pair("llama")
    optimizer = trained(model, len(tokenizer))
    before, backend = everything(model, optimizer), tokenizer.backend_tokenizer.to_str()
    python_side = {key: value for key, value in vars(tokenizer).items() if key != "_tokenizer"}
    if where == "tokenizer":
        with pytest.raises(DataError):
            grow_vocabulary(model, tokenizer, ["fine", "café"], optimizer=optimizer)
    else:
        monkeypatch.setattr("auxin.edits.promise.relative_change", lambda *_: 1.0)
        with pytest.raises(PromiseError):
            grow_vocabulary(model, tokenizer, WORDS, optimizer=optimizer)
    assert_same(everything(model, optimizer), before)
    assert tokenizer.backend_tokenizer.to_str() == backend
    assert {key: value for key, value in vars(tokenizer).items() if key != "_tokenizer"} == python_side


def saved(family, folder, **config):
    model, tokenizer = grown_pair(family, **config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("family", LANGUAGE)
def test_a_checkpoint_grows_with_its_tokenizer(family, tmp_path):
    source, output = tmp_path / "old", tmp_path / "new"
    model, tokenizer = saved(family, source)
    (source / "merges.txt").write_text("of the old vocabulary")
    plan = plan_for(METHOD, source, {"tokens": WORDS, "rule": "pieces"}, folder=tmp_path / "plan")
    plan.to_yaml(tmp_path / "plan" / "plan.yaml")
    apply_to_checkpoint(Plan.from_yaml(tmp_path / "plan" / "plan.yaml"), source, output)
    grow_vocabulary(model, tokenizer, WORDS)
    loaded = load_model(output)
    expected = dict(model.named_parameters())
    assert loaded.config.vocab_size == model.config.vocab_size
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer.get_vocab()
    assert not (output / "merges.txt").exists()
    assert (source / "merges.txt").exists()


def test_a_checkpoint_that_fails_at_the_tokenizer_does_not_appear(tmp_path):
    source, output = tmp_path / "old", tmp_path / "new"
    saved("llama", source)
    plan = plan_for(METHOD, source, {"tokens": WORDS}, folder=tmp_path / "plan")
    grow_tokenizer = AutoTokenizer.from_pretrained(source)
    grow_tokenizer.add_tokens(["meanwhile"])
    grow_tokenizer.save_pretrained(source)
    with pytest.raises(PlanError, match=r"tokenizer.*json is not the file that the plan was made for.*Plan again"):
        apply_to_checkpoint(plan, source, output)
    assert not output.exists()


def test_learned_tokens_are_in_the_plan(tmp_path):
    source, text = tmp_path / "old", tmp_path / "corpus.txt"
    saved("gpt2", source)
    text.write_text("\n".join(TEXT))
    plan = plan_for(METHOD, source, {"tokens_from": str(text), "num_tokens": 5}, folder=tmp_path / "plan")
    text.unlink()  # the plan needs it no more
    output = tmp_path / "new"
    apply_to_checkpoint(plan, source, output)
    new, old = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(source)
    assert len(new) == len(old) + 5
    assert sum(len(new(line)["input_ids"]) for line in TEXT) < sum(len(old(line)["input_ids"]) for line in TEXT)


def test_bits_per_byte_improve_with_a_grown_vocabulary():
    """The grown model, trained on for a few steps, is better than before, and than the old one after as many steps."""
    text = "\n".join(TEXT)
    tokenizer = tiny_tokenizer("byte_level")
    model = tiny("llama", dtype=torch.float32, vocab_size=320, hidden_size=32, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1)

    def train(model, tokenizer, steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for step in range(steps):
            start = (step * 37) % (ids.shape[1] - 64)
            batch = ids[:, start : start + 64]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()

    def bits_per_byte(model, tokenizer):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        nats = -log.gather(-1, ids[:, 1:, None]).sum().item()
        return nats / torch.log(torch.tensor(2.0)).item() / len(text.encode())

    train(model, tokenizer, 120)
    before = bits_per_byte(model, tokenizer)
    plain = copy.deepcopy(model)
    grow_vocabulary(
        model, tokenizer_grown := copy.deepcopy(tokenizer), [" wisdom", " winter", " everything", " incredulity"]
    )
    train(model, tokenizer_grown, 40)
    train(plain, tokenizer, 40)
    assert bits_per_byte(model, tokenizer_grown) < bits_per_byte(plain, tokenizer) < before


def test_the_generation_config_and_the_rest_of_the_config_stay():
    model, tokenizer = grown_pair("gpt2")
    generation, config = model.generation_config.to_dict(), model.config.to_dict()
    grow_vocabulary(model, tokenizer, [*WORDS, *(f" word{number}" for number in range(20))])
    assert model.generation_config.to_dict() == generation
    changed = {key for key, value in model.config.to_dict().items() if config[key] != value}
    assert changed == {"vocab_size"}
    assert model.lm_head.out_features == model.get_input_embeddings().num_embeddings == model.config.vocab_size


def test_the_vocabulary_of_a_part_of_a_model_grows():
    """A model for text and images keeps the vocabulary in the config of its language model."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    text, vision = LlamaConfig(vocab_size=19, **size), CLIPVisionConfig(image_size=8, patch_size=4, **size)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=18))
    probe = {"input_ids": torch.arange(12)[None]}
    plan = plan_vocabulary(model, 19, [[1, 2], []], VocabularyGrowth(rows=2))
    assert apply(plan, model, probe=probe).max_relative_change <= 1e-6
    assert model.config.text_config.vocab_size == 21
    assert model.config.text_config is model.model.language_model.config
    assert model(**probe).logits.shape[-1] == 21


def test_the_plan_reads_and_can_be_taken_back():
    model = tiny("llama", vocab_size=40, tie_word_embeddings=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = plan_vocabulary(model, 38, [[1, 2], [], [3]], VocabularyGrowth(rows=3))
    assert "rows 38..40: means of old rows (2 of" in str(plan)  # and on the next line of the cell: chosen ones)
    assert "pad axis 0 to 48: mean of the first 38" in str(plan)
    back = inverse_plan(plan, model)
    apply(plan, model)
    apply(back, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(
            parameter[:38] if len(parameter) == 40 else parameter, before[name][: 38 if len(parameter) == 40 else None]
        )


def test_on_the_meta_device_only_shapes_change():
    model = skeleton(tiny("bert", vocab_size=40).config)
    receipt = apply(METHOD.plan(Bench(model), VocabularyGrowth(rows=5)), model)
    assert receipt.max_relative_change is None
    assert model.cls.predictions.decoder.bias.shape == (48,)


def test_models_without_a_vocabulary_are_refused():
    for ask in (lambda model: METHOD.plan(Bench(model), VocabularyGrowth(rows=1)), METHOD.examples):
        with pytest.raises(PlanError, match="type 'vit' has no vocabulary"):
            ask(tiny("vit"))


def test_a_tokenizer_that_is_larger_than_the_model_is_refused():
    with pytest.raises(PlanError, match="ids go up to 309, but the model's tables have 128 rows"):
        grow_vocabulary(tiny("llama", vocab_size=128), tiny_tokenizer("byte_level"), WORDS)


def test_a_model_from_nowhere_needs_a_tokenizer():
    with pytest.raises(PlanError, match="Set `tokenizer`"):
        METHOD.plan(Bench(tiny("llama")), VocabularyGrowth(tokens=("x",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give new tokens"),
        ({"tokens": ["a"], "rows": 3}, "give new tokens"),
        ({"tokens_from": "stdlib"}, "go together"),
        ({"num_tokens": 5, "tokens": ["a"]}, "go together"),
        ({"rows": 0}, "rows"),
        ({"tokens": ["a"], "rule": "zeros"}, "rule"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        VocabularyGrowth.parse(values)


def test_it_is_registered():
    assert method("vocabulary") is METHOD
    assert EnlargedTokenizer is module.EnlargedTokenizer
