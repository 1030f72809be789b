"""Parameters, FLOPs and memory, against torch's own counter on real passes and against closed forms."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

import auxin
from auxin.accounting import count_parameters, flops_per_token, training_memory
from auxin.accounting.flops import countable_kernels
from auxin.errors import ConfigError
from auxin.models.tokenformer import TokenFormerConfig
from tiny_models import logits, tiny

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
CONFIGS = {
    "llama-gqa": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=128, max_position_embeddings=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    "mixtral": MixtralConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64
    ),
}
TOKENFORMERS = {
    f"tokenformer-{score_function}-{len(groups)}": TokenFormerConfig(
        **SMALL,
        qkv_tokens=groups,
        proj_tokens=groups,
        ffn_tokens=[2 * n for n in groups],
        score_function=score_function,
    )
    for score_function in ("l2_norm_gelu", "gelu_l2_norm", "gelu", "linear", "softmax")
    for groups in ([48], [32, 16, 13])
}
CONFIGS |= TOKENFORMERS


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param])


@pytest.mark.parametrize("length", [7, 32])
def test_flops_agree_with_a_counted_real_pass(model, length):
    ids = torch.randint(96, (2, length))
    with FlopCounterMode(display=False) as counter, countable_kernels(model):
        model.eval()(input_ids=ids, use_cache=False)
    assert flops_per_token(model, length).forward == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.01)


def test_flops_of_a_dense_model_follow_the_closed_form():
    config = CONFIGS["gpt-neox"]
    d, layers, vocabulary, length = 32, 2, 96, 16
    model = AutoModelForCausalLM.from_config(config)
    expected = 2 * layers * 12 * d * d + 4 * layers * d * length + 2 * vocabulary * d
    counted = flops_per_token(model, length)
    assert counted.forward == expected
    assert counted.backward == 2 * expected
    assert counted.training == 3 * expected


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def test_an_encoder_and_a_decoder_cost_what_each_of_them_sees():
    """Of 20 tokens of text, 17 and 9 in the shape of span corruption."""
    model, d, inner, hidden, vocabulary = tiny_t5(), 32, 32, 48, 96
    layer = 4 * d * inner + 2 * d * hidden
    encoder = 2 * 2 * layer * 17 + 2 * 4 * inner * 17 * 17
    # Cross attention reads keys and values of the encoder's output.
    cross = 2 * 2 * (2 * d * inner * 9 + 2 * d * inner * 17) + 2 * 4 * inner * 9 * 17
    decoder = 2 * 2 * layer * 9 + 2 * 4 * inner * 9 * 9 + 2 * d * vocabulary * 9
    counted = flops_per_token(model, 20, encoder_length=17, decoder_length=9)
    assert counted.forward == pytest.approx((encoder + cross + decoder) / 20)
    assert counted.sequence_length == 20


def test_counting_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    flops_per_token(model, 8)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tied_table_counts_once():
    tied = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=True))
    untied = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=False))
    table = 96 * 32
    assert count_parameters(untied).total - count_parameters(tied).total == table
    assert count_parameters(tied).embedding == table
    assert count_parameters(untied).embedding == 2 * table
    assert count_parameters(tied).non_embedding == count_parameters(untied).non_embedding


def saved_by_a_real_step(model, **inputs) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, parameters left out."""
    parameters = {p.data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or keep(t), lambda t: t):
        model.train()(**inputs)
    return sum(storages.values())


@pytest.mark.parametrize("name", ["gpt-neox", "mixtral", "t5", *TOKENFORMERS])
def test_training_memory_is_what_a_real_step_saves(name):
    model = tiny_t5() if name == "t5" else AutoModelForCausalLM.from_config(CONFIGS[name])
    ids = torch.randint(96, (3, 16))
    labels = ids[:, :5].contiguous() if name == "t5" else ids
    saved = saved_by_a_real_step(model, input_ids=ids, labels=labels, use_cache=False)
    estimate = training_memory(model, 3, 16, labels.shape[1])
    assert estimate.weights == 4 * count_parameters(model).total
    assert estimate.optimizer == 2 * estimate.weights
    # Experts are counted in half of the bytes, twice, and so is what is float32 in either type.
    tolerance = 0.3 if name == "mixtral" else 0.1
    assert estimate.activations == pytest.approx(saved, rel=tolerance)


def test_training_memory_of_images_is_what_a_real_step_saves():
    model = tiny("vit", dtype=torch.float32, image_size=16)
    images = {batch: torch.randn(batch, 3, 16, 16) for batch in (2, 5)}
    found = {}
    for batch, pixels in images.items():
        saved = saved_by_a_real_step(model, pixel_values=pixels, labels=torch.zeros(batch, dtype=torch.long))
        estimate = training_memory(model, batch)
        assert estimate.weights == 4 * count_parameters(model).total
        assert estimate.activations == pytest.approx(saved, rel=0.1)
        given = {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}
        assert training_memory(model, batch, inputs=given) == estimate
        found[batch] = estimate.activations
    assert found[5] == pytest.approx(5 / 2 * found[2], rel=0.05), "an image costs what an image costs"


def test_memory_of_text_needs_a_length():
    with pytest.raises(ConfigError, match=r"sequence_length: needed to count the memory of a model of text\. Give it"):
        training_memory(tiny_t5(), 2)


@pytest.mark.parametrize("family", ["beit", "deberta"])
def test_counting_keeps_no_tensor_without_data_and_follows_none_backwards(family):
    """BEiT's code keeps an index in a cache that all models share; DeBERTa's hands parameters to its modules."""
    model = tiny(family)
    before = logits(model)
    counted = flops_per_token(model, 7).forward
    assert counted > 0
    assert torch.equal(logits(model), before)
    assert flops_per_token(tiny(family, seed=1), 7).forward == counted
    assert torch.equal(logits(tiny(family)), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lengths_that_no_model_reads_are_refused_and_not_tried():
    model = tiny("llama")
    for length in (10**12, 2**24 + 1):
        with pytest.raises(
            ConfigError, match=rf"sequence_length: {length:,} tokens are more than any model reads.*Give"
        ):
            flops_per_token(model, length)
    with pytest.raises(ConfigError, match="sequence_length"):
        auxin.plan(model, "magnitude", target={"flops": 0.5, "sequence_length": 10**12})
    with pytest.raises(ConfigError, match=r"does not run on 40 tokens, and has positions for 32\. Give at most these"):
        flops_per_token(tiny("bert"), 40)
    assert flops_per_token(model, 10**5).forward > flops_per_token(model, 10**4).forward
