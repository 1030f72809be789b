"""Which branches of a recipe have to be finished before which."""

from collections.abc import Iterable

from auxin.errors import ConfigError, unknown_name
from auxin.recipes.schema import Branch, Recipe, TrainStage


def depends_on(recipe: Recipe, branch: Branch) -> set[str]:
    """The branches that have to be finished before `branch` of `recipe` begins."""
    named = {getattr(stage, field, None) for stage in branch.stages for field in ("flops_of", "like", "parameters_of")}
    named |= {branch.fork.partition("/")[0]} if branch.fork else set()
    for stage in branch.stages:
        if isinstance(stage, TrainStage):
            objective = recipe.training_settings(stage, flops=1.0).objective
            named |= {reference.partition("/")[0] for reference in objective.references()}
    known = {other.name for other in recipe.branches}
    return {name for name in named if name in known and name != branch.name}


def with_ancestors(recipe: Recipe, wanted: Iterable[str] | None) -> Recipe:
    """`recipe` with the `wanted` branches (None: all) and those that they need, and no others.

    Raises:
        ConfigError: there is no such branch.
    """
    needed = {branch.name: depends_on(recipe, branch) for branch in recipe.branches}
    chosen = set(needed if wanted is None else wanted)
    if unknown := sorted(chosen - set(needed)):
        raise ConfigError("--branches: " + unknown_name("branch", unknown[0], needed))
    while more := {name for branch in chosen for name in needed[branch]} - chosen:
        chosen |= more
    branches = [branch for branch in recipe.branches if branch.name in chosen]
    main = recipe.main_branch if recipe.main_branch in chosen else None
    return recipe.model_copy(update={"branches": branches, "main_branch": main})
