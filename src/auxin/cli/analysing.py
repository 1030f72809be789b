"""The command that measures a model: what its layers and units do, on samples of text."""

import ast
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from auxin.cli.app import LARGEST_SEED, AsJson, Overrides, app, refuse_swapped
from auxin.cli.listed import SetOptions
from auxin.cli.printing import escaped, print_table, print_wide, to_stderr
from auxin.errors import ConfigError, DataError


class _Analyse(SetOptions):
    """Says in its help which measurements there are."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            if parameter.name == "measurement":
                parameter.help = f"A measurement: {', '.join(measurement_names())}."  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def measurement_names() -> list[str]:
    """The names of all measurements that are installed. They are read from the files of ours and from the entry points
    of others: importing a measurement takes seconds, which `--help` need not wait for."""
    package = find_spec("auxin.analysis")
    assert package is not None
    folders = [Path(folder) for folder in package.submodule_search_locations or ()]
    own = [name for folder in folders for path in folder.glob("*.py") for name in _named_in(path)]
    return sorted({*own, *(entry.name for entry in entry_points(group="auxin.measurements"))})


def _named_in(path: Path) -> Iterator[str]:
    """What the module calls its measurement: the class that it names as `MEASUREMENT` has it as its `name`."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MEASUREMENT":
            for field in classes[ast.unparse(node.value)].body:
                if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == "name" and field.value is not None:
                    yield ast.literal_eval(field.value)


@app.command(
    cls=_Analyse,
    epilog="Example: [bold]auxin analyse CKPT similarity -o similarity[/]\n\n"
    "Quick: [bold]auxin analyse CKPT similarity --samples 16 --length 64[/]\n\n"
    "A setting: [bold]auxin analyse CKPT importance --set score=output[/]",
)
def analyse(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint's folder.")],
    measurement: Annotated[str, typer.Argument(metavar="WHAT", help="A measurement.")],
    samples: Annotated[int, typer.Option(min=1, help="Texts to measure on.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that run at once.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seeds which texts.")] = 0,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for result.json and picture.svg; must be new.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a model's layers or units do, on source code of Python's standard library; the result is kept."""
    from auxin.accounting.machine import choose_device
    from auxin.analysis import measure_all, measurements
    from auxin.analysis import measurement as find_measurement
    from auxin.models.loading import load_model
    from auxin.objectives.calibration import Calibration, CorpusCalibration
    from auxin.recipes.library import apply_override

    if output is not None and output.exists():
        raise ConfigError(f"--output: {output} exists. Give a folder that doesn't, or remove it.")
    known = measurements()
    refuse_swapped(measurement not in known and str(model) in known, "analyse", model, measurement)
    _register()
    values: dict[str, Any] = {}
    for change in overrides or []:
        apply_override(values, change)
    wanted = find_measurement(measurement, **values)
    loaded = load_model(model, device=choose_device("auto"))
    asked = CorpusCalibration(samples=samples, length=length, batch_size=batch_size, seed=seed)
    # What layers give is asked for without labels; a measurement that runs the model itself may look at them.
    labelled = wanted.needs == "batches"
    data = None if wanted.needs == "weights" else Calibration.of_corpus(loaded, model, asked, labelled=labelled)
    if data is not None and getattr(data.objective, "mask_share", 1) == 0:
        to_stderr("The texts are whole, with no token masked: neither the tokenizer nor the model has one for that.")
    if data is not None and data.distinct is not None and samples > data.distinct:
        raise DataError(
            f"--samples: the text makes {data.distinct} samples of {length} tokens, and the same ones again would tell "
            "nothing more. Ask for fewer, or for shorter ones."
        )
    (record,) = measure_all([wanted], loaded, data, progress=True)
    if output is not None:
        _write(record, f"{wanted.name.replace('-', ' ').capitalize()} of {model.resolve().name}", output)
    if as_json:
        print(record.model_dump_json(indent=2))
        return
    for table in record.result.tables():
        print(table.title)
        print_table(table.header, table.rows)
        print()
    for sentence in record.result.findings():
        print_wide(escaped(sentence))
    if output is not None:
        print(f"Written to {output}")


def _register() -> None:
    """Teach transformers the architectures of ours, and the loading of edited models."""
    from auxin import models  # noqa: F401
    from auxin.edits import replay  # noqa: F401


def _write(record: Any, title: str, output: Path) -> None:
    """The result for machines, and the picture for people."""
    from auxin.files import new_folder

    picture = record.result.picture(title)
    with new_folder(output) as folder:
        (folder / "result.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if picture is not None:
            (folder / "picture.svg").write_text(picture, encoding="utf-8")
