"""Commands that train: recipes, their results and reports, and what the machine offers."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from auxin.cli.app import LARGEST_SEED, AsJson, Overrides, app, model_folder
from auxin.cli.printing import number, print_line, print_table, to_stderr
from auxin.errors import ConfigError


class _SeveralValues(TyperCommand):
    """A command whose options --seeds and --branches take all the words that follow: `--seeds 0 1 2`."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its words, as click wants it."""
        spelled: list[str] = []
        option: str | None = None
        for word in args:
            if word in SEVERAL:
                option = word
                continue
            if word.startswith("-"):
                option = None
            spelled += [option, word] if option is not None else [word]
        return super().parse_args(context, spelled)


SEVERAL = ("--seeds", "--branches")


@app.command(
    cls=_SeveralValues,
    epilog="Example: [bold]auxin run demo --output runs/demo[/]\n\n"
    "Over seeds: [bold]auxin run demo --seeds 0 1 2 --jobs 2[/]",
)
def run(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name or a YAML file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder; the same one resumes. Default: runs/NAME.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="The recipe's seed; the same as --set seed=N.")
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option(min=0, max=LARGEST_SEED, metavar="N ...", help="Run with each of these seeds and compare means."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Branches side by side, in processes of one thread each.")] = 1,
    branches: Annotated[
        list[str] | None, typer.Option(metavar="NAME ...", help="With seeds: only these branches, and what they need.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print stages, costs and memory; train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train, grow and compare its branches, and write a report. Resumes where it stopped."""
    from auxin.recipes import load_recipe, price_recipe, run_parallel, run_recipe, run_seeds

    if seed is not None and seeds:
        raise ConfigError(f"--seed {seed} and --seeds {seeds} contradict each other. Give one of them.")
    changes = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    loaded = load_recipe(recipe, changes)
    chosen = seeds or ([] if seed is not None else loaded.seeds)
    if branches and not chosen:
        raise ConfigError("--branches goes with --seeds. Give a seed too, for example --seeds 0.")
    if dry_run:
        price = price_recipe(loaded)
        print(price.model_dump_json(indent=2) if as_json else price)
        if chosen and not as_json:
            print(f"\nAll of it once for each of {len(chosen)} seeds: {', '.join(map(str, chosen))}.")
        return
    directory = output or Path("runs") / loaded.name
    announce = to_stderr if as_json else print_line
    arguments = ["auxin", "run", recipe, *(part for change in changes for part in ("--set", change))]
    arguments += ["--seeds", *map(str, chosen)] if chosen else []
    arguments += ["--branches", *branches] if branches else []
    command = shlex.join([*arguments, *(["--jobs", str(jobs)] if jobs > 1 else [])])
    if chosen:
        results = run_seeds(loaded, directory, command, seeds=chosen, jobs=jobs, branches=branches, announce=announce)
    elif jobs > 1:
        results = run_parallel(loaded, directory, command, jobs, announce)
    else:
        results = run_recipe(loaded, directory, command, announce=announce)
    _print_results(results, directory, as_json)


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
    epilog="Example: [bold]auxin train --model 124m --corpus texts/ --tokens 1000000 -o runs/first[/]\n\n"
    "Continue a checkpoint: [bold]auxin train --model runs/first/... --corpus texts/ --steps 500 -o runs/second[/]"
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
    context_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer to train, where none is given.")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer's folder; default: the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seeds weights and data order.")] = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a model on text. Further settings: --set training.warmup_steps=100 and so on, as in a recipe."""
    from auxin.models.loading import load_config
    from auxin.recipes import run_recipe, training_recipe

    if Path(model).is_dir():
        load_config(model_folder(Path(model)))  # what is wrong with the folder is said before its tokenizer is missed
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
    command = shlex.join(["auxin", *sys.argv[1:]])
    results = run_recipe(recipe, output, command, announce=to_stderr if as_json else print_line)
    _print_results(results, output, as_json)


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


def _print_results(results: Any, directory: Path, as_json: bool) -> None:
    from auxin.report import findings

    if as_json:
        print(results.model_dump_json(indent=2))
        return
    measure = results.measure
    print()
    print_table(
        [
            *("branch", "parameters", f"{results.unit}s", "training FLOPs", "seconds", f"val. {measure.name}"),
            *(("perplexity", "bits/byte") if measure.per_token else ()),
        ],
        [
            [
                *(branch.title, f"{branch.parameters:,}", f"{branch.units:,}", f"{branch.flops:.3e}"),
                *(f"{branch.seconds:.0f}", number(branch.value, 4)),
                *((number(branch.perplexity, 3), number(branch.bits_per_byte, 4)) if measure.per_token else ()),
            ]
            for branch in results.branches
        ],
    )
    growths = [(branch, point) for branch in results.branches for point in branch.growths if branch.parent is None]
    if growths:
        print_table(
            ["growth", "parameters", f"{measure.name} before", f"{measure.name} after", "change"],
            [
                [
                    *(f"{branch.name}/{point.stage}", f"{point.parameters_before:,} -> {point.parameters_after:,}"),
                    *(number(point.value_before, 6), number(point.value_after, 6)),
                    "-" if point.change is None else f"{point.change:+.1e}",
                ]
                for branch, point in growths
            ],
        )
    for sentence in findings(results):
        print(sentence)
    print(f"\nReport: {(directory / 'report.html').resolve()}")
