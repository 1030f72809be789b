"""Configs of tiny encoders of text, with what is peculiar to each: embeddings of a width of their own, one set of
parameters for all layers, relative positions with a norm and a convolution, windows shorter than the inputs."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tiny_decoders import EPSILON, VOCABULARY, Made

TITLE = "Encoders of text"
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "layer_norm_eps": EPSILON,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_ROBERTA = {**_COMMON, "max_position_embeddings": 80}  # positions are counted from the padding's number on
_DEBERTA = {
    **_COMMON,
    "pad_token_id": 0,
    "relative_attention": True,
    "max_relative_positions": 5,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("Roberta", _ROBERTA),
    "xlm-roberta": ("XLMRoberta", _ROBERTA),
    "camembert": ("Camembert", _ROBERTA),
    "mpnet": ("MPNet", _ROBERTA),
    "electra": ("Electra", {**_COMMON, "embedding_size": 10}),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 12,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
        },
    ),
    "albert": ("Albert", {**_COMMON, "embedding_size": 10, "num_hidden_layers": 3}),
    "deberta": ("Deberta", _DEBERTA),
    "deberta-v2": (
        "DebertaV2",
        {
            **_DEBERTA,
            "position_buckets": 4,
            "max_relative_positions": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "attention_head_size": 4,
        },
    ),
    "modernbert": (
        "ModernBert",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 12,
            "max_position_embeddings": 32,
            "norm_eps": EPSILON,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "local_attention": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
}
"""By model type: what the names of its classes begin with, and the values of its config."""
TYPED = ("roberta", "electra", "albert")
"""Those that get types of tokens as inputs here."""


def made(name: str, values: dict[str, Any]) -> Made:
    """The masked language model of an architecture, its config, and the values."""
    return getattr(transformers, f"{name}ForMaskedLM"), getattr(transformers, f"{name}Config"), values


def text(model: PreTrainedModel, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids without padding, and types of tokens where the model knows any."""
    config: Any = model.config
    ids = torch.randint(3, min(model.config.vocab_size, VOCABULARY), (batch, length), generator=generator)
    types = torch.randint(2, ids.shape, generator=generator)
    return {"input_ids": ids, "token_type_ids": types} if config.model_type in TYPED else {"input_ids": ids}


MODELS: dict[str, Made] = {family: made(*own) for family, own in VALUES.items()}
"""Model class, config class and values of the config, by model type."""
INPUTS: dict[str, Any] = dict.fromkeys(MODELS, text)
