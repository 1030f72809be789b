"""Configs of tiny encoder-decoders and of models of sound, with what is peculiar to each: other widths of encoder and
decoder, scaled embeddings, sinusoids, convolutions in front, position biases in every layer."""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tiny_decoders import EPSILON, VOCABULARY, Made

TITLE = "Encoders with decoders, and speech"
MELS, FRAMES = 5, 6
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 14,
    "max_position_embeddings": 32,
    "scale_embedding": True,
    "dropout": 0.0,
    "activation_function": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 5,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 10,
    "layer_norm_epsilon": EPSILON,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_WHISPER = {
    **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": MELS,
    "max_source_positions": FRAMES,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_SOUND = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "conv_dim": (6, 6),
    "conv_kernel": (4, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layer_norm_eps": EPSILON,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "pad_token_id": 0,
}
_STABLE = {**_SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}

VALUES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("Bart", "ForConditionalGeneration", _BART),
    "mbart": ("MBart", "ForConditionalGeneration", _BART),
    "plbart": ("PLBart", "ForConditionalGeneration", _BART),
    "pegasus": ("Pegasus", "ForConditionalGeneration", _BART),
    "marian": ("Marian", "MTModel", {**_BART, "num_beams": 1}),
    "blenderbot": ("Blenderbot", "ForConditionalGeneration", _BART),
    "m2m_100": ("M2M100", "ForConditionalGeneration", _BART),
    # Without gates, which make more than 1e-5 of the float32 rounding in their norms; those are tested in float64.
    # Heads of three, too: scores are not divided, and float32 rounds those of five to more than 1e-5 of a logit.
    "mt5": ("MT5", "ForConditionalGeneration", {**T5, "feed_forward_proj": "relu", "d_kv": 3}),
    "umt5": ("UMT5", "ForConditionalGeneration", {**T5, "feed_forward_proj": "relu"}),
    "t5 encoder": ("T5", "EncoderModel", T5),
    "whisper": ("Whisper", "ForConditionalGeneration", _WHISPER),
    "whisper headless": ("Whisper", "Model", _WHISPER),
    "wav2vec2": ("Wav2Vec2", "ForCTC", _SOUND),
    "wav2vec2 stable": ("Wav2Vec2", "ForCTC", {**_STABLE, "adapter_attn_dim": 3}),
    "hubert": ("Hubert", "ForSequenceClassification", {**_SOUND, "classifier_proj_size": 5, "num_labels": 3}),
    "hubert headless": ("Hubert", "Model", _STABLE),
}
"""By model type, with a word behind it where there are several: what the names of its classes begin with, how that of
the model ends, and the values of its config."""


def _texts(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids for the encoder, and for the decoder where there is one; of the end token none, at which texts are pooled."""
    config: Any = model.config

    def ids(size: int) -> Tensor:
        return torch.randint(3, min(config.vocab_size, VOCABULARY), (batch, size), generator=generator)

    has_decoder = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return {"input_ids": ids(length)} | ({"decoder_input_ids": ids(length - 2)} if has_decoder else {})


def _spectrograms(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Spectrograms of the one length that Whisper takes, and ids for the decoder."""
    config: Any = model.config
    shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)
    return {"input_features": features, "decoder_input_ids": _texts(model, batch, length, generator)["input_ids"]}


def _sounds(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Waveforms, six samples for a frame and some more."""
    waves = torch.randn((batch, 6 * length + 7), generator=generator, dtype=torch.float64)
    return {"input_values": waves.to(model.dtype)}


MODELS: dict[str, Made] = {
    family: (getattr(transformers, name + end), getattr(transformers, f"{name}Config"), values)
    for family, (name, end, values) in VALUES.items()
}
"""Model class, config class and values of the config, by model type."""
INPUTS: dict[str, Any] = {config.model_type: _texts for _, config, _ in MODELS.values()}
INPUTS |= {"whisper": _spectrograms, "wav2vec2": _sounds, "hubert": _sounds}
