"""A run's folder: taken over until something is begun, then changed only where nothing begun depends on it."""

import json

import pytest

from auxin.errors import CheckpointError, ConfigError
from auxin.recipes import Recipe
from auxin.recipes.folder import RECIPE_FILE, claim_directory, differences, left_checkpoint, stage_directory

VALUES = {
    "name": "r",
    "title": "R",
    "data": {"source": "stdlib"},
    "training": {"batch_size": 4, "micro_batch_size": 4},
    "branches": [
        {
            "name": "a",
            "title": "A",
            "stages": [
                {"kind": "build", "preset": "124m"},
                {"kind": "train", "name": "one", "settings": {"steps": 5}},
                {"kind": "train", "name": "two", "settings": {"steps": 5}},
            ],
        },
        {
            "name": "b",
            "title": "B",
            "stages": [{"kind": "build", "like": "a"}, {"kind": "train", "name": "t", "flops_of": "a"}],
        },
    ],
}


def recipe(**changes):
    """The recipe with dotted keys (dots written as two underscores) set; an index one past the end appends."""
    values = Recipe.parse(VALUES).model_dump(mode="json", exclude_defaults=True)
    for key, value in changes.items():
        *path, last = [int(part) if part.isdigit() else part for part in key.split("__")]
        target = values
        for part in path:
            target = target[part]
        if isinstance(target, list) and last == len(target):
            target.append(value)
        else:
            target[last] = value
    return Recipe.parse(values)


def begin(directory, branch, stage):
    """As if that stage had been finished."""
    original = recipe()
    folder = stage_directory(directory, original.branches[branch], original.branches[branch].stages[stage])
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text('{"name": "x", "kind": "train", "checkpoint": "gone"}')
    return folder


def claim(directory, **changes):
    lines = []
    claim_directory(recipe(**changes), directory, lines.append)
    return lines


def test_differences_name_the_field_and_both_values():
    found = differences({"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3, 4]}, "c": 1})
    assert list(found) == ["a.b.1", "a.b.2"]
    assert found["a.b.1"] == "a.b.1: 2 there, 3 asked"
    assert found["a.b.2"] == "a.b.2: not set there, 4 asked"


def test_a_folder_in_which_nothing_was_begun_is_taken_over(tmp_path):
    # What a kill during the very first write leaves.
    (tmp_path / ".recipe.yaml.tmp").write_text("na")
    claim(tmp_path)
    (tmp_path / "data").mkdir()
    claim(tmp_path, seed=3)
    assert (tmp_path / "data").exists()
    claim(tmp_path, seed=3, data__vocab_size=999)
    assert not (tmp_path / "data").exists()
    assert Recipe.from_yaml(tmp_path / RECIPE_FILE) == recipe(seed=3, data__vocab_size=999)


def test_what_was_begun_does_not_depend_on_may_change(tmp_path):
    claim(tmp_path)
    begin(tmp_path, 0, 0)
    begin(tmp_path, 0, 1)
    later = {"kind": "train", "name": "three", "settings": {"steps": 1}}
    changes = {
        "title": "New",
        "main_branch": "b",
        "electricity": {"watts": 65.0},
        "training__micro_batch_size": 2,
        "training__guard": {"action": "rewind"},
        "branches__0__title": "AA",
        "branches__0__stages__1__settings": {"steps": 5, "checkpoint_interval": 7},
        "branches__0__stages__2__settings": {"steps": 9, "learning_rate": 1e-4},
        "branches__0__stages__3": later,
        "branches__2": {"name": "c", "title": "C", "fork": "a/one", "stages": [later]},
    }
    lines = claim(tmp_path, **changes)
    assert "Recipe changed: training.micro_batch_size: 4 there, 2 asked" in lines
    assert Recipe.from_yaml(tmp_path / RECIPE_FILE) == recipe(**changes)
    assert claim(tmp_path, **changes) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed: 0 there, 4 asked"),
        ({"data__vocab_size": 300}, "data.vocab_size: 4096 there, 300 asked"),
        ({"training__batch_size": 8}, "training.batch_size: 4 there, 8 asked"),
        ({"branches__0__name": "z", "branches__1__stages__0__like": "z", "branches__1__stages__1__flops_of": "z"}, "a"),
        ({"branches__0__stages__1__settings": {"steps": 6}}, "branches.0.stages.1.settings.steps: 5 there, 6 asked"),
    ],
)
def test_what_was_begun_is_not_changed(tmp_path, changes, message):
    claim(tmp_path)
    begin(tmp_path, 0, 1)
    with pytest.raises(ConfigError, match=message):
        claim(tmp_path, **changes)
    assert Recipe.from_yaml(tmp_path / RECIPE_FILE) == recipe()


def test_a_branch_that_decided_anothers_size_gets_no_new_stages(tmp_path):
    claim(tmp_path)
    begin(tmp_path, 1, 0)
    begin(tmp_path, 0, 0)
    with pytest.raises(ConfigError, match=r"branches\.0\.stages\.3"):
        claim(tmp_path, branches__0__stages__3={"kind": "train", "name": "three", "settings": {"steps": 1}})


def test_a_damaged_record_of_a_stage_is_one_message(tmp_path):
    folder = begin(tmp_path, 0, 1)
    branch = recipe().branches[0]
    with pytest.raises(CheckpointError, match=r"is of another stage \(x, gone\)"):
        left_checkpoint(tmp_path, branch, branch.stages[1])
    named = {"name": "one", "kind": branch.stages[1].kind}
    elsewhere = {**named, "checkpoint": "branches/a/01-build/checkpoint"}
    (folder / "stage.json").write_text(json.dumps(elsewhere))
    with pytest.raises(CheckpointError, match="is of another stage"):
        left_checkpoint(tmp_path, branch, branch.stages[1])
    (folder / "stage.json").write_text(json.dumps({**named, "checkpoint": "branches/a/02-one/gone"}))
    with pytest.raises(CheckpointError, match="which is gone"):
        left_checkpoint(tmp_path, branch, branch.stages[1])
    (folder / "stage.json").write_text('{"name": "x", "ki')
    with pytest.raises(CheckpointError, match=r"stage\.json can't be read"):
        left_checkpoint(tmp_path, branch, branch.stages[1])
