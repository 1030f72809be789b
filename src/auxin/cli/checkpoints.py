"""Commands that read a checkpoint: what it is, what it writes, how well it predicts; conversion and export."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.tree import Tree

from auxin.cli.app import AsJson, Checkpoint, Output, app, refuse_swapped
from auxin.cli.printing import escaped, number, print_table, print_wide, to_stderr
from auxin.errors import CheckpointError, ConfigError


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
        report = export_official(source, output)
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


@app.command(
    epilog="Example: [bold]auxin export CKPT -o small.gguf --type q8_0[/]\n\n"
    "It needs the gguf library: [bold]pip install 'auxin\\[gguf]'[/]"
)
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, *.gguf; of pieces, the folder.")],
    to_type: Annotated[
        str, typer.Option("--type", help="Of the matrices: f32, f16, bf16, q8_0 or q4_0; see docs/gguf.md.")
    ] = "f16",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a tokenizer, or its tokenizer.json; default: the checkpoint's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a GGUF file, for llama.cpp and its like, judged by what transformers reads in it; or one
    whose tensors several processes left in pieces as a whole folder."""
    from auxin.export import export_gguf
    from auxin.models.pieces import lies_in_pieces
    from auxin.training.whole import whole_checkpoint

    if lies_in_pieces(checkpoint) and output.suffix != ".gguf":
        written = whole_checkpoint(checkpoint, output)
        print(json.dumps({"path": str(written)}) if as_json else f"Made whole in {written}")
        return
    report = export_gguf(checkpoint, output, type=to_type, tokenizer=tokenizer, overwrite=overwrite)
    if as_json:
        print(report.model_dump_json(indent=2))
        return
    kinds = ", ".join(f"{count} tensors in {kind}" for kind, count in report.tensors.items())
    print(f"{kinds}; weights change by {report.largest_change:.1e} of the largest in their tensor at most.")
    if report.unblocked:
        print(f"F16, since their rows are no multiple of 32: {', '.join(report.unblocked)}")
    for note in report.notes:
        print(note)
    print(f"Written to {report.path}: {report.bytes:,} bytes")


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

    refuse_swapped(os.path.isdir(prompt) and not os.path.exists(checkpoint), "generate", checkpoint, prompt)
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

    from auxin.data.streamed_text import held_out_text
    from auxin.evaluation import Perplexity
    from auxin.evaluation.corpus import score_held_out
    from auxin.evaluation.files import score_files

    if not text and corpus is None:
        raise ConfigError("Nothing to score. Give --text FILE or --corpus FOLDER.")
    model, tokenizer = _load(checkpoint)
    scores = {str(corpus): score_held_out(model, tokenizer, held_out_text(corpus))} if corpus else {}
    scores |= score_files(model, tokenizer, text or [], context_length, stride)
    if as_json:
        # Not the json module: it writes NaN and Infinity, which are no JSON.
        print(TypeAdapter(dict[str, Perplexity]).dump_json(scores, indent=2).decode())
        return
    header = ["text", "tokens", "nats/token", "perplexity", "bits/byte"]
    print_table(
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
    verify: Annotated[
        bool, typer.Option("--verify", help="First compare every file with the sum that was written with it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint is: structure, token groups, costs, and the lineage with what each stage cost."""
    from auxin.data.streamed_text import held_out_text
    from auxin.evaluation.inspection import describe_checkpoint
    from auxin.models.folders import model_folder
    from auxin.nn.scores import SCALED

    if verify:
        _verify(model_folder(checkpoint))
    found = describe_checkpoint(checkpoint, None if corpus is None else held_out_text(corpus))
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    sizes = {name: str(part) for name, part in {"": found, **found.parts}.items() if str(part)}
    at = "" if found.unit == "sample" else f" at {found.sequence_length} {found.unit}s"
    print(
        f"{found.model_type}: {'; '.join(f'{name}: {size}' if name else size for name, size in sizes.items())}\n"
        f"{found.parameters.total:,} parameters, {found.parameters.non_embedding:,} without embeddings; "
        f"{found.flops_per_token:.4g} FLOPs per {found.unit} forward{at}"
    )
    if not found.has_weights:
        print(
            f"{checkpoint} holds no weights in safetensors files: it is a config alone, or they are in another format."
        )
    if found.token_groups:
        rows = [
            [
                g.slot,
                f"{sum(g.sizes):,}",
                " + ".join(map(str, g.sizes)),
                g.score_function,
                ", ".join(f"{tau:.4g}" for tau in g.tau) if g.score_function in SCALED else "-",
            ]
            for g in found.token_groups
        ]
        print_table(["parameter tokens", "total", "groups", "scores", "tau"], rows)
    if len(found.nested) > 1:
        rows = [[f"first {n.num_groups}", f"{n.parameters:,}", number(n.validation_loss, 4)] for n in found.nested]
        print_table(["nested models (truncate_groups, no promise)", "parameters", "validation loss"], rows)
    if found.ledger is not None:
        _print_lineage(found.ledger)


def _verify(folder: Path) -> None:
    from auxin.sums import SUMS_FILE, damage, has_sums

    if (reason := damage(folder)) is not None:
        raise CheckpointError(f"{folder} is not as it was written: {reason}.")
    if not has_sums(folder):
        raise CheckpointError(f"{folder} has no {SUMS_FILE} to compare its files with.")
    to_stderr(f"Every file is as it was written ({SUMS_FILE}).")


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """The model of a checkpoint, on the device that training would use, and its tokenizer."""
    from auxin import models  # noqa: F401 - registers the architectures
    from auxin.accounting.machine import choose_device
    from auxin.data.tokenizer import load_tokenizer
    from auxin.edits import replay  # noqa: F401 - and the loading of edited models
    from auxin.sums import refuse_damaged_tensors
    from auxin.training import load_model

    refuse_damaged_tensors(checkpoint)
    return load_model(checkpoint, device=choose_device("auto")), load_tokenizer(checkpoint)


def _print_lineage(ledger: Any) -> None:
    tree = Tree("[bold]lineage[/]", guide_style="dim")
    node = tree
    for stage in ledger.stages:
        costs = [f"{stage.parameters:,} parameters"]
        if stage.units:
            costs.append(f"{stage.units:,} {stage.unit}s, {stage.flops:.3g} FLOPs")
        costs.append(f"{stage.seconds:.1f} s")
        if stage.value_after is not None:
            before = "" if stage.value_before is None else f"{stage.value_before:.4f} -> "
            costs.append(f"{(stage.measure or 'value').replace('_', ' ')} {before}{stage.value_after:.4f}")
        name = stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"
        node = node.add(f"[bold]{escaped(name)}[/]  {', '.join(costs)}")
        for note in stage.notes:
            node.add(f"[yellow]{escaped(note)}[/]")
    print_wide(tree)
    units = dict.fromkeys(stage.unit for stage in ledger.stages if stage.units) or ("token",)
    data = ", ".join(f"{ledger.total_units(unit):,} {unit}s" for unit in units)
    print(f"In all {data}, {ledger.total_flops:.3g} training FLOPs, {ledger.total_seconds:.1f} s")
