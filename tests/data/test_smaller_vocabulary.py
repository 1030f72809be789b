"""Fewer tokens: text whose tokens all stay is tokenized as before, other text into tokens that stay, by all kinds."""

import json
import random

import pytest
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from auxin.data.smaller_vocabulary import Vocabulary, smaller_tokenizer
from auxin.errors import DataError
from oracles.vocabulary_pruning import bpe, kept_merges, parts, unigram, wordpiece
from tiny_tokenizers import KINDS, TEXT, tiny_tokenizer

WORDS = st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=12)


def of(model, **values) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **values)


def smaller(tokenizer, chosen):
    """The tokenizer with the tokens of `chosen` and what has to stay, and the old ids by the new ones."""
    vocabulary = Vocabulary(tokenizer)
    kept = sorted(vocabulary.always.union(*map(vocabulary.with_parts, chosen)))
    return smaller_tokenizer(vocabulary, kept), kept


def split(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def random_merges(draw: random.Random, count: int) -> list[tuple[str, str]]:
    """Merges of what is there already, in any order of lengths; some lead to a token that another one led to."""
    tokens, merges = list("abc"), []
    while len(merges) < count:
        pair = (draw.choice(tokens), draw.choice(tokens))
        if pair not in merges and len("".join(pair)) <= 8:
            merges.append(pair)
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
    draw.shuffle(merges)
    return merges


def bpe_of(merges, **values):
    tokens = dict.fromkeys([*"abc", *("".join(pair) for pair in merges)])
    return of(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, **values))


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 25), words=WORDS, whole_words=st.booleans())
def test_bpe_with_any_merges_goes_the_same_way_where_the_tokens_stay(seed, count, words, whole_words):
    draw = random.Random(seed)
    merges = random_merges(draw, count)
    old = bpe_of(merges, ignore_merges=whole_words)
    names = {index: token for token, index in old.get_vocab().items()}
    new, kept = smaller(old, draw.sample(sorted(names), draw.randint(0, len(names))))
    spelled = {names[index] for index in kept}
    # The oracle: closed, and no merge too many or too few.
    assert spelled == set("abc").union(*(parts(token, merges) for token in spelled))
    found = [tuple(merge) for merge in json.loads(new.backend_tokenizer.to_str())["model"]["merges"]]
    assert found == kept_merges(merges, spelled)
    for word in words:
        before, after = split(old, word), [kept[index] for index in split(new, word)]
        if not whole_words:
            assert [names[index] for index in after] == bpe(word, found)[0]
            assert [names[index] for index in before] == bpe(word, merges)[0]
        if set(before) <= set(kept):
            assert after == before
        assert "".join(names[index] for index in after) == word


def test_without_the_parts_a_token_that_stays_would_never_be_made():
    merges = [("a", "b"), ("ab", "c")]
    assert bpe("abc", merges)[0] == ["abc"]
    assert bpe("abc", kept_merges(merges, {"a", "b", "c", "abc"}))[0] == ["a", "b", "c"]
    _, kept = smaller(bpe_of(merges), [4])
    assert kept == [0, 1, 2, 3, 4]


def test_a_token_that_is_looked_up_as_a_whole_word_needs_no_parts():
    tokens = {token: index for index, token in enumerate(["a", "b", "c", "ab", "cab"])}
    old = of(models.BPE(vocab=tokens, merges=[("a", "b")], ignore_merges=True))
    new, kept = smaller(old, [tokens["cab"]])
    assert kept == [0, 1, 2, 4]
    assert [kept[index] for index in split(new, "cab")] == split(old, "cab") == [4]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), words=WORDS)
@pytest.mark.parametrize("marks", [{"end_of_word_suffix": "</w>"}, {"continuing_subword_prefix": "##"}])
def test_bpe_that_marks_ends_or_insides_of_words(marks, seed, words):
    draw = random.Random(seed)
    ending, inside = marks.get("end_of_word_suffix", ""), marks.get("continuing_subword_prefix", "")
    singles = [*"abc", *((character + ending) if ending else (inside + character) for character in "abc")]
    tokens, merges = list(singles), []
    for _ in range(40):
        left, right = draw.choice(tokens), draw.choice(tokens)
        fits = not left.endswith(ending) if ending else right.startswith(inside)
        made = left + right[len(inside) :]
        if fits and (left, right) not in merges and len(made) <= 12:
            merges.append((left, right))
            tokens += [made] * (made not in tokens)
    old = of(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, **marks))
    new, kept = smaller(old, draw.sample(range(len(tokens)), draw.randint(0, len(tokens))))
    assert set(range(6)) <= set(kept)
    for word in words:
        before, after = split(old, word), [kept[index] for index in split(new, word)]
        assert after == before or not set(before) <= set(kept)
        assert sum(len(tokens[index].removeprefix(inside).removesuffix(ending)) for index in after) == len(word)


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), words=WORDS)
def test_wordpiece(seed, words):
    draw = random.Random(seed)
    pieces = {"".join(draw.choices("abc", k=draw.randint(2, 5))) for _ in range(12)}
    every = ["[UNK]", *"abc", "##a", "##b", *sorted(pieces), *sorted({"##" + piece for piece in pieces})]
    old = of(models.WordPiece(vocab={piece: index for index, piece in enumerate(every)}, unk_token="[UNK]"))
    new, kept = smaller(old, draw.sample(range(len(every)), draw.randint(0, len(every))))
    # There is no "##c", so that what has a c inside can't be made of anything else.
    assert {
        index for index, piece in enumerate(every) if "c" in piece.removeprefix("##")[not piece.startswith("##") :]
    } <= {*kept}
    for word in words:
        before, after = split(old, word), [kept[index] for index in split(new, word)]
        assert [every[index] for index in after] == (wordpiece(word, {every[index] for index in kept}) or ["[UNK]"])
        # Where the longest pieces led nowhere, shorter ones may.
        assert after == before or not set(before) <= set(kept) or before == [0]
        if "c" not in word:
            assert 0 not in after


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), words=WORDS)
def test_unigram(seed, words):
    draw = random.Random(seed)
    pieces = {"".join(draw.choices("abc", k=draw.randint(2, 5))) for _ in range(12)}
    # "c" has no piece of its own: alone it is unknown, and costs the lowest score and 10 more.
    entries = [("<unk>", 0.0), *((piece, -draw.uniform(1, 8)) for piece in ["a", "b", *sorted(pieces)])]
    old = of(models.Unigram(entries, unk_id=0, byte_fallback=False))
    new, kept = smaller(old, draw.sample(range(len(entries)), draw.randint(0, len(entries))))
    lowest = min(range(1, len(entries)), key=lambda index: entries[index][1])
    assert {0, lowest, *(index for index, (piece, _) in enumerate(entries) if "c" in piece)} <= set(kept)
    found = json.loads(new.backend_tokenizer.to_str())["model"]["vocab"]
    assert [piece for piece, _ in found] == [entries[index][0] for index in kept]
    # The library reads numbers to the last but one bit.
    assert [score for _, score in found] == pytest.approx([entries[index][1] for index in kept], rel=1e-15)
    scores = {entries[index][0]: entries[index][1] for index in kept if index}
    for word in words:
        before, after = split(old, word), [kept[index] for index in split(new, word)]
        assert after == before or not set(before) <= set(kept)
        best = unigram(word, scores)
        if best is not None and 0 not in after:
            assert sum(entries[index][1] for index in after) == pytest.approx(best)
        if 0 not in before and "c" not in word:
            assert 0 not in after


TEXTS = st.one_of(
    st.sampled_from(TEXT),
    st.lists(st.sampled_from(" ".join(TEXT).split()), min_size=1, max_size=6).map(" ".join),
    st.text(min_size=1, max_size=20),
)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), text=TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_trained_tokenizers_of_every_kind(kind, seed, text):
    old, draw = tiny_tokenizer(kind), random.Random(seed)
    ids = sorted(old.get_vocab().values())
    new, kept = smaller(old, draw.sample(ids, draw.randint(0, len(ids))))
    assume("\0" not in text)
    before, after = old(text)["input_ids"], [kept[index] for index in new(text)["input_ids"]]
    assert after == before or not set(before) <= set(kept)
    assert [kept[index] for index in new.all_special_ids] == old.all_special_ids
    if kind in ("byte_level", "separate_special_tokens", "gpt2"):
        assert new.decode(new(text)["input_ids"]) == old.decode(before) == text
    if old.unk_token_id is not None and old.unk_token_id not in before:
        assert old.unk_token_id not in after


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_tokenizer_is_read_from_its_files_as_it_is(kind, tmp_path):
    old = tiny_tokenizer(kind)
    ids = [index for index in sorted(old.get_vocab().values()) if index % 3]
    new, kept = smaller(old, ids[: len(ids) // 4])
    assert len(kept) < len(old)
    assert sorted(new.get_vocab().values()) == list(range(len(kept)))
    new.save_pretrained(tmp_path)
    loaded = type(old).from_pretrained(tmp_path)
    assert loaded.get_vocab() == new.get_vocab()
    assert loaded(TEXT)["input_ids"] == new(TEXT)["input_ids"]


def in_bytes() -> PreTrainedTokenizerFast:
    """Llama 2's kind: what has no token is written in bytes."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", *spelled, "▁", *"abcü", "ab", "▁ab", "üc"]
    merges = [("a", "b"), ("▁", "ab"), ("ü", "c")]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.RobertaProcessing(("<s>", 1), ("<s>", 1))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def test_where_bytes_stand_for_unknown_characters_the_bytes_stay_and_characters_may_go():
    old = in_bytes()
    vocabulary = old.get_vocab()
    new, kept = smaller(old, [vocabulary["▁ab"]])
    gone = {token for token, index in vocabulary.items() if index not in kept}
    assert gone == {"c", "ü", "üc"}
    text = "ab ü café"
    ids = split(new, text)
    assert new.unk_token_id not in ids
    assert new.decode(ids).strip() == text
    assert [kept[index] for index in split(new, "ab ab")] == split(old, "ab ab")


def test_ids_around_a_text_and_of_padding_follow():
    old = in_bytes()
    old.backend_tokenizer.enable_padding(pad_id=1, pad_token="<s>")
    vocabulary = old.get_vocab()
    new, kept = smaller(old, [])
    state = json.loads(new.backend_tokenizer.to_str())
    assert [kept[state["post_processor"][name][1]] for name in ("sep", "cls")] == [1, 1]
    assert kept[state["padding"]["pad_id"]] == 1
    assert vocabulary["▁"] in kept


def test_tokens_are_found_as_they_are_spelled_as_text_and_by_id():
    tokenizer = tiny_tokenizer("byte_level")
    vocabulary = Vocabulary(tokenizer)
    (leaf,) = split(tokenizer, " leaf")
    assert vocabulary.find("Ġleaf") == vocabulary.find(" leaf") == vocabulary.find(leaf) == leaf
    with pytest.raises(
        DataError, match=r"keep: 'Zweifel' is no token of the tokenizer; it reads it as 'Z', .*Name tok"
    ):
        vocabulary.find("Zweifel")
    with pytest.raises(DataError, match="keep: the tokenizer has no token 5000; its ids go up to 309"):
        vocabulary.find(5000)


def test_tokens_are_counted_and_what_looks_special_is_text():
    tokenizer = tiny_tokenizer("byte_level")
    counts = Vocabulary(tokenizer).counts([*TEXT, "<|endoftext|>"])
    encoded = [index for text in TEXT for index in split(tokenizer, text)]
    assert tokenizer.eos_token_id not in counts
    assert all(counts[index] >= encoded.count(index) for index in set(encoded))


def test_what_can_not_do_without_tokens_is_refused():
    with pytest.raises(DataError, match="model is WordLevel, whose words are all or nothing"):
        Vocabulary(of(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    with pytest.raises(DataError, match="fast tokenizer"):
        Vocabulary(object())


def test_ids_that_would_not_be_those_of_the_rows_are_refused():
    """The library counts on from the vocabulary for added tokens outside of it, and here gives the third id."""
    gaps = of(models.BPE(vocab={"a": 0, "b": 5, "ab": 6}, merges=[("a", "b")]))
    gaps.add_tokens(["<x>"])
    vocabulary = Vocabulary(gaps)
    with pytest.raises(DataError, match="can't be numbered one after the other"):
        smaller_tokenizer(vocabulary, sorted(vocabulary.ids.values()))


def languages(kind):
    """A tokenizer whose class keeps maps of its own to the ids of languages."""
    start = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    words = [(f"\u2581{word}", -2.0 - number) for number, word in enumerate(["one", "two", "three", "four", "five"])]
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return getattr(transformers, kind)(vocab=[*start, *words, *letters], src_lang="en_XX", tgt_lang="ro_RO")


@pytest.mark.parametrize("kind", ["MBartTokenizer", "MBart50Tokenizer"])
def test_ids_that_the_class_keeps_of_its_own_are_the_new_ones(kind):
    """By them one says in which language to write: `forced_bos_token_id = tokenizer.lang_code_to_id["ro_RO"]`."""
    old = languages(kind)
    new, kept = smaller(old, [old.get_vocab()["\u2581two"]])
    ids = new.get_vocab()
    assert ids["ro_RO"] != old.get_vocab()["ro_RO"]
    assert new.lang_code_to_id == {code: ids[code] for code in old.lang_code_to_id}
    assert new.fairseq_tokens_to_ids["<mask>"] == ids["<mask>"]
    assert new.fairseq_ids_to_tokens[ids["ro_RO"]] == "ro_RO"
    if kind == "MBart50Tokenizer":
        assert new.id_to_lang_code == {ids[code]: code for code in old.lang_code_to_id}
    assert [kept[token] for token in new.prefix_tokens + new.suffix_tokens] == old.prefix_tokens + old.suffix_tokens
    current = "cur_lang_code_id" if kind == "MBart50Tokenizer" else "cur_lang_code"
    assert kept[getattr(new, current)] == getattr(old, current)
    assert [kept[token] for token in new("two").input_ids] == old("two").input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_no_ids_stay(kind):
    tokenizer = tiny_tokenizer(kind)
    tokenizer._extra_ids = tokenizer._pad_token_type_id = 7
    tokenizer.sizes = {"small": 7, "large": 9}
    new, kept = smaller(tokenizer, [])
    assert len(kept) < len(tokenizer)
    assert (new._extra_ids, new._pad_token_type_id, new.sizes) == (7, 7, {"small": 7, "large": 9})


def test_a_map_of_all_tokens_is_told_by_its_content():
    tokenizer = tiny_tokenizer("wordpiece")
    tokenizer.words = dict(tokenizer.get_vocab())
    tokenizer.names = {index: token for token, index in tokenizer.get_vocab().items()}
    new, _ = smaller(tokenizer, [])
    assert new.words == new.get_vocab()
    assert new.names == {index: token for token, index in new.get_vocab().items()}
