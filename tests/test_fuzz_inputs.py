"""Recipes, plans and command lines that are almost right: each is obeyed, or refused in one message without a trace.

By hand, for longer: `AUXIN_FUZZ=5000 python -m pytest -s tests/test_fuzz_inputs.py`, of each kind so many; it prints
what came of them. `AUXIN_FUZZ_SEED` draws others, `AUXIN_FUZZ_LOG` names a file for what was said of each.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import auxin.recipes
from auxin import cli
from auxin.edits import Plan
from auxin.methods import method
from auxin.planning.method import plan_for
from auxin.recipes import price_recipe
from auxin.recipes.beforehand import check_needs
from auxin.recipes.folder import DATA
from corpora import write_documents
from mutations import mutated, mutated_text, mutated_words
from tiny_models import tiny
from tiny_tokenizers import tiny_tokenizer

TRIED = int(os.environ.get("AUXIN_FUZZ", 24))
SEED = int(os.environ.get("AUXIN_FUZZ_SEED", 0))
SECONDS = 20
"""Of this process's own work, which no refusal and no tiny recipe takes."""
LONGEST = 1500
"""Characters of a message that somebody reads."""
MESSAGE = re.compile(r"auxin: \S")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
RECIPE = {
    "name": "small",
    "title": "Small models",
    "seed": 0,
    "data": {"source": "files", "paths": ["texts"], "context_length": 16, "vocab_size": 300},
    "training": {"batch_size": 4, "learning_rate": 1e-3, "objective": {"kind": "causal"}},
    "measures": ["loss"],
    "branches": [
        {
            "name": "grown",
            "title": "Grown",
            "stages": [
                {"kind": "build", "model_type": "llama", "config": {**SIZES, "num_key_value_heads": 4}},
                {"kind": "train", "name": "base", "settings": {"steps": 4, "warmup_steps": 1}},
                {"kind": "change", "method": "hypercloning", "settings": {"factor": 2}},
                {
                    "kind": "train",
                    "name": "end",
                    "settings": {"steps": 2},
                    "hooks": [{"kind": "old_rates", "ratio": 0}],
                },
            ],
        },
        {
            "name": "on",
            "title": "Trained on",
            "fork": "grown/base",
            "stages": [{"kind": "train", "name": "on", "flops_of": "grown"}, {"kind": "evaluate"}],
        },
        {
            "name": "scratch",
            "title": "From scratch",
            "stages": [{"kind": "build", "like": "grown"}, {"kind": "train", "name": "train", "flops_of": "grown"}],
        },
    ],
    "main_branch": "grown",
}


class Hang(BaseException):
    """No error of anybody's, so that nothing catches it."""


class Place:
    """A folder with a model, a corpus, a recipe and a plan, in which commands are run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capfd = folder, monkeypatch, capfd
        self.counted: Counter[str] = Counter()
        self.faults: list[str] = []
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "200")
        for name in ("run_recipe", "run_seeds"):
            monkeypatch.setattr(auxin.recipes, name, _would_begin)
        write_documents(folder / "texts", 3)
        tiny("llama", vocab_size=320).save_pretrained(folder / "model")
        tiny_tokenizer("byte_level").save_pretrained(folder / "model")
        (folder / "empty").mkdir()
        (folder / "binary").write_bytes(bytes(range(256)))
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
        for name, factor in (("plan", 2), ("other", 3)):
            plan_for(method("hypercloning"), Path("model"), {"factor": factor}).to_yaml(f"{name}.yaml")
        self.files = [*sorted(path.name for path in folder.iterdir()), "model/config.json", "model/model.safetensors"]
        self.before = self.state()

    def state(self) -> dict[str, int]:
        """What lies in the folder."""
        return {str(path): path.stat().st_size for path in self.folder.rglob("*") if path.name != "input.yaml"}

    def run(self, words: list[str], what: str) -> None:
        """Run a command and count what comes of it; a fault is kept."""
        self.monkeypatch.setattr(sys, "argv", ["auxin", *words])
        found = _outcome()
        captured = self.capfd.readouterr()
        outcome = found.outcome or _judged(found.code, captured.err)
        if self.state() != self.before:
            if outcome in ("refused", "failed", "usage"):
                outcome = "left files"
            self.clean()
        self.counted[outcome] += 1
        if outcome not in ("done", "refused", "failed", "usage"):
            told = found.trace or f"{captured.out[-300:]}\n{captured.err[-1500:]}"
            self.faults.append(f"{outcome}: auxin {words!r}\n{what[:1500]}\n{told}")
        if path := os.environ.get("AUXIN_FUZZ_LOG"):
            with open(path, "a", errors="replace") as log:
                log.write(json.dumps([outcome, words, what[:3000], captured.err[-3000:], found.trace]) + "\n")

    def clean(self) -> None:
        """Remove what a command wrote; fails where it changed what was there."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if str(path) not in self.before and path.name != "input.yaml" and (path.exists() or path.is_symlink()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert self.state() == self.before

    def finish(self) -> None:
        """Fail with the faults, if any; say what came of all when it was asked for."""
        if "AUXIN_FUZZ" in os.environ:
            with self.capfd.disabled():
                print(f"\n{sum(self.counted.values())}: {dict(self.counted)}")
        assert not self.faults, f"{len(self.faults)} faults, the first:\n" + "\n\n".join(self.faults[:3])


def _outcome() -> SimpleNamespace:
    """How the command line ends: by an exit code, or by what it must not."""

    def stop(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        cli.main()
    except SystemExit as error:
        return SimpleNamespace(outcome="", code=error.code or 0, trace="")
    except Hang:
        return SimpleNamespace(outcome="hang", code=None, trace=traceback.format_exc(limit=-12))
    except Exception:
        return SimpleNamespace(outcome="traceback", code=None, trace=traceback.format_exc(limit=-12))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return SimpleNamespace(outcome="", code=0, trace="")


def _judged(code: int, err: str) -> str:
    """What an exit code and standard error amount to."""
    if code == 0:
        return "done"
    if "Usage:" in err or "─ Error ─" in err:
        return "usage"
    if len(MESSAGE.findall(err)) - err.count("auxin: warning") != 1 or "Traceback" in err:
        return "no message"
    if len(err) > LONGEST:
        return "too long"
    return "refused" if code == 2 else "failed"


def _would_begin(recipe: Any, output: Any, *_: Any, **__: Any) -> None:
    """In place of a run, what it does before it writes anything."""
    check_needs(recipe, Path(output) / DATA)
    seeds = [recipe.seed] if recipe.seeds is None else recipe.seeds[:2]
    for seed in seeds:
        price_recipe(recipe.of_seed(seed), memory=False)
    raise SystemExit(0)


@pytest.fixture
def place(tmp_path, monkeypatch, capfd):
    found = Place(tmp_path, monkeypatch, capfd)
    yield found
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def written(values: Any) -> str:
    """As YAML, with what a person may write that the safe dumper refuses to."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@pytest.mark.filterwarnings("ignore")
def test_every_recipe_is_priced_or_refused(place):
    draw, right = random.Random(f"recipes {SEED}"), Path("recipe.yaml").read_text()
    for number in range(TRIED):
        text = mutated_text(draw, right) if number % 3 == 0 else written(mutated(draw, RECIPE))
        text = text if number else right
        Path("input.yaml").write_text(text, errors="surrogatepass")
        place.run(["run", "input.yaml", "--dry-run"], text)
    place.finish()
    assert place.counted["done"]
    assert place.counted["refused"]


@pytest.mark.filterwarnings("ignore")
def test_every_plan_is_applied_or_refused(place):
    draw, right = random.Random(f"plans {SEED}"), Path("plan.yaml").read_text()
    values = Plan.from_yaml("plan.yaml").model_dump(mode="json", exclude_defaults=True)
    for number in range(TRIED):
        text = mutated_text(draw, right) if number % 3 == 0 else written(mutated(draw, values))
        Path("input.yaml").write_text(text, errors="surrogatepass")
        command = (
            ["diff", "plan.yaml", "input.yaml"] if number % 4 == 0 else ["apply", "model", "input.yaml", "-o", "out"]
        )
        place.run(command, text)
    place.finish()
    assert place.counted["done"]
    assert place.counted["refused"]


LINES = [
    "run recipe.yaml --dry-run --set branches.0.stages.0.config.num_hidden_layers=3",
    "run recipe.yaml --dry-run --set training.learning_rate=1e-3 --set branches.1.fork=grown/base",
    "run recipe.yaml --dry-run --seed 1",
    "run recipe.yaml --dry-run --json --branches grown on --set training.batch_size=2",
    "run recipe.yaml -o out --seeds 0 1 --jobs 2",
    "train --model model/config.json --corpus texts -o out --steps 4 --set training.warmup_steps=1 --context-length 16",
    "train --model 124m -o out --tokens 1000000 --vocab-size 300",
    "plan model stacking --set layers=4 -o new.yaml",
    "plan model/config.json hypercloning --set factor=2 --json",
    "apply model plan.yaml -o out",
    "diff plan.yaml other.yaml",
    "diff model model --json",
    "plan model lemon --set hidden_size=32 --data samples=2 -o new.yaml",
    "grow model --ffn-tokens 40 -o out",
    "show model --json",
    "methods hypercloning --json",
    "methods",
    "evaluate model --text texts/0.txt --stride 4",
    "generate model hello --max-new-tokens 4",
    "report model",
    "recipes --json",
    "convert model -o out",
    "export model -o out.gguf --type q8_0",
    "analyse model similarity --samples 2 -o out",
]


@pytest.mark.filterwarnings("ignore")
def test_every_command_line_is_obeyed_or_refused(place):
    draw = random.Random(f"command lines {SEED}")
    for number in range(TRIED):
        words = mutated_words(draw, LINES[number % len(LINES)].split(), place.files)
        place.run(words, "")
    place.finish()
    assert place.counted["refused"]
    assert place.counted["usage"]
