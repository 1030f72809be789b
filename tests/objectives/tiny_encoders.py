"""BERTs small enough to train in a blink."""

import torch
from transformers import BertConfig, BertForMaskedLM

from training.tiny import VOCABULARY

MASK = VOCABULARY
"""The id after the tokenizer's own."""


def tiny_bert(seed: int = 0, dropout: float = 0.0, **changes: object) -> BertForMaskedLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    values = {"vocab_size": VOCABULARY + 1, "max_position_embeddings": 32, **sizes, **drops, **changes}
    return BertForMaskedLM(BertConfig(**values))
