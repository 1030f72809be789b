"""Enlarged tokenizers: old text as before, new tokens found and decoded, ids in a row, the same after a reload."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from auxin.data.tokenizer import plain_backend
from auxin.data.vocabulary import enlarge_tokenizer, learn_merges, texts_of
from auxin.errors import DataError
from oracles.vocabulary import apply_merges, pair_counts
from tiny_tokenizers import BPE_KINDS, KINDS, TEXT, tiny_tokenizer

TOKENS = {
    "byte_level": [" photosynthesis", "Zweifel", " café", "漢字", "two words"],
    "sentencepiece": ["Zweifel", "photosynthesis", "naïveté"],
    "wordpiece": ["Photosynthesis", "zweifel", "café", "covid-19"],
    "unigram": ["photosynthesis", "Zweifel", "café", "covid-19"],
}
TOKENS |= dict.fromkeys(("separate_special_tokens", "gpt2"), TOKENS["byte_level"])
MODEL_TYPES = {"gpt2": "gpt2", "wordpiece": "bert", "unigram": "t5"}


def enlarged(kind):
    tokenizer = tiny_tokenizer(kind)
    merges = learn_merges(tokenizer, TEXT, 12) if kind in BPE_KINDS else ()
    return tokenizer, enlarge_tokenizer(tokenizer, TOKENS[kind], ["<tool>"], merges)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_old_tokens_stay_and_new_ones_follow(kind):
    old, new = enlarged(kind)
    vocabulary = new.tokenizer.get_vocab()
    assert {token: vocabulary[token] for token in old.get_vocab()} == old.get_vocab()
    assert sorted(vocabulary.values()) == list(range(new.first + len(new.pieces)))
    assert new.first == len(old)
    assert len(new.pieces) == len(TOKENS[kind]) + 1 + (12 if kind in BPE_KINDS else 0)
    assert all(0 <= piece < new.first for pieces in new.pieces for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_tokenizer_is_left_alone(kind):
    old, _ = enlarged(kind)
    assert old.backend_tokenizer.to_str() == tiny_tokenizer(kind).backend_tokenizer.to_str()


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet=st.sampled_from("aeflorst TL.,('é漢<>\n"), max_size=30) | st.sampled_from(TEXT))
def test_text_without_new_tokens_is_tokenized_as_before(kind, text):
    old, new = _CACHE.setdefault(kind, enlarged(kind))
    found = ids(new.tokenizer, text)
    if max(found, default=0) < new.first:
        assert found == ids(old, text)
    else:
        # A new token never makes a text longer, nor another text.
        assert len(found) <= len(ids(old, text)) or old.unk_token_id in ids(old, text)
    if old.unk_token_id not in ids(old, text):
        assert new.tokenizer.decode(found) == old.decode(ids(old, text))


_CACHE: dict = {}


@pytest.mark.parametrize("kind", BPE_KINDS)
@given(
    text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30)
    | st.lists(st.sampled_from([*TOKENS["byte_level"], " ", "<tool>", "leaf", "é", "\n"]), max_size=8).map("".join)
)
def test_byte_level_round_trip(kind, text):
    if kind == "sentencepiece":
        return  # unknown characters are lost in it, before and after
    _, new = _CACHE.setdefault(kind, enlarged(kind))
    assert new.tokenizer.decode(ids(new.tokenizer, text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize(
    ("kind", "text", "tokens"),
    [
        ("byte_level", "the photosynthesis<tool>", ["t", "h", "e", " photosynthesis", "<tool>"]),
        ("gpt2", "Zweifel café", ["Zweifel", " café"]),
        ("wordpiece", "PHOTOSYNTHESIS Café, covid-19.", ["photosynthesis", "cafe", ",", "covid-19", "."]),
        ("unigram", "photosynthesis café covid-19", ["▁photosynthesis", "▁café", "▁covid-19"]),
        ("sentencepiece", "Zweifel", ["Zweifel"]),
    ],
)
def test_new_tokens_are_found(kind, text, tokens):
    tokenizer = tiny_tokenizer(kind)
    new = enlarge_tokenizer(tokenizer, TOKENS[kind], ["<tool>"]).tokenizer
    found = new.convert_ids_to_tokens(ids(new, text))
    if kind == "byte_level":
        found[:-2] = list("".join(found[:-2]))  # how the old tokens split "the" is not the point
    assert found == tokens


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_words_inside_of_other_words_are_not_split(kind):
    old, new = enlarged(kind)
    assert ids(new.tokenizer, "xphotosynthesis") == ids(old, "xphotosynthesis")


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_what_the_token_was_split_into(kind):
    old, new = enlarged(kind)
    for token in [*TOKENS[kind], "<tool>"]:
        number = ids(new.tokenizer, token)
        assert len(number) == 1, token
        before = plain_backend(old).encode(token, add_special_tokens=False).ids
        assert new.pieces[number[0] - new.first] == [index for index in before if index != old.unk_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_left_out_of_decoded_text(kind):
    _, new = enlarged(kind)
    found = ids(new.tokenizer, "leaf<tool>")
    assert found[-1] == new.tokenizer.convert_tokens_to_ids("<tool>")
    assert "tool" not in new.tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_enlarged_again_after_a_reload(kind, tmp_path):
    _, new = enlarged(kind)
    new.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES.get(kind, "llama")}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(new.tokenizer)
    assert loaded.get_vocab() == new.tokenizer.get_vocab()
    texts = [*TEXT, "a photosynthesis Zweifel café <tool> leaf"]
    assert [loaded(text)["input_ids"] for text in texts] == [new.tokenizer(text)["input_ids"] for text in texts]
    again = enlarge_tokenizer(loaded, ["Blaubeerkuchen"], ["<again>"])
    assert again.first == new.first + len(new.pieces)
    again.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == again.tokenizer.get_vocab()


@pytest.mark.parametrize("kind", BPE_KINDS)
def test_learned_merges_against_the_oracle(kind):
    """Each learned merge joins a pair that is as frequent as any, but for those that make a token that exists."""
    tokenizer = tiny_tokenizer(kind)
    merges = learn_merges(tokenizer, TEXT, 15)
    vocabulary = tokenizer.get_vocab()
    words = []
    for text in TEXT:
        encoding = plain_backend(tokenizer).encode(text, add_special_tokens=False)
        last = object()
        for token, word in zip(encoding.tokens, encoding.word_ids, strict=True):
            if word != last or (token.startswith("▁") and token != "▁"):
                words.append([])
            words[-1].append(token)
            last = word
    for number, merge in enumerate(merges):
        counts = pair_counts([apply_merges(word, merges[:number]) for word in words])
        possible = {pair: count for pair, count in counts.items() if "".join(pair) not in vocabulary}
        assert "".join(merge) not in vocabulary
        assert possible[merge] == max(possible.values())
    new = enlarge_tokenizer(tokenizer, merges=merges)
    for word in words:
        expected = apply_merges(word, merges)
        text = tokenizer.convert_tokens_to_string(word)
        if kind == "sentencepiece" or "\ufffd" in text:
            continue
        assert new.tokenizer.convert_ids_to_tokens(ids(new.tokenizer, text)) == expected


def test_learning_is_the_same_each_time():
    tokenizer = tiny_tokenizer("byte_level")
    assert learn_merges(tokenizer, TEXT, 40) == learn_merges(tokenizer, iter(TEXT), 40)


def test_texts_come_from_files_and_stop_in_time(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("é" * 10)
    assert list(texts_of(str(tmp_path), 45)) == ["é" * 10] * 2
    assert len(next(texts_of("stdlib", 100_000))) > 0


def test_many_tokens_are_fast():
    tokenizer = tiny_tokenizer("byte_level")
    words = [f" word{number:04}x" for number in range(2000)]
    new = enlarge_tokenizer(tokenizer, words)
    assert ids(new.tokenizer, "".join(words)) == list(range(new.first, new.first + 2000))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("byte_level", {"tokens": ["café"]}, "decoded to .* Give it with the space before it"),
        ("byte_level", {"tokens": ["x y", "x y"]}, "'x y' comes twice"),
        ("byte_level", {"tokens": [" "]}, "' ' is empty"),
        ("byte_level", {"tokens": ["a"]}, "'a' exists: it is number"),
        ("byte_level", {"tokens": [" the"]}, "' the' is one token already, 'Ġthe'"),
        ("byte_level", {"special_tokens": ["<|endoftext|>"]}, "exists: it is number 0"),
        ("byte_level", {"merges": [("no", "such")]}, "does not fit this tokenizer"),
        ("wordpiece", {"tokens": ["Zweifel", "zweifel"]}, "comes twice"),
        ("wordpiece", {"merges": [("a", "b")]}, "this one's model is WordPiece"),
        ("unigram", {"tokens": ["two words"]}, "several words"),
    ],
)
def test_what_can_not_be_is_refused(kind, arguments, message):
    with pytest.raises(DataError, match=message):
        enlarge_tokenizer(tiny_tokenizer(kind), **arguments)


def test_learning_refuses_other_models_and_too_little_text():
    with pytest.raises(DataError, match=r"this one's model is WordPiece\. Give a list"):
        learn_merges(tiny_tokenizer("wordpiece"), TEXT, 3)
    with pytest.raises(DataError, match=r"gives \d+ new tokens, 50 are wanted"):
        learn_merges(tiny_tokenizer("byte_level"), ["ab ab"], 50)
    with pytest.raises(DataError, match="fast tokenizer"):
        learn_merges(object(), TEXT, 3)


def test_gaps_in_the_ids_are_refused():
    tokenizer = tiny_tokenizer("byte_level")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][last] += 5
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    with pytest.raises(DataError, match="have gaps"):
        enlarge_tokenizer(tokenizer, ["photosynthesis"])
