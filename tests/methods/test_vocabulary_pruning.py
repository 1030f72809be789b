"""Vocabulary pruning: rows and moments by the oracle, the same logits for the same text, all ids renumbered."""

import copy
import json
import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import auxin
from auxin.cli import app
from auxin.edits import Plan, SetConfig, SliceParameter, apply, inverse_plan
from auxin.errors import ConfigError, DataError, PlanError, PromiseError
from auxin.methods.prune.vocabulary_pruning import METHOD, VocabularyPruning, plan_kept, prune_vocabulary
from auxin.models.loading import load_model, skeleton
from auxin.planning.bench import Bench
from auxin.planning.token_tables import token_tables
from auxin.recipes.schema import ChangeStage
from auxin.recipes.stage_models import change_plan
from capabilities import of_the_same_text
from edits.models import assert_same, everything
from layered_models import pair
from oracles.vocabulary_pruning import kept_rows
from outputs import output
from tiny_models import inputs, labels, tiny
from tiny_tokenizers import KINDS, TEXT, tiny_tokenizer

PART = TEXT[:2]
ROUNDING = 1e-14
"""Of logits in float64: a product with fewer rows may add in another order."""
"""What a corpus has of the text that the tokenizers were trained on."""
OWN = VocabularyPruning(ids=())
"""Settings for plans of ids that are given."""


def state_of(model, optimizer, key):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: state[key].clone() for parameter, state in optimizer.state.items() if key in state}


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "albert", "gptj", "bart", "clip"])
@settings(max_examples=2)
@given(tied=st.booleans(), seed=st.integers(0, 10**6), length=st.integers(19, 30))
def test_rows_moments_and_logits_against_the_oracle(family, tied, seed, length):
    nested = (
        {} if family != "clip" else {"text_config": {**tiny("clip").config.text_config.to_dict(), "vocab_size": 19}}
    )
    model = tiny(family, seed % 7, **(nested or {"vocab_size": length, "tie_word_embeddings": tied}))
    length = model.config.get_text_config().vocab_size
    chosen = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[: length // 2].tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        output(model(**inputs(model))).square().mean().backward()
        optimizer.step()
    wanted = METHOD.settings.parse({"ids": chosen, "multiple_of": 1})
    plan = METHOD.plan(Bench(model), wanted)
    kept = plan.kept_tokens
    assert set(chosen) <= set(kept)
    assert len(kept) < length
    tables = {table.name: table.axis for table in token_tables(model)}
    old = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    moments = {key: state_of(model, optimizer, key) for key in ("exp_avg", "exp_avg_sq")}
    twin = copy.deepcopy(model)
    receipt = apply(plan, model, optimizer)
    assert receipt.max_relative_change <= 1e-13

    def expected(name, tensor):
        if name not in tables:
            return tensor
        rows = tensor.movedim(tables[name], 0)
        found = torch.tensor(kept_rows(rows.reshape(len(rows), -1).tolist(), kept), dtype=tensor.dtype)
        return found.view(len(kept), *rows.shape[1:]).movedim(0, tables[name])

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected(name, old[name])), name
    for key, before in moments.items():
        for name, tensor in state_of(model, optimizer, key).items():
            assert torch.equal(tensor, expected(name, before[name])), (key, name)
    with torch.no_grad():
        after = output(model(**inputs(model)))
    torch.testing.assert_close(after, of_the_same_text(twin, model, kept), rtol=1e-12, atol=1e-12)
    output(model(**inputs(model))).square().mean().backward()
    optimizer.step()


def test_the_loss_on_texts_of_tokens_that_stay_is_no_larger():
    model = tiny("llama")
    twin = copy.deepcopy(model)
    kept = apply(auxin.plan(model, "vocabulary-pruning", ids=range(0, 19, 2), multiple_of=1), model).plan.kept_tokens
    batch, wanted = inputs(model), labels(model)
    tokens = torch.tensor(kept)
    before = twin(input_ids=tokens[batch["input_ids"]]).logits.log_softmax(-1)[..., tokens]
    after = model(**batch).logits.log_softmax(-1)
    assert (after >= before).all()
    assert (after > before).gather(-1, wanted[..., None]).all()


def test_a_table_that_is_shorter_reads_the_others_as_token_0_still():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Gemma3nTextConfig(
        **sizes,
        **more,
        vocab_size=20,
        vocab_size_per_layer_input=14,
        hidden_size_per_layer_input=4,
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    model = transformers.Gemma3nForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    old = model.model.embed_tokens_per_layer.weight.detach().clone()
    receipt = auxin.apply(auxin.plan(model, "vocabulary-pruning", ids=[5, 13, 14, 19], multiple_of=1), model)
    assert receipt.max_relative_change < 1e-6
    assert receipt.plan.kept_tokens == [0, 1, 2, 5, 13, 14, 19]
    assert torch.equal(model.model.embed_tokens_per_layer.weight, old[[0, 1, 2, 5, 13, 0, 0]])
    assert model.config.vocab_size == model.config.vocab_size_per_layer_input == 7


def test_whole_numbers_by_token_follow():
    """The experts that DeepSeek V4 sends a token to."""
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    model = skeleton(transformers.DeepseekV4Config(**values, bos_token_id=0, eos_token_id=1, pad_token_id=None))
    plan = auxin.plan(model, "vocabulary-pruning", ids=[4, 9], multiple_of=1)
    cut = {edit.parameter for edit in plan.edits if isinstance(edit, SliceParameter)}
    assert any(name.endswith("tid2eid") for name in cut)


def test_an_encoder_and_a_decoder_of_one_vocabulary_are_cut_together():
    model = pair(torch.float32)
    length = model.config.encoder.vocab_size
    plan = auxin.plan(model, "vocabulary-pruning", ids=range(0, length, 2), multiple_of=1)
    auxin.apply(plan, model)
    assert model.config.encoder.vocab_size == model.config.decoder.vocab_size == len(plan.kept_tokens) < length


IDS = {
    "bos_token_id": 8,
    "eos_token_id": [6, 10],
    "pad_token_id": 12,
    "suppress_tokens": [14, 16],
    "bad_words_ids": [[18, 4]],
    "forced_decoder_ids": [[1, 10], [2, None]],
    "sequence_bias": [[[4, 6], -3.0]],
    "lang_to_id": {"<|de|>": 16},
}


def with_ids(**values):
    model = tiny("llama", dtype=torch.float32, bos_token_id=8, eos_token_id=[6, 10], pad_token_id=12, unk_token_id=2)
    for name, value in {**IDS, **values}.items():
        setattr(model.generation_config, name, value)
    return model


EVEN = {**IDS, "bos_token_id": 4, "eos_token_id": [3, 5], "pad_token_id": 6, "suppress_tokens": [7, 8]} | {
    "bad_words_ids": [[9, 2]],
    "forced_decoder_ids": [[1, 5], [2, None]],
    "sequence_bias": [[[2, 3], -3.0]],
    "lang_to_id": {"<|de|>": 8},
}


def test_all_ids_that_configs_name_stay_and_are_renumbered():
    model = with_ids()
    plan = auxin.plan(model, "vocabulary-pruning", ids=[0], multiple_of=1)
    assert plan.kept_tokens == list(range(0, 19, 2))
    auxin.apply(plan, model)
    config, generation = model.config, model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.unk_token_id) == (4, [3, 5], 6, 1)
    assert model.model.embed_tokens.padding_idx == 6
    assert {name: getattr(generation, name) for name in IDS} == EVEN


def test_ids_of_a_folder_are_renumbered_or_refused_before_work(tmp_path):
    with_ids().save_pretrained(tmp_path / "old")
    plan = auxin.plan(tmp_path / "old", "vocabulary-pruning", ids=[0], multiple_of=1)
    auxin.apply(plan, tmp_path / "old", output=tmp_path / "new")
    values = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert {name: values[name] for name in IDS} == EVEN
    assert auxin.load(tmp_path / "new").config.eos_token_id == [3, 5]
    # Another generation config than the one that was planned for names what goes.
    path = tmp_path / "old" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "suppress_tokens": [5]}))
    with pytest.raises(PlanError, match="generation config: suppress_tokens names token 5, which the plan takes away"):
        auxin.apply(plan, tmp_path / "old", output=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    model = with_ids(begin_suppress_tokens=[7])
    before = everything(model)
    with pytest.raises(PlanError, match="begin_suppress_tokens names token 7"):
        auxin.apply(plan, model)
    assert_same(everything(model), before)


def test_a_failure_puts_the_generation_config_back(monkeypatch):
    model = with_ids()
    before, generation = everything(model), model.generation_config.to_dict()
    monkeypatch.setattr("auxin.edits.promise.relative_change", lambda *_: 1.0)
    with pytest.raises(PromiseError):
        auxin.apply(auxin.plan(model, "vocabulary-pruning", ids=[0], multiple_of=1), model)
    assert_same(everything(model), before)
    assert model.generation_config.to_dict() == generation


def test_positions_that_are_counted_from_the_padding_stay():
    """RoBERTa's first position is the one behind the padding's id."""
    model = tiny("roberta", bos_token_id=3, pad_token_id=4)
    plan = auxin.plan(model, "vocabulary-pruning", ids=[9], multiple_of=1)
    assert plan.kept_tokens[:6] == [0, 1, 2, 3, 4, 9]
    assert auxin.apply(plan, model).max_relative_change <= ROUNDING
    assert model.config.pad_token_id == 4


def test_a_clip_that_pools_at_the_largest_id_goes_on_so():
    values = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(vocab_size=40, max_position_embeddings=16, eos_token_id=2, **values)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    ids = torch.tensor([[5, 39, 7, 9]])
    before = model(ids).text_embeds
    kept = auxin.apply(
        auxin.plan(model, "vocabulary-pruning", ids=[5, 7, 9, 39], multiple_of=1), model
    ).plan.kept_tokens
    assert model.config.eos_token_id == 2
    torch.testing.assert_close(model(torch.tensor([[kept.index(token) for token in ids[0]]])).text_embeds, before)


FAMILY = {"wordpiece": "bert", "unigram": "t5", "gpt2": "gpt2"}


def saved(kind, folder, **config):
    tokenizer = tiny_tokenizer(kind)
    size = -(-len(tokenizer) // 16) * 16
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = {"vocab_size": size, **special, **config}
    if FAMILY.get(kind) == "t5":
        values["decoder_start_token_id"] = tokenizer.pad_token_id
    model = tiny(FAMILY.get(kind, "llama"), dtype=torch.float32, **values)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "corpus.txt").write_text("\n".join(PART))
    return model, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_cut_with_its_tokenizer(kind, tmp_path):
    source, output_folder = tmp_path / "old", tmp_path / "new"
    model, tokenizer = saved(kind, source)
    for name in ("merges.txt", "vocab.json", "added_tokens.json", "special_tokens_map.json"):
        (source / name).write_text("of the old vocabulary")
    for name in ("vocab.json", "added_tokens.json", "special_tokens_map.json"):
        (source / name).write_text("{}")
    corpus = str(source / "corpus.txt")
    plan = auxin.plan(source, "vocabulary-pruning", corpus=corpus, multiple_of=8, folder=tmp_path / "plan")
    plan.to_yaml(tmp_path / "plan" / "plan.yaml")
    plan = Plan.from_yaml(tmp_path / "plan" / "plan.yaml")
    receipt = auxin.apply(plan, source, output=output_folder)
    kept = plan.kept_tokens
    assert len(kept) % 8 == 0
    assert len(kept) < len(tokenizer)
    assert receipt.max_relative_change <= receipt.tolerance
    assert not [name for name in ("merges.txt", "vocab.json", "added_tokens.json") if (output_folder / name).exists()]
    new, loaded = AutoTokenizer.from_pretrained(output_folder), load_model(output_folder)
    for text in PART:
        assert [kept[index] for index in new(text)["input_ids"]] == tokenizer(text)["input_ids"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (old := getattr(tokenizer, name)) is not None:
            assert kept[getattr(new, name)] == old
            assert getattr(loaded.config, name) == getattr(new, name)
    # In memory it is the same.
    same = prune_vocabulary(model, tokenizer, ["\n".join(PART)], multiple_of=8)
    assert same.plan.kept_tokens == kept
    assert tokenizer.get_vocab() == new.get_vocab()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_no_folder_keeps_a_tokenizer_of_the_old_ids(tmp_path):
    model, tokenizer = saved("byte_level", tmp_path / "old")
    elsewhere = auxin.plan(model, "vocabulary-pruning", ids=range(300), multiple_of=4)
    with pytest.raises(
        PlanError, match=r"the tokenizer in .*old would go on with the old ones. Make the plan for this"
    ):
        auxin.apply(elsewhere, tmp_path / "old", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    chosen = tokenizer(PART[0])["input_ids"]
    plan = auxin.plan(tmp_path / "old", "vocabulary-pruning", ids=chosen, multiple_of=4, folder=tmp_path)
    auxin.apply(plan, tmp_path / "old", output=tmp_path / "new")
    new = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert [plan.kept_tokens[index] for index in new(PART[0])["input_ids"]] == chosen


def of_tokens(tokenizer, **values):
    model = tiny("llama", dtype=torch.float32, vocab_size=320, bos_token_id=0, eos_token_id=0)
    return prune_vocabulary(model, tokenizer, PART, multiple_of=1, **values).plan.kept_tokens


def test_how_often_how_many_and_what_else():
    tokenizer = tiny_tokenizer("byte_level")
    every = of_tokens(copy.deepcopy(tokenizer))
    often = of_tokens(copy.deepcopy(tokenizer), keep_at_least=3)
    few = of_tokens(copy.deepcopy(tokenizer), size=265)
    assert set(often) < set(every)
    assert set(few) < set(every)
    assert len(few) == 265
    last = max(set(range(310)) - set(every))
    wanted = of_tokens(copy.deepcopy(tokenizer), keep=[last])
    assert set(every) < set(wanted)
    assert last in wanted


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_a_target_keeps_the_most_used_tokens_for_which_there_is_room(kind, tied, tmp_path, monkeypatch):
    """As many as make no more parameters, in the multiple that is asked for; the same ones as by their number."""
    monkeypatch.chdir(tmp_path)  # where the files of plans lie
    model, _ = saved(kind, tmp_path / "old", tie_word_embeddings=tied)
    corpus, have = str(tmp_path / "old" / "corpus.txt"), model.num_parameters()
    asked = {"corpus": corpus, "multiple_of": 2}
    least = len(auxin.plan(tmp_path / "old", "vocabulary-pruning", **asked, keep_at_least=10_000).kept_tokens)
    for rows in (least + 2, least + 5):
        limit = skeleton(model.config.__class__(**{**model.config.to_dict(), "vocab_size": rows})).num_parameters()
        plan = auxin.plan(tmp_path / "old", "vocabulary-pruning", **asked, target={"parameters": limit})
        assert f"; asked for: target.parameters = {limit:,}" in plan.findings[0]
        smaller = copy.deepcopy(model)
        apply(plan, smaller)
        assert smaller.num_parameters() <= limit
        assert len(plan.kept_tokens) == rows // 2 * 2 or kind == "unigram"
        by_number = auxin.plan(tmp_path / "old", "vocabulary-pruning", **asked, size=rows // 2 * 2)
        assert plan.kept_tokens == by_number.kept_tokens
    share = auxin.plan(tmp_path / "old", "vocabulary-pruning", **asked, target={"parameters": limit / have})
    assert share.kept_tokens == plan.kept_tokens
    few = {**asked, "target": {"parameters": 0.01}}
    with pytest.raises(
        PlanError, match=r"0.01 leaves 0 tokens, which is less .* Ask for ([\d,]+) parameters"
    ) as refused:
        auxin.plan(tmp_path / "old", "vocabulary-pruning", **few)
    enough = int(re.search(r"Ask for ([\d,]+) parameters", str(refused.value))[1].replace(",", ""))
    plan = auxin.plan(tmp_path / "old", "vocabulary-pruning", **{**asked, "target": {"parameters": enough}})
    assert len(plan.kept_tokens) == least
    with pytest.raises(PlanError, match=f"the model has {have:,} already"):
        auxin.plan(tmp_path / "old", "vocabulary-pruning", **asked, target={"parameters": have})


def test_the_number_is_rounded_up_with_what_is_used_most_and_no_token_without_its_parts():
    tokenizer = tiny_tokenizer("byte_level")
    model = tiny("llama", dtype=torch.float32, vocab_size=320, bos_token_id=0, eos_token_id=0)
    smaller = copy.deepcopy(tokenizer)
    receipt = prune_vocabulary(model, smaller, TEXT, keep_at_least=1000, multiple_of=8)
    assert model.config.vocab_size == len(smaller) == len(receipt.plan.kept_tokens) == 264
    for token, index in smaller.get_vocab().items():
        text = smaller.decode([index])
        if "\ufffd" not in text and index not in smaller.all_special_ids:
            assert smaller(text)["input_ids"] == [index], token
    # 309 tokens are used, and 11 rows of 320 have none: the last of them stay, where the multiple asks for it.
    model = tiny("llama", dtype=torch.float32, vocab_size=330, bos_token_id=0, eos_token_id=0)
    receipt = prune_vocabulary(model, copy.deepcopy(tokenizer), TEXT, multiple_of=160)
    assert receipt.plan.kept_tokens == list(range(320))


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"size": 100}, PlanError, r"size = 100 is less than the 257 tokens that must stay.*Ask for 257 or more"),
        ({"keep": ["Zweifel"]}, DataError, r"keep: 'Zweifel' is no token"),
        ({"keep": [999]}, DataError, r"keep: the tokenizer has no token 999"),
        ({"multiple_of": 320}, PlanError, r"Nothing would go: what stays, in a multiple of 320, takes all 320 rows"),
    ],
)
def test_what_can_not_be_is_refused_and_both_stay(values, error, said):
    tokenizer = tiny_tokenizer("byte_level")
    model = tiny("llama", dtype=torch.float32, vocab_size=320, bos_token_id=0, eos_token_id=0)
    before, backend = everything(model), tokenizer.backend_tokenizer.to_str()
    with pytest.raises(error, match=said):
        prune_vocabulary(model, tokenizer, PART, **values)
    assert_same(everything(model), before)
    assert tokenizer.backend_tokenizer.to_str() == backend


def test_a_corpus_that_uses_every_token_leaves_nothing_to_do():
    tokenizer = tiny_tokenizer("byte_level")
    everything_used = [" ".join(tokenizer.get_vocab()), *TEXT]
    model = tiny("llama", vocab_size=310, bos_token_id=0, eos_token_id=0)
    with pytest.raises(PlanError, match="Nothing would go"):
        prune_vocabulary(model, tokenizer, everything_used)
    with pytest.raises(DataError, match="holds no text"):
        prune_vocabulary(model, tokenizer, [])


def test_wrong_folders_are_refused_by_name(tmp_path):
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match=r"There is no tokenizer.json in .*bare"):
        auxin.plan(tmp_path / "bare", "vocabulary-pruning", corpus="stdlib")
    with pytest.raises(PlanError, match="comes from no local folder, so that its tokenizer is unknown"):
        auxin.plan(tiny("llama"), "vocabulary-pruning", corpus="stdlib")
    (tmp_path / "bare" / "spiece.model").write_text("not one")
    with pytest.raises(DataError, match=r"bare holds no tokenizer that can be loaded|a fast tokenizer"):
        auxin.plan(tmp_path / "bare", "vocabulary-pruning", corpus="stdlib")
    saved("byte_level", tmp_path / "whole")
    with pytest.raises(DataError, match=r"nothing\.txt"):
        auxin.plan(tmp_path / "whole", "vocabulary-pruning", corpus=str(tmp_path / "nothing.txt"))
    small = tiny("llama", vocab_size=128, bos_token_id=0, eos_token_id=0)
    with pytest.raises(PlanError, match="ids go up to 309, but the model's tables have 128 rows"):
        prune_vocabulary(small, tiny_tokenizer("byte_level"), PART)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, r"give the corpus whose tokens stay \(corpus = stdlib, or a file .* or ids = \[0, 5, 17\]"),
        ({"corpus": "stdlib", "size": 300, "target": {"parameters": 0.9}}, "size and target both say"),
        ({"corpus": "stdlib", "target": {"flops": 0.9}}, r"Give target\.parameters"),
        ({"ids": [1], "target": {"parameters": 0.9}}, "target goes with a corpus"),
        ({"corpus": "stdlib", "ids": [1]}, "give the corpus"),
        ({"ids": [1], "size": 4}, "size goes with a corpus"),
        ({"corpus": "stdlib", "keep_at_least": 0}, "keep_at_least"),
    ],
)
def test_settings_are_checked(values, said):
    with pytest.raises(ConfigError, match=said):
        VocabularyPruning.parse(values)


def test_ids_that_mean_something_else_are_refused():
    config = transformers.IdeficsConfig(vocab_size=20, additional_vocab_size=2)
    with pytest.raises(PlanError, match="additional_vocab_size = 2 ids of this model mean something else"):
        auxin.plan(skeleton(config), "vocabulary-pruning", ids=[3])
    with pytest.raises(PlanError, match="ids: the model has no token 19"):
        auxin.plan(tiny("llama"), "vocabulary-pruning", ids=[19])


def test_there_is_no_way_back(tmp_path):
    model = tiny("llama")
    with pytest.raises(PlanError, match="has no inverse"):
        inverse_plan(auxin.plan(model, "vocabulary-pruning", ids=[3], multiple_of=1), model)


def test_a_plan_whose_ids_are_not_those_of_its_edits_is_found():
    model = tiny("llama")
    plan = plan_kept(model, [0, 1, 5, 7], OWN)
    wrong = plan.model_copy(update={"kept_tokens": [0, 1, 5, 8]})
    before = everything(model)
    with pytest.raises(PromiseError, match="promised to keep the function"):
        apply(wrong, model)
    for kept, said in (
        ([0, 1, 5], "are 3 ids up to 5, but the model has 19 tokens before and 4 after"),
        ([0, 1, 5, 40], "up to 40"),
    ):
        with pytest.raises(PlanError, match=said):
            apply(plan.model_copy(update={"kept_tokens": kept}), model)
    assert_same(everything(model), before)
    for values in ({"kept_tokens": [2, 1]}, {"kept_tokens": []}, {"kept_tokens": [1], "vocabulary": 3}):
        with pytest.raises(ConfigError, match="kept_tokens"):
            Plan.parse({"method": "x", "promise": "none", "edits": [SetConfig(values={"vocab_size": 1})], **values})


def test_a_probe_is_in_old_ids_of_tokens_that_stay():
    model = tiny("llama")
    plan = auxin.plan(model, "vocabulary-pruning", ids=[5, 7], multiple_of=1)
    with pytest.raises(PlanError, match="The probe's input_ids hold the token 6, which the plan takes away"):
        apply(plan, model, probe=torch.tensor([[5, 6, 7]]))
    assert apply(plan, model, probe=torch.tensor([[5, 7, 0, 1]])).max_relative_change <= ROUNDING


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved("byte_level", tmp_path / "old")
    wanted = ["--set", "corpus=old/corpus.txt", "--set", "multiple_of=16"]
    for arguments in (["plan", "old", "vocabulary-pruning", *wanted, "-o", "plan.yaml"], ["apply", "old", "plan.yaml"]):
        arguments += ["-o", "new"] * (arguments[0] == "apply")
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    length = LlamaConfig.from_pretrained("new").vocab_size
    assert length % 16 == 0
    assert length < 320
    assert isinstance(load_model(tmp_path / "new"), LlamaForCausalLM)


def change(**values) -> ChangeStage:
    return ChangeStage(kind="change", name="smaller", method="vocabulary-pruning", settings=values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"corpus": "stdlib"}, "settings: Which tokens the corpus leaves is not known before .* start from the result"),
        ({"ids": [3], "multiple_of": 1}, r"gives tokens other ids, .* Do it before the run"),
    ],
)
def test_a_run_whose_data_has_the_old_ids_refuses_before_it_begins(values, said):
    with pytest.raises(PlanError, match=said):
        change_plan(change(**values), Bench(skeleton(tiny("llama").config)))
