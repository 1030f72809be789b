"""What the benchmarks that compare a recipe's branches over seeds share: their options, and the run itself."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import both_machines, write_results
from scipy.stats import linregress, t

from auxin.accounting.comparison import BranchComparison, Comparison
from auxin.accounting.results import BranchResult
from auxin.accounting.statistics import Estimate, paired_difference
from auxin.recipes import Recipe, load_recipe, read_comparison, run_seeds, seed_results
from auxin.recipes.results import RESULTS_FILE
from auxin.report.comparison import estimate_text


def options(description: str | None, runs: Path | None) -> argparse.ArgumentParser:
    """The options of such a benchmark.

    Args:
        description: the benchmark's docstring.
        runs: the default folder of its runs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--branches", nargs="+", help="only these, and what they need")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--results", type=Path, help="where the numbers are written")
    parser.add_argument("--table", type=Path, help="where the table is written")
    parser.add_argument("--picture", type=Path, help="where the picture is written")
    parser.add_argument("--read-only", action="store_true", help="run nothing; write what the finished branches show")
    return parser


def command_of(arguments: argparse.Namespace, seeds: Iterable[int]) -> str:
    """What reproduces a run with `seeds`; a table or picture elsewhere, or more processes, change no number."""
    parts = ["--seeds", *map(str, seeds), *(part for change in arguments.set for part in ("--set", change))]
    if "parts" in arguments:
        parts += ["--parts", *arguments.parts]
    model = [arguments.model] if "model" in arguments else []
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parents[1])
    return shlex.join(["python", str(script), *model, *parts])


def chosen_recipe(name: str, arguments: argparse.Namespace) -> Recipe:
    """The recipe called `name`, with the seeds and changes that were asked for."""
    return load_recipe(name, [*arguments.set, f"seeds={arguments.seeds}"])


def compared(recipe: Recipe, arguments: argparse.Namespace) -> Comparison:
    """Run what is missing, unless only reading was asked for; what the finished branches show."""
    if arguments.read_only:
        return read_comparison(arguments.runs)
    command = command_of(arguments, arguments.seeds)
    return run_seeds(recipe, arguments.runs, command, jobs=arguments.jobs, branches=arguments.branches)


@dataclass(frozen=True)
class Part:
    """One of several comparisons of a benchmark: a recipe, and what is changed of it."""

    heading: str
    """On the page."""
    recipe: Path
    changes: tuple[str, ...] = ()
    branches: tuple[str, ...] | None = None
    """The branches to run; None: all."""

    def chosen(self, arguments: argparse.Namespace) -> Recipe:
        """The recipe with the seeds and changes that were asked for."""
        own = argparse.Namespace(**{**vars(arguments), "set": [*self.changes, *arguments.set]})
        return chosen_recipe(str(self.recipe), own)


Curves = dict[str, dict[int, dict[int, float]]]
"""By branch, seed and units of data trained on: the measure."""
Counts = dict[str, dict[int, dict[str, float]]]
"""By branch, seed and name: what a benchmark counted."""


class PartResults(Comparison):
    """What one part shows, and what was measured on the way."""

    on_the_way: Curves | None = None
    """None where the results don't hold it."""
    counted: Counts | None = None
    """None where the benchmark counts nothing."""


def compare_parts(
    parser: argparse.ArgumentParser,
    parts: Mapping[str, Part],
    page: Callable[[dict[str, PartResults]], str],
    on_the_way: Collection[str] = (),
    count: Callable[[BranchResult], dict[str, float]] | None = None,
) -> None:
    """Run what is missing of the parts that are asked for, then write the results and the page of all that were run.

    Args:
        parser: of `options`, with defaults for runs, results and table.
        parts: by name.
        page: the page of what was found, by part.
        on_the_way: the parts of which the results hold what was measured before the end, too.
        count: what else the results hold of every branch of a seed, by name; None: nothing.
    """
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep what the results hold of branches and seeds that the folder of runs has not: measured before, with "
        "the same software and data",
    )
    arguments = parser.parse_args()
    for name in arguments.parts:  # before the first is run
        parts[name].chosen(arguments).needed(arguments.branches or parts[name].branches)
    for name in [] if arguments.read_only else arguments.parts:
        own = {
            "runs": arguments.runs / name,
            "branches": arguments.branches or parts[name].branches,
            "parts": [name],
        }
        compared(parts[name].chosen(arguments), argparse.Namespace(**{**vars(arguments), **own}))
    # A part that was begun may have nothing finished.
    finished = [name for name in parts if (arguments.runs / name / RESULTS_FILE).is_file()]
    found = {name: read_part(arguments.runs / name, name in on_the_way, count) for name in finished}
    if arguments.add:
        for name, recorded in json.loads(arguments.results.read_text(encoding="utf-8")).items():
            own = argparse.Namespace(**{**vars(arguments), "parts": [name]})
            before = PartResults.model_validate(recorded)
            found[name] = added(found[name], before, own) if name in found else before
        found = {name: found[name] for name in parts if name in found}
    record = {}
    for name, results in found.items():
        empty = [field for field in ("on_the_way", "counted") if getattr(results, field) is None]
        left_out: dict[str, Any] = {"branches": {"__all__": {"curve"}}, **dict.fromkeys(empty, True)}
        record[name] = results.model_dump(mode="json", exclude=left_out)
    write_results(record, arguments.results, page(found), arguments.table)
    print(f"Written to {arguments.table} and {arguments.results}", file=sys.stderr)


def read_part(
    output: Path, has_curves: bool, count: Callable[[BranchResult], dict[str, float]] | None = None
) -> PartResults:
    """What the runs in a folder of `run_seeds` show, their curves where they are asked for, and what `count` finds."""
    curves: Curves = {}
    counted: Counts = {}
    for seed, results in seed_results(output).items() if has_curves or count is not None else ():
        for branch in results.branches:
            if has_curves:
                points = {point.units: point.value for point in branch.curve if point.value is not None}
                curves.setdefault(branch.name, {})[seed] = points
            if count is not None:
                counted.setdefault(branch.name, {})[seed] = count(branch)
    return PartResults(**dict(read_comparison(output)), on_the_way=curves or None, counted=counted or None)


def added(found: PartResults, recorded: PartResults, arguments: argparse.Namespace) -> PartResults:
    """`found` with the branches and seeds that only `recorded` has; what both have is as `found` has it.

    Raises:
        SystemExit: one was measured with other software or on other data, or a branch has changed.
    """
    for what, before, now in (
        ("software", recorded.versions, found.versions),
        ("data", recorded.data, found.data),
        ("measure", recorded.measure, found.measure),
    ):
        if before != now:
            raise SystemExit(f"The results are of other {what}: {before}, now {now}. Run all again, without --add.")
    known = {branch.name: branch for branch in recorded.branches}
    branches = {branch.name: _both(branch, known.pop(branch.name, branch)) for branch in found.branches} | known
    main = branches[found.main_branch].values if found.main_branch in branches else {}
    for name, branch in branches.items():
        difference = None if name == found.main_branch else paired_difference(branch.values, main)
        branches[name] = branch.model_copy(update={"difference": difference})
    seeds = sorted({seed for branch in branches.values() for seed in branch.seeds})
    machine = both_machines(found.machine, recorded.machine)
    changes: dict[str, Any] = {
        "branches": list(branches.values()),
        "seeds": seeds,
        "command": command_of(arguments, seeds),
    }
    for field in ("on_the_way", "counted"):
        if (held := getattr(recorded, field)) is not None:
            new = getattr(found, field) or {}
            changes[field] = {
                name: dict(sorted({**held.get(name, {}), **new.get(name, {})}.items())) for name in {**held, **new}
            }
    return found.model_copy(update={**changes, "machine": machine})


def _both(found: BranchComparison, recorded: BranchComparison) -> BranchComparison:
    """One branch, measured on some seeds now and on some before. What is no value by seed
    is left out, or stays that of now."""
    for field in ("title", "parameters", "parent"):
        if getattr(found, field) != getattr(recorded, field):
            raise SystemExit(
                f"The branch {found.name} is not that of the results: its {field} was {getattr(recorded, field)}, and "
                f"now is {getattr(found, field)}. Run it again on all seeds, without --add."
            )
    values = dict(sorted({**recorded.values, **found.values}.items()))
    if set(values) == set(found.values):
        return found
    changes = {"values": values, "seeds": list(values), "value": Estimate.of(values.values())}
    by_mean = {"measures": {}, "perplexity": None, "bits_per_byte": None, "growths": []}
    return found.model_copy(update={**changes, **by_mean})


def by_loss(comparison: Comparison) -> list[BranchComparison]:
    """The branches of a comparison, the best first; those without a loss last."""
    return sorted(comparison.branches, key=lambda branch: branch.value.mean if branch.value else float("inf"))


def fitted(points: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """The line through points by least squares: its slope, half of the 95 % interval of that (Student's t), and its
    height at 0."""
    points = list(points)
    fit = linregress(*zip(*points, strict=True))
    return fit.slope, float(t.ppf(0.975, len(points) - 2)) * fit.stderr, fit.intercept


def interval(values: Iterable[float | None], signed: bool = False) -> str:
    """Mean and 95 % interval as a table has them; a dash where there is none."""
    found = Estimate.of(values)
    return "-" if found is None else found.text(3, signed)


def signed(difference: float) -> str:
    """As the tables write one."""
    return estimate_text(Estimate.of([difference]), 3, signed=True)


def curve_since(result: BranchResult, stages: set[str]) -> list[tuple[float, float]]:
    """(FLOPs, held-out loss) of the measurements in `stages`, in order."""
    return [(point.flops, point.value) for point in result.curve if point.value is not None and point.stage in stages]
