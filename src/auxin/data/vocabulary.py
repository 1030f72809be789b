"""New tokens for an existing tokenizer, such that text that holds none of them is tokenized as before.

How a token gets in depends on the tokenizer's model, since only some ways keep old text as it was and decode well:

| tokenizer | token | way in |
|---|---|---|
| BPE | learned from text | merges after the old ones: what they join is made of finished old tokens |
| BPE | given | added token: found anywhere in a text; a leading space belongs to it |
| WordPiece, Unigram | given, one word | entry of the model's vocabulary, for a whole word or its beginning |
| WordPiece | given, several words | added token, found between word boundaries |
| any | special | added token that is no text: not normalized, left out by `skip_special_tokens` |
"""

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from auxin.data.settings import CorpusSettings
from auxin.data.sources import read_documents
from auxin.data.tokenizer import plain_backend
from auxin.errors import DataError

Merge = tuple[str, str]
"""Two neighbouring tokens, as the vocabulary spells them, that become one."""

SPACE = "▁"
"""How SentencePiece spells a space."""
_ALPHABET = 0x10000
"""Where the characters begin that stand for token ids: no whitespace among them, and room for a million."""
_BATCH = 64
"""Texts that are encoded at a time, on all threads."""
_SURPLUS = 1.25
"""Merges that are learned for each that is wanted: some make tokens that exist."""
_FILLER_SCORE = -1e6
"""Unigram score of an entry that only holds an id's place."""
_UNKNOWN_PENALTY = 10.0
"""What the Unigram model takes off its lowest score for an unknown character."""
_WORD_BONUS = 0.1
"""By how much a new Unigram entry is likelier, in nats, than the old pieces it is made of."""


@dataclass(frozen=True)
class EnlargedTokenizer:
    """A tokenizer with new tokens."""

    tokenizer: PreTrainedTokenizerFast
    """The enlarged copy."""
    first: int
    """Id of the first new token; all ids before it are old."""
    pieces: list[list[int]]
    """Of each new token, in the order of the ids: the old tokens that it was split into, unknown ones left out."""


def enlarge_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
    tokens: Sequence[str] = (),
    special_tokens: Sequence[str] = (),
    merges: Sequence[Merge] = (),
) -> EnlargedTokenizer:
    """A copy of `tokenizer` with new tokens; ids of old tokens stay, and so does text that holds no new one.

    Args:
        tokenizer: a fast tokenizer.
        tokens: new tokens as text; those of a byte-level BPE may begin with the space before a word.
        special_tokens: new tokens that are no text.
        merges: as `learn_merges` gives them, for a BPE.

    Raises:
        DataError: no fast tokenizer, a token that exists, is empty, comes twice, or would not decode to itself.
    """
    check_fast(tokenizer)
    _check_given(tokenizer, tokens, special_tokens)
    backend = plain_backend(tokenizer)
    first = max(tokenizer.get_vocab().values()) + 1
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    entries: dict[str, list[int]] = {}
    rest: list[AddedToken] = []
    if merges:
        entries = _add_merges(state, merges)
    for token in tokens:
        pieces = _pieces(tokenizer, backend, token)
        word = _word(backend, token) if state["model"]["type"] in ("WordPiece", "Unigram") else None
        if word is None:
            rest.append(_added_token(backend, state["model"]["type"], token))
        elif word in entries:
            raise DataError(f"The new token {token!r} comes twice: the tokenizer reads it as {word!r}. Leave one out.")
        else:
            entries[word] = pieces
    rest += [AddedToken(token, normalized=False, special=True) for token in special_tokens]
    grown = copy.deepcopy(tokenizer)
    if entries:
        _add_entries(state, entries, first)
        grown._tokenizer = Tokenizer.from_str(json.dumps(state))
    grown.add_tokens(rest)
    names = [*entries, *(token.content for token in rest)]
    _check_ids(tokenizer, grown, names, first)
    for added in rest:
        _check_decoding(grown, backend, added)
    pieces_of_rest = [_known_ids(tokenizer, backend, token.content) for token in rest]
    return EnlargedTokenizer(grown, first, [*entries.values(), *pieces_of_rest])


def learn_merges(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], num_tokens: int) -> list[Merge]:
    """Go on with the training of a BPE where it ended: merges that make `num_tokens` new tokens, best first.

    The old tokenizer splits the text; its tokens are the alphabet of a second BPE training within the same words. Ties
    go to the lower ids, so that the same text gives the same merges. A token comes from a pair seen twice at least.

    Args:
        tokenizer: a fast tokenizer with a BPE model.
        texts: what to learn from.
        num_tokens: new tokens wanted.

    Raises:
        DataError: the tokenizer is no BPE, or the text has too few pairs.
    """
    check_fast(tokenizer)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise DataError(
            f"New tokens can be learned for a BPE tokenizer; this one's model is {model['type']}. Give a list of "
            "tokens instead."
        )
    names = {index: token for token, index in model["vocab"].items()}
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = [chr(_ALPHABET + index) for index in sorted(names)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + int(_SURPLUS * num_tokens) + 16,
        min_frequency=2,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(_spelled_by_ids(tokenizer, names, texts), trainer)
    merges = _usable_merges(json.loads(trained.to_str())["model"]["merges"], names, num_tokens)
    found = len({left + right for left, right in merges})
    if found < num_tokens:
        raise DataError(f"The text gives {found} new tokens, {num_tokens} are wanted. Ask for fewer or give more text.")
    return merges


def texts_of(source: str, max_bytes: int | None = None) -> Iterator[str]:
    """The documents to learn from: "stdlib" (the running Python's standard library), or a file, folder or glob.

    Args:
        source: where they are.
        max_bytes: stop before they exceed this many UTF-8 bytes; None: all.

    Raises:
        DataError: there is nothing.
    """
    settings = {"source": "stdlib"} if source == "stdlib" else {"source": "files", "paths": [source]}
    read = 0
    for document in read_documents(CorpusSettings.parse(settings)):
        if document.data is None:
            continue
        read += len(document.data)
        if max_bytes is not None and read > max_bytes:
            return
        yield document.data.decode("utf-8")


def check_fast(tokenizer: Any) -> None:
    """DataError when `tokenizer` is no fast one."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"A fast tokenizer (tokenizer.json) is needed, received a {type(tokenizer).__name__}. Load one with "
            "AutoTokenizer."
        )


def _check_given(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], special: Sequence[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    seen: set[str] = set()
    for token in (*tokens, *special):
        if not token.strip():
            raise DataError(f"The new token {token!r} is empty. Leave it out.")
        if token in seen:
            raise DataError(f"The new token {token!r} comes twice. Leave one out.")
        if token in vocabulary:
            raise DataError(f"The new token {token!r} exists: it is number {vocabulary[token]}. Leave it out.")
        seen.add(token)


def _known_ids(tokenizer: PreTrainedTokenizerFast, backend: Tokenizer, text: str) -> list[int]:
    ids = backend.encode(text, add_special_tokens=False).ids
    return [index for index in ids if index != tokenizer.unk_token_id]


def _pieces(tokenizer: PreTrainedTokenizerFast, backend: Tokenizer, token: str) -> list[int]:
    """The old tokens of `token`; DataError when it is one already."""
    ids = backend.encode(token, add_special_tokens=False).ids
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        raise DataError(
            f"The new token {token!r} is one token already, {backend.id_to_token(ids[0])!r} (number {ids[0]}). "
            "Leave it out."
        )
    return [index for index in ids if index != tokenizer.unk_token_id]


def _word(backend: Tokenizer, token: str) -> str | None:
    """How the model sees `token` when it is one word, None when it is several."""
    text = token if backend.normalizer is None else backend.normalizer.normalize_str(token)
    if backend.pre_tokenizer is None:
        return None
    words = backend.pre_tokenizer.pre_tokenize_str(text)
    return words[0][0] if len(words) == 1 else None


def _added_token(backend: Tokenizer, kind: str, token: str) -> AddedToken:
    """An added token whose text round-trips."""
    if kind == "Unigram":
        # The space before an added token is lost in encoding, and one after it is made up.
        raise DataError(
            f"The new token {token!r} is several words, which a Unigram tokenizer can't decode. Give single words."
        )
    # A normalizer that folds case has to be followed; one that spells spaces would put the mark into the token.
    mark = backend.normalizer is not None and SPACE in backend.normalizer.normalize_str("a b")
    # WordPiece decodes with a space before every word, so that a token inside of one would split it.
    return AddedToken(token, normalized=backend.normalizer is not None and not mark, single_word=kind == "WordPiece")


def _add_merges(state: dict[str, Any], merges: Sequence[Merge]) -> dict[str, list[int]]:
    """Append `merges` to the model in `state`; the pieces of each new token."""
    model = state["model"]
    if model["type"] != "BPE":
        raise DataError(f"Merges belong to a BPE tokenizer; this one's model is {model['type']}. Give tokens instead.")
    vocabulary = model["vocab"]
    pieces: dict[str, list[int]] = {}
    for left, right in merges:
        known = all(part in pieces or part in vocabulary for part in (left, right))
        if not known or left + right in vocabulary:
            raise DataError(f"The merge of {left!r} and {right!r} does not fit this tokenizer. Learn it with this one.")
        split = [pieces[part] if part in pieces else [vocabulary[part]] for part in (left, right)]
        pieces.setdefault(left + right, split[0] + split[1])
    # Old files spell a merge as one string, newer ones as a pair.
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [f"{left} {right}" if as_text else [left, right] for left, right in merges]
    return pieces


def _add_entries(state: dict[str, Any], entries: dict[str, list[int]], first: int) -> None:
    """Put `entries` into the model's vocabulary, with ids from `first` on.

    Added tokens outside of it get an entry of their own first: their ids are counted from the vocabulary's size when
    the file is read again.
    """
    model = state["model"]
    outside = {token["id"]: token["content"] for token in state["added_tokens"]}
    if model["type"] != "Unigram":
        vocabulary = model["vocab"]
        for index, content in outside.items():
            vocabulary.setdefault(content, index)
        vocabulary |= {entry: first + number for number, entry in enumerate(entries)}
        return
    scores = model["vocab"]
    lowest = min(score for _, score in scores)
    for index in range(len(scores), first):
        scores.append([outside.get(index, f"<unused {index}>"), _FILLER_SCORE])
    for entry, pieces in entries.items():
        known = sum(scores[piece][1] for piece in pieces)
        missing = len(entry) - sum(len(scores[piece][0]) for piece in pieces)
        scores.append([entry, known + max(0, missing) * (lowest - _UNKNOWN_PENALTY) + _WORD_BONUS])


def _check_ids(old: PreTrainedTokenizerFast, grown: PreTrainedTokenizerFast, names: list[str], first: int) -> None:
    """Old ids as they were, new ones in a row: what the rows of a table need."""
    wanted = old.get_vocab() | {name: first + number for number, name in enumerate(names)}
    if grown.get_vocab() != wanted:
        raise DataError(
            f"The tokenizer's {len(old)} ids have gaps (the largest is {first - 1}), so that new tokens would not come "
            "after the old ones. Give its unused ids a token first."
        )


def _check_decoding(grown: PreTrainedTokenizerFast, backend: Tokenizer, token: AddedToken) -> None:
    text = token.content
    if token.normalized and backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    decoded = grown.backend_tokenizer.decode([grown.get_vocab()[token.content]], skip_special_tokens=False)
    if decoded.strip() != text.strip():
        # The byte-level decoder takes an added token of nothing but characters of its alphabet for bytes.
        raise DataError(
            f"The new token {token.content!r} would be decoded to {decoded!r}. Give it with the space before it "
            f"({' ' + token.content!r}), or learn tokens from text."
        )


def _spelled_by_ids(tokenizer: PreTrainedTokenizerFast, names: dict[int, str], texts: Iterable[str]) -> Iterator[str]:
    """Each text as a string with one character per token, words apart."""
    backend = plain_backend(tokenizer)
    # Added tokens are cut out of a text before the model sees it, so that nothing merges with them.
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    breaks = {index for index, name in names.items() if name in added}
    begins = {index for index, name in names.items() if name.startswith(SPACE) and name.strip(SPACE)}
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, _BATCH)):
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            characters: list[str] = []
            word: int | None = None
            for index, number in zip(encoding.ids, encoding.word_ids, strict=True):
                if index in breaks or index not in names:
                    characters.append(" ")
                    continue
                if number != word or index in begins:
                    characters.append(" ")
                word = number
                characters.append(chr(_ALPHABET + index))
            yield "".join(characters)


def _usable_merges(merges: list[Any], names: dict[int, str], num_tokens: int) -> list[Merge]:
    """The merges over token ids as merges over tokens, without those that make a token that exists."""
    old = set(names.values())
    usable = {chr(_ALPHABET + index): name for index, name in names.items()}
    new: set[str] = set()
    found: list[Merge] = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left not in usable or right not in usable:
            continue  # made of a token that was left out
        token = usable[left] + usable[right]
        if token in old:
            continue  # the old training reached it in another way; making it here would change old text
        if token not in new and len(new) == num_tokens:
            break
        new.add(token)
        usable[left + right] = token
        found.append((usable[left], usable[right]))
    return found
