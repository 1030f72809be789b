"""Commands that train: recipes, their results and reports, and what the machine offers."""

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from auxin.cli.app import LARGEST_SEED, AsJson, Overrides, app
from auxin.cli.listed import ListedOptions, SetOptions
from auxin.cli.printing import number, print_line, print_table, to_stderr
from auxin.errors import AuxinError, ConfigError, placed

if TYPE_CHECKING:
    from auxin.accounting.comparison import Comparison


@app.command(
    cls=ListedOptions,
    epilog="Example: [bold]auxin run demo --output runs/demo[/]\n\n"
    "Over seeds: [bold]auxin run demo --seeds 0 1 2 --jobs 2[/]",
)
def run(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name or a YAML file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder; the same resumes. Default: runs/NAME[-seeds]."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="The recipe's seed; the same as --set seed=N.")
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option(metavar="N ...", help="Run with each of these, and compare over them.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Branches at a time, in processes of one thread each.")] = 1,
    branches: Annotated[
        list[str] | None, typer.Option(metavar="NAME ...", help="Only these, and what they need.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print stages, costs, memory and time, for which a few steps are timed; train nothing."
        ),
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: compute memory and time of so many GPUs.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Their kind: b200, h200, h100, a100, ...")] = "h100",
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train, change and compare its branches, and write a report. Resumes where it stopped."""
    from auxin.recipes import load_recipe, part_of, price_seeds, refuse_together, run_seeds, run_together
    from auxin.recipes.beforehand import check_devices, check_sources
    from auxin.training.ranks import speaks, started_together

    changes, given = list(overrides or []), _seeds(seeds)
    if seed is not None and given is not None:
        raise ConfigError(f"--seed {seed} and --seeds {_spaced(given)} contradict each other. Give one of them.")
    if given is not None:
        changes.append(f"seeds={given}")
    if seed is not None:
        changes.append(f"seed={seed}")
    loaded = load_recipe(recipe, changes)
    with placed("--branches: "):
        loaded.needed(branches)
    if seed is not None and loaded.seeds is not None:
        raise ConfigError(
            f"--seed {seed}: the recipe has seeds {loaded.seeds}. Give --seeds {seed}, or --set seeds=null for a run "
            "with one seed."
        )
    if gpus is not None:
        if not dry_run:
            raise ConfigError(
                f"--gpus {gpus} is for --dry-run. A run takes the GPUs of the processes that torchrun starts."
            )
        _print_shared(part_of(loaded, branches), gpus, gpu, as_json)
        return
    if dry_run:
        if not speaks():
            return
        from auxin.recipes.timing import Timer

        check_devices(loaded)
        check_sources(loaded)
        timer = Timer(threads=1 if loaded.seeds is not None or jobs > 1 else None)
        one = loaded.seeds is None
        price = timer.price(part_of(loaded, branches)) if one else price_seeds(loaded, branches, timer.price)
        _print_price(price, as_json)
        return
    arguments = ["auxin", "run", recipe]
    arguments += ["--seeds", *map(str, given)] if given is not None else []
    arguments += [part for change in changes if not change.startswith("seeds=[") for part in ("--set", change)]
    arguments += ["--jobs", str(jobs)] if jobs > 1 else []
    arguments += ["--branches", *branches] if branches else []
    how: dict[str, Any] = {"announce": to_stderr if as_json else print_line, "jobs": jobs, "branches": branches}
    if started_together():
        refuse_together(loaded, jobs)
    if loaded.seeds is None:
        directory = output or Path("runs") / loaded.name
        if (results := run_together(loaded, directory, shlex.join(arguments), **how)) is not None:
            _print_results(results, directory, as_json)
    else:
        directory = output or Path("runs") / f"{loaded.name}-seeds"
        _print_comparison(run_seeds(loaded, directory, shlex.join(arguments), **how), directory, as_json)


def _print_shared(recipe: Any, gpus: int, name: str, as_json: bool) -> None:
    from auxin.recipes.several_gpus import find_gpu, price_shared, shared_notes, shared_table

    gpu = find_gpu(name)
    prices = price_shared(recipe, gpus, gpu)
    if as_json:
        print(json.dumps([{**one.model_dump(), "seconds": one.seconds} for one in prices], indent=2))
        return
    header, *rows = shared_table(prices, gpu)
    print_table(header, rows, optional=5)
    print_line("\n".join(shared_notes(prices, gpus, gpu)))


def _print_price(price: Any, as_json: bool) -> None:
    """Of one run or of several seeds."""
    if as_json:
        print(price.model_dump_json(indent=2))
        return
    several = hasattr(price, "different")
    for heading, one in price.different() if several else [("", price)]:
        header, *rows = one.table()
        print(heading, end="")
        print_table(header, rows, optional=4)
        print_line("\n".join(one.notes()))
        if one.seconds is None and any(stage.kind == "train" for stage in one.stages):
            print_line("\nHow long that takes is not told: no train stage could be timed here within a few seconds.")
    if several:
        print_line("\n".join(price.notes()))


def _seeds(words: list[str] | None) -> list[int] | None:
    """The seeds of `--seeds 0 1 2` or `--seeds 0,1,2`; None where the option was not given."""
    if not words:
        return None
    seeds = []
    for word in ",".join(words).split(","):
        if not (word.isascii() and word.isdigit() and int(word) <= LARGEST_SEED):
            raise ConfigError(f"--seeds {_spaced(words)}: {word!r} is no whole number from 0 to {LARGEST_SEED}.")
        seeds.append(int(word))
    return seeds


def _spaced(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


@app.command(epilog="Example: [bold]auxin recipes[/]")
def recipes(as_json: AsJson = False) -> None:
    """List the built-in recipes."""
    from auxin.recipes import builtin_recipes

    found = builtin_recipes()
    if as_json:
        print(json.dumps({name: recipe.title for name, recipe in found.items()}, indent=2))
    else:
        print_table(["recipe", "what it does"], [[name, recipe.title] for name, recipe in found.items()])


@app.command(
    cls=SetOptions,
    epilog="Example: [bold]auxin train --model 124m --corpus texts/ --tokens 1000000 -o runs/first[/]\n\n"
    "Continue a checkpoint: [bold]auxin train --model runs/first/... --corpus texts/ --steps 500 -o runs/second[/]",
)
def train(
    model: Annotated[str, typer.Option(help="A preset (124m, ...), a checkpoint's folder or a config.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder; the same one resumes.")],
    corpus: Annotated[list[str] | None, typer.Option(help="Files, folders, globs; default: stdlib.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in optimizer steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens.")] = None,
    flops: Annotated[float | None, typer.Option(help="Budget in training FLOPs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    context_length: Annotated[int | None, typer.Option(help="Tokens per sequence; default: 512.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer to train, where none is given.")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer's folder; default: the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seeds weights and data order.")] = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a model on text. Further settings: --set training.warmup_steps=100 and so on, as in a recipe."""
    from auxin.models.loading import load_config
    from auxin.recipes import run_together, training_recipe

    if Path(model).is_dir():
        load_config(model)  # what is wrong with the folder is said before its tokenizer is missed
    command = shlex.join(["auxin", *sys.argv[1:]])
    with _in_options(context_length is not None):
        recipe = training_recipe(
            model,
            corpus={
                **({"source": "files", "paths": corpus} if corpus and corpus != ["stdlib"] else {"source": "stdlib"}),
                "context_length": context_length,
                "vocab_size": vocab_size,
                "tokenizer": tokenizer,
            },
            training={
                "steps": steps,
                "tokens": tokens,
                "flops": flops,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
            },
            seed=seed,
            overrides=overrides or [],
        )
        results = run_together(recipe, output, command, announce=to_stderr if as_json else print_line)
    if results is not None:
        _print_results(results, output, as_json)


_OPTIONS = {
    "data.context_length": "--context-length",
    "data.paths": "--corpus",
    "data.tokenizer": "--tokenizer",
    "data.vocab_size": "--vocab-size",
    "training.batch_size": "--batch-size",
    "training.flops": "--flops",
    "training.learning_rate": "--learning-rate",
    "training.steps": "--steps",
    "training.tokens": "--tokens",
    "main/build: ": "--model: ",
    "main/train: ": "",
}
"""What `auxin train` calls the places of the recipe that it makes."""


@contextlib.contextmanager
def _in_options(context_length_given: bool) -> Iterator[None]:
    """Within the context, errors name the options of `auxin train` and no places of a recipe, which nobody wrote."""
    names = dict(_OPTIONS)
    if not context_length_given:
        names["data.context_length"] += ", which was not given,"
    # A name within a longer one is another name.
    places = re.compile(r"(?<![\w./])(" + "|".join(map(re.escape, names)) + r")(?<!\w(?=\w|\.\w))")
    try:
        yield
    except AuxinError as error:
        error.args = (places.sub(lambda found: names[found[1]], str(error)), *error.args[1:])
        raise


@app.command(epilog="Example: [bold]auxin doctor --json[/]")
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, and what will be used of it."""
    from auxin.doctor import diagnose

    found = diagnose()
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    for title, values in (
        ("Machine", found.machine),
        ("Versions", found.versions),
        ("Will be used", found.used),
        ("Available", found.available),
    ):
        print_table([title, ""], [[name, value] for name, value in values.items()])
    for warning in found.warnings:
        print(f"Warning: {warning}")


@app.command(epilog="Example: [bold]auxin report runs/demo[/]")
def report(directory: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Write the HTML report and the chart of a run again, from its results.json."""
    from auxin.recipes import rewrite_report

    for path in rewrite_report(directory):
        print(path)


def _print_comparison(comparison: "Comparison", directory: Path, as_json: bool) -> None:
    from auxin.report.comparison import comparison_findings, comparison_rows, estimate_text, measure_words

    if as_json:
        print(comparison.model_dump_json(indent=2))
        return
    seeds = ", ".join(map(str, comparison.seeds))
    interval = ", 95 % intervals" if len(comparison.seeds) > 1 else ""
    print_line(f"\nMeans of seeds {seeds}{interval}; differences from the first row are taken seed by seed.\n")
    print_table(
        [
            "branch",
            measure_words(comparison.measure).replace("validation", "val."),
            "difference",
            *(other.name for other in comparison.other_measures),
            *("training FLOPs", "parameters"),
        ],
        [
            [
                *(row.branch.title, estimate_text(row.branch.value, 3)),
                "" if row.standing == "main" else estimate_text(row.branch.difference, 3, signed=True),
                *(estimate_text(row.branch.measures.get(other.kind), 3) for other in comparison.other_measures),
                *(f"{row.branch.flops:.2e}", f"{row.branch.parameters:,}"),
            ]
            for row in comparison_rows(comparison)
        ],
        optional=2,
    )
    for sentence in comparison_findings(comparison):
        print_line(sentence)
    print_line(f"\nReport: {(directory / 'report.html').resolve()}")


def _print_results(results: Any, directory: Path, as_json: bool) -> None:
    from auxin.report.curves import word_for
    from auxin.report.findings import findings

    if as_json:
        print(results.model_dump_json(indent=2))
        return
    measure = results.measure
    print()
    print_table(
        [
            *("branch", f"val. {measure.name}", *(other.name for other in results.other_measures)),
            *("training FLOPs", "parameters", f"{results.unit}s", "seconds"),
            *(("perplexity", "bits/byte") if measure.per_token else ()),
        ],
        [
            [
                *(branch.title, number(branch.value, 4)),
                *(number(branch.measures.get(other.kind), 4) for other in results.other_measures),
                *(f"{branch.flops:.3e}", f"{branch.parameters:,}"),
                *(f"{branch.units:,}", f"{branch.seconds:.0f}"),
                *((number(branch.perplexity, 3), number(branch.bits_per_byte, 4)) if measure.per_token else ()),
            ]
            for branch in results.branches
        ],
        optional=6 if measure.per_token else 4,
    )
    growths = [(branch, point) for branch in results.branches for point in branch.growths if branch.parent is None]
    if growths:
        print_table(
            [
                *(word_for(point for _, point in growths), "difference"),
                *(f"{measure.name} before", f"{measure.name} after", "parameters"),
            ],
            [
                [
                    f"{branch.name}/{point.stage}",
                    "-" if point.change is None else f"{point.change:+.1e}",
                    *(number(point.value_before, 6), number(point.value_after, 6)),
                    f"{point.parameters_before:,} -> {point.parameters_after:,}",
                ]
                for branch, point in growths
            ],
            optional=3,
        )
    for sentence in findings(results):
        print_line(sentence)
    print_line(f"\nReport: {(directory / 'report.html').resolve()}")
