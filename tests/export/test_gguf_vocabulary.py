"""Tokenizers in GGUF files: transformers reads the same ids, llama.cpp's rule is named, what has no form is refused."""

from typing import Any

import pytest
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from auxin.errors import DataError
from auxin.export import export_gguf
from auxin.export.gguf_vocabulary import LLAMA3
from tiny_tokenizers import TEXT, tiny_tokenizer

TEXTS = [*TEXT, "3 and 27, 1999.5", "it's\n\n  what   we'll 🙂 say", "<|endoftext|>a<|endoftext|>"]


@pytest.fixture(scope="module")
def model():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=590, hidden_size=32, intermediate_size=32, **sizes))


def split_by(*parts: Any, **values: Any) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with another rule, or other values, of how texts are cut into words."""
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, **values)]
    )
    return tokenizer


def regex(pattern: str, behavior: str = "isolated", invert: bool = False) -> PreTrainedTokenizerFast:
    return split_by(pre_tokenizers.Split(Regex(pattern), behavior, invert), use_regex=False)


def llama3() -> PreTrainedTokenizerFast:
    tokenizer = regex(LLAMA3)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def with_ends(first: str = "", last: str = "") -> PreTrainedTokenizerFast:
    """With tokens around each text."""
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    template = processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")],
    )
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def with_added() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.add_tokens(["<think>", "leafy"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


KNOWN: dict[str, tuple[Any, str]] = {
    "byte_level": (lambda: tiny_tokenizer("byte_level"), "gpt-2"),
    "gpt2": (lambda: tiny_tokenizer("gpt2"), "gpt-2"),
    "separate special tokens": (lambda: tiny_tokenizer("separate_special_tokens"), "gpt-2"),
    "llama 3": (llama3, "llama-bpe"),
    "qwen2": (lambda: regex(PRETOKENIZE_REGEX), "qwen2"),
    "begun": (lambda: with_ends("<s>"), "gpt-2"),
    "ended": (lambda: with_ends(last="</s>"), "gpt-2"),
    "both": (lambda: with_ends("<s>", "</s>"), "gpt-2"),
    "added": (with_added, "gpt-2"),
}


@pytest.mark.parametrize("case", KNOWN)
def test_transformers_reads_the_same_ids(case, model, tmp_path):
    make, rule = KNOWN[case]
    tokenizer = make()
    report = export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == rule
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (case in ("begun", "both"))
    assert fields["tokenizer.ggml.add_eos_token"].contents() == (case in ("ended", "both"))
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert len(report.notes) == 1
    assert "have no text" in report.notes[0]


def test_kinds_of_tokens(model, tmp_path):
    tokenizer = with_added()
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    kinds = dict(
        zip(fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents(), strict=True)
    )
    assert kinds["<|im_start|>"] == kinds["<|endoftext|>"] == TokenType.CONTROL
    assert kinds["<think>"] == kinds["leafy"] == TokenType.USER_DEFINED
    assert kinds["a"] == TokenType.NORMAL
    assert kinds["[PAD589]"] == TokenType.UNUSED


def test_smollms_rule_is_named_and_what_transformers_makes_of_it_told(model, tmp_path):
    tokenizer = smollms()
    report = export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    assert GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert any("'smollm', which transformers does not know: it cuts" in note for note in report.notes)


def test_tokens_that_a_file_has_no_key_for_are_no_news(model, tmp_path, caplog):
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.add_special_tokens({"cls_token": "<cls>", "mask_token": "<mask>"})
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.mask_token_id"].contents() == tokenizer.mask_token_id
    assert not [record for record in caplog.records if record.name.startswith("gguf")]


def test_a_chats_template_goes_along(model, tmp_path):
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").chat_template == tokenizer.chat_template


def taking_spaces() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.add_tokens([AddedToken("<gap>", lstrip=True)])
    return tokenizer


def taking_spaces_last() -> PreTrainedTokenizerFast:
    """The last of as many tokens as Llama 3 has in reserve."""
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.add_tokens([f"<{number}>" for number in range(256)])
    tokenizer.add_tokens([AddedToken("<gap>", rstrip=True)])
    return tokenizer


def whole_word() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.add_tokens([AddedToken("zzz", single_word=True)])
    return tokenizer


def smollms(token: AddedToken | None = None, lower: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = split_by(pre_tokenizers.Digits(individual_digits=True))
    tokenizer.add_tokens([] if token is None else [token])
    if lower:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def of_bytes() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("byte_level")
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=alphabet, merges=[])
    return tokenizer


def too_long() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.add_tokens([f"<{number}>" for number in range(300)])
    return tokenizer


def prefixed() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def whole_words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    )


REFUSED: dict[str, tuple[Any, str]] = {
    "sentencepiece": (lambda: tiny_tokenizer("sentencepiece"), "of the kind BPE over.*convert_hf_to_gguf"),
    "wordpiece": (lambda: tiny_tokenizer("wordpiece"), "of the kind WordPiece"),
    "unigram": (lambda: tiny_tokenizer("unigram"), "of the kind Unigram"),
    "words": (whole_words, "of the kind WordLevel"),
    "another regex": (lambda: regex(r"\p{L}+|\s+"), "cuts texts into words by .*no name"),
    "numbers kept together": (
        lambda: split_by(pre_tokenizers.Digits(individual_digits=False)),
        "cuts texts into words by .*Digits",
    ),
    "what Qwen2's regex leaves": (lambda: regex(PRETOKENIZE_REGEX, invert=True), "cuts texts into words by .*no name"),
    "Qwen2's regex thrown away": (
        lambda: regex(PRETOKENIZE_REGEX, behavior="removed"),
        "cuts texts into words by .*no name",
    ),
    "a space before a text": (prefixed, "cuts texts into words by .*add_prefix_space"),
    "merges that llama.cpp leaves out": (lambda: regex(LLAMA3), "ignore_merges is False"),
    "two tokens before a text": (lambda: with_ends("<s> <s>"), "makes .* of the text 'a'"),
    "a token that takes spaces along": (taking_spaces, "texts are cut otherwise .*<gap>"),
    "one of many that does": (taking_spaces_last, "1 of .* texts are cut otherwise .*<gap>"),
    "a token that is a word of its own alone": (whole_word, "texts are cut otherwise .*zzz"),
    "one in a tokenizer like SmolLM's": (
        lambda: smollms(AddedToken("<gap>", lstrip=True)),
        "1 of .* texts are cut otherwise .*<gap>",
    ),
    "one like SmolLM's that writes small letters": (lambda: smollms(lower=True), "texts are cut otherwise .*The quick"),
    "no merges": (of_bytes, "has no merges"),
    "more ids than rows": (too_long, "has the id 609, and the model has 590 tokens.*method vocabulary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_form_is_refused_and_leaves_nothing(case, model, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        export_gguf(model, tmp_path / "m.gguf", tokenizer=make())
    assert not list(tmp_path.iterdir())
