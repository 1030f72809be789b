"""A table of embeddings as a product of two smaller ones (ALBERT, Lan et al. 2020, arXiv 1909.11942, section 3.1), made
of a trained table W (tokens, width):

    W ~ A B,   A (tokens, rank), B (rank, width),

the best for rows that count as often as their tokens come (GroupReduce, Chen et al. 2018, arXiv 1806.06950, eq. 3,
with one group):

    A, B = argmin sum_t f_t |W_t - A_t B|^2,   by the singular value decomposition of diag(sqrt f) W.

f_t is how often token t comes in samples. Most tokens of a large vocabulary never come: together these count as many
times as there are tokens that came once (Good 1953: that is the share of tokens not seen yet), at least once, and each
as often as the others.

Where the head is the table (tied embeddings), it stays so: A B is both. FLOPs of the head fall by as much as its
parameters. Nothing in the config of a family tells of it but ALBERT's and ELECTRA's, so that what it leaves needs this
package.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, StrictFloat, StrictInt, model_validator
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.accounting.inputs import call_arguments
from auxin.edits.kinds.edit import Edit
from auxin.edits.kinds.file_edits import MultiplyParameter
from auxin.edits.kinds.module_edits import ReplaceModule, TieParameters
from auxin.edits.plan import Plan
from auxin.edits.plan_files import PlanFile
from auxin.edits.structure import config_values
from auxin.errors import DataError, PlanError
from auxin.nn.linear import linear_class
from auxin.nn.low_rank import INPUT, OUTPUT
from auxin.nn.low_rank_embedding import LowRankEmbedding
from auxin.objectives.calibration import Calibration, CalibrationSettings
from auxin.objectives.objective import is_encoder_decoder
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.target import Gauge, Removal, Target, least_removal, removal
from auxin.planning.token_tables import SECOND_COUNTS, token_tables
from auxin.settings import Settings

NAME = "factorised-embedding"
FREQUENCIES, ROOTS = "frequencies.safetensors", "roots"
"""The plan's file, and the tensor in it: the root of how often each token counts."""
Product = Literal["low_rank_embedding", "low_rank_linear"]
"""The bricks that are products."""
CHUNK = 8192
"""Rows of a table that are looked at together."""


class FactorisedEmbedding(Settings):
    """The rank: `rank`, a count or a share of the width (0.5), or a `target`; and what counts as near."""

    rank: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Entries that a token has in the smaller table."""
    target: Target | None = None
    """How small the model shall be, instead."""
    frequencies: bool = True
    """Whether rows count as often as their tokens come in samples. False: all count alike, and no data is needed; what
    it leaves is far worse."""
    head: bool = False
    """Whether a head with a table of its own becomes a product, too. One that is the embedding does in any case."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.rank is None) == (self.target is None):
            raise ValueError("give rank (a count, or a share of the width), or a target.")
        if isinstance(self.rank, float) and self.rank >= 1:
            raise ValueError(f"rank = {self.rank} is no share below 1. Give one (0.5), or a whole number.")
        return self


@dataclass(frozen=True)
class Table:
    """A matrix with a row for every token, and the modules that have it."""

    name: str
    """Of the parameter."""
    modules: Mapping[str, Product]
    """The bricks that replace them, by their paths; that of `name` is the first."""
    tokens: int
    width: int

    @property
    def most(self) -> int:
        """The largest rank that saves parameters."""
        return -(-self.tokens * self.width // (self.tokens + self.width)) - 1

    def edits(self, rank: int, file: str | None = None) -> Iterator[Edit]:
        """What makes it a product: its rows times the roots of their weights, the best product of that, and back.

        Args:
            rank: of the product.
            file: the name of the plan's file that holds the roots; None: all rows count alike.
        """
        first, *others = self.modules
        if file is not None:
            yield self._times_roots(self.name, file, divide=False)
        for path, brick in self.modules.items():
            yield ReplaceModule(module=path, brick=brick, settings={"rank": rank})
        if file is not None:
            yield self._times_roots(f"{first}.{OUTPUT}", file, divide=True)
        for path in others:
            for factor in (OUTPUT, INPUT):
                yield TieParameters(parameter=f"{path}.{factor}", to=f"{first}.{factor}")

    def _times_roots(self, parameter: str, file: str, divide: bool) -> Edit:
        return MultiplyParameter(
            parameter=parameter, file=file, tensor=ROOTS, shape=(self.tokens,), axis=0, divide=divide
        )


def plan_factorised_embedding(bench: Bench, settings: FactorisedEmbedding) -> Plan:
    """Plan tables of embeddings that are products.

    Args:
        bench: with samples where rows count by them. The file of their weights goes to its folder.
        settings: the rank, and what counts as near.

    Raises:
        PlanError: the model has no table of embeddings that a product can replace, or the rank saves nothing.
    """
    tables = factorisable(bench.model, settings)
    ranks, found = _ranks(bench.model, tables, settings)  # before any data is read
    matrices = [bench.model.get_parameter(table.name) for table in tables]
    for table, matrix in zip(tables, matrices, strict=True):
        if not matrix.isfinite().all():
            raise PlanError(f"{table.name} holds values that are not finite. Go back to an earlier checkpoint.")
    counts, file = torch.ones(tables[0].tokens, dtype=torch.float64), None
    if bench.data is not None:
        counts = occurrences(bench.model, bench.data, tables)
        file = PlanFile.write(bench.folder, FREQUENCIES, save({ROOTS: counts.sqrt()}))
    kept = (
        f"{table.name} {_kept(matrix, rank, counts):.1%}"
        for table, matrix, rank in zip(tables, matrices, ranks, strict=True)
    )
    weighed = "rows as often as their tokens come" if file is not None else "all rows alike"
    finding = f"Of the sum of squares, {weighed}, products keep: {', '.join(kept)}."
    plan = _plan(bench.model, tables, ranks, found, settings, file)
    return plan.model_copy(update={"findings": [*plan.findings, finding]}).beside(bench.folder)


def _outline(bench: Bench, settings: FactorisedEmbedding) -> Plan:
    tables = factorisable(bench.model, settings)
    return _plan(bench.model, tables, *_ranks(bench.model, tables, settings), settings)


def factorisable(model: PreTrainedModel, settings: FactorisedEmbedding) -> list[Table]:
    """The tables that become products.

    Args:
        model: weights are not looked at.
        settings: whether heads do, too.

    Raises:
        PlanError: there are none, or one is part of a module that does something of its own.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for table in token_tables(model):
        parameter = parameters.get(table.name)
        if parameter is None or parameter.dim() != 2 or table.axis != 0 or {*table.fields} <= {*SECOND_COUNTS}:
            continue
        same = [name for name, other in parameters.items() if other is parameter and name != table.name]
        owners = [name.rpartition(".")[0] for name in (table.name, *same)]
        embeds = any(isinstance(model.get_submodule(path), nn.Embedding | LowRankEmbedding) for path in owners)
        if embeds or settings.head:
            bricks = {path: _brick(model, path, table.name) for path in owners}
            found.append(Table(table.name, bricks, parameter.shape[0], parameter.shape[1]))
    if not found:
        raise PlanError(
            f"A {type(model).__name__} has no table of embeddings with a row for every token. Give a model that reads "
            "text."
        )
    return found


def _brick(model: PreTrainedModel, path: str, table: str) -> Product:
    """What replaces the module at `path`, which has the parameter `table`; PlanError where nothing can."""
    module = model.get_submodule(path)
    if LowRankEmbedding.can_replace(module):
        return "low_rank_embedding"
    if linear_class(module) is nn.Linear:
        return "low_rank_linear"
    raise PlanError(
        f"{path} has the table {table} and is a {type(module).__name__}, in whose place no product can be put. Give "
        "another model, or take off what an edit put there (merge_module)."
    )


def occurrences(model: PreTrainedModel, data: Calibration, tables: list[Table]) -> Tensor:
    """How often each token counts, (tokens,), float64: see this module.

    Args:
        model: weights are not looked at.
        data: samples. Padding does not count; where a token is hidden and asked for, both count.
        tables: of one vocabulary. Labels count where a head is among them, or where a decoder reads them.

    Returns:
        Counts over their mean: how much was looked at says nothing of how large factors should be.
    """
    writes = any("low_rank_linear" in table.modules.values() for table in tables)
    answers = is_encoder_decoder(model.config) and model.can_generate()
    counts = torch.zeros(tables[0].tokens, dtype=torch.int64)
    for batch in data.batches():
        ids, mask, labels = batch.get("input_ids"), batch.get("attention_mask"), batch.get("labels")
        if ids is not None:
            read = ids.flatten() if mask is None or mask.shape != ids.shape else ids[mask.bool()]
            counts += torch.bincount(read, minlength=len(counts))
        if labels is None:  # where answers begin and end are no tokens
            continue
        asked = labels >= 0
        if answers:  # a decoder reads what it is to write
            counts += torch.bincount(labels[asked], minlength=len(counts))
        elif writes and ids is not None:
            counts += torch.bincount(labels[asked & (labels != ids)], minlength=len(counts))
    if not counts.any():
        raise DataError(
            "Rows count as often as their tokens come, and no batch has a token (input_ids). Give batches with some, "
            "or frequencies = false."
        )
    unseen, once = counts == 0, int((counts == 1).sum())
    share = max(once, 1) / max(int(unseen.sum()), 1)
    found = torch.where(unseen, share, counts.double())
    return found / found.mean()


def _ranks(
    model: PreTrainedModel, tables: list[Table], settings: FactorisedEmbedding
) -> tuple[list[int], Removal | None]:
    """The rank of each table, and what a target found."""
    for table in tables:
        if table.most < 1:
            raise PlanError(f"{table.name} [{table.tokens}, {table.width}]: no product of it is smaller. Leave it.")
    if settings.target is not None:
        most = max(table.most for table in tables)

        def ranks_of(amount: int) -> list[int]:
            return [max(table.most + 1 - amount, 1) for table in tables]

        def family(amount: int) -> list[Edit]:
            return _edits(tables, ranks_of(amount))

        found = least_removal(Gauge(settings.target, model), family, most, NAME)
        assert found.amount is not None
        return ranks_of(found.amount), found
    assert settings.rank is not None
    ranks = []
    for table in tables:
        rank = settings.rank if isinstance(settings.rank, int) else max(round(settings.rank * table.width), 1)
        if rank > table.most:
            raise PlanError(
                f"rank = {settings.rank}: {table.name} [{table.tokens}, {table.width}] is smaller than a product of "
                f"rank {rank}. Give {table.most} at most."
            )
        ranks.append(rank)
    return ranks, None


def _edits(tables: Sequence[Table], ranks: Sequence[int], file: str | None = None) -> list[Edit]:
    return [edit for table, rank in zip(tables, ranks, strict=True) for edit in table.edits(rank, file)]


def _kept(rows: Tensor, rank: int, counts: Tensor) -> float:
    """The share of the weighted sum of squares of a table's rows that a product keeps: of the squared singular values
    the largest."""
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, count in zip(rows.detach().double().split(CHUNK), counts.to(rows.device).split(CHUNK), strict=True):
        gram += (part * count[:, None]).mT @ part
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    return float(squares[-rank:].sum() / squares.sum()) if squares.any() else 1.0


def _plan(
    model: PreTrainedModel,
    tables: Sequence[Table],
    ranks: Sequence[int],
    found: Removal | None,
    settings: FactorisedEmbedding,
    file: PlanFile | None = None,
) -> Plan:
    edits = _edits(tables, ranks, None if file is None else file.name)
    shared = [
        f"{' and '.join(list(table.modules)[1:])}: the same product as that of {table.name}, as before the same table."
        for table in tables
        if len(table.modules) > 1
    ]
    return Plan(
        method=NAME,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="none",
        edits=edits,
        files=[] if file is None else [file],
        findings=[*(found or removal(model, edits)).findings(settings.target), *shared],
        made_for=config_values(model.config),
    )


def _example(model: PreTrainedModel) -> dict[str, Any]:
    tables = factorisable(model, FactorisedEmbedding(rank=1))
    # Samples have labels, and so need a model that takes some.
    counted = {} if "labels" in call_arguments(model) else {"frequencies": False}
    return {"rank": max(min(table.most for table in tables) // 2, 1), **counted}


METHOD = Method(
    name=NAME,
    title="The table of embeddings as a product of two smaller ones, near where tokens come often",
    paper="arXiv 1909.11942 (weights: arXiv 1806.06950)",
    intent="factorize",
    settings=FactorisedEmbedding,
    plan=plan_factorised_embedding,
    examples=_example,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=512) if settings.frequencies else None,
    outline=_outline,
)
