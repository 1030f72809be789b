"""The TokenFormer of images computes what the paper and ViT say, and is an ordinary Hugging Face model."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from auxin.errors import ConfigError, DataError, PlanError
from auxin.evaluation.inspection import describe_checkpoint
from auxin.models.tokenformer import (
    VISION_PUBLISHED,
    VisionTokenFormerConfig,
    VisionTokenFormerForImageClassification,
    VisionTokenFormerModel,
)
from auxin.models.tokenformer.layers import SLOT_OF_MODULE
from auxin.models.tokenformer.slots import SLOTS
from auxin.nn.pattention import Pattention
from oracles import vision_tokenformer as oracle

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "qkv_tokens": 10,
    "proj_tokens": 9,
    "ffn_tokens": 14,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
PAPER = {**SIZES, **VISION_PUBLISHED}


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model whose weights are large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = VisionTokenFormerForImageClassification(VisionTokenFormerConfig(**{**PAPER, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def pixels(model: Any, images: int = 3, seed: int = 1) -> Tensor:
    patches, config = model.model.embeddings.patch_embeddings, model.config
    shape = (images, config.num_channels, *patches.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(model.dtype)


def expected(model: Any, images: Tensor, fake: oracle.Fake = "") -> Tensor:
    """What the oracle says."""
    config, patch = model.config, model.model.embeddings.patch_embeddings.patch_size
    found = oracle.logits(
        {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()},
        images.numpy(),
        heads=config.num_attention_heads,
        patch=patch,
        layers=config.num_hidden_layers,
        groups={slot: config.group_sizes(slot) for slot in SLOTS},
        tau={slot: config.group_tau(slot) for slot in SLOTS},
        functions={slot: config.slot_score_function(slot) for slot in SLOTS},
        norm_eps=config.layer_norm_eps,
        fake=fake,
    )
    return torch.from_numpy(found)


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score_function": "softmax"},
        {"score_function": "gelu", "qkv_score_function": "softmax"},
        {"norm_parameters": True},
        {"num_channels": 1, "image_size": [8, 12], "patch_size": [4, 2], "layer_norm_eps": 1e-2},
        {"qkv_tokens": [4, 6], "ffn_tokens": [5, 5, 4], "ffn_tau": [1.0, 2.5, 0.5]},
    ],
)
def test_the_whole_forward_pass_is_the_oracle_s(changes: dict[str, Any], attention: str) -> None:
    model = tiny_model(torch.float64, attn_implementation=attention, **changes)
    images = pixels(model)
    assert difference(model(images).logits, expected(model, images)) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("fake", ["no sqrt(n)", "softmax", "causal", "two feed-forward layers", "gains in the layers"])
def test_what_a_fake_would_compute_is_another_function(fake: oracle.Fake) -> None:
    model = tiny_model(torch.float64)
    images = pixels(model)
    assert difference(model(images).logits, expected(model, images, fake)) > 1e-2


def test_there_are_no_other_parameters_than_the_paper_s() -> None:
    """One pair of matrices for the feed-forward part, no biases, and no gains in the layers unless asked for."""
    shapes = {name: tuple(parameter.shape) for name, parameter in tiny_model().named_parameters()}
    counts = {"qkv": 10, "proj": 9, "ffn": 14}
    wanted = {
        f"model.layers.{layer}.{module}.{kind}": (counts[slot], 32)
        for layer in range(2)
        for module, slot in SLOT_OF_MODULE.items()
        for kind in ("key_tokens", "value_tokens")
    } | {
        "model.embeddings.cls_token": (1, 1, 32),
        "model.embeddings.position_embeddings": (1, 5, 32),
        "model.embeddings.patch_embeddings.projection.weight": (32, 3, 4, 4),
        "model.embeddings.patch_embeddings.projection.bias": (32,),
        "model.norm.weight": (32,),
        "model.norm.bias": (32,),
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }
    assert shapes == wanted
    more = set(dict(tiny_model(norm_parameters=True).named_parameters())) - set(wanted)
    norms = {f"model.layers.{layer}.{norm}" for layer in range(2) for norm in ("attention_norm", "mlp_norm")}
    assert more == {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}


@pytest.mark.parametrize("norm_parameters", [False, True])
@pytest.mark.parametrize("image_size", [8, (8, 12)])
def test_the_config_s_count_is_the_model_s(norm_parameters: bool, image_size: Any) -> None:
    model = tiny_model(norm_parameters=norm_parameters, image_size=image_size)
    assert model.config.num_parameters() == model.num_parameters()


@torch.no_grad()
def test_with_linear_layers_for_pattention_it_is_a_vit_of_transformers_blocks() -> None:
    """The same matrices, without biases, and one matrix for the feed-forward part: what is left is the wiring."""
    ours = tiny_model(torch.float64, norm_parameters=True)
    sizes = {key: value for key, value in SIZES.items() if not key.endswith("_tokens")}
    config = ViTConfig(**sizes, intermediate_size=32, qkv_bias=False, layer_norm_eps=ours.config.layer_norm_eps)
    theirs = ViTForImageClassification(config).double().eval()
    theirs.vit.embeddings.load_state_dict(ours.model.embeddings.state_dict())
    theirs.vit.layernorm.load_state_dict(ours.model.norm.state_dict())
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    for layer, their_layer in zip(ours.model.layers, theirs.vit.layers, strict=True):
        their_layer.layernorm_before.load_state_dict(layer.attention_norm.state_dict())
        their_layer.layernorm_after.load_state_dict(layer.mlp_norm.state_dict())
        for name, their_name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("proj", "o_proj")):
            linear = nn.Linear(32, 32, bias=False, dtype=torch.float64)
            nn.init.normal_(linear.weight, std=0.3)
            setattr(layer.attention, name, linear)
            setattr(their_layer.attention, their_name, linear)
        layer.mlp = their_layer.mlp = nn.Linear(32, 32, bias=False, dtype=torch.float64)
    images = pixels(ours)
    found = [model(images, output_hidden_states=True) for model in (ours, theirs)]
    assert difference(found[0].logits, found[1].logits) < 1e-13
    for one, other in zip(found[0].hidden_states, found[1].hidden_states, strict=True):
        assert difference(one, other) < 1e-13


@torch.no_grad()
def test_every_token_sees_all_others_and_places_count() -> None:
    model = tiny_model(torch.float64)
    images = pixels(model, 1)
    before = model.model(images).last_hidden_state
    changed = images.clone()
    changed[..., 4:, 4:] += 1  # the last patch
    assert (model.model(changed).last_hidden_state - before).abs().amax(-1).min() > 1e-3
    swapped = torch.cat([images[..., 4:], images[..., :4]], -1)
    assert difference(model(swapped).logits, model(images).logits) > 1e-3


@torch.no_grad()
def test_it_is_called_as_transformers_calls_models() -> None:
    model = tiny_model(attn_implementation="eager")
    images, labels = pixels(model), torch.tensor([0, 2, 1])
    output = model(images, labels=labels, output_hidden_states=True, output_attentions=True)
    assert output.loss.item() == pytest.approx(nn.functional.cross_entropy(output.logits, labels).item())
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 5, 5)] * 2
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 5, 32)] * 3
    assert torch.equal(model(images, return_dict=False)[0], output.logits)
    half = copy.deepcopy(model).bfloat16()
    assert half(images).logits.dtype == torch.bfloat16  # pixels are cast to the type of the weights
    hidden = model.model(images, attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 3)).last_hidden_state
    other = images.clone()
    other[..., 4:, 4:] += 1
    masked = model.model(other, attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 3)).last_hidden_state
    torch.testing.assert_close(masked[:, :4], hidden[:, :4])
    with pytest.raises(ValueError, match="doesn't match model"):
        model(torch.zeros(1, 3, 16, 16))
    assert model(torch.zeros(1, 3, 16, 16), interpolate_pos_encoding=True).logits.shape == (1, 3)
    with pytest.raises(ConfigError, match="Give pixel_values"):
        model()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for recomputes in (False, True):
        model = tiny_model().train()
        if recomputes:
            model.gradient_checkpointing_enable()
        model(pixels(model), labels=torch.tensor([0, 2, 1])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_dropout_is_for_training_and_is_vit_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the embeddings and behind both parts of each layer: five places with two layers, as in ViT."""
    model = tiny_model(hidden_dropout_prob=0.5)
    images = pixels(model)
    assert torch.equal(model(images).logits, tiny_model()(images).logits)
    sizes = {key: value for key, value in SIZES.items() if not key.endswith("_tokens")}
    vit = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=32, hidden_dropout_prob=0.5))
    original, seen = nn.functional.dropout, list[tuple[int, ...]]()

    def watched(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        assert (p, training) == (0.5, True)
        seen.append(tuple(x.shape))
        return original(x, p, training, inplace)

    monkeypatch.setattr(nn.functional, "dropout", watched)
    for each in (model, vit):
        seen.clear()
        assert not torch.equal(each.train()(images).logits, each(images).logits)
        assert seen == [(3, 5, 32)] * 2 * 5


def test_a_new_model_is_drawn_as_the_paper_s_code_and_vit_draw() -> None:
    torch.manual_seed(0)
    config = VisionTokenFormerConfig(**{**PAPER, "hidden_size": 64, "ffn_tokens": 800, "image_size": 64})
    model: Any = VisionTokenFormerForImageClassification(config)
    layer, embeddings = model.model.layers[0], model.model.embeddings
    assert layer.mlp.key_tokens.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.value_tokens.std().item() == pytest.approx(2 / (2 * 8), rel=0.05)
    assert embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.05)
    assert embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)


PROGRAM = """
import sys
import torch
import auxin
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
assert "auxin.models.tokenformer.vision" not in sys.modules
assert "transformers.models.vit.modeling_vit" not in sys.modules
model = AutoModelForImageClassification.from_pretrained(folder).eval()
probe = load_file(folder + "/probe.safetensors")
with torch.no_grad():
    assert torch.equal(model(probe["pixels"]).logits, probe["logits"])
base = AutoModel.from_pretrained(folder)
print(type(config).__name__, type(model).__name__, type(base).__name__, type(auxin.load(folder)).__name__)
"""


def test_auto_classes_load_it_in_a_new_process_bit_by_bit(tmp_path: Any) -> None:
    model = tiny_model(qkv_tokens=[6, 4], norm_parameters=True)
    images = pixels(model)
    model.set_tau(qkv=[1.5, 0.25])
    with torch.no_grad():
        probe = {"pixels": images, "logits": model(images).logits}
    model.save_pretrained(tmp_path)
    save_file(probe, tmp_path / "probe.safetensors")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == [
        "VisionTokenFormerConfig",
        "VisionTokenFormerForImageClassification",
        "VisionTokenFormerModel",
        "VisionTokenFormerForImageClassification",
    ], done.stderr
    assert type(AutoModel.from_config(model.config)) is VisionTokenFormerModel
    assert type(AutoModelForImageClassification.from_config(model.config)) is VisionTokenFormerForImageClassification


@torch.no_grad()
def test_the_first_groups_are_a_smaller_model() -> None:
    model = tiny_model(torch.float64, qkv_tokens=[6, 4], ffn_tokens=[5, 5, 4], norm_parameters=True)
    small = model.truncate_groups(1)
    assert [small.config.group_sizes(slot) for slot in SLOTS] == [[6], [9], [5]]
    images = pixels(model)
    for module in model.modules():
        if isinstance(module, Pattention) and len(module.group_sizes) > 1:
            module.value_tokens[module.group_sizes[0] :] = 0
    assert difference(small(images).logits, model(images).logits) < 1e-12
    with pytest.raises(PlanError, match=r"received 4. Ask for 1..3"):
        model.truncate_groups(4)


def test_a_checkpoint_is_described_and_scored_on_no_text(tmp_path: Any) -> None:
    tiny_model(ffn_tokens=[5, 5, 4]).save_pretrained(tmp_path)
    found = describe_checkpoint(tmp_path)
    assert [groups.sizes for groups in found.token_groups] == [[10], [9], [5, 5, 4]]
    assert (found.unit, len(found.nested)) == ("sample", 3)
    with pytest.raises(DataError, match=r"vision_tokenformer, which reads images .*Leave the corpus out"):
        describe_checkpoint(tmp_path, corpus=object())  # type: ignore[arg-type] # it is not looked at


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_size": 3}, r"patch_size must divide image_size, received patches of 3 .* 8.*\[1, 2, 4, 8\]"),
        ({"patch_size": 16}, "patch_size must divide image_size"),
        ({"image_size": [8, 10]}, "side of 10"),
        ({"image_size": [8]}, r"image_size must be a whole number, or height and width, received \[8\]"),
        ({"image_size": 0}, "image_size must be a positive whole number, received 0"),
        ({"patch_size": -4}, "patch_size must be a positive"),
        ({"num_channels": True}, "num_channels must be a positive whole number"),
        ({"norm_parameters": "no"}, "norm_parameters"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be .*below 1"),
        ({"num_attention_heads": 5}, "must divide hidden_size"),
        ({"ffn_tokens": [8, 0]}, "ffn_tokens.*0"),
    ],
)
def test_the_config_says_what_is_wrong(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionTokenFormerConfig(**{**SIZES, **wrong})
