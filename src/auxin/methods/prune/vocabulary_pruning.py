"""Vocabulary pruning: tokens that a corpus never uses go, from the tokenizer and from all tables of the model.

A model that serves one domain or a few languages carries rows of its embedding and its head for tokens that never come.
They are taken away as arXiv 2010.05609 ("Load What You Need: Smaller Versions of Multilingual BERT") does it for a
subword vocabulary, here for BPE and Unigram, too, and for everything else that a model keeps per token. The tokens that
stay get other ids, in the old order; config, generation config and tokenizer follow.

Exact: a text whose tokens all stay is split into the same tokens (`auxin.data.smaller_vocabulary` has the proof), and
gives the same logits for all tokens that stay. Their probabilities are no smaller than before, since the softmax has
fewer terms: so the loss on such texts falls a little, or stays. There is no way back.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import floor, prod
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from auxin.data.smaller_vocabulary import Vocabulary, smaller_tokenizer
from auxin.data.tokenizer import has_tokenizer, read_tokenizer
from auxin.data.vocabulary import texts_of
from auxin.edits import Edit, Plan, Receipt, SetConfig, SliceParameter, apply
from auxin.edits.probe import Probe
from auxin.edits.renumbering import generation_values
from auxin.edits.structure import config_values
from auxin.edits.tensor_names import shapes_of
from auxin.errors import DataError, PlanError
from auxin.models.token_ids import named_ids, renumbered
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.target import Gauge, Target, removal
from auxin.planning.token_tables import config_ids, ids_that_stay, refuse_shared_ids, table_length, token_tables
from auxin.planning.tokenizer_files import tokenizer_folder, with_tokenizer
from auxin.settings import Settings
from auxin.words.paths import dotted

SOFTMAX = (
    "The logits of the tokens that stay are as before, their probabilities are not: the softmax has fewer terms, so "
    "that the loss on texts of these tokens falls or stays. It is no progress: compare models of one vocabulary."
)


class VocabularyPruning(Settings):
    """Which tokens stay."""

    corpus: str | None = None
    """The text whose tokens stay: "stdlib" (the running Python's standard library), or a file, folder or glob. Give all
    that the model is to read and write: what a part of it lacks goes."""
    max_bytes: int | None = Field(default=None, gt=0)
    """How much of `corpus` to read, in UTF-8 bytes; None: all."""
    keep_at_least: int = Field(default=1, gt=0)
    """How often a token has to come in the corpus to stay."""
    size: int | None = Field(default=None, gt=0)
    """Keep this many tokens, the most used ones, those included that always stay, or fewer where fewer come often
    enough; `multiple_of` is for after that. None: all that come often enough."""
    target: Target | None = None
    """Instead of `size`, how small the model shall be: `target.parameters`. Of the tokens that come often enough the
    most used ones stay for which there is room."""
    keep: tuple[str | int, ...] = ()
    """Tokens that stay though they don't come often enough: as the vocabulary spells them, as texts that are one token,
    or as ids."""
    multiple_of: int = Field(default=64, gt=0)
    """The number of tokens becomes a multiple of this, which is kind to kernels: further ones stay, the most used
    first, and at last rows without a token, where the table has some."""
    ids: tuple[int, ...] | None = None
    """Instead of a corpus: the ids that stay, with those that must. A tokenizer in the model's folder follows; where it
    is kept elsewhere, only what the configs name must stay."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; None: the model's folder."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if (self.corpus is None) == (self.ids is None):
            raise ValueError(
                "give the corpus whose tokens stay (corpus = stdlib, or a file or folder of the text that the model is "
                "for), or ids = [0, 5, 17] and no corpus."
            )
        if self.target is not None and self.target.parameters is None:
            raise ValueError(
                f"target.{self.target.name}: a row that is looked up costs no computation. Give target.parameters."
            )
        if self.target is not None and self.size is not None:
            raise ValueError("size and target both say how many tokens stay; leave one out.")
        of_corpus = {"max_bytes", "keep_at_least", "size", "target", "keep", "tokenizer"} & self.model_fields_set
        if self.ids is not None and of_corpus:
            raise ValueError(f"{min(of_corpus)} goes with a corpus, and ids says which tokens stay; leave one out")
        return self


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    keep_at_least: int = 1,
    size: int | None = None,
    keep: Sequence[str | int] = (),
    multiple_of: int = 64,
    optimizer: Optimizer | None = None,
    probe: Probe | None = None,
) -> Receipt:
    """Take tokens that `texts` never use from `tokenizer` and their rows from `model`, both in place; on any error both
    are as before.

    Args:
        model: a model with a vocabulary.
        tokenizer: the fast tokenizer it was trained with.
        texts: whose tokens stay.
        keep_at_least, size, keep, multiple_of: as in `VocabularyPruning`.
        optimizer: the optimizer that trains the model, if there is one; moments of rows that stay stay.
        probe: as for `apply`; of tokens that stay, in their old ids.

    Returns:
        What was done; `receipt.plan.kept_tokens` has the old ids of the tokens that stay, by their new ones.

    Raises:
        DataError: no fast tokenizer, one that can't do without tokens, or `keep` names an unknown one.
        PlanError: the model has no vocabulary or not that of the tokenizer, or no token can go.
    """
    wanted = {"keep_at_least": keep_at_least, "size": size, "keep": tuple(keep), "multiple_of": multiple_of}
    settings = VocabularyPruning.parse({"corpus": "texts in memory", **wanted})
    vocabulary = Vocabulary(tokenizer)
    kept = _chosen(model, vocabulary, texts, settings)
    smaller = smaller_tokenizer(vocabulary, kept)
    receipt = apply(plan_kept(model, kept, settings), model, optimizer, probe)
    tokenizer.__dict__ = smaller.__dict__
    return receipt


def plan_kept(model: PreTrainedModel, kept: Sequence[int], settings: VocabularyPruning) -> Plan:
    """Plan that the tokens of the ids `kept` alone stay; the model's weights are not looked at.

    Args:
        model: a model with a vocabulary; the meta device serves.
        kept: ids in ascending order, with all that the config names.
        settings: for the record.

    Raises:
        PlanError: the model has no vocabulary, all of it stays, or its ids mean something else, too.
    """
    config, length = model.config, table_length(model.config)
    refuse_shared_ids(config)
    if len(kept) >= length:
        raise PlanError(
            f"Nothing would go: what stays, in a multiple of {settings.multiple_of}, takes all {length} rows of the "
            "model's tables. Raise keep_at_least, give a size or another corpus, or a smaller multiple_of."
        )
    edits: list[Edit] = []
    values: dict[str, Any] = {}
    for table in token_tables(model):
        # Tokens that a second, shorter table lacks are read as token 0, and go on so.
        index = [token if token < table.length else 0 for token in kept]
        if index != list(range(table.length)):
            edits.append(SliceParameter(parameter=table.name, axis=table.axis, index=index))
        values |= {field: len(kept) for field in table.fields}
    new_ids = {old: new for new, old in enumerate(kept)}
    for path, named in config_ids(config).items():
        changed = renumbered(named, new_ids, length, "The model's config")
        values |= {dotted(path, name): value for name, value in changed.items()}
    return Plan(
        method="vocabulary-pruning",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        kept_tokens=list(kept),
        edits=[SetConfig(values=values), *edits],
        notes=[SOFTMAX],
        made_for=config_values(config),
    )


def plan_pruning(bench: Bench, settings: VocabularyPruning) -> Plan:
    """Plan which tokens stay, and the tokenizer that has them, whose files belong to the plan.

    Args:
        bench: its model comes from the folder that holds the tokenizer, unless the settings name another; weights are
            not looked at. Its folder gets the new tokenizer's files.
        settings: the corpus, or ids.

    Raises:
        PlanError: the model has no vocabulary or not that of the tokenizer, the tokenizer is unknown, no token can go,
            or more must stay than `size` or `target` allows.
        DataError: the tokenizer or the corpus can't be read, or `keep` names an unknown token.
    """
    model = bench.model
    table_length(model.config)
    has_one = has_tokenizer(Path(model.name_or_path)) if model.name_or_path else False
    if settings.ids is not None and not has_one:
        return plan_kept(model, _of_ids(model, settings), settings)
    folder = tokenizer_folder(model, settings.tokenizer)
    vocabulary = Vocabulary(read_tokenizer(folder))
    texts = () if settings.corpus is None else texts_of(settings.corpus, settings.max_bytes)
    kept = _chosen(model, vocabulary, texts, settings)
    plan = plan_kept(model, kept, settings)
    if settings.target is not None:
        reached = removal(model, plan.edits).findings(settings.target)
        plan = plan.model_copy(update={"findings": [*plan.findings, *reached]})
    smaller = smaller_tokenizer(vocabulary, kept)
    return with_tokenizer(plan, smaller, bench.folder, folder if settings.tokenizer is None else None)


def outline_pruning(bench: Bench, settings: VocabularyPruning) -> Plan:
    """The plan for given ids. What a corpus leaves is not known without the tokenizer."""
    if settings.ids is None:
        raise PlanError(
            "Which tokens the corpus leaves is not known before the model's tokenizer is there, and those that stay "
            "get other ids. Do it before, with `auxin plan` and `auxin apply`, and start from the result."
        )
    return plan_kept(bench.model, _of_ids(bench.model, settings), settings)


def _named_rows(model: PreTrainedModel) -> set[int]:
    """The ids that the model's config and its generation config, in memory and in its folder, name, with those that go
    with them."""
    found = ids_that_stay(model)
    own = getattr(model, "generation_config", None)
    folder = Path(model.name_or_path) if model.name_or_path else None
    for values in (vars(own) if own is not None else {}, generation_values(folder) if folder is not None else {}):
        found |= set[int]().union(*named_ids(values).values())
    return {token for token in found if token < table_length(model.config)}


def _of_ids(model: PreTrainedModel, settings: VocabularyPruning) -> list[int]:
    """The ids that the settings give, with those that the configs name, as many as they shall be."""
    length = table_length(model.config)
    kept = _given(settings, length) | _named_rows(model)
    return _rounded(kept, settings.multiple_of, range(length), length)


def _given(settings: VocabularyPruning, length: int) -> set[int]:
    """The ids that the settings give."""
    wanted = set(settings.ids or ())
    if odd := sorted(token for token in wanted if not 0 <= token < length):
        raise PlanError(f"ids: the model has no token {odd[0]}; its ids go from 0 to {length - 1}.")
    return wanted


def _chosen(
    model: PreTrainedModel, vocabulary: Vocabulary, texts: Iterable[str], settings: VocabularyPruning
) -> list[int]:
    """The ids that stay, in ascending order, where `texts` are the corpus."""
    length = table_length(model.config)
    if (largest := max(vocabulary.ids.values())) >= length:
        raise PlanError(
            f"The tokenizer's ids go up to {largest}, but the model's tables have {length} rows. Give the tokenizer "
            "that the model was trained with."
        )
    known, rows = set(vocabulary.ids.values()), _named_rows(model) | _given(settings, length)
    wanted = {vocabulary.find(token) for token in settings.keep} | (rows & known)
    kept = vocabulary.always.union(rows, *map(vocabulary.with_parts, wanted))
    room = _Room.of(model, settings)
    limit = settings.size or (length if room is None else room.rows)
    if len(kept) > limit:
        asked, least = f"size = {settings.size}", f"{len(kept)}"
        if room is not None:
            whole = -(-len(kept) // settings.multiple_of) * settings.multiple_of
            asked, least = f"{settings.target} leaves {limit} tokens, which", f"{room.parameters(whole):,} parameters"
        raise PlanError(
            f"{asked} is less than the {len(kept)} tokens that must stay: special and added ones, single characters, "
            f"what the config names, and `keep` with its parts. Ask for {least} or more."
        )
    counts = vocabulary.counts(texts)
    if not counts and settings.corpus is not None:
        raise DataError(f"corpus: {settings.corpus} holds no text, so that all tokens would go. Give another.")
    by_use = sorted(counts, key=lambda token: (-counts[token], token))
    for token in by_use:
        new = vocabulary.with_parts(token) - kept
        if counts[token] >= settings.keep_at_least and len(kept) + len(new) <= limit:
            kept |= new
    further = _with_their_parts(vocabulary, kept, [*by_use, *sorted(known)])
    unused = (token for token in range(length) if token not in known)
    return _rounded(kept, settings.multiple_of, chain(further, unused), length)


@dataclass(frozen=True)
class _Room:
    """How many tokens a target has room for."""

    rows: int
    """A multiple of what the number shall be one of."""
    others: int
    """Parameters of the model that are none of its tables' rows."""
    per_row: int
    """Parameters that go with a token."""

    @classmethod
    def of(cls, model: PreTrainedModel, settings: VocabularyPruning) -> "_Room | None":
        """None where there is no target; PlanError where the model meets it as it is."""
        if settings.target is None:
            return None
        gauge, shapes = Gauge(settings.target, model), shapes_of(model)
        settings.target.refuse_met(gauge.have)
        parameters = {name for name, _ in model.named_parameters()}
        tables = [table for table in token_tables(model) if table.name in parameters]
        sizes = [prod(shapes[table.name]) for table in tables]
        per_row = sum(size // table.length for size, table in zip(sizes, tables, strict=True))
        others = int(gauge.have) - sum(sizes)
        rows = max(0, floor((gauge.limit - others) / per_row))
        return cls(rows // settings.multiple_of * settings.multiple_of, others, per_row)

    def parameters(self, rows: int) -> int:
        """Of the model with so many tokens."""
        return self.others + rows * self.per_row


def _with_their_parts(vocabulary: Vocabulary, kept: set[int], tokens: Sequence[int]) -> Iterator[int]:
    """`tokens` in an order in which each comes after its parts."""
    seen = set(kept)
    for token in tokens:
        # The shorter parts first: each has the parts of its own before it.
        for part in sorted(vocabulary.with_parts(token) - seen, key=lambda one: len(vocabulary.with_parts(one))):
            seen.add(part)
            yield part


def _rounded(kept: set[int], multiple: int, further: Iterable[int], length: int) -> list[int]:
    """`kept` and so many of `further` that the number is a multiple, in ascending order; all where there are too
    few."""
    wanted = min(-(-len(kept) // multiple) * multiple, length)
    found = set(kept)
    for token in further:
        if len(found) >= wanted:
            break
        found.add(token)
    return sorted(found)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    """Every fourth token goes, so that the others get other ids."""
    length = table_length(model.config)
    return {"ids": [token for token in range(length) if token % 4 != 3], "multiple_of": 1}


METHOD = Method(
    name="vocabulary-pruning",
    title="Tokens that a corpus never uses go: tokenizer, embedding and head become smaller together",
    paper="arXiv 2010.05609",
    intent="prune",
    settings=VocabularyPruning,
    plan=plan_pruning,
    examples=_examples,
    promise="exact over the tokens that stay: their logits, for texts of them; the softmax has fewer terms",
    outline=outline_pruning,
    other_tokens=True,
)
