"""The command that measures a model: what its layers do, on samples of text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from auxin.cli.app import LARGEST_SEED, AsJson, Overrides, app, model_folder
from auxin.cli.printing import escaped, print_table, print_wide
from auxin.errors import ConfigError, DataError

CORPUS_BYTES = 4_000_000
"""How much of the standard library's source is read."""


@app.command(
    epilog="Example: [bold]auxin analyse CKPT similarity -o similarity[/]\n\n"
    "Quick: [bold]auxin analyse CKPT similarity --samples 16 --length 64[/]"
)
def analyse(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint's folder.")],
    measurement: Annotated[str, typer.Argument(metavar="WHAT", help="A measurement: similarity.")],
    samples: Annotated[int, typer.Option(min=1, help="Texts to measure on.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that run at once; changes nothing else.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seeds which texts.")] = 0,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for result.json and picture.svg; must be new.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what the layers of a model do, on source code of Python's standard library; kept for the next time."""
    from auxin.analysis import measure_all
    from auxin.analysis import measurement as find_measurement
    from auxin.models.loading import load_model
    from auxin.recipes.library import apply_override
    from auxin.training.hardware import choose_device

    if output is not None and output.exists():
        raise ConfigError(f"--output: {output} exists. Give a folder that doesn't, or remove it.")
    _register()
    values: dict[str, Any] = {}
    for change in overrides or []:
        apply_override(values, change)
    wanted = find_measurement(measurement, **values)
    folder = model_folder(model)
    loaded = load_model(folder, device=choose_device("auto"))
    data = None if wanted.needs == "weights" else _calibration(loaded, folder, samples, length, batch_size, seed)
    (record,) = measure_all([wanted], loaded, data, progress=True)
    if output is not None:
        _write(record, f"{wanted.name.capitalize()} of {folder.resolve().name}", output)
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


@dataclass(frozen=True)
class _Texts:
    """Contexts of a corpus as inputs of a model."""

    fingerprint: str
    inputs: list[dict[str, Any]]
    """Of each sample, tensors (1, tokens)."""
    batch_size: int

    @property
    def samples(self) -> int:
        return len(self.inputs)

    def batches(self) -> Iterator[dict[str, Any]]:
        import torch

        for start in range(0, self.samples, self.batch_size):
            some = self.inputs[start : start + self.batch_size]
            yield {name: torch.cat([sample[name] for sample in some]) for name in some[0]}


def _calibration(model: Any, folder: Path, samples: int, length: int, batch_size: int, seed: int) -> Any:
    """Samples of the standard library's source in the model's own tokens.

    Raises:
        DataError: the model takes no text, its folder has no tokenizer of its own, or the text is too short.
        ConfigError: the samples are longer than the model's positions.
    """
    import hashlib
    import tempfile

    import numpy as np
    import torch

    from auxin.data import CorpusSettings, prepare
    from auxin.data.tokenizer import TOKENIZER_FILES
    from auxin.objectives.objective import ObjectiveSettings, is_encoder_decoder, model_inputs

    if model.main_input_name != "input_ids":
        raise DataError(
            f"The command line measures on text, and a {type(model).__name__} takes {model.main_input_name}. Measure "
            "it from Python, on data of your own."
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            f"{folder} has no tokenizer, which makes the model's inputs of text. Save the model with its tokenizer, or "
            "measure it from Python, on data of your own."
        )
    objective = ObjectiveSettings(objective="span_corruption" if is_encoder_decoder(model.config) else "causal")
    objective.check_architecture(model.config)
    objective.check_positions(model.config, length, "--length")
    settings = CorpusSettings(context_length=length, max_bytes=CORPUS_BYTES, tokenizer=folder, seed=seed)
    with tempfile.TemporaryDirectory() as temporary:
        packed = prepare(settings, Path(temporary) / "corpus", progress=True)
        contexts, fingerprint = packed.train[:samples].astype(np.int64), packed.fingerprint
    if packed.vocab_size > model.config.vocab_size:
        raise DataError(
            f"The tokenizer in {folder} has {packed.vocab_size} entries, the model {model.config.vocab_size}: it "
            "belongs to another model. Put the right one there."
        )
    if len(contexts) < samples:
        raise DataError(
            f"The text makes {len(contexts)} samples of {length} tokens. Ask for fewer, or for shorter ones."
        )
    corruption = objective.corruption(model.config, packed.vocab_size, length)
    inputs = [model_inputs(torch.from_numpy(row[None]), corruption, seed, n) for n, row in enumerate(contexts)]
    facts = f"{fingerprint} {samples} {seed} {objective.model_dump_json()}"
    return _Texts(hashlib.sha256(facts.encode()).hexdigest(), inputs, batch_size)
