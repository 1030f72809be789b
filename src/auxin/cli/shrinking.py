"""The command that chooses how a model becomes smaller."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from auxin.cli.app import LARGEST_SEED, AsJson, Overrides, app
from auxin.cli.listed import ListedOptions
from auxin.cli.printing import escaped, print_line, print_table, print_wide, to_stderr


@app.command(
    cls=ListedOptions,
    epilog="Example: [bold]auxin shrink CKPT --target 0.7 --budget 200000 -o smaller[/]\n\n"
    "Fewer things to try: [bold]auxin shrink CKPT --target 0.7 --methods taylor greenformers --trials 8 -o smaller[/]",
)
def shrink(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint's folder.")],
    target: Annotated[float, typer.Option(help="How much may be left: a share below 1, or the number itself.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder; the same resumes.")],
    of: Annotated[
        Literal["parameters", "flops", "memory", "latency", "latency_ms"],
        typer.Option(help="What the target is a share or number of: latency is measured on this machine."),
    ] = "parameters",
    budget: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Mend the chosen model on so many tokens (classifiers: texts, images)."),
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(metavar="NAME ...", help="Try these; default: a dozen that are quick.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Ways to try. Default: 32.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Begin no trial after so many minutes; default: no limit.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the search, samples and data.")] = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make a model smaller in the best of many ways: methods and combinations of them are tried, one is chosen,
    mended, and measured on text that nothing looked at.

    Further settings: --set samples=64, --set data.paths=TEXTS, --set training.learning_rate=3e-4, --set
    target.sequence_length=512 and so on.
    """
    from auxin.recipes.library import apply_override
    from auxin.shrinking import ShrinkSettings
    from auxin.shrinking import shrink as find_and_do

    given: dict[str, Any] = {"budget": budget, "methods": methods, "trials": trials, "minutes": minutes, "seed": seed}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    values |= {"model": str(model), "target": {of: target}}
    for change in overrides or []:
        apply_override(values, change)
    settings = ShrinkSettings.parse(values)
    arguments = ["auxin", "shrink", str(model), "--target", repr(target), "--of", of]
    for name, value in (("budget", budget), ("trials", trials), ("minutes", minutes), ("seed", seed or None)):
        arguments += [f"--{name}", str(value)] if value is not None else []
    arguments += ["--methods", *methods] if methods else []
    arguments += [part for change in overrides or [] for part in ("--set", change)]
    command = shlex.join([*arguments, "-o", str(output)])
    outcome = find_and_do(settings, output, command, announce=to_stderr if as_json else print_line)
    if as_json:
        print(outcome.model_dump_json(indent=2))
        return
    rows = [
        [escaped(found.title), f"{found.parameters:,}", f"{found.loss:.4f}"]
        for found in (outcome.whole, outcome.chosen, outcome.single)
        if found is not None
    ]
    print()
    print_table(["model", "parameters", "held-out loss"], rows, words=True)
    print()
    print_wide(f"Chosen: {escaped(outcome.chosen.title)}. {escaped(outcome.verdict)}")
    print(f"Written to {output}: shrink.md, front.svg, report.html, and the model in {output / 'model'}")
