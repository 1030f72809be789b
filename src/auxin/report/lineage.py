"""The tree of a run: stages in the order of their branch, and branches where they were forked."""

import json
from typing import Any

from auxin.accounting import StageRecord
from auxin.accounting.results import BranchResult, RunResults
from auxin.report.formatting import is_number
from auxin.settings import Settings


class StageNode(Settings):
    """One stage, and the branches that go out from it."""

    record: StageRecord
    parameters_before: int | None
    """None for the first stage of a lineage."""
    value_after: float | None
    """None also when it is not finite."""
    details: list[tuple[str, str]]
    """Names and JSON texts of what was planned and measured."""
    forks: list["BranchNode"]


class BranchNode(Settings):
    """The stages that a branch added to those before its fork."""

    name: str
    stages: list[StageNode]


def lineage(results: RunResults) -> list[BranchNode]:
    """The trees of all branches; a branch whose parent is not among the results stands alone with all its stages."""
    branches = {branch.name: branch for branch in results.branches}
    children: dict[tuple[str, int], list[BranchResult]] = {}
    roots = []
    for branch in results.branches:
        inherited = inherited_stages(branch, branches)
        if inherited:
            assert branch.parent is not None
            children.setdefault((branch.parent, inherited - 1), []).append(branch)
        else:
            roots.append(branch)

    def node(branch: BranchResult) -> BranchNode:
        records = branch.ledger.stages
        stages = [
            StageNode(
                record=record,
                parameters_before=records[index - 1].parameters if index else None,
                value_after=record.value_after if is_number(record.value_after) else None,
                details=[(name, _json(value)) for name in ("plan", "receipt") if (value := getattr(record, name))],
                forks=[node(child) for child in children.get((branch.name, index), [])],
            )
            for index, record in enumerate(records)
            if index >= inherited_stages(branch, branches)
        ]
        return BranchNode(name=branch.name, stages=stages)

    return [node(branch) for branch in roots]


def inherited_stages(branch: BranchResult, branches: dict[str, BranchResult]) -> int:
    """How many stages at the beginning of the branch's ledger are its parent's."""
    if branch.parent is None or branch.parent not in branches or branch.parent == branch.name:
        return 0
    names = [record.name for record in branches[branch.parent].ledger.stages]
    if branch.fork_stage not in names:
        return 0
    # The last one of that name: a parent that is a fork itself may have inherited a stage of the same name.
    return len(names) - names[::-1].index(branch.fork_stage)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
