"""Tiny models of transformers' by what they take and say: text, images, sound, pairs; with heads and without."""

from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY, DECODER_VOCABULARY = 99, 77
END = 98
IMAGE_TOKEN = 7

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_WIDTHS, "vocab_size": VOCABULARY}
_ENCODER = {**_TEXT, "max_position_embeddings": 40}
_LLAMA = {
    **_TEXT,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 5,
}
_IMAGE = {**_WIDTHS, "image_size": 16, "patch_size": 4}
_SOUND = {
    **_WIDTHS,
    "vocab_size": 20,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_CLIP_TEXT = {**_TEXT, "max_position_embeddings": 24, "bos_token_id": 97, "eos_token_id": END}
_SIGLIP_TEXT = {**_TEXT, "max_position_embeddings": 24, "projection_size": 32}
_QWEN2_VL = {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


def _config(model_type: str, **values: Any) -> Any:
    return transformers.AutoConfig.for_model(model_type, **values)


def _both(model_type: str, encoder: Any) -> Any:
    """An encoder-decoder made of two models; its decoder has a smaller vocabulary and fewer positions."""
    decoder = _config("bert", **{**_ENCODER, "vocab_size": DECODER_VOCABULARY, "max_position_embeddings": 20})
    kinds = {
        "encoder-decoder": transformers.EncoderDecoderConfig,
        "vision-encoder-decoder": transformers.VisionEncoderDecoderConfig,
        "speech-encoder-decoder": transformers.SpeechEncoderDecoderConfig,
    }
    return kinds[model_type].from_encoder_decoder_configs(encoder, decoder)


_LLAVA = _config(
    "llava",
    text_config=_config("llama", **_LLAMA),
    vision_config=_config("clip_vision_model", **_IMAGE),
    image_token_id=IMAGE_TOKEN,
    image_seq_length=16,
)
_AST = _config(
    "audio-spectrogram-transformer",
    **_WIDTHS,
    max_length=40,
    num_mel_bins=16,
    patch_size=8,
    frequency_stride=4,
    time_stride=4,
)
_WHISPER = _config("whisper", **_BART, max_source_positions=30, max_target_positions=20, num_mel_bins=8)
_SWIN = _config("swin", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
_GEMMA3N = _config(
    "gemma3n_text",
    **{**_LLAMA, "intermediate_size": [48, 48]},
    head_dim=8,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
    laurel_rank=4,
    activation_sparsity_pattern=[0.0, 0.0],
    layer_types=["sliding_attention", "full_attention"],
)


class Kind(NamedTuple):
    config: Any
    inputs: dict[str, tuple[int, ...]]
    """Shapes of the inputs of three samples, at most 64 tokens or frames each."""
    outputs: set[str]
    """What is compared."""
    parameters: tuple[str, ...]
    """Some that the function depends on, of each tower one."""


_IDS64, _IDS40, _IDS24 = {"input_ids": (3, 64)}, {"input_ids": (3, 40)}, {"input_ids": (3, 24)}
_PIXELS = {"pixel_values": (3, 3, 16, 16)}
_WAVE = {"input_values": (3, 5 * (63 * 2 + 3 - 1) + 10)}
_LOGITS, _POOLED = {"logits"}, {"last_hidden_state", "pooler_output"}
_PAIR = {"logits_per_image", "logits_per_text", "text_embeds", "image_embeds"}
_MEL = {"input_features": (3, 8, 60)}
KINDS: dict[str, Kind] = {
    "ASTModel": Kind(_AST, {"input_values": (3, 40, 16)}, _POOLED, ("layers.0.attention.v_proj",)),
    "ASTForAudioClassification": Kind(
        _AST, {"input_values": (3, 40, 16)}, _LOGITS, ("audio_spectrogram_transformer.layers.1.mlp.fc1",)
    ),
    "WhisperForConditionalGeneration": Kind(
        _WHISPER,
        {**_MEL, "decoder_input_ids": (3, 20)},
        _LOGITS,
        ("model.encoder.layers.0.fc1", "model.decoder.layers.1.fc1"),
    ),
    "WhisperModel": Kind(
        _WHISPER,
        {**_MEL, "decoder_input_ids": (3, 20)},
        {"last_hidden_state", "encoder_last_hidden_state"},
        ("encoder.layers.0.fc1", "decoder.layers.1.encoder_attn.v_proj"),
    ),
    "WhisperForAudioClassification": Kind(_WHISPER, _MEL, _LOGITS, ("encoder.layers.1.fc1",)),
    "CLIPModel": Kind(
        _config("clip", text_config=_CLIP_TEXT, vision_config=_IMAGE, projection_dim=16),
        {**_IDS24, **_PIXELS},
        _PAIR,
        ("text_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.1.self_attn.v_proj"),
    ),
    "CLIPTextModel": Kind(
        _config("clip_text_model", **_CLIP_TEXT), _IDS24, _POOLED, ("encoder.layers.1.self_attn.v_proj",)
    ),
    "CLIPTextModelWithProjection": Kind(
        _config("clip_text_model", **_CLIP_TEXT, projection_dim=16),
        _IDS24,
        {"text_embeds", "last_hidden_state"},
        ("text_projection",),
    ),
    "CLIPVisionModel": Kind(_config("clip_vision_model", **_IMAGE), _PIXELS, _POOLED, ("encoder.layers.0.mlp.fc1",)),
    "SiglipModel": Kind(
        _config("siglip", text_config=_SIGLIP_TEXT, vision_config=_IMAGE),
        {**_IDS24, **_PIXELS},
        _PAIR,
        ("text_model.encoder.layers.0.mlp.fc1", "vision_model.head.mlp.fc1"),
    ),
    "SiglipVisionModel": Kind(
        _config("siglip_vision_model", **_IMAGE), _PIXELS, _POOLED, ("encoder.layers.1.self_attn.v_proj",)
    ),
    "Siglip2Model": Kind(
        _config("siglip2", text_config=_SIGLIP_TEXT, vision_config={**_WIDTHS, "num_patches": 16, "patch_size": 4}),
        {**_IDS24, "pixel_values": (3, 16, 48), "pixel_attention_mask": (3, 16), "spatial_shapes": (3, 2)},
        _PAIR,
        ("text_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.0.mlp.fc1"),
    ),
    "AltCLIPModel": Kind(
        _config("altclip", text_config={**_ENCODER, "project_dim": 16}, vision_config=_IMAGE, projection_dim=16),
        {"input_ids": (3, 38), **_PIXELS},
        _PAIR,
        ("text_model.roberta.encoder.layers.0.intermediate.dense", "vision_model.encoder.layers.0.mlp.fc1"),
    ),
    "ViltModel": Kind(
        _config("vilt", **_ENCODER, image_size=16, patch_size=4),
        {**_IDS40, **_PIXELS},
        _POOLED,
        ("encoder.layer.0.intermediate.dense", "embeddings.patch_embeddings.projection"),
    ),
    "Wav2Vec2ForCTC": Kind(
        _config("wav2vec2", **_SOUND), _WAVE, _LOGITS, ("wav2vec2.encoder.layers.0.attention.v_proj",)
    ),
    "Wav2Vec2Model": Kind(
        _config("wav2vec2", **_SOUND),
        _WAVE,
        {"last_hidden_state", "extract_features"},
        ("encoder.layers.1.attention.v_proj", "feature_extractor.conv_layers.1.conv"),
    ),
    "HubertModel": Kind(
        _config("hubert", **_SOUND), _WAVE, {"last_hidden_state"}, ("encoder.layers.0.attention.v_proj",)
    ),
    "Wav2Vec2BertModel": Kind(
        _config("wav2vec2-bert", **_WIDTHS, feature_projection_input_dim=16),
        {"input_features": (3, 64, 16)},
        {"last_hidden_state", "extract_features"},
        ("encoder.layers.0.self_attn.linear_v",),
    ),
    "SpeechEncoderDecoderModel": Kind(
        _both("speech-encoder-decoder", _config("wav2vec2", **_SOUND)),
        {**_WAVE, "decoder_input_ids": (3, 20)},
        _LOGITS,
        ("encoder.encoder.layers.0.attention.v_proj", "decoder.bert.encoder.layer.0.crossattention.self.value"),
    ),
    "Speech2TextForConditionalGeneration": Kind(
        _config(
            "speech_to_text",
            **_BART,
            input_feat_per_channel=8,
            conv_channels=16,
            max_source_positions=200,
            max_target_positions=30,
        ),
        {"input_features": (3, 64, 8), "decoder_input_ids": (3, 30)},
        _LOGITS,
        ("model.encoder.layers.0.fc1", "model.decoder.layers.1.fc1"),
    ),
    "XLNetLMHeadModel": Kind(
        _config("xlnet", vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48),
        _IDS64,
        _LOGITS,
        ("transformer.layer.0.ff.layer_1",),
    ),
    "Gemma3nForCausalLM": Kind(_GEMMA3N, _IDS64, _LOGITS, ("model.layers.0.mlp.up_proj",)),
    "BartForConditionalGeneration": Kind(
        _config("bart", **_BART, max_position_embeddings=40),
        {**_IDS40, "decoder_input_ids": (3, 40)},
        _LOGITS,
        ("model.encoder.layers.0.fc1", "model.decoder.layers.1.fc1"),
    ),
    "BartModel": Kind(
        _config("bart", **_BART, max_position_embeddings=40),
        {**_IDS40, "decoder_input_ids": (3, 40)},
        {"last_hidden_state", "encoder_last_hidden_state"},
        ("encoder.layers.0.fc1", "decoder.layers.1.fc1"),
    ),
    "BartForSequenceClassification": Kind(
        _config("bart", **_BART, max_position_embeddings=40),
        {**_IDS40, "decoder_input_ids": (3, 40)},
        _LOGITS,
        ("model.encoder.layers.0.fc1", "model.decoder.layers.1.fc1"),
    ),
    "T5EncoderModel": Kind(
        _config("t5", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        _IDS64,
        {"last_hidden_state"},
        ("encoder.block.0.layer.1.DenseReluDense.wi",),
    ),
    # Positions start behind the padding's, 1.
    "RobertaForMaskedLM": Kind(
        _config("roberta", **_ENCODER), {"input_ids": (3, 38)}, _LOGITS, ("roberta.encoder.layer.0.intermediate.dense",)
    ),
    "BertModel": Kind(
        _config("bert", **_ENCODER), _IDS40, _POOLED, ("encoder.layer.0.intermediate.dense", "pooler.dense")
    ),
    "BertForQuestionAnswering": Kind(
        _config("bert", **_ENCODER),
        _IDS40,
        {"start_logits", "end_logits"},
        ("bert.encoder.layer.0.intermediate.dense",),
    ),
    "BertForTokenClassification": Kind(
        _config("bert", **_ENCODER), _IDS40, _LOGITS, ("bert.encoder.layer.0.attention.self.value",)
    ),
    "BertForPreTraining": Kind(
        _config("bert", **_ENCODER),
        _IDS40,
        {"prediction_logits", "seq_relationship_logits"},
        ("cls.predictions.transform.dense", "cls.seq_relationship"),
    ),
    "LlamaModel": Kind(_config("llama", **_LLAMA), _IDS64, {"last_hidden_state"}, ("layers.1.mlp.up_proj",)),
    "LlamaForSequenceClassification": Kind(
        _config("llama", **_LLAMA), _IDS64, _LOGITS, ("model.layers.1.mlp.up_proj",)
    ),
    "ViTModel": Kind(_config("vit", **_IMAGE), _PIXELS, _POOLED, ("layers.0.mlp.fc1", "pooler.dense")),
    "Dinov2Model": Kind(_config("dinov2", **_IMAGE), _PIXELS, _POOLED, ("encoder.layer.0.mlp.fc1",)),
    "DeiTForImageClassification": Kind(_config("deit", **_IMAGE), _PIXELS, _LOGITS, ("deit.layers.0.mlp.fc1",)),
    "SwinModel": Kind(_SWIN, _PIXELS, _POOLED, ("encoder.layers.0.blocks.0.attention.v_proj",)),
    "SwinForImageClassification": Kind(_SWIN, _PIXELS, _LOGITS, ("swin.encoder.layers.1.blocks.0.mlp.fc1",)),
    "ViTMAEModel": Kind(
        _config("vit_mae", **_IMAGE), _PIXELS, {"last_hidden_state", "mask"}, ("layers.0.attention.v_proj",)
    ),
    "VideoMAEModel": Kind(
        _config("videomae", **_IMAGE, num_frames=4),
        {"pixel_values": (3, 4, 3, 16, 16)},
        {"last_hidden_state"},
        ("encoder.layer.0.intermediate.dense",),
    ),
    # Images of any size.
    "ResNetModel": Kind(
        _config("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        {"pixel_values": (3, 3, 224, 224)},
        _POOLED,
        ("encoder.stages.1.layers.0.shortcut.convolution",),
    ),
    "LlavaForConditionalGeneration": Kind(_LLAVA, _IDS64, _LOGITS, ("model.language_model.layers.0.mlp.up_proj",)),
    "LlavaModel": Kind(_LLAVA, _IDS64, {"last_hidden_state"}, ("language_model.layers.1.self_attn.v_proj",)),
    "Qwen2VLForConditionalGeneration": Kind(
        _config(
            "qwen2_vl",
            text_config=_QWEN2_VL,
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            image_token_id=IMAGE_TOKEN,
            video_token_id=8,
            vision_start_token_id=9,
            vision_end_token_id=10,
        ),
        _IDS64,
        _LOGITS,
        ("model.language_model.layers.0.mlp.up_proj",),
    ),
    "Gemma3ForConditionalGeneration": Kind(
        _config(
            "gemma3",
            text_config={**_LLAMA, "head_dim": 8, "sliding_window": 8},
            vision_config=_IMAGE,
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
            boi_token_index=8,
            eoi_token_index=9,
        ),
        _IDS64,
        _LOGITS,
        ("model.language_model.layers.0.self_attn.v_proj",),
    ),
    "VisionEncoderDecoderModel": Kind(
        _both("vision-encoder-decoder", _config("vit", **_IMAGE)),
        {**_PIXELS, "decoder_input_ids": (3, 20)},
        _LOGITS,
        ("encoder.layers.0.mlp.fc1", "decoder.bert.encoder.layer.0.intermediate.dense"),
    ),
    "EncoderDecoderModel": Kind(
        _both("encoder-decoder", _config("bert", **_ENCODER)),
        {**_IDS40, "decoder_input_ids": (3, 20)},
        _LOGITS,
        ("encoder.encoder.layer.0.intermediate.dense", "decoder.bert.encoder.layer.1.intermediate.dense"),
    ),
}


def tiny_kind(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A tiny model of the class `name`, one of `KINDS`, as transformers makes it, in evaluation mode.

    Args:
        name: the class.
        dtype: of the weights.
        config: values of its config that differ from the usual ones.
    """
    made = KINDS[name].config
    values = type(made).from_dict({**made.to_dict(), **config})
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(values)
    return model.to(dtype).eval()
