"""Official checkpoints come in and go out, judged by logits."""

import math
import os
import zipfile
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import auxin.models  # noqa: F401 - registers the Auto classes
from auxin.errors import CheckpointError, ConfigError
from auxin.models.tokenformer import PUBLISHED, TokenFormerConfig, TokenFormerForCausalLM, official
from auxin.models.tokenformer.layers import TokenFormerAttention
from auxin.models.tokenformer.modeling import rotary_cos_sin
from auxin.models.tokenformer.official import export_official, import_official, infer_config, reference_logits
from oracles import tokenformer as oracle

LAYERS, WIDTH, HEADS, VOCABULARY = 2, 32, 2, 120
PROJ = "sequential.2.attention.proj.key_param_tokens"


def tiny_state(seed=0, **changes):
    values = {"layers": LAYERS, "width": WIDTH, "tokens": 24, "ffn_tokens": 40, "vocabulary": VOCABULARY, "seed": seed}
    return oracle.random_state(**{**values, **changes})


def token_ids(vocabulary=VOCABULARY, shape=(2, 12)):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def relative(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """An official file and the folder it was imported to."""
    directory = tmp_path_factory.mktemp("official")
    torch.save(tiny_state(), directory / "pytorch_model.bin")
    import_official(directory / "pytorch_model.bin", directory / "model", num_attention_heads=HEADS)
    return directory


def test_logits_at_the_structure_of_the_150m_model(tmp_path):
    state = oracle.random_state(layers=12, width=768, tokens=768, ffn_tokens=3072, vocabulary=512, seed=0)
    report = import_official(state, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (model.config.num_attention_heads, model.config.rotary_dim) == (12, 16)
    input_ids = token_ids(512, (2, 16))
    with torch.no_grad():
        logits = model(input_ids).logits
    assert logits.dtype == torch.float32
    assert relative(logits, oracle.logits(state, input_ids, 12, torch.float32)) < 1e-4
    assert report.parameters == model.num_parameters() == 113_246_208 + 512 * 768 + 2 * 768


def test_the_converters_reference_equals_the_oracle():
    state = tiny_state()
    expected = oracle.logits(state, token_ids(), HEADS)
    assert relative(reference_logits(state, token_ids(), HEADS), expected) < 1e-5
    # The measure can fail: other heads, other positions, another order of norm and GELU would be seen.
    assert relative(reference_logits(state, token_ids(), 1), expected) > 1e-2


@pytest.mark.parametrize("rotary", [0.25, 0.0])
def test_one_attention_layer_sees_the_order_of_earlier_tokens_through_rope(rotary):
    """Permuting earlier keys and values changes the last output if, and only if, there is a position encoding."""
    config = TokenFormerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, qkv_tokens=24, proj_tokens=24, partial_rotary_factor=rotary,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    layer = TokenFormerAttention(config, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4)
    x = torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat((x[:, [3, 0, 5, 1, 4, 2]], x[:, 6:]), dim=1)
    positions = rotary_cos_sin(torch.arange(7)[None], config.rotary_dim, config.rope_theta)
    # The last token sees all others, so no mask is needed for its output.
    last, last_shuffled = (layer(tokens, positions)[0][0, -1] for tokens in (x, shuffled))
    if rotary:
        assert relative(last_shuffled, last) > 1e-2
    else:
        assert relative(last_shuffled, last) < 1e-5


def test_the_oracle_sees_the_order_of_earlier_tokens():
    query, key, value = torch.randn(3, 7, 1, HEADS, 16, generator=torch.Generator().manual_seed(0)).double()
    order = [3, 0, 5, 1, 4, 2, 6]
    last = oracle.attend(query, key, value)[-1]
    assert relative(oracle.attend(query, key[order], value[order])[-1], last) > 1e-2
    unrotated = oracle.attend(query, key, value, rotary=False)[-1]
    assert relative(oracle.attend(query, key[order], value[order], rotary=False)[-1], unrotated) < 1e-12


def test_import_reports_and_infers(imported):
    state = tiny_state()
    config = TokenFormerConfig.from_pretrained(imported / "model")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (LAYERS, WIDTH, VOCABULARY)
    assert (config.qkv_tokens, config.proj_tokens, config.ffn_tokens) == ([24], [24], [40])
    model = TokenFormerForCausalLM.from_pretrained(imported / "model")
    assert torch.equal(
        model.model.layers[1].attention.value.key_tokens, state["sequential.3.attention.value.key_param_tokens"]
    )
    assert relative(model(token_ids()).logits, oracle.logits(state, token_ids(), HEADS)) < 1e-4
    assert model.generate(token_ids(), max_new_tokens=3, eos_token_id=None).shape == (2, 15)


def test_round_trip_is_bit_exact(imported, tmp_path):
    report = export_official(imported / "model", tmp_path / "out" / "pytorch_model.bin")
    assert report.max_relative_difference < 1e-5
    back = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    state = tiny_state()
    assert set(back) == set(state)
    assert all(type(tensor) is torch.Tensor and torch.equal(tensor, state[name]) for name, tensor in back.items())
    assert os.listdir(tmp_path / "out") == ["pytorch_model.bin"]
    size = sum(tensor.nbytes for tensor in state.values())
    assert (tmp_path / "out" / "pytorch_model.bin").stat().st_size < 1.2 * size + 20_000


def test_untied_head(tmp_path):
    state = tiny_state()
    state[f"sequential.{LAYERS + 4}.final_linear.weight"] = torch.randn(VOCABULARY, WIDTH)
    report = import_official(state, tmp_path / "model", num_attention_heads=HEADS)
    model = TokenFormerForCausalLM.from_pretrained(tmp_path / "model")
    assert not model.config.tie_word_embeddings
    assert (report.missing_keys, report.unused_keys) == ([], [])
    assert torch.equal(model.lm_head.weight, state[f"sequential.{LAYERS + 4}.final_linear.weight"])
    export_official(tmp_path / "model", tmp_path)
    assert set(torch.load(tmp_path / "pytorch_model.bin", weights_only=True)) == set(state)


@pytest.mark.parametrize("copied", [True, False])
def test_a_tied_head_that_is_stored_too(tmp_path, copied):
    state, head = tiny_state(), f"sequential.{LAYERS + 4}.final_linear.weight"
    embedding = state["sequential.0.word_embeddings.weight"]
    state[head] = embedding.clone() if copied else embedding
    torch.save(state, tmp_path / "pytorch_model.bin")
    report = import_official(tmp_path, tmp_path / "model", num_attention_heads=HEADS)
    assert (report.missing_keys, report.unused_keys) == ([], [head])
    assert TokenFormerConfig.from_pretrained(tmp_path / "model").tie_word_embeddings
    config = infer_config(tiny_state(), HEADS)
    config.tie_word_embeddings = False
    report = import_official(tmp_path, tmp_path / "untied", config=config)
    assert (report.missing_keys, report.unused_keys) == ([], [])
    model = TokenFormerForCausalLM.from_pretrained(tmp_path / "untied")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_entries_that_are_no_named_tensors_are_reported(tmp_path):
    torch.save({**tiny_state(), 7: torch.ones(2), "step": 3}, tmp_path / "pytorch_model.bin")
    report = import_official(tmp_path, tmp_path / "model", num_attention_heads=HEADS)
    assert report.unused_keys == ["7", "step"]


def test_safetensors_and_unused_keys(tmp_path):
    state = {**tiny_state(), "sequential.2.attention.rotary_emb.inv_freq": torch.ones(2)}
    save_file(state, tmp_path / "official.safetensors")
    report = import_official(tmp_path / "official.safetensors", tmp_path / "model", num_attention_heads=HEADS)
    assert report.unused_keys == ["sequential.2.attention.rotary_emb.inv_freq"]
    assert report.direction == "import"
    assert report.missing_keys == ["lm_head.weight"]


def test_the_format_before_zip_files(tmp_path):
    torch.save(tiny_state(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert import_official(tmp_path, tmp_path / "model", num_attention_heads=HEADS).max_relative_difference < 1e-5


def test_half_precision_is_kept(tmp_path):
    state = {name: tensor.to(torch.float16) for name, tensor in tiny_state().items()}
    import_official(state, tmp_path / "model", num_attention_heads=HEADS)
    assert TokenFormerForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.float16


def test_padded_vocabulary_keeps_its_rows_and_the_tokenizer_comes_along(tmp_path):
    state = tiny_state(vocabulary=50304)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "tokenizer.json").write_text("{}")
    report = import_official(tmp_path, tmp_path / "model", num_attention_heads=HEADS)
    assert "50277 ids, the last 27 rows are padding" in report.notes[0]
    assert TokenFormerConfig.from_pretrained(tmp_path / "model").vocab_size == 50304
    assert (tmp_path / "model" / "tokenizer.json").exists()


def swappable_pairs():
    names = official.official_names(TokenFormerConfig(num_hidden_layers=LAYERS))
    state = tiny_state()
    return [(a, b) for a, b in combinations(names, 2) if state[names[a]].shape == state[names[b]].shape]


@settings(max_examples=30)
@given(
    pair=st.sampled_from(swappable_pairs()),
    direction=st.sampled_from(["import", "export"]),
    out_std=st.sampled_from([0.1, 1.0]),
)
def test_two_swapped_tensors_are_caught(tmp_path_factory, pair, direction, out_std):
    directory = tmp_path_factory.mktemp("swap")
    state, names = tiny_state(out_std=out_std), official.official_names

    def swapped(config):
        table = names(config)
        table[pair[0]], table[pair[1]] = table[pair[1]], table[pair[0]]
        return table

    if direction == "export":
        import_official(state, directory / "model", num_attention_heads=HEADS)
    convert = {
        "import": lambda: import_official(state, directory / "model", num_attention_heads=HEADS),
        "export": lambda: export_official(directory / "model", directory / "pytorch_model.bin"),
    }[direction]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "official_names", swapped)
        with pytest.raises(CheckpointError, match="logits differ"):
            convert()
    assert os.listdir(directory) == (["model"] if direction == "export" else [])


def test_non_finite_weights_fail(tmp_path):
    state = tiny_state()
    state[PROJ][3, 3] = math.nan
    with pytest.raises(CheckpointError, match="differ by nan"):
        import_official(state, tmp_path / "model", num_attention_heads=HEADS)
    assert not os.listdir(tmp_path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_unsafe_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**tiny_state(), "extra": Harmful()}, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"run code.*isolated place.*safetensors"):
        import_official("pytorch_model.bin", "model", num_attention_heads=HEADS)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"PK\x03\x04 and then nothing", "may be incomplete"),
        (b"", "no PyTorch file"),
    ],
)
def test_broken_files(tmp_path, content, message):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        import_official(tmp_path / "pytorch_model.bin", tmp_path / "model")


def test_truncated_file(tmp_path):
    torch.save(tiny_state(), tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="may be incomplete"):
        import_official(tmp_path, tmp_path / "model")


def test_a_damaged_pickle_inside_the_file(tmp_path):
    torch.save(tiny_state(), tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    original = entries[pickled]
    raised = set()
    for position in range(2, 300, 3):
        entries[pickled] = original[:position] + b"\xff" + original[position + 1 :]
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as damaged:
            for name, content in entries.items():
                damaged.writestr(name, content)
        try:
            official._read(tmp_path / "pytorch_model.bin")
        except CheckpointError as error:
            raised.add(type(error.__cause__).__name__)
    assert len(raised) > 1, raised


def test_missing_source_tensor_or_model(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        import_official(tmp_path / "nowhere.bin", tmp_path / "model")
    state = tiny_state()
    del state[PROJ]
    with pytest.raises(CheckpointError, match=PROJ):
        import_official(state, tmp_path / "model", num_attention_heads=HEADS)
    with pytest.raises(CheckpointError, match="no official TokenFormer checkpoint"):
        import_official({"model.embed_tokens.weight": torch.ones(2, 2)}, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        export_official(tmp_path, tmp_path / "out.bin")


def test_heads_come_from_the_released_models_or_from_the_caller():
    assert infer_config(tiny_state(layers=12, width=768, tokens=5, ffn_tokens=5)).num_attention_heads == 12
    with pytest.raises(ConfigError, match="Give num_attention_heads"):
        infer_config(tiny_state())
    with pytest.raises(ConfigError, match=r"num_attention_heads must be a positive whole number, received 0"):
        infer_config(tiny_state(), 0)


def test_a_given_config_is_checked_against_the_shapes(tmp_path):
    config = infer_config(tiny_state(), HEADS)
    assert import_official(tiny_state(), tmp_path / "model", config=config).max_relative_difference < 1e-5
    config.ffn_tokens = [41]
    with pytest.raises(CheckpointError, match=r"\(40, 32\), but the config asks for \(41, 32\)"):
        import_official(tiny_state(), tmp_path / "other", config=config)
    with pytest.raises(ConfigError, match="num_attention_heads is 4, but the given config says 2"):
        import_official(tiny_state(), tmp_path / "other", config=config, num_attention_heads=4)


def test_nothing_is_overwritten(imported, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        import_official(tiny_state(), tmp_path, num_attention_heads=HEADS)
    with pytest.raises(CheckpointError, match="exists already"):
        export_official(imported / "model", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ffn_tokens": [16, 8]}, "ffn tokens form 2 groups"),
        ({"qkv_tau": [3.0]}, r"qkv scale is 3, the official code always uses sqrt\(24\)"),
        ({"gelu": "tanh"}, "gelu is 'tanh'"),
        ({"score_function": "softmax"}, "score_function is 'softmax'"),
        (
            {"score_function": "gelu", "proj_score_function": "softmax"},
            "qkv_score_function is 'gelu'.* proj_score_function is 'softmax'",
        ),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor"),
    ],
)
def test_what_has_no_official_form(tmp_path, changes, reason):
    config = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 1}
    model = TokenFormerForCausalLM(
        TokenFormerConfig(**{**PUBLISHED, **config, "qkv_tokens": 24, "proj_tokens": 8, **changes})
    )
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=f"no official form.*{reason}"):
        export_official(tmp_path / "model", tmp_path / "pytorch_model.bin")
    assert os.listdir(tmp_path) == ["model"]


def test_export_refuses_an_incomplete_checkpoint(imported, tmp_path):
    model = TokenFormerForCausalLM.from_pretrained(imported / "model")
    weights = model.state_dict()
    del weights["model.layers.0.mlp.key_tokens"], weights["lm_head.weight"]
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weight.*model\.layers\.0\.mlp\.key_tokens"):
        export_official(tmp_path, tmp_path / "pytorch_model.bin")
