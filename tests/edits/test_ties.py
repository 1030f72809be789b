"""Which parameters are one tensor is a fact of the tensors: in memory, and in a folder as from_pretrained finds it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import auxin
from auxin.edits import ArrangeLayers, Plan, apply, apply_to_checkpoint
from auxin.edits.structure import skeleton_of
from auxin.errors import PlanError
from auxin.models.loading import load_config
from tiny_kinds import tiny_kind

VOCABULARY = 32


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def t5():
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


def bert():
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    )


def bart():
    sides = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in SIDES.items()}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=16, **sides))


SIDES = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
MODELS = {make.__name__: make for make in (llama, gpt2, t5, bert, bart)}
HEADS = {
    "llama": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "t5": ("lm_head.weight", "shared.weight"),
    "bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "bart": ("lm_head.weight", "model.shared.weight"),
}
"""The head of each and the embedding that it is by its config."""
MARKED = {"t5", "bert", "bart"}
"""Those whose config ties more than the head, so that no flag of it says what is and what is not tied."""


def set_parameter(model, name, parameter):
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, parameter)


def with_own(model, *names):
    """Give parameters tensors of their own, with other values."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        shape = model.get_parameter(name).shape
        set_parameter(model, name, nn.Parameter(torch.randn(shape, generator=generator) / 8))
    return model.eval()


def by_a_copy(model, head, embedding):
    set_parameter(model, head, nn.Parameter(model.get_parameter(head).detach().clone()))


def by_other_values(model, head, embedding):
    with_own(model, head)


def by_another_embedding(model, head, embedding):
    set_parameter(model, embedding, nn.Parameter(model.get_parameter(embedding).detach() + 0.1))


def by_the_flag(model, head, embedding):
    """Built untied; then the config is made to say that it is tied."""
    model.config.tie_word_embeddings = False
    model.__init__(model.config)
    model.config.tie_word_embeddings = True


def growth(model, name):
    return auxin.plan(model, "hypercloning", factor=2) if name != "bart" else deeper()


def deeper():
    return Plan(method="deeper", promise="none", edits=[ArrangeLayers(layers="model.encoder.layers", order=[0, 1, 0])])


def told(config):
    return {key: getattr(config, key, None) for key in ("tie_word_embeddings", "untied_weights")}


@pytest.mark.parametrize("how", [by_a_copy, by_other_values, by_another_embedding, by_the_flag])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "bart"])
def test_a_head_of_its_own_stays_one_and_the_config_says_so(name, how):
    torch.manual_seed(0)
    model, (head, embedding) = MODELS[name](), HEADS[name]
    if how is by_another_embedding and name in ("t5", "bart"):
        pytest.skip("there the embedding is tied to those of encoder and decoder, too")
    if how is by_the_flag and name == "t5":
        pytest.skip("T5's config has no such flag")
    how(model.eval(), head, embedding)
    optimizer = torch.optim.AdamW(model.parameters())
    assert {head, embedding} <= {each for each, _ in model.named_parameters()}
    receipt = apply(growth(model, name), model, optimizer)
    assert receipt.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert model.get_parameter(head) is not model.get_parameter(embedding)
    everything = how is by_the_flag or name not in MARKED
    wanted = {"tie_word_embeddings": not everything, "untied_weights": None if everything else [head]}
    assert told(model.config) == wanted
    assert skeleton_of(model).all_tied_weights_keys == model.all_tied_weights_keys
    assert head not in model.all_tied_weights_keys


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_one_tensor_stays_one_where_the_flag_was_taken_off_after_building(name):
    model, (head, embedding) = MODELS[name]().eval(), HEADS[name]
    model.config.tie_word_embeddings = False
    apply(growth(model, name), model)
    assert model.get_parameter(head) is model.get_parameter(embedding)
    assert told(model.config) == {"tie_word_embeddings": True, "untied_weights": None}


def test_a_mark_goes_when_the_tensors_are_tied_again():
    model = with_own(t5(), "lm_head.weight")
    apply(growth(model, "t5"), model)
    assert model.config.untied_weights == ["lm_head.weight"]
    model.tie_weights()
    apply(growth(model, "t5"), model)
    assert told(model.config) == {"tie_word_embeddings": True, "untied_weights": None}
    assert model.lm_head.weight is model.shared.weight


def test_a_failed_plan_leaves_what_the_config_said():
    model = with_own(llama(), "lm_head.weight")
    broken = Plan(
        method="x",
        promise="exact",
        edits=[ArrangeLayers(layers="model.layers", order=[1, 0])],
    )
    with pytest.raises(auxin.errors.PromiseError):
        apply(broken, model)
    assert told(model.config) == {"tie_word_embeddings": True, "untied_weights": None}
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_ties_that_no_config_tells_are_refused_by_name():
    model = t5()
    model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 16))
    model.encoder.embed_tokens.weight = model.lm_head.weight
    with pytest.raises(PlanError, match=r"encoder\.embed_tokens\.weight and lm_head\.weight are one tensor, and"):
        apply(Plan(method="x", promise="none", edits=[]), model)
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        PlanError, match=r"layers\.0\.mlp\.up_proj\.weight and .*layers\.1\.mlp\.up_proj\.weight are one"
    ):
        apply(Plan(method="x", promise="none", edits=[]), model)


# In folders.


def saved(model, folder, **tensors):
    """A folder whose config says that everything is tied, whatever the tensors are."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    if tensors:
        weights = folder / "model.safetensors"
        save_file({**load_file(weights), **{key.replace("__", "."): t for key, t in tensors.items()}}, weights)
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "bart"])
def test_two_tensors_in_a_folder_stay_two_as_in_memory(name, tmp_path):
    torch.manual_seed(0)
    head, embedding = HEADS[name]
    model = with_own(MODELS[name](), head)
    source = saved(model, tmp_path / "old")
    assert {head, embedding} <= load_file(source / "model.safetensors").keys()
    wanted = {"tie_word_embeddings": name in MARKED, "untied_weights": [head] if name in MARKED else None}
    assert told(load_config(source)) == told(auxin.load(source).config) == wanted

    plan = growth(source, name)
    assert plan.edits == growth(model, name).edits
    apply_to_checkpoint(plan, source, tmp_path / "new")
    apply(plan, model)
    model.save_pretrained(tmp_path / "reference")
    new, reference = (load_file(tmp_path / folder / "model.safetensors") for folder in ("new", "reference"))
    assert new.keys() == reference.keys()
    assert all(torch.equal(new[key], reference[key]) for key in new)
    assert not torch.equal(new[head], new[embedding])
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("new", "reference")]
    assert configs[0] == configs[1]
    plain = type(model).from_pretrained(tmp_path / "new")
    assert torch.equal(plain.get_parameter(head), model.get_parameter(head))
    assert torch.equal(plain.get_parameter(embedding), model.get_parameter(embedding))


def test_equal_tensors_in_a_folder_are_one(tmp_path):
    model = llama()
    source = saved(model, tmp_path / "old", lm_head__weight=model.lm_head.weight.detach().clone())
    assert told(load_config(source)) == {"tie_word_embeddings": True, "untied_weights": None}
    apply_to_checkpoint(growth(source, "llama"), source, tmp_path / "new")
    new = auxin.load(tmp_path / "new")
    assert new.lm_head.weight is new.model.embed_tokens.weight
    assert new.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("names", "marked"),
    [
        (["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight"]),
        (["lm_head.weight", "decoder.embed_tokens.weight"], ["decoder.embed_tokens.weight", "lm_head.weight"]),
        (
            ["lm_head.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"],
            ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"],
        ),
    ],
)
def test_any_of_several_names_can_be_its_own(names, marked, tmp_path):
    model = with_own(t5(), *names)
    source = saved(model, tmp_path / "old")
    assert told(load_config(source)) == {"tie_word_embeddings": True, "untied_weights": marked}
    plan = Plan(
        method="as it is",
        promise="exact",
        edits=[ArrangeLayers(layers="encoder.block", order=[0, 1])],
    )
    apply_to_checkpoint(plan, source, tmp_path / "new")
    apply(plan, model)
    new = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")
    for name, tensor in model.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name
    assert {name for name, _ in new.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_berts_second_bias_stays_its_own(tmp_path):
    model = with_own(bert(), "cls.predictions.decoder.bias")
    source = saved(model, tmp_path / "old")
    assert load_config(source).untied_weights == ["cls.predictions.decoder.bias"]
    receipt = apply_to_checkpoint(growth(source, "bert"), source, tmp_path / "new")
    assert receipt.plan.promise == "exact"
    new = auxin.load(tmp_path / "new")
    assert torch.equal(new.cls.predictions.decoder.bias, model.cls.predictions.decoder.bias)
    assert new.cls.predictions.decoder.weight is new.bert.embeddings.word_embeddings.weight
    assert not torch.equal(new.cls.predictions.bias, new.cls.predictions.decoder.bias)


def test_t5_of_version_1_1_keeps_its_head_and_its_logits(tmp_path):
    """Its config.json says that nothing is tied, by which T5's config knows that logits are not scaled."""
    torch.manual_seed(0)
    source = with_own(t5(), "lm_head.weight")
    source.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "scale_decoder_outputs"}
    path.write_text(json.dumps({**values, "tie_word_embeddings": False}))
    assert load_config(tmp_path / "old").untied_weights == ["lm_head.weight"]
    plan = growth(tmp_path / "old", "t5")
    assert apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new").plan.promise == "exact"
    new = T5ForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert not new.config.scale_decoder_outputs
    assert new.lm_head.weight is not new.shared.weight


@pytest.mark.parametrize("stored_as", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_of_its_own_is_found_where_files_have_other_names_than_the_model(stored_as, tmp_path):
    """Gemma 3 with images: `model.language_model` lies as `language_model.model` in the files."""
    model = tiny_kind("Gemma3ForConditionalGeneration")
    model.save_pretrained(tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"]
    tensors[stored_as] = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    old = AutoModelForImageTextToText.from_pretrained(tmp_path / "old")
    assert torch.equal(old.lm_head.weight, tensors[stored_as])
    plan = auxin.plan(tmp_path / "old", "llama-pro", layers=3, part="language_model")
    assert auxin.apply(plan, tmp_path / "old", output=tmp_path / "new").max_relative_change == 0
    new = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    assert torch.equal(new.lm_head.weight, old.lm_head.weight)
    assert torch.equal(new.get_input_embeddings().weight, old.get_input_embeddings().weight)
    assert stored_as in load_file(tmp_path / "new" / "model.safetensors")
