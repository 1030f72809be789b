"""Commands that change the size of a model: methods, plans, what they make of a checkpoint, and differences."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from auxin.cli.app import LARGEST_SEED, AsJson, Checkpoint, Output, Overrides, app, refuse_swapped
from auxin.cli.listed import SetOptions
from auxin.cli.printing import print_list, print_table, to_stderr
from auxin.errors import ConfigError


@app.command(epilog="Example: [bold]auxin grow runs/demo/.../checkpoint --to 757m -o grown[/]")
def grow(
    checkpoint: Checkpoint,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the grown checkpoint.")] = None,
    to: Annotated[str | None, typer.Option(metavar="PRESET", help="A preset to grow to.")] = None,
    qkv_tokens: Annotated[int | None, typer.Option(help="Tokens of query, key and value each, after growth.")] = None,
    proj_tokens: Annotated[int | None, typer.Option(help="Tokens of the output projection, after growth.")] = None,
    ffn_tokens: Annotated[int | None, typer.Option(help="Tokens of the feed-forward part, after growth.")] = None,
    regime: Annotated[str, typer.Option(help="Rule for the new tokens; see docs/tokenformer.md.")] = "grouped",
    keys: Annotated[str | None, typer.Option(help="Instead of the regime's rule for new keys.")] = None,
    values: Annotated[str | None, typer.Option(help="Instead of the regime's rule for new values.")] = None,
    scale: Annotated[str | None, typer.Option(help="Instead of the regime's scale of the scores.")] = None,
    noise: Annotated[float, typer.Option(help="On copied values, relative; keeps their sum.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seeds the new tokens.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Grow a TokenFormer by appending parameter tokens; its optimizer's moments follow.

    What the settings mean: `auxin methods tokenformer`.
    """
    from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth, token_growth_to
    from auxin.models.loading import load_config
    from auxin.recipes.change import change_checkpoint

    config: Any = load_config(checkpoint)
    counts = {"qkv_tokens": qkv_tokens, "proj_tokens": proj_tokens, "ffn_tokens": ffn_tokens}
    uncounted = all(count is None for count in counts.values())
    if (to is None) == uncounted and not (uncounted and regime == "padding"):
        raise ConfigError("Give either --to PRESET or token counts (--qkv-tokens, --proj-tokens, --ffn-tokens).")
    rules = {"regime": regime, "keys": keys, "values": values, "scale": scale, "noise": noise, "seed": seed}
    settings = TokenGrowth.parse({**counts, **rules}) if to is None else token_growth_to(config, to, **rules)
    plan = plan_token_growth(config, settings)
    if dry_run:
        print(plan.model_dump_json(indent=2) if as_json else plan)
        return
    if output is None:
        raise ConfigError("--output: give the folder of the grown checkpoint, or --dry-run to see the plan only.")
    receipt = change_checkpoint(plan, checkpoint, output)
    _print_receipt(receipt, output, as_json, str(receipt.plan))


@app.command(epilog="Example: [bold]auxin methods[/]\n\nOne of them: [bold]auxin methods tokenformer[/]")
def methods(
    name: Annotated[str | None, typer.Argument(help="A method: print its settings.")] = None, as_json: AsJson = False
) -> None:
    """List the methods that change a model, those of installed plugins too, by what they are for; or what one promises,
    and its settings."""
    from auxin.methods import method, methods

    if name is None:
        found = methods()
        if as_json:
            print(json.dumps({key: _described(item) for key, item in found.items()}, indent=2))
            return
        longest = max(len(key) for key in found)
        for intent, purpose in _PURPOSES.items():
            named = [(f"  {key:<{longest}}", item.title) for key, item in found.items() if item.intent == intent]
            if named:
                print(f"{intent}: {purpose}")
                print_list(named)
                print()
        print("auxin methods NAME says what one of them promises, and its settings.")
        return
    item = method(name)
    if as_json:
        print(json.dumps(_described(item), indent=2))
        return
    print(f"{item.name}: {item.title}.\nSource: {item.paper}. Promise: {item.promise or 'see the plan'}.\n")
    rows = [[field["name"], field["default"], field["meaning"]] for field in _described(item)["settings"]]
    print_table(["setting", "default", "meaning"], rows, words=True)


@app.command(
    cls=SetOptions,
    epilog="Example: [bold]auxin plan CKPT tokenformer --set ffn_tokens=1024 -o plan.yaml[/]\n\n"
    "Then: [bold]auxin apply CKPT plan.yaml -o grown[/]",
)
def plan(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint's folder, or a config.json.")],
    method: Annotated[str, typer.Argument(metavar="METHOD", help="One of `auxin methods`.")],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What a method that looks at data sees: samples, length, batch_size, seed, corpus.paths=TEXTS and so "
            "on. Default: as much as it asks for, of the standard library's source in the model's own tokens.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="YAML file for the plan.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a method would do to a model: every edit, parameters and FLOPs before and after, and what is promised."""
    from auxin.methods import method as find_method
    from auxin.methods import methods
    from auxin.planning.method import plan_for
    from auxin.recipes.library import apply_override

    known = methods()
    refuse_swapped(method not in known and str(model) in known, "plan", model, method)
    values: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    for change in overrides or []:
        apply_override(values, change)
    for change in data or []:
        apply_override(seen, change, "--data")
    if output is not None and output.is_dir():
        raise ConfigError(f"--output: {output} is a folder. Give the plan's file: -o {output / 'plan.yaml'}.")
    # What belongs to a plan lies beside it.
    made = plan_for(find_method(method), model, values, seen, Path() if output is None else output.parent)
    if output is not None:
        made.to_yaml(output)
    print(made.model_dump_json(indent=2) if as_json else made)
    if output is not None and not as_json:
        print(f"\nWritten to {output}")


@app.command(epilog="Example: [bold]auxin apply CKPT plan.yaml -o grown[/]")
def apply(
    checkpoint: Checkpoint,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's YAML file, of `auxin plan` or your own.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Apply a plan to a checkpoint, tensor by tensor; its optimizer's moments follow, its books are kept."""
    from auxin.edits import Plan
    from auxin.recipes.change import change_checkpoint

    refuse_swapped(checkpoint.is_file() and plan.is_dir(), "apply", checkpoint, plan)
    receipt = change_checkpoint(Plan.from_yaml(plan), checkpoint, output)
    _print_receipt(receipt, output, as_json, receipt.plan.summary())


@app.command(epilog="Example: [bold]auxin diff CKPT grown[/]\n\nTwo plans: [bold]auxin diff plan.yaml other.yaml[/]")
def diff(
    old: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint's folder, or a plan's YAML file.")],
    new: Annotated[Path, typer.Argument(metavar="B", help="The other one, of the same kind.")],
    as_json: AsJson = False,
) -> None:
    """What differs between two checkpoints (config, shapes, values) or between two plans (edits)."""
    from auxin.edits import Plan
    from auxin.edits.diff import diff_checkpoints, diff_plans

    if old.is_dir() != new.is_dir():
        raise ConfigError(f"{old} and {new} can't be compared. Give two checkpoint folders, or two plans' YAML files.")
    if old.is_dir():
        found: Any = diff_checkpoints(old, new)
    else:
        found = diff_plans(Plan.from_yaml(old), Plan.from_yaml(new))
    if as_json:
        print(found.model_dump_json(indent=2))
    elif rows := found.rows():
        print_table(["what", "name", "A", "B"], rows, words=True)
    else:
        print("No difference.")


_PURPOSES = {
    "grow": "a larger model",
    "prune": "a smaller model, of some of its parts",
    "factorize": "a smaller model, of products of smaller matrices",
    "moe": "a model of experts",
    "quantize": "shorter numbers",
    "restructure": "other layers",
    "adapt": "few new parameters beside the old ones",
}
"""What methods are for."""


def _described(method: Any) -> dict[str, Any]:
    """A method as JSON."""
    fields = [
        {
            "name": name,
            "default": "required"
            if field.is_required()
            else json.dumps(field.get_default(call_default_factory=True), default=str),
            "meaning": _meaning(field),
        }
        for name, field in method.settings.model_fields.items()
    ]
    return {
        **{key: getattr(method, key) for key in ("name", "title", "paper", "intent", "promise", "needs_weights")},
        "settings": fields,
    }


def _meaning(field: Any) -> str:
    """What the docstring of a setting says, in the words of `--set`, and the choices that it does not name."""
    text = re.sub(r"\bNone\b", "null", " ".join((field.description or "").split()))
    choices = [str(choice) for choice in _choices(field.annotation)]
    named = all(re.search(rf"\b{re.escape(choice)}\b", text) for choice in choices)
    return text if named else f"{text} One of: {', '.join(choices)}."


def _choices(annotation: Any) -> list[Any]:
    """The values of a Literal, also where there may be null or a list of them."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(inner)
    return [choice for part in inner for choice in _choices(part)]


def _print_receipt(receipt: Any, output: Path, as_json: bool, done: str) -> None:
    from auxin.edits.runtimes import about_runtimes
    from auxin.models.loading import load_config
    from auxin.models.weight_files import first_file

    weights = first_file(output)
    assert weights is not None  # they were written
    note = about_runtimes(load_config(output), weights.name)
    if as_json:
        print(receipt.model_dump_json(indent=2))
        to_stderr(note)
        return
    print(f"{done}\n\n{receipt}\nWritten to {output}\n{note}")
