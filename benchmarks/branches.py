"""Runs the branches of a recipe over several seeds in parallel processes, for the benchmarks that compare branches.

Each seed has a run folder of its own, in which finished stages are not done again and stopped ones go on.
"""

import argparse
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from auxin.accounting import Ledger
from auxin.accounting.ledger import software_versions
from auxin.accounting.machine import describe_machine
from auxin.accounting.results import BranchResult
from auxin.models.loading import load_config
from auxin.recipes import Recipe
from auxin.recipes.folder import DATA, OUTCOME_FILE, claim_directory, left_checkpoint, stage_directory
from auxin.recipes.results import Course, branch_result
from auxin.recipes.runner import Run, open_run, run_branch
from auxin.recipes.schema import Branch

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantile of Student's distribution by degrees of freedom."""

MakeRecipe = Callable[[int], Recipe]
"""(seed) -> recipe; a module-level function, so that other processes can call it."""


def command_line(description: str | None, runs: Path, results: Path, table: Path, picture: Path) -> argparse.Namespace:
    """The options of a benchmark that runs branches of a recipe over seeds.

    Args:
        description: the benchmark's docstring.
        runs: folder of its runs.
        results: where its numbers are written.
        table: where its table is written.
        picture: where its picture is written.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--branches", nargs="+", help="only these, and what they need")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--table", type=Path, default=table)
    parser.add_argument("--picture", type=Path, default=picture)
    parser.add_argument("--read-only", action="store_true", help="run nothing; write what the finished branches show")
    return parser.parse_args()


def seed_folder(runs: Path, seed: int) -> Path:
    """The run folder of one seed."""
    return runs / f"seed-{seed}"


def depends_on(branch: Branch) -> set[str]:
    """The branches that have to be finished before `branch`."""
    named = [getattr(stage, field, None) for stage in branch.stages for field in ("flops_of", "like", "parameters_of")]
    return {*filter(None, named), *([branch.fork.partition("/")[0]] if branch.fork else [])}


def with_ancestors(recipe: Recipe, wanted: Iterable[str] | None) -> list[str]:
    """The names of the `wanted` branches (None: all) and of those that they need, in the recipe's order."""
    needed = {branch.name: depends_on(branch) for branch in recipe.branches}
    chosen = set(needed if wanted is None else wanted)
    if unknown := chosen - set(needed):
        raise SystemExit(f"no such branch: {', '.join(sorted(unknown))}. There are: {', '.join(needed)}")
    while more := {name for branch in chosen for name in needed[branch]} - chosen:
        chosen |= more
    return [name for name in needed if name in chosen]


def run_all(make: MakeRecipe, seeds: Sequence[int], runs: Path, wanted: Iterable[str] | None, jobs: int) -> None:
    """Run the `wanted` branches of every seed's recipe, `jobs` at a time, each in a process of one thread."""
    recipes = {seed: make(seed) for seed in seeds}
    torch.set_num_threads(1)
    for seed in seeds:
        folder, first = seed_folder(runs, seed), seed_folder(runs, seeds[0])
        claim_directory(recipes[seed], folder, print)
        if not (folder / DATA).exists() and (first / DATA).exists():
            shutil.copytree(first / DATA, folder / DATA)
        _open(make, seed, runs)
    waiting = [
        (seed, name)
        for seed in seeds
        for name in with_ancestors(recipes[seed], wanted)
        if not is_finished(recipes[seed], seed_folder(runs, seed), name)
    ]
    total, failed = len(waiting), []
    branches = {(seed, branch.name): branch for seed in seeds for branch in recipes[seed].branches}
    running: dict[Future[float], tuple[int, str]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            open_cells = {*waiting, *running.values(), *failed}
            for cell in [*waiting]:
                seed, name = cell
                if len(running) < jobs and not open_cells & {(seed, other) for other in depends_on(branches[cell])}:
                    running[pool.submit(_run_one, make, seed, runs, name)] = cell
                    waiting.remove(cell)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                seed, name = running.pop(future)
                if error := future.exception():
                    failed.append((seed, name))
                    print(f"seed {seed}, {name}: FAILED: {type(error).__name__}: {error}", flush=True)
                else:
                    done = total - len(waiting) - len(running)
                    print(f"seed {seed}, {name}: {future.result():.0f} s ({done} of {total})", flush=True)


def is_finished(recipe: Recipe, folder: Path, name: str) -> bool:
    """Whether every stage of the branch is done."""
    branch = next(branch for branch in recipe.branches if branch.name == name)
    return (stage_directory(folder, branch, branch.stages[-1]) / OUTCOME_FILE).exists()


def results_of(recipe: Recipe, folder: Path) -> dict[str, BranchResult]:
    """What the finished branches of one run measured, by name, in the recipe's order."""
    run = open_run(recipe, folder, announce=lambda line: None)
    courses: dict[str, Course] = {}
    measure = recipe.measures[0]
    results: dict[str, BranchResult] = {}
    for branch in recipe.branches:
        if is_finished(recipe, folder, branch.name):
            checkpoint = left_checkpoint(folder, branch, branch.stages[-1])
            objective = recipe.objective.bind(load_config(checkpoint), run.data.form)
            results[branch.name] = branch_result(
                branch, Ledger.load(checkpoint), folder, run.data, courses, measure, objective
            )
    return results


def curve_since(result: BranchResult, stages: set[str]) -> list[tuple[float, float]]:
    """(FLOPs, held-out loss) of the measurements in `stages`, in order."""
    return [(point.flops, point.value) for point in result.curve if point.value is not None and point.stage in stages]


def interval(values: Sequence[float], digits: int = 3, sign: bool = False) -> str:
    """Mean and 95 % interval of Student's t."""
    if not values or not all(map(math.isfinite, values)):
        return "-"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def where(command: str, seeds: Sequence[int]) -> str:
    """Command, seeds, machine and versions, as a line under a table's title."""
    machine, versions = describe_machine(), software_versions()
    return (
        f"Command: `{command}`. Seeds: {', '.join(map(str, seeds))}. Machine: {machine['processor']}, "
        f"{machine['cores']} cores, one thread per branch. Versions: "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    )


@cache
def _open(make: MakeRecipe, seed: int, runs: Path) -> Run:
    return open_run(make(seed), seed_folder(runs, seed), announce=lambda line: None)


def _run_one(make: MakeRecipe, seed: int, runs: Path, name: str) -> float:
    torch.set_num_threads(1)
    started = time.perf_counter()
    run = _open(make, seed, runs)
    run_branch(run, next(branch for branch in run.recipe.branches if branch.name == name))
    return time.perf_counter() - started
