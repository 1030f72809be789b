"""One recipe with several seeds: a run for each in a folder of its own, and what they show together."""

from collections.abc import Callable, Sequence
from pathlib import Path

from auxin.accounting.comparison import Comparison, compare
from auxin.accounting.results import RunResults
from auxin.errors import CheckpointError, ConfigError
from auxin.files import write_text
from auxin.recipes.beforehand import check_builds, check_needs
from auxin.recipes.folder import DATA, claim_seeds, held, is_finished, seed_directory
from auxin.recipes.price import RecipePrice, price_recipe
from auxin.recipes.results import RESULTS_FILE, read_results, rewrite_report
from auxin.recipes.runner import finish_run, prepared_run
from auxin.recipes.schema import Recipe
from auxin.recipes.stages import Announce
from auxin.recipes.workers import Cell, raise_failures, run_cells
from auxin.settings import Settings
from auxin.training.progress import hours


class SeedsPrice(Settings):
    """What a recipe will cost with several seeds; printed as a table."""

    seeds: dict[int, RecipePrice]
    flops: float
    """Training FLOPs of all stages of all seeds, those that branches share once."""
    seconds: float | None = None
    """Of all their steps on this machine, one after the other with one thread each, where they were timed."""

    def __str__(self) -> str:
        return "\n".join(f"{heading}{price}" for heading, price in self.different()) + "\n".join(["", *self.notes()])

    def different(self) -> list[tuple[str, RecipePrice]]:
        """The prices of single seeds with what stands above each; one where all are the same."""
        prices = list(self.seeds.values())
        if all(price == prices[0] for price in prices):
            return [("", prices[0])]
        return [(f"Seed {seed}:\n", price) for seed, price in self.seeds.items()]

    def notes(self) -> list[str]:
        """What is said of all of them together."""
        seeds = ", ".join(map(str, self.seeds))
        same = len(self.seeds) > 1 and len(self.different()) == 1
        each = f"; of seed {next(iter(self.seeds))} above, the others cost the same" if same else ""
        lines = ["", f"Training FLOPs of all stages, seeds {seeds} together: {self.flops:.3g}{each}."]
        if self.seconds is not None and len(self.seeds) > 1:
            lines.append(f"One after the other the steps of all seeds take about {hours(self.seconds)}.")
            lines.append(next(iter(self.seeds.values())).electricity.arithmetic(self.seconds))
        return lines


def price_seeds(
    recipe: Recipe, branches: Sequence[str] | None = None, price: Callable[[Recipe], RecipePrice] = price_recipe
) -> SeedsPrice:
    """Price `recipe` for each of its seeds, as `price_recipe`.

    Args:
        recipe: has seeds.
        branches: only these and what they need; None: all.
        price: of one seed; a `Timer`'s tells the time too.

    Raises:
        ConfigError, PlanError: the recipe can't be run as it stands.
    """
    prices = {seed: price(part_of(recipe.of_seed(seed), branches)) for seed in _seeds(recipe)}
    seconds = [one.seconds for one in prices.values()]
    return SeedsPrice(
        seeds=prices,
        flops=sum(stage.flops for one in prices.values() for stage in one.stages),
        seconds=None if None in seconds else sum(second or 0.0 for second in seconds),
    )


def part_of(recipe: Recipe, branches: Sequence[str] | None) -> Recipe:
    """The recipe of `branches` and what they need alone; None: of all.

    Raises:
        ConfigError: one of them is not in the recipe.
    """
    needed = recipe.needed(branches)
    return recipe.model_copy(update={"branches": [branch for branch in recipe.branches if branch.name in needed]})


def run_seeds(
    recipe: Recipe,
    output: str | Path,
    command: str,
    announce: Announce = print,
    jobs: int = 1,
    branches: Sequence[str] | None = None,
) -> Comparison:
    """Run `recipe` with each of its seeds into the folder `output`, or go on where an earlier run into it stopped.

    Every branch of every seed runs in a process of one thread, so that the number of jobs changes no bit. What is
    finished is not run again, so that seeds can be added later.

    Args:
        recipe: has seeds.
        output: the folder; made if it does not exist. `data` in it is shared by all seeds, `seed-N` is the run of one.
        command: the command line that reproduces all of it, for the report.
        announce: is told of every finished stage, a line at a time.
        jobs: processes at a time.
        branches: names of the branches to run, with those that they need; None: all.

    Returns:
        What the finished branches show over the recipe's seeds; also written to `results.json` and `report.html` in
        `output`, beside those in each seed's folder.

    Raises:
        ConfigError, PlanError: `output` holds a run of another recipe or with one seed, or the recipe asks for what
            can't be built or does not fit together; found before anything is written, as far as it does not depend on
            the data.
        TrainingError: a branch failed; the others are done, and reported. Or a signal came; what was trained is saved.
    """
    directory = Path(output)
    wanted, seeds = recipe.needed(branches), _seeds(recipe)
    check_needs(recipe, directory / DATA)
    for seed in seeds:
        price_recipe(recipe.of_seed(seed), memory=False)
    with held(directory):
        claim_seeds(recipe, directory, announce)
        runs = {}
        for seed in seeds:
            tell = announce if seed == seeds[0] else _quietly
            runs[seed] = prepared_run(recipe.of_seed(seed), seed_directory(directory, seed), directory / DATA, tell)
            check_builds(runs[seed], wanted)
        cells = [
            Cell(run.directory, directory / DATA, run.recipe, name, f"seed {seed}, ")
            for seed, run in runs.items()
            for name in wanted
        ]
        failures = run_cells(cells, jobs, announce)
        results = [
            finish_run(run, command, threads=1)
            for run in runs.values()
            if any(is_finished(run.directory, branch) for branch in run.recipe.branches)
        ]
        if results:
            comparison = compare(results, command)
            write_text(directory / RESULTS_FILE, comparison.model_dump_json(indent=2) + "\n")
            rewrite_report(directory)
        raise_failures(failures)
    return comparison


def read_comparison(output: str | Path) -> Comparison:
    """What `run_seeds` wrote into the folder `output`.

    Raises:
        CheckpointError: there is no comparison.
    """
    results = read_results(output)
    if not isinstance(results, Comparison):
        raise CheckpointError(f"{output} holds a run with one seed. Give the folder of one with several.")
    return results


def seed_results(output: str | Path) -> dict[int, RunResults]:
    """What each seed's run in the folder `output` of `run_seeds` measured, for further evaluation; by seed.

    Only the seeds of its last comparison.

    Raises:
        CheckpointError: there is no comparison.
    """
    directory, found = Path(output), {}
    for seed in read_comparison(output).seeds:
        results = read_results(seed_directory(directory, seed))
        assert isinstance(results, RunResults)  # a seed's run has one seed
        found[seed] = results
    return found


def _seeds(recipe: Recipe) -> list[int]:
    if recipe.seeds is None:
        raise ConfigError("seeds: the recipe has none. Give some, or run it with one seed by run_recipe.")
    return recipe.seeds


def _quietly(line: str) -> None:
    pass
