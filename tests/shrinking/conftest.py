"""A small trained model in a folder, and documents of the kind that it knows."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from auxin.recipes import Recipe, run_recipe
from auxin.recipes.folder import branch_checkpoint
from corpora import small_corpus, write_documents


class Trained(NamedTuple):
    model: Path
    data: dict[str, Any]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    data = small_corpus(write_documents(folder / "texts", 60))
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    stages = [
        {"kind": "build", "model_type": "llama", "config": {**config, "max_position_embeddings": 32}},
        {"kind": "train", "name": "train", "settings": {"steps": 60, "learning_rate": 3e-3, "batch_size": 8}},
    ]
    branch = {"name": "main", "title": "main", "stages": stages}
    recipe = Recipe.parse({"name": "base", "title": "base", "data": data, "branches": [branch]})
    run_recipe(recipe, folder / "run", "", announce=lambda line: None)
    checkpoint = branch_checkpoint(folder / "run", recipe.branches[0])
    return Trained(checkpoint, {key: value for key, value in data.items() if key != "vocab_size"})
