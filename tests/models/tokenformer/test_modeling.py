"""TokenFormerForCausalLM is an ordinary Hugging Face model."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import auxin.models  # noqa: F401 - registers the Auto classes
from auxin.errors import ConfigError, PlanError
from auxin.models.tokenformer import PUBLISHED, TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel
from auxin.models.tokenformer.layers import rotate
from auxin.models.tokenformer.modeling import rotary_cos_sin

VOCABULARY = 97


def tiny_config(**changes):
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "qkv_tokens": [16, 8],
        "proj_tokens": 12,
        "ffn_tokens": [32, 8, 16],
        "pad_token_id": 1,
    }
    return TokenFormerConfig(**{**values, **changes})


def tiny_model(**changes):
    """A model whose weights are large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = TokenFormerForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def tokens(batch=2, length=10, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, input_ids, **kwargs):
    return model.generate(input_ids, max_new_tokens=8, do_sample=False, eos_token_id=None, **kwargs)


def test_importing_the_package_registers_the_auto_classes(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    script = (
        "import sys, auxin; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM;"
        "config = AutoConfig.from_pretrained(sys.argv[1]);"
        "print(*(type(auto.from_config(config)).__name__ for auto in (AutoModel, AutoModelForCausalLM)))"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["TokenFormerModel", "TokenFormerForCausalLM"]


def test_parameter_names(model):
    names = {name for name, _ in model.named_parameters()}
    patts = ("attention.query", "attention.key", "attention.value", "attention.proj", "mlp")
    layers = {
        f"model.layers.{i}.{patt}.{kind}" for i in range(2) for patt in patts for kind in ("key_tokens", "value_tokens")
    }
    assert names == layers | {"model.embed_tokens.weight", "model.norm.weight", "model.norm.bias"}


def test_loss_is_the_mean_next_token_cross_entropy(model):
    input_ids = tokens()
    labels = input_ids.clone()
    labels[0, :4] = -100
    output = model(input_ids, labels=labels)
    log_probabilities = output.logits.double().log_softmax(-1)[:, :-1]
    picked = log_probabilities.gather(-1, input_ids[:, 1:, None])[..., 0]
    expected = -picked[labels[:, 1:] != -100].mean()
    assert math.isclose(output.loss.item(), expected.item(), rel_tol=1e-5)


def test_logits_to_keep(model):
    input_ids = tokens()
    full = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(input_ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]])


def test_is_causal(model):
    input_ids = tokens()
    changed = input_ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCABULARY
    before, after = model(input_ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_generation_gives_the_same_tokens(attention):
    model = tiny_model(attn_implementation=attention)
    input_ids = tokens()
    cached = greedy(model, input_ids)
    assert torch.equal(cached, greedy(model, input_ids, use_cache=False))
    assert len(set(cached[:, 10:].flatten().tolist())) > 3  # a constant output would prove nothing


def test_step_by_step_logits_equal_the_full_forward(model):
    input_ids = tokens()
    cache, steps = None, []
    for position in range(input_ids.shape[1]):
        output = model(input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model(input_ids).logits, rtol=1e-4, atol=1e-4)


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=3), seed=st.integers(0, 100))
def test_left_padded_batches_generate_what_single_prompts_do(lengths, seed):
    model = tiny_model()
    prompts = [tokens(1, length, seed + index) for index, length in enumerate(lengths)]
    longest = max(lengths)
    batch = torch.cat([F.pad(prompt, (longest - prompt.shape[1], 0), value=1) for prompt in prompts])
    mask = torch.cat([F.pad(torch.ones_like(prompt), (longest - prompt.shape[1], 0)) for prompt in prompts])
    together = greedy(model, batch, attention_mask=mask)[:, longest:]
    alone = torch.cat([greedy(model, prompt)[:, prompt.shape[1] :] for prompt in prompts])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing(attention):
    model = tiny_model(attn_implementation=attention)
    input_ids = tokens(1, 6)
    expected = model(input_ids).logits
    right = model(F.pad(input_ids, (0, 3), value=1), attention_mask=torch.tensor([[1] * 6 + [0] * 3])).logits[:, :6]
    torch.testing.assert_close(right, expected, rtol=1e-4, atol=1e-4)
    positions = torch.tensor([[0, 0, 0, *range(6)]])
    mask = torch.tensor([[0] * 3 + [1] * 6])
    left = model(F.pad(input_ids, (3, 0), value=1), attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(left).all()


def test_sdpa_equals_eager(model):
    eager = tiny_model(attn_implementation="eager")
    output = eager(tokens(), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert [weights.shape for weights in output.attentions] == [(2, 2, 10, 10)] * 2
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, tied, dtype):
    model = tiny_model(tie_word_embeddings=tied, ffn_tau=[0.7, 2.0, 3.1]).to(dtype)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert isinstance(loaded, TokenFormerForCausalLM)
    assert loaded.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    if dtype == torch.float32:
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    tau = loaded.model.layers[1].mlp.tau
    assert tau.dtype == torch.float32
    assert torch.equal(tau, torch.tensor([0.7, 2.0, 3.1]))


def test_the_base_model_loads_alone(tmp_path, model):
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, TokenFormerModel)
    expected = model.model(tokens()).last_hidden_state
    assert torch.equal(base(tokens()).last_hidden_state, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("changes", "query", "mlp", "values"),
    [
        (PUBLISHED, 0.02, 0.02, 2 / (3 * 8)),
        ({}, 1 / 8, 1 / 8, 2 / (3 * 8)),
        ({**PUBLISHED, "ffn_score_function": "gelu"}, 0.02, 1 / 8, 2 / (3 * 8)),
        ({"key_initializer_range": 0.5, "value_initializer_range": 0.3}, 0.5, 0.5, 0.3),
    ],
)
def test_initialisation_is_the_official_codes_but_for_keys_without_a_norm(changes, query, mlp, values):
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, num_hidden_layers=3, qkv_tokens=[256, 64], vocab_size=1000, **changes)
    model = AutoModelForCausalLM.from_config(config)
    drawn = {
        "attention.query.key_tokens": query,
        "mlp.key_tokens": mlp,
        "attention.query.value_tokens": values,
        "mlp.value_tokens": values,
    }
    for name, std in drawn.items():
        weights = torch.cat([layer.get_parameter(name).flatten() for layer in model.model.layers])
        assert weights.std().item() == pytest.approx(std, rel=0.03)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    torch.testing.assert_close(model.model.layers[2].attention.key.tau, torch.tensor([16.0, 8.0]))


def test_the_same_seed_gives_the_same_weights():
    first, second = (
        torch.manual_seed(3) and TokenFormerForCausalLM(tiny_config()).model.layers[1].mlp.key_tokens for _ in range(2)
    )
    assert torch.equal(first, second)


def test_rotary_turns_halves_by_position_and_leaves_the_rest():
    x = torch.randn(1, 2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rotary_cos_sin(torch.arange(5)[None], 4, 10000.0, torch.float64))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    for position in range(5):
        for pair, frequency in enumerate((1.0, 10000.0**-0.5)):
            angle = position * frequency
            a, b = x[0, :, position, pair], x[0, :, position, pair + 2]
            expected = torch.stack(
                (a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle))
            )
            got = torch.stack((turned[0, :, position, pair], turned[0, :, position, pair + 2]))
            torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_bfloat16_keeps_the_rotary_angles():
    cos, _ = rotary_cos_sin(torch.tensor([[1999]]), 4, 10000.0, torch.bfloat16)
    assert cos.dtype == torch.float32
    assert cos[0, 0, 1].item() == pytest.approx(math.cos(19.99), abs=1e-5)


def test_set_tau_reaches_every_layer_and_the_config(model):
    model = tiny_model(score_function="l2_norm_gelu")
    before = model(tokens()).logits
    model.set_tau(ffn=[9.0, 1.0, 1.0])
    assert model.config.ffn_tau == [9.0, 1.0, 1.0]
    assert model.config.qkv_tau is None
    for layer in model.model.layers:
        assert layer.mlp.tau.tolist() == [9.0, 1.0, 1.0]
        torch.testing.assert_close(layer.attention.value.tau, torch.tensor([4.0, math.sqrt(8)]))
    assert not torch.allclose(model(tokens()).logits, before)


@pytest.mark.parametrize("tau", [[1.0], [1.0, -1.0], [1.0, math.inf]])
def test_set_tau_refuses_and_changes_nothing(model, tau):
    with pytest.raises(ConfigError, match="qkv tau must hold 2 positive finite numbers"):
        model.set_tau(qkv=tau, proj=[5.0])
    assert model.config.proj_tau is None


def test_truncate_groups_is_the_model_without_the_later_groups(model):
    smaller = model.truncate_groups(1)
    assert smaller.config.qkv_tokens == [16]
    assert smaller.config.ffn_tokens == [32]
    assert not smaller.training
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    # With their values at zero, the later groups of the whole model add nothing.
    muted = tiny_model()
    muted.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in muted.model.layers:
            for patt, old in ((layer.attention.query, 16), (layer.attention.key, 16), (layer.attention.value, 16)):
                patt.value_tokens[old:] = 0
            layer.mlp.value_tokens[32:] = 0
    torch.testing.assert_close(smaller(tokens()).logits, muted(tokens()).logits, rtol=1e-4, atol=1e-4)
    weights = model.model.layers[0].mlp.key_tokens.detach().clone()
    with torch.no_grad():
        smaller.model.layers[0].mlp.key_tokens.zero_()
    assert torch.equal(model.model.layers[0].mlp.key_tokens, weights)


def test_truncate_groups_keeps_what_is_shorter_and_the_kept_tau():
    model = tiny_model(ffn_tau=[1.5, 2.5, 3.5], tie_word_embeddings=False)
    smaller = model.truncate_groups(2)
    assert (smaller.config.proj_tokens, smaller.config.ffn_tokens) == ([12], [32, 8])
    assert smaller.config.ffn_tau == [1.5, 2.5]
    assert smaller.model.layers[0].mlp.tau.tolist() == [1.5, 2.5]
    assert smaller.lm_head.weight is not smaller.model.embed_tokens.weight
    assert torch.equal(model.truncate_groups(3)(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("num_groups", [0, 4, -1])
def test_truncate_groups_refuses(model, num_groups):
    with pytest.raises(PlanError, match=f"3 group.*received {num_groups}"):
        model.truncate_groups(num_groups)


def test_the_vocabulary_can_be_resized():
    model = tiny_model()
    before = model(tokens()).logits
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model.config.vocab_size == VOCABULARY + 7
    assert model.config.num_parameters() == model.num_parameters()
    torch.testing.assert_close(model(tokens()).logits[..., :VOCABULARY], before)


def test_one_graph_under_compile():
    torch.compiler.reset()  # what other tests compiled counts against its limit
    model = tiny_model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, output = (m(tokens(), labels=tokens(), use_cache=False) for m in (model, compiled))
    torch.testing.assert_close(output.loss, expected.loss)
    output.loss.backward()
    gradient = model.model.layers[0].mlp.key_tokens.grad.clone()
    model.zero_grad()
    expected.loss.backward()
    torch.testing.assert_close(gradient, model.model.layers[0].mlp.key_tokens.grad)


def test_exactly_one_input(model):
    with pytest.raises(ConfigError, match="exactly one"):
        model()


def test_text_generation_pipeline_of_a_folder(model, tmp_path):
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", padding_side="left")
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    prompts = ["w5 w6 w7", "w9"]
    batched = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    assert [texts[0]["generated_text"].startswith(prompt) for texts, prompt in zip(batched, prompts, strict=True)]
    assert [texts[0] for texts in batched] == [generate(p, max_new_tokens=5, do_sample=False)[0] for p in prompts]
