"""A model that stands for one on the Hugging Face Hub where nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCE = "The capital of France is Paris"
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""The sizes of HuggingFaceTB/SmolLM2-135M-Instruct, from its config.json."""


def write_stand_in(folder: Path) -> None:
    """Write a Llama of SmolLM2's depth, narrow, with a tokenizer of words, whose head was fitted to one sentence."""
    words = {word: index for index, word in enumerate(["<unk>", *SENTENCE.split()])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    sizes = {"vocab_size": len(words), "hidden_size": 18, "intermediate_size": 24, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2 | sizes))
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0, :-1]
        following = torch.nn.functional.one_hot(ids[0, 1:], len(words)).float()
        model.lm_head.weight.copy_(torch.linalg.lstsq(hidden, following).solution.T)
        assert torch.equal(model(input_ids=ids).logits[0, :-1].argmax(-1), ids[0, 1:])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
