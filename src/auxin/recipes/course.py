"""The course of a run: which stages it does, one after the other, and what of them is still to come."""

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path

from auxin.accounting import Ledger
from auxin.data.dataset import Dataset
from auxin.recipes.folder import is_done
from auxin.recipes.price import RecipePrice, StagePrice
from auxin.recipes.schema import Branch, Recipe, Stage
from auxin.training.progress import Place


@dataclass(frozen=True)
class Course:
    """The stages that one process does, in order."""

    recipe: Recipe
    directory: Path
    """The run's."""
    stages: tuple[StagePrice, ...]

    @classmethod
    def of(cls, recipe: Recipe, directory: Path, price: RecipePrice) -> "Course":
        """All stages of `recipe`."""
        return cls(recipe, directory, tuple(price.stages))

    def of_branches(self, names: list[str]) -> "Course":
        """That of the branches of these names."""
        return Course(self.recipe, self.directory, tuple(stage for stage in self.stages if stage.branch in names))

    def place(self, branch: Branch, stage: Stage) -> Place:
        """Where `stage` of `branch` stands, and what comes after it."""
        index = self._index(branch, stage)
        left = sum(price.flops for price in self.stages[index + 1 :] if not self._done(price))
        return Place(index + 1, len(self.stages), left)

    def describe_start(self, branch: Branch, stage: Stage, data: Dataset, before: Ledger) -> str:
        """What the train stage `stage` is about to do, in one line: its steps and data, and how often it goes through
        the data, some of which the model with the books `before` may have seen."""
        index = self._index(branch, stage)
        price, split = self.stages[index], data.split("train")
        seen = before.units_seen(data.fingerprint)
        about = "about " if price.estimate else ""
        counted = isinstance(split, Sized)
        there = data.form.amount((len(split) if isinstance(split, Sized) else split.about) or 0)
        nearly = about if counted else "about "
        passes = f"{nearly}{_passes(price.units / there)} over the " if there else "of a stream of unknown length"
        learnt = f"{'' if counted else 'about '}{there:,} {data.form.unit}s to learn from" if there else ""
        before_this = _passes(seen / there) if there else f"{seen:,} {data.form.unit}s"
        earlier = f", after {before_this} in earlier stages" if seen else ""
        return (
            f"{stage.name}: stage {index + 1} of {len(self.stages)}, {about}{price.steps:,} steps, "
            f"{about}{price.units:,} {data.form.unit}s: {passes}{learnt}{earlier}"
        )

    def _index(self, branch: Branch, stage: Stage) -> int:
        names = [(price.branch, price.stage) for price in self.stages]
        return names.index((branch.name, stage.name))

    def _done(self, price: StagePrice) -> bool:
        branch = self.recipe.branch(price.branch)
        return is_done(self.directory, branch, branch.stage(price.stage))


def _passes(number: float) -> str:
    text = f"{number:.3g}" if number < 100 else f"{number:,.0f}"
    return f"{text} pass" if text == "1" else f"{text} passes"
