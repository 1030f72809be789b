"""Small tokenizers of every kind that new tokens get into in a way of their own."""

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, T5Tokenizer

TEXT = [
    "def walk(tree, found):",
    "    for leaf in tree.leaves: found.append(leaf.name)",
    "    return sorted(found) or None",
    "class Leaf(Tree):",
    "    name = 'leaf'  # the name of the leaf, not of the tree",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,",
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light,",
    "it was the spring of hope, it was the winter of despair; we had everything before us.",
    "Überall grünt es; naïve café owners say: 1 + 2 = 3, 40 * 56 = 2240.",
] * 3
KINDS = ["byte_level", "separate_special_tokens", "gpt2", "sentencepiece", "wordpiece", "unigram"]
BPE_KINDS = KINDS[:4]


@cache
def _model(kind: str) -> Any:
    trainer: Any
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=310,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(TEXT, trainer)
    return json.loads(tokenizer.to_str())["model"]


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `kind`, trained on `TEXT`:

    byte_level: GPT-2's kind in transformers' general class. separate_special_tokens: the same, with special tokens
    beside the model's vocabulary, as Qwen has them. gpt2: in GPT-2's own class. sentencepiece: Llama 2's kind, spaces
    spelled by a normalizer. wordpiece: BERT's. unigram: T5's.
    """
    if kind == "wordpiece":
        return BertTokenizer(vocab=_model(kind)["vocab"])
    if kind == "unigram":
        extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(4))]
        return T5Tokenizer(vocab=[*map(tuple, _model(kind)["vocab"]), *extra], extra_ids=4)
    if kind == "sentencepiece":
        vocabulary, merges = _model(kind)["vocab"], [tuple(merge) for merge in _model(kind)["merges"]]
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    vocabulary, merges = dict(_model("byte_level")["vocab"]), [tuple(m) for m in _model("byte_level")["merges"]]
    if kind == "gpt2":
        return GPT2Tokenizer(vocab=vocabulary, merges=merges)
    if kind == "separate_special_tokens":
        del vocabulary["<|endoftext|>"]
        vocabulary = {token: index - 1 for token, index in vocabulary.items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    if kind == "separate_special_tokens":
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|start|>"]})
    return tokenizer
