"""Vocabulary growth: new tokens for the tokenizer and rows for them in the model's tables, both or neither.

New rows of the embedding and of an untied head start as means of old rows:

| rule | row of a new token | why |
|---|---|---|
| pieces (default) | mean of the rows of the old tokens that it was split into | arXiv 2402.09977, "FVT" |
| mean | mean of the rows of all old tokens | a new token takes at most an average token's probability |

So do all that a model keeps per token: a bias of the logits, also one that is a buffer (BART's final_logits_bias), and
a second table (the embeddings per layer of Gemma 3n and 4).

Rows beyond the vocabulary, which tables have so that their length is a multiple of 64 or so, hold no token and take no
part in the means; new tokens use them up before the table grows. What a text without new tokens gives is kept: the
logits of all old tokens stay as they are. Their probabilities do not, since the softmax has more terms.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from auxin.data.tokenizer import read_tokenizer
from auxin.data.vocabulary import EnlargedTokenizer, Merge, enlarge_tokenizer, learn_merges, texts_of
from auxin.edits import AverageRows, Edit, MeanFill, PadParameter, Plan, Receipt, SetConfig, apply
from auxin.edits.probe import Probe
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.token_tables import (
    LEGACY_CLIP_END,
    TokenTable,
    refuse_taken_ids,
    refuse_whole_numbers,
    table_length,
    token_tables,
)
from auxin.planning.tokenizer_files import tokenizer_folder, with_tokenizer
from auxin.settings import Settings

Rule = Literal["pieces", "mean"]

LARGEST_MULTIPLE = 128
"""The largest padding multiple that a table's length is taken to follow."""


class VocabularyGrowth(Settings):
    """Which tokens a model shall learn, and where their rows start."""

    tokens: tuple[str, ...] = ()
    """New tokens as text. With a byte-level BPE, " word" is the token of a word with the space before it."""
    special_tokens: tuple[str, ...] = ()
    """New tokens that are no text, such as "<|tool|>"."""
    tokens_from: str | None = None
    """Learn `num_tokens` tokens from text: "stdlib" (the running Python's standard library), or a file, folder or glob.
    Needs a BPE tokenizer, whose training goes on where it ended."""
    num_tokens: int | None = Field(default=None, gt=0)
    """How many tokens to learn."""
    max_bytes: int = Field(default=16_000_000, gt=0)
    """How much of `tokens_from` to read, in UTF-8 bytes."""
    merges: tuple[Merge, ...] = ()
    """What was learned: neighbouring tokens, as the vocabulary spells them, that become one. A plan holds them."""
    rows: int | None = Field(default=None, gt=0)
    """Instead of tokens: this many rows behind the table's, each the mean of all, for a model whose tokenizer is kept
    elsewhere."""
    rule: Rule = "pieces"
    """Where new rows start: "pieces" (mean of the rows of the old tokens that the new one was split into; of all old
    ones where they are unknown) or "mean" (of all old tokens)."""
    multiple: int | None = Field(default=None, gt=0)
    """The table's length becomes a multiple of this when it grows; None: of the largest power of two up to 128 that
    divides it now."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; None: the model's folder."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if (self.tokens_from is None) != (self.num_tokens is None):
            raise ValueError("tokens_from and num_tokens go together: say from where and how many")
        named = bool(self.tokens or self.special_tokens or self.tokens_from or self.merges)
        if named == (self.rows is not None):
            raise ValueError("give new tokens (tokens, special_tokens or tokens_from), or rows and no tokens")
        return self


def grow_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Sequence[str] = (),
    *,
    special_tokens: Sequence[str] = (),
    tokens_from: str | None = None,
    num_tokens: int | None = None,
    merges: Sequence[Merge] = (),
    rule: Rule = "pieces",
    multiple: int | None = None,
    optimizer: Optimizer | None = None,
    probe: Probe | None = None,
) -> Receipt:
    """Add tokens to `tokenizer` and rows for them to `model`, both in place; on any error both are as before.

    Moments of new rows start like those of other new parameters: the first at zero, the second at the old rows' mean.

    Args:
        model: a model with a vocabulary.
        tokenizer: the fast tokenizer it was trained with.
        tokens, special_tokens, tokens_from, num_tokens, merges, rule, multiple: as in `VocabularyGrowth`.
        optimizer: the optimizer that trains the model, if there is one.
        probe: as for `apply`; its ids must be old ones.

    Returns:
        What was done, with the largest change of an old token's logit.

    Raises:
        DataError: the tokenizer can't take a token.
        PlanError: the model has no vocabulary, or not that of the tokenizer.
    """
    wanted = {
        "tokens": tuple(tokens),
        "special_tokens": tuple(special_tokens),
        "tokens_from": tokens_from,
        "num_tokens": num_tokens,
        "merges": tuple(merges),
        "rule": rule,
        "multiple": multiple,
    }
    settings = _learned(VocabularyGrowth.parse(wanted), tokenizer)
    enlarged = _enlarged(settings, tokenizer)
    plan = plan_vocabulary(model, enlarged.first, enlarged.pieces, settings)
    receipt = apply(plan, model, optimizer, probe)
    tokenizer.__dict__ = enlarged.tokenizer.__dict__
    return receipt


def plan_vocabulary(
    model: PreTrainedModel, first: int, pieces: Sequence[Sequence[int]], settings: VocabularyGrowth
) -> Plan:
    """Plan rows for new tokens, as `enlarge_tokenizer` numbers them; the model's weights are not looked at.

    Args:
        model: a model with a vocabulary; the meta device serves.
        first: number of the first new token, which is how many old ones there are.
        pieces: of each new token the old ones that it was split into; empty where they are unknown.
        settings: rule and multiple.

    Raises:
        PlanError: the model has no vocabulary, or a smaller one than the tokenizer, or takes the new tokens' ids for
            something else.
    """
    config, length = model.config, table_length(model.config)
    needed = first + len(pieces)
    if first > length:
        raise PlanError(
            f"The tokenizer's ids go up to {first - 1}, but the model's tables have {length} rows. Give the tokenizer "
            "that the model was trained with."
        )
    refuse_taken_ids(config, needed)
    multiple = settings.multiple or _padding_multiple(length)
    new_length = length if needed <= length else -(-needed // multiple) * multiple
    sources = [list(old) if settings.rule == "pieces" else [] for old in pieces]
    edits: list[Edit] = []
    values: dict[str, Any] = {}
    tables = token_tables(model)
    refuse_whole_numbers(model, tables)
    for table in tables:
        if table.length < new_length:
            fill = MeanFill(rows=min(first, table.length))
            edits.append(PadParameter(parameter=table.name, axis=table.axis, size=new_length, fill=fill))
            values |= dict.fromkeys(table.fields, new_length)
        edits.append(_new_entries(table, first, sources))
    if values:
        edits.insert(0, SetConfig(values=values))
    return Plan(
        method="vocabulary",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        vocabulary=first,
        edits=edits,
        notes=list(_hazards(config, first)),
        made_for=config_values(config),
    )


def _new_entries(table: TokenTable, first: int, sources: Sequence[list[int]]) -> AverageRows:
    """What puts means of old tokens' entries where those of the tokens from `first` on are. Tokens that have none, as
    the table ends before them, were read as token 0 and get its entry."""
    known = min(first, table.length)
    taken = [[row if row < known else 0 for row in rows] for rows in sources]
    return AverageRows(parameter=table.name, axis=table.axis, first=known, sources=[[0]] * (first - known) + taken)


def _padding_multiple(length: int) -> int:
    """The largest power of two up to LARGEST_MULTIPLE that divides `length`."""
    return min(length & -length, LARGEST_MULTIPLE)


def _hazards(config: PreTrainedConfig, first: int) -> Iterator[str]:
    """What a model does with ids behind the old vocabulary, where it takes them for something else than tokens."""
    if config.model_type == "whisper":
        yield (
            f"Whisper's generate takes ids behind its <|notimestamps|> for times, and the new tokens (from {first} on) "
            "are behind it: read and write them without timestamps (return_timestamps = False)."
        )
    text = getattr(config, "text_config", config)
    if text.model_type == "clip_text_model" and text.eos_token_id == LEGACY_CLIP_END:
        yield (
            "This CLIP pools a text at its largest id (text_config.eos_token_id = 2, as early configs say), which a "
            "new token would be. Before texts hold new tokens, set eos_token_id to the id of <|endoftext|>, "
            f"{first - 1} where it is the last old one."
        )


def plan_with_tokenizer(bench: Bench, settings: VocabularyGrowth) -> Plan:
    """Plan rows for new tokens and the tokenizer that has them, whose files belong to the plan.

    Args:
        bench: its model comes from the folder that holds the tokenizer, unless the settings name another; weights are
            not looked at. Its folder gets the new tokenizer's files.
        settings: the tokens.

    Raises:
        PlanError: the model has no vocabulary or not that of the tokenizer, or the tokenizer is unknown.
        DataError: the tokenizer can't be read or can't take a token.
    """
    model, length = bench.model, table_length(bench.model.config)
    if settings.rows is not None:
        return plan_vocabulary(model, length, [[]] * settings.rows, settings)
    folder = tokenizer_folder(model, settings.tokenizer)
    tokenizer = read_tokenizer(folder)
    settings = _learned(settings, tokenizer)
    enlarged = _enlarged(settings, tokenizer)
    plan = plan_vocabulary(model, enlarged.first, enlarged.pieces, settings)
    return with_tokenizer(plan, enlarged.tokenizer, bench.folder, folder if settings.tokenizer is None else None)


def outline_vocabulary(bench: Bench, settings: VocabularyGrowth) -> Plan:
    """A plan with the sizes of the real one where it is not known yet which tokenizer the model will have: every new
    token gets a row behind the table's, which may have unused ones left for it."""
    length = table_length(bench.model.config)
    learned = len(settings.merges) + (settings.num_tokens or 0)
    count = settings.rows or len(settings.tokens) + len(settings.special_tokens) + learned
    return plan_vocabulary(bench.model, length, [[]] * count, settings)


def _learned(settings: VocabularyGrowth, tokenizer: PreTrainedTokenizerFast) -> VocabularyGrowth:
    """The settings with what there is to learn learned, so that the plan needs no text any more."""
    if settings.tokens_from is None or settings.num_tokens is None:
        return settings
    merges = learn_merges(tokenizer, texts_of(settings.tokens_from, settings.max_bytes), settings.num_tokens)
    return settings.model_copy(update={"merges": tuple(merges), "tokens_from": None, "num_tokens": None})


def _enlarged(settings: VocabularyGrowth, tokenizer: PreTrainedTokenizerFast) -> EnlargedTokenizer:
    return enlarge_tokenizer(tokenizer, settings.tokens, settings.special_tokens, settings.merges)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    table_length(model.config)
    return {"rows": 3}


METHOD = Method(
    name="vocabulary",
    title="New tokens: tokenizer, embedding and head grow together",
    paper="arXiv 2402.09977",
    intent="grow",
    settings=VocabularyGrowth,
    plan=plan_with_tokenizer,
    examples=_examples,
    promise="exact over the old vocabulary: the logits of old tokens; the softmax has more terms",
    outline=outline_vocabulary,
    other_tokens=True,
)
