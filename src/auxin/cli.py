"""The command line: reads arguments, calls the library, prints what it returns."""

import json
import math
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from auxin.errors import AuxinError, CheckpointError, ConfigError

# The library is imported inside the commands: torch and transformers take seconds that `--help` need not wait for.

app = typer.Typer(
    name="auxin",
    help="Change the size of a transformer without starting over: grow it, prove what was preserved, keep the books.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not hold something else.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; repeatable.")
]
LARGEST_SEED = 2**63 - 1
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Folder of a checkpoint.")]


def main() -> None:
    """Entry point: an error of the user's is one message and an exit code, never a traceback (unless AUXIN_DEBUG=1)."""
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                app()
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be dealt with, and not when the interpreter ends
    except BrokenPipeError:
        # The reader of a pipe went away (`auxin show ... | head`): no more output is wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (AuxinError, OSError) as error:
        if os.environ.get("AUXIN_DEBUG"):
            raise
        Console(stderr=True, highlight=False).print(f"[bold red]auxin:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code if isinstance(error, AuxinError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        import importlib.metadata

        print(importlib.metadata.version("auxin"))
        raise typer.Exit


@app.command(epilog="Example: [bold]auxin run demo --output runs/demo[/]")
def run(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name or a YAML file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder; the same one resumes. Default: runs/NAME.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="The recipe's seed; the same as --set seed=N.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print stages, costs and memory; train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train, grow and compare its branches, and write a report. Resumes where it stopped."""
    from auxin.recipes import load_recipe, price_recipe, run_recipe

    changes = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    loaded = load_recipe(recipe, changes)
    if dry_run:
        price = price_recipe(loaded)
        print(price.model_dump_json(indent=2) if as_json else price)
        return
    directory = output or Path("runs") / loaded.name
    arguments = ["auxin", "run", recipe, *(part for change in changes for part in ("--set", change))]
    results = run_recipe(loaded, directory, shlex.join(arguments), announce=_to_stderr if as_json else _print_line)
    _print_results(results, directory, as_json)


@app.command(epilog="Example: [bold]auxin recipes[/]")
def recipes(as_json: AsJson = False) -> None:
    """List the built-in recipes."""
    from auxin.recipes import builtin_recipes

    found = builtin_recipes()
    if as_json:
        print(json.dumps({name: recipe.title for name, recipe in found.items()}, indent=2))
    else:
        _print_table(["recipe", "what it does"], [[name, recipe.title] for name, recipe in found.items()])


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
        load_config(_model_folder(Path(model)))  # what is wrong with the folder is said before its tokenizer is missed
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
    results = run_recipe(recipe, output, command, announce=_to_stderr if as_json else _print_line)
    _print_results(results, output, as_json)


@app.command(epilog="Example: [bold]auxin grow runs/demo/.../checkpoint --to 757m -o grown[/]")
def grow(
    checkpoint: Checkpoint,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the grown checkpoint.")] = None,
    to: Annotated[str | None, typer.Option(metavar="PRESET", help="A preset to grow to.")] = None,
    qkv_tokens: Annotated[int | None, typer.Option(help="Tokens of query, key and value each, after growth.")] = None,
    proj_tokens: Annotated[int | None, typer.Option(help="Tokens of the output projection, after growth.")] = None,
    ffn_tokens: Annotated[int | None, typer.Option(help="Tokens of the feed-forward part, after growth.")] = None,
    regime: Annotated[str, typer.Option(help="Rule for the new tokens; see docs/tokenformer.md.")] = "grouped",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seeds the new tokens.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Grow a TokenFormer by appending parameter tokens; its optimizer's moments follow."""
    from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth, token_growth_to
    from auxin.models.loading import load_config
    from auxin.recipes.growth import grow_checkpoint

    config: Any = load_config(_model_folder(checkpoint))
    counts = {"qkv_tokens": qkv_tokens, "proj_tokens": proj_tokens, "ffn_tokens": ffn_tokens}
    if (to is None) == all(count is None for count in counts.values()):
        raise ConfigError("Give either --to PRESET or token counts (--qkv-tokens, --proj-tokens, --ffn-tokens).")
    if to is not None:
        settings = token_growth_to(config, to, regime=regime, seed=seed)
    else:
        settings = TokenGrowth.parse({**counts, "regime": regime, "seed": seed})
    plan = plan_token_growth(config, settings)
    if dry_run:
        print(plan.model_dump_json(indent=2) if as_json else plan)
        return
    if output is None:
        raise ConfigError("--output: give the folder of the grown checkpoint, or --dry-run to see the plan only.")
    receipt = grow_checkpoint(plan, checkpoint, output)
    if as_json:
        print(receipt.model_dump_json(indent=2))
        return
    print(plan)
    print(
        f"\n{receipt.parameters_before:,} -> {receipt.parameters_after:,} parameters in {receipt.seconds:.1f} s. "
        f"Promise {plan.promise!r}: the probe's logits moved by {receipt.max_relative_change:.1e} relative "
        f"(allowed for an exact plan: {receipt.tolerance:.0e}).\nWritten to {output}"
    )


@app.command(
    epilog="Example: [bold]auxin convert TokenFormer-150M/pytorch_model.bin -o tokenformer-150m[/]\n\n"
    "Back: [bold]auxin convert tokenformer-150m --to-official -o pytorch_model.bin[/]"
)
def convert(
    source: Annotated[Path, typer.Argument(help="An official file or folder; with --to-official, one of ours.")],
    output: Output,
    to_official: Annotated[
        bool, typer.Option("--to-official", help="Write the official format instead of reading it.")
    ] = False,
    num_attention_heads: Annotated[int | None, typer.Option(help="Where no released model has these sizes.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder whose tokenizer files are copied along.")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert an official TokenFormer checkpoint to a Hugging Face folder, or back; judged by logits."""
    from auxin.models.tokenformer.official import export_official, import_official

    if to_official:
        report = export_official(_model_folder(source), output)
    else:
        report = import_official(source, output, num_attention_heads=num_attention_heads, tokenizer_dir=tokenizer)
    if as_json:
        print(report.model_dump_json(indent=2))
        return
    print(f"{report.parameters:,} parameters; logits differ by {report.max_relative_difference:.1e} relative.")
    for title, keys in (("Unused keys", report.unused_keys), ("Repeated, left out", report.missing_keys)):
        if keys:
            print(f"{title}: {', '.join(keys)}")
    for note in report.notes:
        print(note)
    print(f"Written to {output}")


@app.command(epilog='Example: [bold]auxin generate CKPT "import os" --max-new-tokens 40[/]')
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to write, at most; default: 64, or what the model's positions allow.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    from auxin.evaluation import generate_text

    model, tokenizer = _load(checkpoint)
    text = generate_text(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed)
    print(json.dumps({"prompt": prompt, "continuation": text}) if as_json else prompt + text)


@app.command(
    epilog="Example: [bold]auxin evaluate CKPT --text notes.txt --stride 64[/]\n\n"
    "Held-out split of a run: [bold]auxin evaluate CKPT --corpus runs/demo/data[/]"
)
def evaluate(
    checkpoint: Checkpoint,
    text: Annotated[list[Path] | None, typer.Option(help="A UTF-8 text file to score; repeatable.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="A prepared corpus (the data/ folder of a run): score its held-out split.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Window in tokens, of texts; default: the model's, at most 1024.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: half the window.")] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity and bits per byte of a model on texts, with a strided window, or on a run's held-out split."""
    from pydantic import TypeAdapter

    from auxin.data import PackedData
    from auxin.evaluation import Perplexity
    from auxin.evaluation.corpus import score_held_out
    from auxin.evaluation.files import score_files

    if not text and corpus is None:
        raise ConfigError("Nothing to score. Give --text FILE or --corpus FOLDER.")
    model, tokenizer = _load(checkpoint)
    scores = {str(corpus): score_held_out(model, tokenizer, PackedData.load(corpus))} if corpus else {}
    scores |= score_files(model, tokenizer, text or [], context_length, stride)
    if as_json:
        # Not the json module: it writes NaN and Infinity, which are no JSON.
        print(TypeAdapter(dict[str, Perplexity]).dump_json(scores, indent=2).decode())
        return
    header = ["text", "tokens", "nats/token", "perplexity", "bits/byte"]
    _print_table(
        header,
        [
            [path, f"{s.tokens:,}", f"{s.nats_per_token:.4f}", f"{s.perplexity:.3f}", f"{s.bits_per_byte:.4f}"]
            for path, s in scores.items()
        ],
    )


@app.command(epilog="Example: [bold]auxin show runs/demo/branches/grown/06-final/checkpoints/step-00000350[/]")
def show(
    checkpoint: Checkpoint,
    corpus: Annotated[
        Path | None, typer.Option(help="A prepared corpus (the data/ folder of a run): score the nested models on it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint is: structure, token groups, costs, and the lineage with what each stage cost."""
    from auxin.data import PackedData
    from auxin.evaluation.inspection import describe_checkpoint

    found = describe_checkpoint(_model_folder(checkpoint), None if corpus is None else PackedData.load(corpus))
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    print(
        f"{found.model_type}: {found.num_hidden_layers} layers, hidden size {found.hidden_size}, "
        f"{found.num_attention_heads} heads, vocabulary {found.vocab_size:,}\n"
        f"{found.parameters.total:,} parameters, {found.parameters.non_embedding:,} without embeddings; "
        f"{found.flops_per_token:.4g} FLOPs per token forward at {found.sequence_length} tokens"
    )
    if found.token_groups:
        rows = [
            [g.slot, f"{sum(g.sizes):,}", " + ".join(map(str, g.sizes)), ", ".join(f"{tau:.4g}" for tau in g.tau)]
            for g in found.token_groups
        ]
        _print_table(["parameter tokens", "total", "groups", "tau"], rows)
    if len(found.nested) > 1:
        rows = [[f"first {n.num_groups}", f"{n.parameters:,}", _number(n.validation_loss, 4)] for n in found.nested]
        _print_table(["nested models (truncate_groups, no promise)", "parameters", "validation loss"], rows)
    if found.ledger is not None:
        _print_lineage(found.ledger)


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
        _print_table([title, ""], [[name, value] for name, value in values.items()])
    for warning in found.warnings:
        print(f"Warning: {warning}")


@app.command(epilog="Example: [bold]auxin report runs/demo[/]")
def report(directory: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Write the HTML report and the chart of a run again, from its results.json."""
    from auxin.recipes import rewrite_report

    for path in rewrite_report(directory):
        print(path)


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """The model of a checkpoint, on the device that training would use, and its tokenizer."""
    from auxin import models  # noqa: F401 - registers the architectures
    from auxin.data.tokenizer import load_tokenizer
    from auxin.training import load_model
    from auxin.training.hardware import choose_device

    return load_model(_model_folder(checkpoint), device=choose_device("auto")), load_tokenizer(checkpoint)


def _model_folder(folder: Path) -> Path:
    """`folder`; where it is the folder of a run (or of a stage), an error that names the checkpoints in it."""
    marks = ("recipe.yaml", "branches", "checkpoints", "checkpoint")
    if (folder / "config.json").is_file() or not any((folder / mark).exists() for mark in marks):
        return folder
    configs = sorted(path for path in folder.rglob("config.json") if not path.parent.name.startswith("."))
    # The last of each stage: names of checkpoints sort by step.
    newest = {path.parent.parent: path.parent for path in configs}
    if not newest:
        raise CheckpointError(f"{folder} is the folder of a run, which has saved no checkpoint yet.")
    raise CheckpointError(
        f"{folder} is the folder of a run, not of a checkpoint. Give one of those in it: "
        + ", ".join(map(str, newest.values()))
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of the package's own is for whoever runs the command: one line, without the place in the code."""
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parent):
        _to_stderr(f"auxin: warning: {message}")
    else:
        _to_stderr(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"))


def _print_results(results: Any, directory: Path, as_json: bool) -> None:
    from auxin.report import findings

    if as_json:
        print(results.model_dump_json(indent=2))
        return
    print()
    _print_table(
        ["branch", "parameters", "tokens", "training FLOPs", "seconds", "val. loss", "perplexity", "bits/byte"],
        [
            [
                *(branch.title, f"{branch.parameters:,}", f"{branch.tokens:,}", f"{branch.flops:.3e}"),
                *(f"{branch.seconds:.0f}", _number(branch.validation_loss, 4)),
                *(_number(branch.perplexity, 3), _number(branch.bits_per_byte, 4)),
            ]
            for branch in results.branches
        ],
    )
    growths = [(branch, point) for branch in results.branches for point in branch.growths if branch.parent is None]
    if growths:
        _print_table(
            ["growth", "parameters", "loss before", "loss after", "change"],
            [
                [
                    *(f"{branch.name}/{point.stage}", f"{point.parameters_before:,} -> {point.parameters_after:,}"),
                    *(_number(point.loss_before, 6), _number(point.loss_after, 6)),
                    "-" if point.change is None else f"{point.change:+.1e}",
                ]
                for branch, point in growths
            ],
        )
    for sentence in findings(results):
        print(sentence)
    print(f"\nReport: {(directory / 'report.html').resolve()}")


def _print_lineage(ledger: Any) -> None:
    tree = Tree("[bold]lineage[/]", guide_style="dim")
    node = tree
    for stage in ledger.stages:
        costs = [f"{stage.parameters:,} parameters"]
        if stage.tokens:
            costs.append(f"{stage.tokens:,} tokens, {stage.flops:.3g} FLOPs")
        costs.append(f"{stage.seconds:.1f} s")
        if stage.loss_after is not None:
            before = "" if stage.loss_before is None else f"{stage.loss_before:.4f} -> "
            costs.append(f"loss {before}{stage.loss_after:.4f}")
        name = stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"
        node = node.add(f"[bold]{_escaped(name)}[/]  {', '.join(costs)}")
        for note in stage.notes:
            node.add(f"[yellow]{_escaped(note)}[/]")
    _print_wide(tree)
    print(
        f"In all {ledger.total_tokens:,} tokens, {ledger.total_flops:.3g} training FLOPs, {ledger.total_seconds:.1f} s"
    )


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, title in enumerate(header):
        table.add_column(
            title, justify="left" if column == 0 else "right" if len(header) > 2 else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(_escaped(cell) for cell in row))
    _print_wide(table)


def _print_wide(content: Any) -> None:
    # On a pipe rich would cut at 80 columns; a script wants whole lines.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(content)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _print_line(line: str) -> None:
    print(line, flush=True)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
