"""The tokenizer in a GGUF file: byte-level BPE, with the name of the rule by which llama.cpp cuts a text into words."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from auxin.errors import DataError
from auxin.foreign import offline

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REGEXES = {LLAMA3: "llama-bpe", PRETOKENIZE_REGEX: "qwen2"}
"""llama.cpp's names of the rules that are one regular expression (llama-vocab.cpp)."""
UNKNOWN_TO_TRANSFORMERS = ("smollm",)
"""Names of rules that llama.cpp knows, and for which transformers' reader takes GPT-2's."""
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "it's what we'll see; I'VE been, they'd say",
    "def walk(tree, found):\n    for leaf in tree:\n\tfound.append(leaf)  # 12345",
    "1 22 333 4444 55555, 3.14 and 1,000,000",
    "a   7 b    42",
    "Überall naïve café owners – “quoted” … 10 €",
    "日本語のテキスト, русский, عربى, 🙂👩‍💻",
    "line\r\nline\n\n   \n\tend   ",
    "x" * 40 + "_-=+*/\\|<>{}[]()!?@#$%^&~`",
)
"""Texts on which two tokenizers are compared."""
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
"""Tokens that a file has a key for."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    config: PreTrainedConfig
    rule: str
    """llama.cpp's name of how a text is cut into words."""
    begins: bool
    """Whether a text begins with the token that begins texts."""
    ends: bool
    """Whether it ends with the one that ends them."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> "Vocabulary":
        """DataError where `tokenizer` has no form in a GGUF file, or ids that a model of `config` has no row for."""
        notes = []
        rows, last = config.vocab_size, max(tokenizer.get_vocab().values(), default=-1)
        if last >= rows:
            raise DataError(
                f"The tokenizer has the id {last}, and the model has {rows} tokens. Give the model's tokenizer, or "
                "grow the model's vocabulary (the method vocabulary)."
            )
        if len(tokenizer.get_vocab()) < rows:
            unused = rows - len(tokenizer.get_vocab())
            notes.append(f"{unused} of the model's {rows} tokens have no text; the file calls them [PAD...], unused.")
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        rule = _rule(described)
        if described["normalizer"] is not None:
            notes.append(
                f"The tokenizer rewrites texts first ({described['normalizer']['type']}); a GGUF file has no place for "
                "it, and its readers don't."
            )
        return cls(tokenizer, config, rule, *_template(tokenizer), tuple(notes))

    def describe(self, writer: Any, folder: Path) -> None:
        """Add tokens, merges, special tokens and the chat's template to a GGUFWriter; `folder` is for files."""
        import gguf

        names = {index: token for token, index in self.tokenizer.get_vocab().items()}
        added = self.tokenizer.added_tokens_decoder
        tokens, types = [], []
        for index in range(self.config.vocab_size):
            if index not in names:
                types.append(gguf.TokenType.UNUSED)
            elif index in added:
                types.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
            else:
                types.append(gguf.TokenType.NORMAL)
            tokens.append(names.get(index, f"[PAD{index}]"))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_add_space_prefix(False)
        # The library reads a tokenizer in the files that transformers writes, and in the config the special tokens that
        # the tokenizer has no name for.
        files = folder / "tokenizer"
        self.tokenizer.save_pretrained(files)
        ids = {name: getattr(self.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        # Some configs say -1 where there is none, and default ids are those of larger vocabularies.
        held = {name: one for name, one in ids.items() if isinstance(one, int) and 0 <= one < self.config.vocab_size}
        (files / "config.json").write_text(json.dumps(held), encoding="utf-8")
        special = gguf.SpecialVocab(files, load_merges=True, special_token_types=_SPECIAL)
        # It guesses these from the template; here they are known.
        special.add_special_token = {"bos": self.begins, "eos": self.ends}
        special.add_to_gguf(writer, quiet=True)


def cut_otherwise(folder: Path, name: str, words: Vocabulary) -> Iterator[str]:
    """A note where transformers reads another tokenizer than `words` in a file, and llama.cpp reads the same.

    Raises:
        DataError: it reads another one, and nothing is known of llama.cpp.
    """
    with offline():
        read = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    added = [token.content for token in words.tokenizer.added_tokens_decoder.values()]
    texts = [*SAMPLES, *(f"a {token} b" for token in added), *(f"a{token}b" for token in added)]
    known = words.rule not in UNKNOWN_TO_TRANSFORMERS
    if wrong := _otherwise(words.tokenizer if known else _by_gpt2s_rule(words.tokenizer), read, texts):
        raise DataError(
            f"The tokenizer has no GGUF form: {len(wrong)} of {len(texts)} texts are cut otherwise by what "
            f"transformers reads in the file, the first {wrong[0]!r}. A file has no place for spaces that "
            "a token takes along, nor for rules of the tokenizer's own."
        )
    if wrong := _otherwise(words.tokenizer, read, texts):
        yield (
            f"The file says how texts are cut by llama.cpp's name {words.rule!r}, which transformers does not know: it "
            f"cuts {len(wrong)} of {len(texts)} texts otherwise, the first {wrong[0]!r}."
        )


def _otherwise(one: Any, other: Any, texts: list[str]) -> list[str]:
    """The texts that two tokenizers cut differently."""
    ids = zip(texts, one(texts)["input_ids"], other(texts)["input_ids"], strict=True)
    return [text for text, first, second in ids if first != second]


def _by_gpt2s_rule(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that cuts texts into words as GPT-2's does."""
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return made


def _rule(described: dict[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer that the `tokenizers` library describes cuts a text into words."""
    model, splitter = described["model"], described["pre_tokenizer"] or {}
    parts: Sequence[dict[str, Any]] = splitter.get("pretokenizers", [splitter])
    kinds = [part.get("type") for part in parts]
    if model["type"] != "BPE" or kinds[-1:] != ["ByteLevel"] or model.get("byte_fallback"):
        raise DataError(
            f"The tokenizer is of the kind {model['type']} over {' and '.join(map(str, kinds))}. Here a GGUF file "
            "takes byte-level BPE: GPT-2, Llama 3, Qwen, SmolLM2. Others: llama.cpp's convert_hf_to_gguf.py."
        )
    if not model["merges"]:
        raise DataError(
            "The tokenizer has no merges, without which transformers reads none in a GGUF file. Give the one that the "
            "model was trained with."
        )
    last, rule = parts[-1], None
    if kinds == ["ByteLevel"] and last["use_regex"]:
        rule = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and last["use_regex"]:
        rule = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not last["use_regex"] and not parts[0]["invert"]:
        rule = REGEXES.get(parts[0]["pattern"].get("Regex", "")) if parts[0]["behavior"] == "Isolated" else None
    if rule is None or last["add_prefix_space"]:
        raise DataError(
            f"The tokenizer cuts texts into words by {json.dumps(splitter)[:200]}, for which llama.cpp has no name "
            "that is known here. Known are those of GPT-2, SmolLM, Llama 3 and Qwen2."
        )
    if bool(model.get("ignore_merges")) != (rule == "llama-bpe"):
        raise DataError(
            f"The tokenizer's ignore_merges is {bool(model.get('ignore_merges'))}, and llama.cpp takes the other for "
            f"tokenizers of the kind {rule!r}. Set it so, where it makes no difference to your texts."
        )
    return rule


def _template(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Whether a text begins and ends with the tokens that begin and end texts; DataError where it gets others."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for begins in (False, True):
        for ends in (False, True):
            first, last = [tokenizer.bos_token_id] * begins, [tokenizer.eos_token_id] * ends
            if whole == first + plain + last:
                return begins, ends
    raise DataError(
        f"The tokenizer makes {whole} of the text 'a', which is {plain}: a GGUF file can say that a text begins with "
        "bos_token and ends with eos_token, and nothing else."
    )
