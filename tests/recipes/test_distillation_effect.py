"""What a teacher buys: a Llama that lost two of its four layers, or half of its heads and feed-forward units by a
score, is mended by what it was before, on an equal budget.

The page on objectives has the figures.
"""

from pathlib import Path
from typing import Any

from auxin.accounting import Ledger
from auxin.recipes import Recipe
from auxin.recipes.runner import opened_run, run_branch
from plugins import EXAMPLE, install

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SEEDS = (0, 1, 2)
STEPS = 50


LAYERS = {"method": "drop-layers", "settings": {"drop": [1, 2]}}
SCORED = {"method": "taylor", "settings": {"heads": 0.5, "ffn": 0.5}}
"""Units that matter least by a score, of every layer."""


def mended(
    name: str, objective: dict[str, Any] | None, budget: str, removed: dict[str, Any] = LAYERS
) -> dict[str, Any]:
    cut = {"kind": "change", "name": "cut", **removed}
    train: dict[str, Any] = {"kind": "train", "name": "repair", "settings": {"warmup_steps": 5}}
    if budget == "flops":
        train["flops_of"] = "plain"
    else:
        train["settings"]["steps"] = STEPS
    if objective is not None:
        train["settings"]["objective"] = {"kind": "distillation", "teacher": "base/train", **objective}
    return {"name": name, "title": name, "fork": "base/train", "stages": [cut, train]}


def recipe(seed: int) -> Recipe:
    corpus = {"source": "stdlib", "max_bytes": 120_000, "vocab_size": 300, "context_length": 24}
    base = {"kind": "train", "name": "train", "settings": {"steps": 400, "warmup_steps": 20}}
    build = {"kind": "build", "model_type": "llama", "config": SIZES}
    return Recipe.parse(
        {
            "name": "mending",
            "title": "Mending",
            "seed": seed,
            "data": {**corpus, "validation_fraction": 0.1},
            "training": {"batch_size": 8, "learning_rate": 3e-3, "tensorboard": False, "device": "cpu"},
            "branches": [
                {"name": "base", "title": "base", "stages": [build, base]},
                mended("plain", None, "steps"),
                mended("steps", {"weight": 0.9}, "steps"),
                mended("flops", {"weight": 0.9}, "flops"),
                mended("scored-plain", None, "steps", SCORED),
                mended("scored-steps", {"weight": 0.9}, "steps", SCORED),
            ],
        }
    )


def losses(seed: int, folder: Path) -> dict[str, float]:
    """The held-out loss that each branch ends with; the cut models' under "cut" and "scored-cut"."""
    found = {}
    with opened_run(recipe(seed), folder, lambda line: None) as run:
        for branch in run.recipe.branches:
            run_branch(run, branch)
            record = Ledger.load(run.final_checkpoint(branch.name)).stages[-1]
            cut = "scored-cut" if branch.name.startswith("scored") else "cut"
            found[branch.name], found[cut] = record.value_after, record.value_before
    return found


def test_a_cut_model_is_mended_better_by_what_it_was(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "auxin-drop-layers", EXAMPLE)
    found = [losses(seed, tmp_path / str(seed)) for seed in SEEDS]
    for one in found:
        assert one["plain"] < one["cut"]
        # In as many steps, and at as many FLOPs, of which the teacher's own passes take a share.
        assert one["steps"] < one["plain"]
        assert one["flops"] < one["plain"]
        # Likewise behind a cut by a score, which leaves all layers.
        assert one["scored-steps"] < min(one["scored-plain"], one["scored-cut"])
