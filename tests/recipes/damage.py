"""Damaged runs: copies of a finished run that end early, and one file of each harmed in one way.

A case is a moment at which the run stands (what it reads next), a file that it reads then, and a harm. Each copy is run
on, and how that ended is told in one word: see `OUTCOMES`.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from auxin.errors import AuxinError
from auxin.recipes import Recipe, run_recipe
from corpora import small_corpus, write_documents
from training.tiny import checkpoint_bits

OUTCOMES = ("same", "named", "unnamed", "other", "traceback")
"""The bits that the run ends in without harm; an error that names the harmed file; one that does not; other bits and no
word; an exception that is not the library's own."""

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
BRANCH = Path("branches/main")
END = BRANCH / "04-on"

MOMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train stage to resume": ("02-base/checkpoints/step-00000004", ("03-grow", "04-on", "05-evaluate")),
    "trained, before growth": ("02-base/checkpoints/step-00000006", ("03-grow", "04-on", "05-evaluate")),
    "grown, before training": ("03-grow/checkpoint", ("04-on", "05-evaluate")),
    "built, before training": ("01-build/checkpoint", ("02-base", "03-grow", "04-on", "05-evaluate")),
    "all done, report again": ("05-evaluate/checkpoint", ()),
    "corpus": ("../../data", ("02-base", "03-grow", "04-on", "05-evaluate")),
}
"""Where the file that is harmed lies, in the branch's folder, and the stages that are yet to do."""


def recipe(corpus: Path) -> Recipe:
    """Trained, grown and trained on; the checkpoints on the way are kept."""
    stages = [
        {
            "kind": "build",
            "model_type": "tokenformer",
            "config": {**SIZES, "qkv_tokens": 4, "proj_tokens": 4, "ffn_tokens": 8},
        },
        {
            "kind": "train",
            "name": "base",
            "settings": {"steps": 6, "decay_fraction": 0.0, "checkpoint_interval": 2, "keep_checkpoints": 4},
        },
        {"kind": "change", "name": "grow", "tokens": {"qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 16}},
        {"kind": "train", "name": "on", "settings": {"steps": 3}},
        {"kind": "evaluate"},
    ]
    return Recipe.parse(
        {
            "name": "damaged",
            "title": "A run that is harmed",
            "data": small_corpus(corpus),
            "training": {"batch_size": 4, "log_interval": 2, "tensorboard": False},
            "branches": [{"name": "main", "title": "main", "stages": stages}],
        }
    )


@dataclass(frozen=True)
class Harm:
    """One way to harm a file."""

    name: str
    do: Callable[[Path, random.Random, "Path | None"], bool]
    """Harm the file, given another step's file of the same name; False where that can't be done to it."""


def _flip(path: Path, draw: random.Random, other: Path | None) -> bool:
    content = bytearray(path.read_bytes())
    # Half of them in what is read first: headers, the beginning of JSON.
    place = draw.randrange(min(200, len(content)) if draw.random() < 0.5 else len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return True


def _cut(path: Path, draw: random.Random, other: Path | None) -> bool:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    return True


def _remove(path: Path, draw: random.Random, other: Path | None) -> bool:
    path.unlink()
    return True


def _swap(path: Path, draw: random.Random, other: Path | None) -> bool:
    if other is None or not other.is_file() or other.read_bytes() == path.read_bytes():
        return False
    shutil.copyfile(other, path)
    return True


def _edit(change: Callable[[random.Random, object], object]) -> Callable[[Path, random.Random, Path | None], bool]:
    def edit(path: Path, draw: random.Random, other: Path | None) -> bool:
        if path.suffix != ".json":
            return False
        values = json.loads(path.read_text(encoding="utf-8"))
        places = list(_places(values))
        holder, key = draw.choice(places)
        holder[key] = change(draw, holder[key])
        if holder[key] is None and isinstance(holder, dict):
            del holder[key]
        path.write_text(json.dumps(values, indent=2), encoding="utf-8")
        return True

    return edit


def _places(values: object) -> Iterator[tuple[object, object]]:
    """Every value of nested JSON, by what holds it and its key there."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(pairs):
        yield values, key
        yield from _places(value)


def _another_value(draw: random.Random, value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + draw.choice([1, -1, 7])
    return f"{value}x" if isinstance(value, str) else draw.choice([3, "x", []])


HARMS = (
    Harm("a bit flipped", _flip),
    Harm("cut short", _cut),
    Harm("missing", _remove),
    Harm("another step's", _swap),
    Harm("JSON, a value changed", _edit(_another_value)),
    Harm("JSON, a value taken out", _edit(lambda draw, value: None)),
    Harm("JSON, a value of another type", _edit(lambda draw, value: draw.choice([{"a": 1}, [1], "no", -1]))),
)


@dataclass(frozen=True)
class Case:
    """One harm to one file at one moment."""

    moment: str
    file: str
    """Relative to the folder that the moment names."""
    harm: Harm
    number: int
    """Seeds what of the file is harmed."""

    def __str__(self) -> str:
        return f"{self.moment}: {self.file}: {self.harm.name} ({self.number})"


class Workshop:
    """A finished run, of which harmed copies are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = recipe(write_documents(folder / "corpus", documents=20))
        self.finished = folder / "finished"
        self._run(self.finished)
        self.end = self._end(self.finished)

    def cases(self, seed: int, repeats: int = 1) -> list[Case]:
        """All moments, files and harms, in an order drawn from `seed`."""
        found = []
        for moment, (place, _) in MOMENTS.items():
            folder = self.finished / BRANCH / place
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                for harm in HARMS:
                    found += [Case(moment, path.relative_to(folder).as_posix(), harm, n) for n in range(repeats)]
        random.Random(seed).shuffle(found)
        return found

    def outcome(self, case: Case) -> tuple[str, str] | None:
        """How a run ends that is harmed so, and what it says; None where the file can't be harmed so."""
        run = self.folder / "harmed"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.finished, run)
        place, undone = MOMENTS[case.moment]
        for name in undone:
            shutil.rmtree(run / BRANCH / name)
        stage = run / BRANCH / "02-base"
        if case.moment == "train stage to resume":
            (stage / "stage.json").unlink()
            shutil.rmtree(stage / "checkpoints/step-00000006")
            (stage / "latest").write_text("checkpoints/step-00000004\n")
        path = run / BRANCH / place / case.file
        other = stage / "checkpoints/step-00000002" / case.file
        draw = random.Random(f"{case.moment} {case.file} {case.number}")
        if not case.harm.do(path, draw, other):
            return None
        try:
            self._run(run)
        except AuxinError as error:
            return ("named" if path.name in str(error) else "unnamed"), str(error)
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"
        return ("same", "") if self._end(run) == self.end else ("other", "")

    def _run(self, folder: Path) -> None:
        run_recipe(self.recipe, folder, "", announce=lambda line: None)

    def _end(self, run: Path) -> object:
        """Weights, moments, generators, and what was measured, counted and told of the end."""
        results = json.loads((run / "results.json").read_text())
        kept = ("parameters", "units", "flops", "value", "measures", "perplexity", "bits_per_byte")
        curves = [
            {key: value for key, value in point.items() if key != "seconds"}
            for branch in results["branches"]
            for point in branch["curve"]
        ]
        numbers = [{key: branch[key] for key in kept} for branch in results["branches"]]
        return checkpoint_bits(run / END / "checkpoints/step-00000003"), numbers, curves, results["data"]
