"""Configs of tiny encoders of images and of spectrograms, with and without heads, with what is peculiar to each: two
class tokens, a layer scale away from 1, registers, gated feed-forward parts, relative positions; networks of stages;
parameter tokens."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from auxin.models.tokenformer import (
    VisionTokenFormerConfig,
    VisionTokenFormerForImageClassification,
    VisionTokenFormerModel,
)
from tiny_decoders import EPSILON, Made

TITLE = "Images, towers and spectrograms"
_COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "layer_norm_eps": EPSILON,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
_DINOV2 = {**{key: value for key, value in _COMMON.items() if key != "intermediate_size"}, "mlp_ratio": 2}
_TOWER = {key: _COMMON[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")}
_TEXT = {**_TOWER, "intermediate_size": 10, "vocab_size": 19, "max_position_embeddings": 12}
_CLIP_TEXT = {**_TEXT, "eos_token_id": 18, "bos_token_id": 17, "projection_dim": 6}
_CLIP_IMAGE = {**_TOWER, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 14}
_CLIP_IMAGE |= {"image_size": 8, "patch_size": 4, "projection_dim": 6}
_CLIP = {"text_config": _CLIP_TEXT, "vision_config": _CLIP_IMAGE, "projection_dim": 6, "num_labels": 3}
_SIGLIP_TEXT = {**_TEXT, "projection_size": 24}
_SIGLIP_IMAGE = {key: value for key, value in _CLIP_IMAGE.items() if key != "projection_dim"}
_SIGLIP = {"text_config": _SIGLIP_TEXT, "vision_config": _SIGLIP_IMAGE, "num_labels": 3}
_TOKENS = {
    **{key: value for key, value in _COMMON.items() if key != "intermediate_size"},
    "qkv_tokens": 10,
    "proj_tokens": 9,
    "ffn_tokens": 14,
    # The paper's layer in two slots, a new model's in the third.
    "score_function": "l2_norm_gelu",
    "proj_score_function": "gelu",
}
_AST = {"max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4}

_SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [2, 1],
    "hidden_sizes": [8, 12],
    "num_attention_heads": [2, 3],
    "mlp_ratios": [2, 1],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "decoder_hidden_size": 5,
    "image_size": 16,
    "num_labels": 3,
}
_RESNET = {"embedding_size": 5, "hidden_sizes": [8, 12], "depths": [2, 1], "image_size": 16, "num_labels": 3}


def _made(model: str, config: str, values: dict[str, Any]) -> Made:
    return getattr(transformers, model), getattr(transformers, f"{config}Config"), values


MODELS: dict[str, Made] = {
    "vit base": _made("ViTModel", "ViT", _COMMON),
    "vit masked": _made("ViTForMaskedImageModeling", "ViT", {**_COMMON, "encoder_stride": 4}),
    "deit": _made("DeiTForImageClassificationWithTeacher", "DeiT", _COMMON),
    "dinov2": _made("Dinov2ForImageClassification", "Dinov2", _DINOV2),
    "dinov2 gated": _made("Dinov2ForImageClassification", "Dinov2", {**_DINOV2, "use_swiglu_ffn": True}),
    "dinov2_with_registers": _made("Dinov2WithRegistersForImageClassification", "Dinov2WithRegisters", _DINOV2),
    "beit": _made(
        "BeitForImageClassification",
        "Beit",
        {**_COMMON, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    ),
    "audio-spectrogram-transformer": _made("ASTForAudioClassification", "AST", {**_COMMON, **_AST}),
    "segformer": _made("SegformerForSemanticSegmentation", "Segformer", _SEGFORMER),
    "resnet": _made("ResNetForImageClassification", "ResNet", {**_RESNET, "layer_type": "basic"}),
    "resnet bottlenecks": _made("ResNetForImageClassification", "ResNet", {**_RESNET, "layer_type": "bottleneck"}),
    "clip": _made("CLIPModel", "CLIP", _CLIP),
    "clip images": _made("CLIPForImageClassification", "CLIP", _CLIP),
    "clip_text_model": _made("CLIPTextModelWithProjection", "CLIPText", _CLIP_TEXT),
    "clip_vision_model": _made("CLIPVisionModelWithProjection", "CLIPVision", _CLIP_IMAGE),
    "siglip": _made("SiglipModel", "Siglip", _SIGLIP),
    "siglip images": _made("SiglipForImageClassification", "Siglip", _SIGLIP),
    "siglip_text_model": _made("SiglipTextModel", "SiglipText", _SIGLIP_TEXT),
    "siglip_vision_model": _made("SiglipVisionModel", "SiglipVision", _SIGLIP_IMAGE),
    "vision_tokenformer": (VisionTokenFormerForImageClassification, VisionTokenFormerConfig, _TOKENS),
    "vision_tokenformer norms": (
        VisionTokenFormerForImageClassification,
        VisionTokenFormerConfig,
        {**_TOKENS, "norm_parameters": True, "score_function": "softmax", "ffn_tokens": [8, 6]},
    ),
    "vision_tokenformer base": (VisionTokenFormerModel, VisionTokenFormerConfig, _TOKENS),
}
"""Model class, config class and values of the config, by the model type and a word for what else it is."""


def _pixels(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    config: Any = getattr(model.config, "vision_config", model.config)
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)
    if "Masked" not in type(model).__name__:
        return {"pixel_values": pixels}
    patches = (config.image_size // config.patch_size) ** 2
    return {"pixel_values": pixels, "bool_masked_pos": torch.arange(patches).expand(batch, -1) % 2 == 0}


def _spectrogram(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    config: Any = model.config
    shape = (batch, config.max_length, config.num_mel_bins)
    return {"input_values": torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)}


def _text(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    config: Any = getattr(model.config, "text_config", model.config)
    end = min(18, config.vocab_size - 1)  # the end token, at which CLIP pools, also in a smaller vocabulary
    ids = torch.randint(end - 1, (batch, length), generator=generator)
    ids[:, -2] = end
    return {"input_ids": ids}


def _pair(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    images = _pixels(model, batch, length, generator)
    return images if model.main_input_name == "pixel_values" else images | _text(model, batch, length, generator)


INPUTS = {
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers", "beit", "segformer", "resnet"), _pixels),
    "vision_tokenformer": _pixels,
    "audio-spectrogram-transformer": _spectrogram,
    **dict.fromkeys(("clip", "siglip"), _pair),
    **dict.fromkeys(("clip_text_model", "siglip_text_model"), _text),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), _pixels),
}
"""What makes inputs, by model type."""
