"""Fewer tokens for an existing tokenizer, such that text whose tokens all stay is tokenized as before.

What has to stay with a token depends on the tokenizer's model:

| tokenizer | stays with a token | why that is enough |
|---|---|---|
| BPE | the tokens on its way: what its characters are merged to one after the other | below |
| WordPiece | nothing | the longest piece that matches, where it stays, is still the longest |
| Unigram | nothing, but the lowest score in the vocabulary stays | the likeliest split, where it stays, is still that |

**BPE.** Merges are tried by rank, the leftmost first, and are never undone, so every merge that is done in a word lies
inside of one of the word's final tokens, none across two of them. Within a final token the merges that were done are
the best ones there at each moment, whatever stands beside it: they are those that its text alone would go through, its
way. With a subset of the merges, in the old order, that holds the ways of all final tokens, the best merge at each
moment is there, and no better one is new: the word goes the same way. So tokens that stay need the tokens of their
ways; all merges stay whose two parts and result do. (A token that its own text does not lead to, such as one that is
looked up as a whole word, `ignore_merges`, has no way.)

So that every text can still be written, single characters stay, of which all others are made; where unknown characters
are written in bytes, the bytes stay instead. Pieces of WordPiece and Unigram with a character that has no piece of its
own stay, too. Added tokens, special or not, stay. (A word that WordPiece can't split, since its longest pieces lead
nowhere, may become known, where shorter ones lead on.)
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from auxin.data.tokenizer import encode_documents, plain_backend
from auxin.data.vocabulary import SPACE, check_fast
from auxin.errors import DataError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""How a byte is spelled that is written instead of an unknown character."""
_TO_IDS = re.compile(r"\w+_to_ids?")
_FROM_IDS = re.compile(r"(\w+_)?ids?_to_\w+")
_OWN_IDS = re.compile(r"cur_lang\w*|(prefix|suffix)_tokens|(\w+_)?token_ids?")
"""Attributes of tokenizers that are ids, beside maps to and from them: of a language, of what is put around texts."""
_BATCH_CHARACTERS = 2_000_000


class Vocabulary:
    """The tokens of a tokenizer, and what has to stay with which."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """
        Raises:
            DataError: it is no fast one, or of a kind whose words would become unknown.
        """
        check_fast(tokenizer)
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = tokenizer.get_vocab()
        """Of every token, added ones too, as the vocabulary spells them."""
        self.state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self.kind: str = self.state["model"]["type"]
        if self.kind not in ("BPE", "WordPiece", "Unigram"):
            raise DataError(
                f"The tokenizer's model is {self.kind}, whose words are all or nothing: those that go would become "
                "unknown. Only BPE, WordPiece and Unigram can do without some."
            )

    def find(self, token: str | int) -> int:
        """The id of a token: as the vocabulary spells it, as a text that is one token, or its id.

        Raises:
            DataError: there is none.
        """
        if isinstance(token, int):
            if token in self._names:
                return token
            raise DataError(f"keep: the tokenizer has no token {token}; its ids go up to {max(self._names)}.")
        if token in self.ids:
            return self.ids[token]
        found = plain_backend(self.tokenizer).encode(token, add_special_tokens=False).ids
        if len(found) == 1 and found[0] != self.tokenizer.unk_token_id:
            return found[0]
        spelled = ", ".join(repr(self._names[one]) for one in found[:8])
        raise DataError(f"keep: {token!r} is no token of the tokenizer; it reads it as {spelled}. Name tokens it has.")

    def counts(self, texts: Iterable[str]) -> dict[int, int]:
        """How often each token comes in `texts`; what looks like a special token in them is text."""
        counted: dict[int, int] = {}
        for _, ids, _ in encode_documents(plain_backend(self.tokenizer), texts, _BATCH_CHARACTERS):
            for token in ids:
                counted[token] = counted.get(token, 0) + 1
        return counted

    @cached_property
    def always(self) -> set[int]:
        """The ids that stay whatever is used: added tokens, and what makes every text writable."""
        found = set(self.tokenizer.added_tokens_decoder) | {self.ids[token] for token in self._alphabet}
        _renumber_beside(copy.deepcopy(self.state), lambda index: found.add(index) or index)  # type: ignore[func-returns-value]
        if (unknown := self.state["model"].get("unk_token")) in self.ids:
            found.add(self.ids[unknown])
        if self.kind == "Unigram":
            scores = self.state["model"]["vocab"]
            lowest = min(score for _, score in scores)
            # By it the score of an unknown character is made, which must not become better.
            found.add(next(index for index, (_, score) in enumerate(scores) if score == lowest))
            found |= {self.state["model"]["unk_id"]} - {None}
        return set().union(*(self.with_parts(token) for token in found))

    def with_parts(self, token: int) -> set[int]:
        """The ids that stay with the token of this id, its own included."""
        if self.kind != "BPE":
            return {token}
        return {token, *(self.ids[part] for part in self._way(self._names[token]))}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {index: token for token, index in self.ids.items()}

    @cached_property
    def _of_model(self) -> dict[str, int]:
        """The tokens of the model's own vocabulary, with their ids."""
        vocabulary = self.state["model"]["vocab"]
        if self.kind == "Unigram":
            return {token: index for index, (token, _) in enumerate(vocabulary)}
        return dict(vocabulary)

    @cached_property
    def _alphabet(self) -> set[str]:
        """The tokens of the model that every text can be written with."""
        singles = {token for token in self._of_model if len(self._characters(token)) == 1}
        spelled = {token for token in self._of_model if _BYTE.fullmatch(token)}
        if self.state["model"].get("byte_fallback") and len(spelled) == 256:
            # A space is decoded as one where it is a token, and not out of bytes.
            return spelled | ({SPACE} & singles)
        if self.kind == "BPE":
            return singles | spelled
        alone = {character for token in singles for character in self._characters(token)}
        return singles | spelled | {token for token in self._of_model if not alone.issuperset(self._characters(token))}

    def _characters(self, token: str) -> list[str]:
        """The characters that a token is made of, each spelled as it would be as a token of its own there: within a
        word, or at its end."""
        prefix = self.state["model"].get("continuing_subword_prefix") or ""
        ending = self.state["model"].get("end_of_word_suffix") or ""
        inside = bool(prefix) and token.startswith(prefix) and token != prefix
        ends = bool(ending) and token.endswith(ending) and token != ending
        text = token[len(prefix) * inside : len(token) - len(ending) * ends]
        spelled = [
            character if place == 0 and not inside else prefix + character for place, character in enumerate(text)
        ]
        if ends:
            spelled[-1] += ending
        return spelled

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in reversed(list(enumerate(map(_pair, self.state["model"]["merges"]))))}

    def _way(self, token: str) -> set[str]:
        """The tokens that the characters of `token` are, and become, until they are the token; none where they don't
        become it."""
        prefix = len(self.state["model"].get("continuing_subword_prefix") or "")
        word = self._characters(token)
        seen = set(word)
        if not seen <= self._of_model.keys():
            return set()
        while len(word) > 1:
            known = [(self._ranks[pair], place) for place, pair in enumerate(pairwise(word)) if pair in self._ranks]
            if not known:
                return set()
            _, place = min(known)
            word[place : place + 2] = [word[place] + word[place + 1][prefix:]]
            seen.add(word[place])
        return seen if word == [token] else set()


def smaller_tokenizer(vocabulary: Vocabulary, kept: Sequence[int]) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer with the tokens of the ids `kept` alone, which are numbered in that order.

    Args:
        vocabulary: of the tokenizer.
        kept: ids in ascending order, closed under `with_parts`, `always` among them; ids that no token has leave a gap.

    Raises:
        DataError: the tokens would not get these ids.
    """
    new_ids = {old: new for new, old in enumerate(kept)}
    state = copy.deepcopy(vocabulary.state)
    model = state["model"]
    if vocabulary.kind == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
        model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[index] for token, index in model["vocab"].items() if index in new_ids}
    if vocabulary.kind == "BPE":
        prefix = len(model["continuing_subword_prefix"] or "")
        tokens = model["vocab"].keys()
        model["merges"] = [
            merge
            for merge, (left, right) in zip(model["merges"], map(_pair, model["merges"]), strict=True)
            if {left, right, left + right[prefix:]} <= tokens
        ]
    _renumber_beside(state, new_ids.__getitem__)
    smaller = copy.deepcopy(vocabulary.tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(state))
    own = vars(smaller)
    own.update({name: _attribute_in_new_ids(name, value, vocabulary.ids, new_ids) for name, value in own.items()})
    wanted = {token: new_ids[index] for token, index in vocabulary.ids.items() if index in new_ids}
    if smaller.get_vocab() != wanted:
        raise DataError(
            "The tokenizer's ids have gaps before its added tokens, or those come before others, so that the tokens "
            "that stay can't be numbered one after the other. Give its unused ids a token first."
        )
    return smaller


def _attribute_in_new_ids(name: str, value: Any, ids: Mapping[str, int], new_ids: Mapping[int, int]) -> Any:
    """What becomes of an attribute that a tokenizer's class computed from its ids, such as mBART's `lang_code_to_id`;
    any other as it is. It is known by its name, or, of a map, by agreeing with the vocabulary in every token."""
    gone = set(ids.values()) - new_ids.keys()
    if isinstance(value, dict) and value:
        if all(map(_is_id, value.values())) and (
            _TO_IDS.fullmatch(name) or all(ids.get(word) == token for word, token in value.items())
        ):
            return {word: new_ids.get(token, token) for word, token in value.items() if token not in gone}
        if all(map(_is_id, value)) and (
            _FROM_IDS.fullmatch(name) or all(ids.get(word) == token for token, word in value.items())
        ):
            return {new_ids.get(token, token): word for token, word in value.items() if token not in gone}
    if _OWN_IDS.fullmatch(name):
        if _is_id(value):
            return new_ids.get(value, value)
        if isinstance(value, list) and all(map(_is_id, value)):
            return [new_ids.get(token, token) for token in value]
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _renumber_beside(state: dict[str, Any], new: Callable[[int], int]) -> None:
    """Give the tokens that a tokenizer's `state` names beside its model their new ids, in place."""
    for token in state["added_tokens"]:
        token["id"] = new(token["id"])
    if state["padding"] is not None:
        state["padding"]["pad_id"] = new(state["padding"]["pad_id"])
    _renumber_processor(state["post_processor"], new)


def _renumber_processor(processor: Mapping[str, Any] | None, new: Callable[[int], int]) -> None:
    """The same for what puts special tokens around a text."""
    if processor is None:
        return
    for each in processor.get("processors", ()):
        _renumber_processor(each, new)
    for special in processor["special_tokens"].values() if processor["type"] == "TemplateProcessing" else ():
        special["ids"] = [new(index) for index in special["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = new(processor[name][1])


def _pair(merge: Any) -> tuple[str, str]:
    """The two tokens that a merge joins; old files spell it as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
