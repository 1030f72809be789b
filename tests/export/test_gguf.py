"""GGUF files: transformers reads the very model in them, rows lie as llama.cpp has them, and what has no place in
one is refused before there is a file."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import auxin
from auxin.errors import AuxinError, CheckpointError, ConfigError, DataError, PlanError
from auxin.export import export_gguf
from auxin.export import gguf as writing
from auxin.export.gguf_families import Family
from auxin.sums import write_sums
from tiny_models import change, tiny
from tiny_tokenizers import tiny_tokenizer

ROWS = 313
"""Three more than the tokenizer has tokens."""
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 3e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
}
MODELS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 24}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 128}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 3e-4}),
}


def made(family: str, **values: Any) -> PreTrainedModel:
    """A model with nothing trivial in it: random gains and biases."""
    model_class, config_class, own = MODELS[family]
    sizes = {"vocab_size": ROWS} if family == "gpt2" else SIZES
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**{**sizes, **own, **values}))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.eval()


def read(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(torch.randint(ROWS - 5, (2, 24), generator=torch.Generator().manual_seed(1))).logits


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("byte_level")


@pytest.mark.parametrize("family", MODELS)
def test_in_f32_transformers_reads_the_very_model(family, tokenizer, tmp_path):
    model = made(family)
    report = export_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tokenizer)
    assert torch.equal(logits(read(tmp_path / "m.gguf")), logits(model))
    assert report.largest_change == 0
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """By the definitions of the types (ggml-quants.c), in NumPy: rows in blocks of 32 with a float16 step each."""
    if kind == "f16":
        return weight.astype(np.float16).astype(np.float32)
    if kind == "bf16":  # the upper half of the bits, to the nearest, to even where two are as near
        bits = weight.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)
    blocks = weight.reshape(-1, 32)
    if kind == "q8_0":
        step = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
        steps = np.round(blocks / step)
    else:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
        step = largest / np.float32(-8)
        steps = np.clip(np.floor(blocks / step + np.float32(8.5)), 0, 15) - 8
    return (step.astype(np.float16).astype(np.float32) * steps).reshape(weight.shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", MODELS)
def test_other_types_round_each_matrix_by_their_definition(family, kind, tokenizer, tmp_path):
    model = made(family)
    report = export_gguf(model, tmp_path / "m.gguf", type=kind, tokenizer=tokenizer)
    found = read(tmp_path / "m.gguf")
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if parameter.dim() == 2 and "wpe" not in name:
            own = "q8_0" if kind == "q4_0" and any(part in name for part in ("embed", "wte", "lm_head")) else kind
            laid = value.T if family == "gpt2" and "wte" not in name else value
            expected = rounded(np.ascontiguousarray(laid), own)
            value = expected.T if laid is not value else expected
        # One step of the grid where an entry lies halfway between two.
        off = np.abs(found.get_parameter(name).detach().numpy() - value) > 1e-6
        assert off.mean() < 1e-3, name
    assert (
        0
        < report.largest_change
        < {"f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}[kind]
    )
    assert set(report.tensors) == {"F32", kind.upper()} | ({"Q8_0"} if kind == "q4_0" else set())


def test_bf16_is_exact_for_a_bf16_model(tokenizer, tmp_path):
    model = made("llama").to(torch.bfloat16)
    report = export_gguf(model, tmp_path / "m.gguf", type="bf16", tokenizer=tokenizer)
    assert report.largest_change == 0
    assert torch.equal(logits(read(tmp_path / "m.gguf").to(torch.bfloat16)), logits(model))


def test_a_float64_model_is_rounded_to_float32_and_the_report_says_so(tokenizer, tmp_path):
    model = made("llama").double()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(2.0**-30)
    report = export_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tokenizer)
    assert 0 < report.largest_change <= 2**-24


def test_a_matrix_too_small_for_its_type_is_named(tokenizer, tmp_path):
    model = made("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-9)
    report = export_gguf(model, tmp_path / "m.gguf", type="q8_0", tokenizer=tokenizer)
    assert report.largest_change == 1
    assert "layers.0.mlp.up_proj.weight are so small that Q8_0 changes them by up to 100%" in report.notes[-1]
    report = export_gguf(model, tmp_path / "m.gguf", type="bf16", tokenizer=tokenizer, overwrite=True)
    assert report.largest_change < 2**-8
    assert len(report.notes) == 1


def test_gpt2_may_say_its_feed_forward_width(tokenizer, tmp_path):
    model = made("gpt2", n_inner=4 * 64)
    export_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tokenizer)
    assert torch.equal(logits(read(tmp_path / "m.gguf")), logits(model))


def test_ids_that_no_token_has_are_left_out(tokenizer, tmp_path, caplog):
    """LlamaConfig's default ids are those of another vocabulary, and some configs say -1 where there is none."""
    model = made("llama")
    model.config.update({"bos_token_id": ROWS, "pad_token_id": -1})
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert not {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id"} & fields.keys()
    model.config.update({"bos_token_id": ROWS - 1, "pad_token_id": 0})
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer, overwrite=True)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.bos_token_id"].contents() == ROWS - 1
    assert fields["tokenizer.ggml.padding_token_id"].contents() == 0
    assert not [record for record in caplog.records if record.name.startswith("gguf")]


def test_q8_moves_logits_by_no_more_than_its_grid(tokenizer, tmp_path):
    model = made("llama")
    export_gguf(model, tmp_path / "m.gguf", type="q8_0", tokenizer=tokenizer)
    assert 0 < change(logits(model), logits(read(tmp_path / "m.gguf"))) < 0.05


def rotated(x: np.ndarray, pairs: tuple[Any, Any], theta: float) -> np.ndarray:
    """Heads (position, unit), the units of each pair turned by the position times theta^(-2 i / d)."""
    first, second = pairs
    angles = np.outer(np.arange(len(x)), theta ** (-2 * np.arange(x.shape[1] // 2) / x.shape[1]))
    turned = np.empty_like(x)
    turned[:, first] = x[:, first] * np.cos(angles) - x[:, second] * np.sin(angles)
    turned[:, second] = x[:, second] * np.cos(angles) + x[:, first] * np.sin(angles)
    return turned


def test_rows_of_queries_and_keys_are_those_that_llama_cpp_rotates(tokenizer, tmp_path):
    """llama.cpp turns neighbouring units of a head, transformers one of the first half with one of the second."""
    model = made("llama")
    export_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tokenizer)
    tensors = {tensor.name: tensor.data.astype(np.float64) for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    attention = model.model.layers[1].self_attn
    stream = np.random.default_rng(0).normal(size=(9, 64))
    for head in range(4):
        scores = []
        for source, pairs in (
            ((attention.q_proj.weight, attention.k_proj.weight), (slice(0, 12), slice(12, 24))),
            ((tensors["blk.1.attn_q.weight"], tensors["blk.1.attn_k.weight"]), (slice(0, 24, 2), slice(1, 24, 2))),
        ):
            query, key = (np.asarray(getattr(w, "detach", lambda w=w: w)(), dtype=np.float64) for w in source)
            query, key = query[head * 24 :][:24], key[head // 2 * 24 :][:24]
            scores.append(rotated(stream @ query.T, pairs, 1234.0) @ rotated(stream @ key.T, pairs, 1234.0).T)
        np.testing.assert_allclose(*scores, rtol=1e-9, atol=1e-9)


@settings(max_examples=8)
@given(
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    half=st.integers(1, 9),
    times=st.integers(1, 9),
    ffn=st.integers(1, 70),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    kind=st.sampled_from(["f32", "q8_0"]),
)
def test_any_sizes(groups, shared, half, times, ffn, layers, tied, kind, tokenizer, tmp_path_factory):
    hidden = groups * shared * times  # LlamaConfig asks for a multiple, whatever head_dim is
    sizes = {"num_attention_heads": groups * shared, "num_key_value_heads": groups, "head_dim": 2 * half}
    other = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    model = made("llama", **sizes, **other)
    path = tmp_path_factory.mktemp("any") / "m.gguf"
    report = export_gguf(model, path, type=kind, tokenizer=tokenizer)
    found = read(path)
    assert found.config.tie_word_embeddings == tied
    if kind == "f32":
        assert torch.equal(logits(found), logits(model))
        assert report.unblocked == []
        return
    widths = {"attn_q": hidden, "attn_output": groups * shared * 2 * half, "ffn_down": ffn, "token_embd": hidden}
    for part, width in widths.items():
        assert any(part in name for name in report.unblocked) == bool(width % 32)


def test_keys_are_those_that_llama_cpp_reads(tokenizer, tmp_path):
    export_gguf(made("llama"), tmp_path / "m.gguf", type="q8_0", tokenizer=tokenizer)
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 48,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 1234.0,
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-4, rel=1e-6)
    assert len(fields["tokenizer.ggml.tokens"]) == ROWS
    assert fields["tokenizer.ggml.token_type"][-3:] == [gguf.TokenType.UNUSED] * 3


def test_keys_of_gpt2_are_those_that_llama_cpp_reads(tokenizer, tmp_path):
    export_gguf(made("gpt2"), tmp_path / "m.gguf", tokenizer=tokenizer)
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "general.architecture": "gpt2",
        "gpt2.block_count": 2,
        "gpt2.context_length": 1024,
        "gpt2.embedding_length": 64,
        "gpt2.feed_forward_length": 256,
        "gpt2.attention.head_count": 4,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(3e-4, rel=1e-6)


# -------------------------------------------------------------------------------------------------- what Auxin has made


def test_a_pruned_model_goes_out_of_its_folder(tokenizer, tmp_path):
    model = made("llama")
    plan = auxin.plan(model, "magnitude", ffn=0.5, heads=0.5, hidden=0.75)
    auxin.apply(plan, model)
    auxin.save(model, tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    report = export_gguf(tmp_path / "small", tmp_path / "m.gguf", type="f32")
    found = read(tmp_path / "m.gguf")
    assert (found.config.intermediate_size, found.config.hidden_size, found.config.num_attention_heads) == (48, 48, 2)
    assert torch.equal(logits(found), logits(model))
    assert report.tensors == {"F32": len(list(model.parameters()))}
    ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")("for leaf in tree: 40 naïve")["input_ids"]
    assert ids == tokenizer("for leaf in tree: 40 naïve")["input_ids"]


def test_a_damaged_folder_is_not_exported(tokenizer, tmp_path):
    auxin.save(made("llama"), tmp_path / "saved")
    write_sums(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors"):
        export_gguf(tmp_path / "saved", tmp_path / "m.gguf", tokenizer=tokenizer)
    assert not (tmp_path / "m.gguf").exists()


def uneven(model: PreTrainedModel) -> None:
    auxin.apply(auxin.plan(model, "magnitude", ffn=0.75, uniform=False, keep=["model.layers.0"]), model)


def low_rank(model: PreTrainedModel) -> None:
    auxin.apply(auxin.plan(model, "greenformers", rank=4, solver="svd"), model)


def gated(model: PreTrainedModel) -> None:
    auxin.apply(auxin.plan(model, "gated-attention"), model)


def widened(model: PreTrainedModel) -> None:
    auxin.apply(auxin.plan(model, "altup"), model)


@pytest.mark.parametrize(
    ("edit", "mend"),
    [(uneven, "one width"), (low_rank, "low_rank"), (gated, "gate"), (widened, "alt")],
    ids=["uneven", "low rank", "gates", "altup"],
)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_structural_edits_are_refused_with_a_way_out(edit, mend, where, tokenizer, tmp_path):
    model: Any = made("llama")
    edit(model)
    if where == "folder":
        auxin.save(model, tmp_path / "edited")
        model = tmp_path / "edited"
    with pytest.raises(ConfigError, match=rf"structural edit.*{mend}"):
        export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.glob("*.gguf"))


# ---------------------------------------------------------------------------------------------------------- refusals


def with_adapter(model: PreTrainedModel) -> PreTrainedModel:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    return model


def with_weight(value: float) -> PreTrainedModel:
    model = made("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    return model


def with_head(head: nn.Module) -> PreTrainedModel:
    model = made("llama")
    model.lm_head = head
    return model


def with_layers(*numbers: int) -> PreTrainedModel:
    model = made("llama")
    model.model.layers = nn.ModuleList(model.model.layers[number] for number in numbers)
    return model


def without_weights() -> PreTrainedModel:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES))


def with_heads_that_fit_no_width() -> PreTrainedModel:
    """LlamaConfig takes no such number of heads, but may be told so afterwards."""
    model = made("llama", hidden_size=66, num_attention_heads=6, head_dim=8)
    model.config.update({"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4})
    return model


def packed() -> PreTrainedModel:
    model = made("llama")
    model.config.quantization_config = {"quant_method": "torchao"}
    return model


REFUSED: dict[str, tuple[Any, type[AuxinError], str]] = {
    "another architecture": (lambda: tiny("olmo", dtype=torch.float32), ConfigError, "olmo has no GGUF form"),
    "a TokenFormer": (lambda: tiny("tokenformer", dtype=torch.float32), ConfigError, "tokenformer has no GGUF form"),
    "no head": (lambda: LlamaModel(LlamaConfig(**SIZES)), ConfigError, "is a LlamaModel.*LlamaForCausalLM"),
    "biases": (lambda: made("llama", attention_bias=True), ConfigError, "attention_bias is true.*read as false"),
    "another activation": (lambda: made("llama", hidden_act="gelu"), ConfigError, "hidden_act is 'gelu'.*'silu'"),
    "scaled positions": (
        lambda: made("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ConfigError,
        "rope_parameters is .*linear",
    ),
    "a window": (
        lambda: made("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        ConfigError,
        "sliding_window is 8",
    ),
    "heads that transformers has another size for": (lambda: made("qwen3", head_dim=16), ConfigError, "head_dim is 16"),
    "positions that it has another number of": (lambda: made("gpt2", n_positions=64), ConfigError, "n_positions is 64"),
    "heads that no key tells of": (lambda: made("qwen2", head_dim=32), ConfigError, "q_proj.*would be read as"),
    "heads that fit no width": (with_heads_that_fit_no_width, ConfigError, "not a multiple of .*Change those sizes"),
    "an adapter": (lambda: with_adapter(made("llama")), ConfigError, "changed behind its config.*Merge adapters"),
    "no number": (lambda: with_weight(float("nan")), ConfigError, "up_proj.*entries of nan.*Mend the model"),
    "more than float16 holds": (lambda: with_weight(1e5), ConfigError, "up_proj.*65504|6.55e.*Give bf16 or f32"),
    "a layer that is not there": (
        lambda: with_layers(0),
        ConfigError,
        r"behind its config: model\.layers\.1.*not there",
    ),
    "one layer twice": (lambda: with_layers(0, 0), ConfigError, r"layers\.1.*is another tensor"),
    "a head of other rows": (
        lambda: with_head(nn.Linear(64, 400, bias=False)),
        ConfigError,
        r"lm_head\.weight has the shape \(400, 64\).*\(313, 64\)",
    ),
    "no head at all": (lambda: with_head(nn.Identity()), ConfigError, r"lm_head\.weight is not there"),
    "a GPT-2 of another feed-forward width": (lambda: made("gpt2", n_inner=96), ConfigError, "n_inner is 96"),
    "no weights": (without_weights, ConfigError, "meta device"),
    "what peft wraps": (
        lambda: get_peft_model(made("llama"), LoraConfig(r=2, target_modules=["q_proj"])),
        ConfigError,
        "is a PeftModel.*merge_and_unload",
    ),
    "packed weights": (packed, PlanError, r"quantized \(torchao\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_and_leaves_nothing(case, tokenizer, tmp_path):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        export_gguf(make(), tmp_path / "m.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_paths_and_types_are_checked_first(tokenizer, tmp_path):
    model = made("llama")
    (tmp_path / "there.gguf").write_text("old")
    (tmp_path / "folder.gguf").mkdir()
    for name, options, error, message in (
        ("m.bin", {}, ConfigError, "ends in .gguf"),
        ("folder.gguf", {}, ConfigError, "is a folder"),
        ("there.gguf", {}, CheckpointError, "exists already"),
        ("m.gguf", {"type": "q4_k"}, ConfigError, "type = 'q4_k'.*f32, f16, bf16, q8_0, q4_0.*llama-quantize"),
        ("m.gguf", {"tokenizer": None}, DataError, "holds its tokenizer"),
        ("m.gguf", {"tokenizer": tokenizer.backend_tokenizer}, DataError, "is a Tokenizer, and has to be"),
    ):
        with pytest.raises(error, match=message):
            export_gguf(model, tmp_path / name, **{"tokenizer": tokenizer, **options})
    assert (tmp_path / "there.gguf").read_text() == "old"
    export_gguf(model, tmp_path / "there.gguf", tokenizer=tokenizer, overwrite=True)
    assert change(logits(model), logits(read(tmp_path / "there.gguf"))) < 1e-2


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_library_is_told_with_its_extra(missing, tokenizer, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(writing, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ConfigError, match=rf'needs {missing}: pip install "auxin\[gguf\]"'):
        export_gguf(made("llama"), tmp_path / "m.gguf", tokenizer=tokenizer)


def test_an_old_file_stays_when_writing_fails(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_text("old")

    def full(*_: Any) -> None:
        raise OSError("960 requested and 32 written")  # NumPy's words for a full disk

    for step in ("write_kv_data_to_file", "write_tensor_data"):
        with monkeypatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, step, full)
            with pytest.raises(CheckpointError, match=r"m\.gguf can't be .*: 960 requested"):
                export_gguf(made("llama"), tmp_path / "m.gguf", tokenizer=tokenizer, overwrite=True)
    usage = writing.disk_usage(tmp_path)
    monkeypatch.setattr(writing, "disk_usage", lambda folder: usage._replace(free=99))
    with pytest.raises(CheckpointError, match=r"m\.gguf needs 2\d\d,\d\d\d bytes, and its disk has room for 99"):
        export_gguf(made("llama"), tmp_path / "m.gguf", tokenizer=tokenizer, overwrite=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.gguf", "old")]


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_rows_in_another_order_are_found_by_reading_the_file(kind, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "arranged", lambda self, key, value, config: value)
    model = made("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = 1e3  # of this block alone the grid is as coarse
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight as transformers reads it differs"):
        export_gguf(model, tmp_path / "m.gguf", type=kind, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
