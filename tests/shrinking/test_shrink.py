"""A search from the model to the smaller one: what it chooses, keeps apart, keeps, and refuses."""

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import auxin
from auxin.accounting import count_parameters, flops_per_token
from auxin.cli import app
from auxin.data.corpus import PackedData
from auxin.edits import Plan
from auxin.errors import CheckpointError, ConfigError, DataError, PlanError, TrainingError
from auxin.objectives.causal import Causal
from auxin.objectives.measures import Loss
from auxin.planning.target import Target
from auxin.recipes import Recipe, run_recipe
from auxin.recipes.folder import DATA
from auxin.shrinking import Outcome, ShrinkSettings, shrink
from auxin.shrinking.candidates import Candidate, Step
from auxin.shrinking.folder import MODEL, OUTCOME, PAGE, PICTURE, TRIALS
from auxin.shrinking.outcome import Measured
from auxin.shrinking.page import front
from auxin.shrinking.trials import Records, Trial, Workbench, measured_sizes
from auxin.training.run_folder import latest_checkpoint
from labelled import BARS, labelled_rows, question_rows, write_bars, write_rows

METHODS = ["shortgpt", "taylor", "greenformers"]


def asked(trained, **changes):
    values = {
        "model": str(trained.model), "target": {"parameters": 0.7}, "methods": METHODS, "trials": 6, "samples": 8,
        "choosing_samples": 12, "data": trained.data, "budget": 640, "training": {"learning_rate": 1e-3},
    }  # fmt: skip
    return ShrinkSettings.parse({**values, **changes})


def done(settings: ShrinkSettings, output: Path) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    return shrink(settings, output, announce=lines.append, progress=False), lines


def without_time(trials: list[Trial]) -> list[Trial]:
    return [trial.model_copy(update={"seconds": 0.0}) for trial in trials]


@pytest.fixture(scope="module")
def found(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("found") / "smaller"
    outcome, lines = done(asked(trained), output)
    return output, outcome, lines


def test_the_chosen_model_is_as_small_as_asked_and_the_best_that_was_tried(trained, found):
    output, outcome, _ = found
    trials = Records(output / TRIALS).trials
    assert len(trials) == 6
    best = min((trial for trial in trials if trial.loss is not None), key=lambda trial: trial.loss)
    assert outcome.chosen.number == best.number
    whole = count_parameters(auxin.load(trained.model)).total
    model = auxin.load(output / MODEL)
    assert count_parameters(model).total == outcome.chosen.parameters <= 0.7 * whole
    assert all(trial.parameters <= 0.7 * whole for trial in trials if trial.parameters is not None)
    for step, planned in enumerate(sorted((output / "branches" / f"trial-{best.number}").glob("*/plan.yaml"))):
        assert Plan.from_yaml(planned).method == best.steps[step]["method"]


def test_what_is_reported_is_measured_on_the_held_out_split_by_another_way(found):
    output, outcome, _ = found
    data = PackedData.load(output / DATA)
    model = auxin.load(output / MODEL)
    loss = Loss()(model, data.split("validation"), Causal().bind(model.config, data.form), 4)
    assert outcome.chosen.loss == pytest.approx(loss, abs=1e-5)
    assert sum(outcome.chosen.losses) / len(outcome.chosen.losses) == pytest.approx(loss, abs=1e-5)  # of equal length
    assert outcome.chosen.before != outcome.chosen.loss


def test_methods_choice_and_report_look_at_different_samples(trained, found, monkeypatch):
    output, _, _ = found
    model, data = auxin.load(trained.model), PackedData.load(output / DATA)
    bench = Workbench(model, data, Causal(), asked(trained))
    choosing, looked_at = bench.choosing_rows, set()
    real = data.split("train").rows

    class Watched:
        def __len__(self):
            return len(data.train)

        def rows(self, rows):
            looked_at.update(rows)
            return real(rows)

    monkeypatch.setattr(data, "split", lambda name: {"train": Watched()}[name])  # the held-out one is not asked for
    trial = next(t for t in Records(output / TRIALS).trials if t.loss is not None and len(t.steps) > 1)
    bench.smaller(trial.candidate, output / "..")
    assert looked_at
    assert not looked_at & set(choosing)
    assert len(set(choosing)) == 12


def test_a_trial_again_gives_the_same_bits(trained, found, tmp_path):
    output, _, _ = found
    bench = Workbench(auxin.load(trained.model), PackedData.load(output / DATA), Causal(), asked(trained))
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    kept = Records(output / TRIALS).trials
    for trial in (kept[0], kept[-1]):
        assert without_time([bench.tried(trial.number, trial.candidate, tmp_path)]) == without_time([trial])
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_the_page_tells_what_was_tried_and_what_came_of_it(found):
    output, outcome, _ = found
    told, picture = ((output / name).read_text() for name in (PAGE, PICTURE))
    trials = Records(output / TRIALS).trials
    for trial in trials:
        assert trial.candidate.title in told
    assert f"{outcome.chosen.loss:.4f} nats per token" in told
    assert outcome.verdict in told
    assert picture.count("<circle") == sum(trial.loss is not None for trial in trials)
    assert Outcome.model_validate_json((output / OUTCOME).read_text()) == outcome


def test_it_goes_on_with_more_trials_and_does_nothing_twice(trained, found):
    output, outcome, _ = found
    trials = Records(output / TRIALS).trials
    again, lines = done(asked(trained), output)
    assert again.model_dump(exclude={"seconds"}) == outcome.model_dump(exclude={"seconds"})
    assert not [line for line in lines if "steps" in line]  # nothing was trained again
    longer, _ = done(asked(trained, trials=7), output)
    assert Records(output / TRIALS).trials[:6] == trials
    assert len(Records(output / TRIALS).trials) == 7
    assert count_parameters(auxin.load(output / MODEL)).total == longer.chosen.parameters


def test_other_settings_are_refused(trained, found):
    output, _, _ = found
    for changes in ({"seed": 1}, {"budget": 320}, {"target": {"parameters": 0.6}}):
        with pytest.raises(ConfigError, match=f"other settings \\({next(iter(changes))}.*: .* there, .* asked\\)"):
            done(asked(trained, **changes), output)


KILLED = """
import os, signal, sys
from pathlib import Path
from auxin.shrinking import ShrinkSettings, shrink
from auxin.shrinking import trials
add, count = trials.Records.add, [0]
def killed(self, trial):
    count[0] += 1
    if count[0] == 3:
        with self.path.open("ab") as file:
            file.write(b'{"number": 2, "ste')
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, trial)
trials.Records.add = killed
shrink(ShrinkSettings.from_yaml(sys.argv[1]), sys.argv[2], progress=False)
"""


def test_a_search_that_was_killed_in_the_middle_of_a_line_ends_alike(trained, found, tmp_path):
    settings = asked(trained)
    settings.to_yaml(tmp_path / "asked.yaml")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "asked.yaml"), str(tmp_path / "smaller")]
    ended = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    outcome, lines = done(settings, tmp_path / "smaller")
    assert "2 trials are done already." in lines
    kept = Records(tmp_path / "smaller" / TRIALS).trials
    assert without_time(kept) == without_time(Records(found[0] / TRIALS).trials[:6])
    again = auxin.load(tmp_path / "smaller" / MODEL).state_dict()
    branch = found[0] / "branches" / f"trial-{outcome.chosen.number}"
    first = auxin.load(latest_checkpoint(next(branch.glob("*-mend")))).state_dict()
    assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_a_line_that_is_no_trial_is_named(tmp_path):
    path = tmp_path / TRIALS
    path.write_text('{"number": 0, "steps": []}\nnonsense\n')
    with pytest.raises(CheckpointError, match="line 2: no trial can be read"):
        Records(path)


def test_what_no_way_reaches_is_refused_with_the_reasons(trained, tmp_path):
    settings, output = asked(trained, methods=["shortgpt", "taylor"], trials=2, target=TOO_SMALL), tmp_path / "smaller"
    with pytest.raises(PlanError, match=r"None of 2 ways reaches target\.parameters = 0\.01\. shortgpt: .*") as told:
        done(settings, output)
    reasons = [trial.refused for trial in Records(output / TRIALS).trials]
    assert reasons[0] in str(told.value)
    assert reasons[1] not in str(told.value)  # it stands where the message says


TOO_SMALL = {"parameters": 0.01}


def test_a_search_in_which_nothing_reached_the_target_makes_way_for_another(trained, tmp_path):
    few = {"methods": ["shortgpt", "taylor"], "trials": 2, "budget": None}
    output = tmp_path / "smaller"
    with pytest.raises(PlanError, match="with the same --output"):
        done(asked(trained, **few, target=TOO_SMALL), output)
    with pytest.raises(ConfigError, match=r"seed: 0 there, 1 asked\)\. Give another --output, or remove ") as told:
        done(asked(trained, **few, seed=1), output)
    assert len(str(told.value).replace(str(output), "")) < 250
    alone, _ = done(asked(trained, **few), tmp_path / "alone")
    outcome, lines = done(asked(trained, **few), output)
    begun = "The search begins anew (target.parameters: 0.01 there, 0.7 asked)."
    assert f"No trial here has reached its target. {begun}" in lines
    assert outcome.model_dump(exclude={"seconds"}) == alone.model_dump(exclude={"seconds"})
    with pytest.raises(ConfigError, match="other settings"):  # now there is something to keep
        done(asked(trained, **few, target=TOO_SMALL), output)


def test_what_has_nothing_to_do_is_refused_before_work_starts(trained, tmp_path):
    with pytest.raises(PlanError, match=r"the model has [0-9,]+ already, so that nothing has to go"):
        done(asked(trained, target={"parameters": 10**9}), tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_a_run_without_a_search_and_trials_without_settings_are_refused(trained, found, tmp_path):
    for left in ("shrink.yaml", "trials.jsonl"):
        shutil.copytree(found[0], tmp_path / left)
        (tmp_path / left / "shrink.yaml").unlink()
        (tmp_path / left / left).unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=r"holds a run, and no search with its shrink\.yaml\. Give another"):
            done(asked(trained), tmp_path / left)


def test_nobody_else_gets_into_the_folder_from_the_first_step_to_the_last(trained, tmp_path):
    output, tried = tmp_path / "smaller", []
    settings = asked(trained, methods=["shortgpt", "taylor"], trials=2, budget=None)

    def told(line: str) -> None:
        tried.append(line)
        second = a_search if line.startswith("Trial 1") else a_run
        with pytest.raises(TrainingError, match=r"is in use: process .* Wait for it or choose another folder"):
            second()

    def a_search() -> None:
        done(settings, output)

    def a_run() -> None:
        run_recipe(settings.recipe(), output, "", announce=lambda line: None)

    shrink(settings, output, announce=told, progress=False)
    assert {"No budget: what is chosen is not mended.", "\nthe whole model"} <= set(tried)
    assert sum(line.startswith("Trial") for line in tried) == 2
    assert not [line for line in tried if "Recipe changed" in line]


def test_too_few_samples_and_wrong_settings_are_refused_before_work_starts(trained, tmp_path):
    with pytest.raises(DataError, match="choosing_samples = 100000"):
        done(asked(trained, choosing_samples=100_000), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"training\.steps: how long the model is mended is said by budget"):
        asked(trained, training={"steps": 5})
    assert asked(trained, training={"steps": None}).training == {"steps": None}
    with pytest.raises(ConfigError, match="latency"):
        asked(trained, target={"latency": 2})


def test_without_the_library_that_searches_it_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'auxin\[shrink\]'"):
        done(asked(trained), tmp_path / "smaller")


def test_time_that_is_up_begins_no_trial_but_the_first(trained, tmp_path):
    output = tmp_path / "smaller"
    settings = asked(trained, minutes=1e-6, budget=None, methods=["shortgpt", "taylor"], trials=3)
    outcome, lines = done(settings, output)
    assert "not mended" in lines[0]
    assert "1 of 3 trials: no time is left." in lines
    assert outcome.trials == 1
    assert outcome.chosen.before is None
    assert outcome.verdict == "The best of 1 ways is one method alone, at its default settings."


def test_a_model_that_was_changed_is_not_taken_for_the_one_that_was_written(trained, found, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(found[0], output)
    weights = next((output / MODEL).glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{MODEL} is not as it was written: .*{weights.name}"):
        done(asked(trained, trials=7), output)
    weights.write_bytes(whole)
    (output / MODEL / "NOTES.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"NOTES\.md was added"):
        done(asked(trained, trials=7), output)
    assert (output / MODEL / "NOTES.md").read_text() == "mine"


def test_sizes_are_counted_as_the_target_counts_them(trained, found):
    target = Target(memory=0.7, sequence_length=24, batch_size=64)
    model = auxin.load(trained.model)
    assert measured_sizes(model, target)["memory"] == target.of(model)
    flops = Target(flops=0.7, sequence_length=8)
    assert measured_sizes(model, flops)["flops"] == flops.of(model)
    assert found[1].whole.size == found[1].whole.parameters


def model_of(losses: list[float], title: str = "a way") -> Measured:
    return Measured(title=title, size=1.0, parameters=1, loss=sum(losses) / len(losses), losses=losses)


@pytest.mark.parametrize(
    ("chosen", "single", "alone", "said"),
    [
        (
            [1.0, 1.1, 0.9],
            [2.0, 2.1, 1.9],
            2,
            "It is better than the best method alone, taylor, by 1.0000 ± 0.00",
        ),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], 2, "It is worse than the best method alone, taylor, by 1.0000"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.1], 2, "It is no better than the best method alone, taylor: the two differ by"),
        ([1.0], [2.0], 2, "by 1.0000 nats; one sample does not say how sure that is"),
        ([1.0, math.nan], [1.0, 2.0], 2, "nothing can be said: losses are no finite numbers"),
        ([1.0, 2.0], None, 3, "The best of 9 ways is one method alone, at its default settings."),
        ([1.0, 2.0], None, 0, "No method alone, at its default settings, reaches the target."),
    ],
)
def test_the_verdict_says_what_the_losses_say(chosen, single, alone, said):
    other = None if single is None else model_of(single, "taylor")
    outcome = Outcome(
        **dict.fromkeys(("target", "unit", "flops_unit"), "token"), seconds=1.0, trials=9, alone=alone,
        whole=model_of([1.0]), chosen=model_of(chosen), single=other,
    )  # fmt: skip
    assert said in outcome.verdict


def test_a_way_that_fails_in_torch_ends_no_search(trained, found, tmp_path, monkeypatch):
    bench = Workbench(auxin.load(trained.model), PackedData.load(found[0] / DATA), Causal(), asked(trained))

    def fails(*_):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr("auxin.recipes.stage_models.make_plan", fails)
    trial = bench.tried(1, Candidate((Step("taylor"),)), tmp_path)
    assert trial.refused.endswith("LinAlgError: no convergence")
    assert trial.loss is None


@pytest.mark.parametrize(
    ("kind", "objective", "rows", "methods"),
    [
        ("labelled_text", "classification", labelled_rows(), ["finercut", "taylor"]),
        ("question_answering", "question_answering", question_rows(), ["taylor", "random"]),
    ],
)
def test_a_model_of_one_task_is_compared_by_the_loss_of_its_samples(tmp_path, kind, objective, rows, methods):
    texts = {"kind": kind, "paths": [str(write_rows(tmp_path / "rows.jsonl", rows))]}
    texts |= {"context_length": 24, "validation_fraction": 0.25}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    stages = [
        {"kind": "build", "model_type": "bert", "config": {**sizes, "max_position_embeddings": 24}},
        {"kind": "train", "name": "train", "settings": {"steps": 40, "batch_size": 16, "learning_rate": 5e-3}},
        {"kind": "evaluate"},
    ]
    recipe = Recipe.parse(
        {
            "name": "base",
            "title": "base",
            "data": {**texts, "vocab_size": 400},
            "training": {"objective": objective},
            "branches": [{"name": "main", "title": "main", "stages": stages}],
        }
    )
    run_recipe(recipe, tmp_path / "run", "", announce=lambda line: None)
    model = tmp_path / "run/branches/main/03-evaluate/checkpoint"
    values = {"methods": methods, "trials": 3, "samples": 8, "choosing_samples": 12, "budget": 64}
    settings = {"model": str(model), "target": {"flops": 0.8}, "data": {**texts, "tokenizer": str(model)}, **values}
    outcome, _ = done(ShrinkSettings.parse(settings), tmp_path / "smaller")
    assert outcome.target == "example"
    assert outcome.chosen.flops <= 0.8 * outcome.whole.flops
    assert 0 < outcome.chosen.loss < (2 if kind == "labelled_text" else 4)
    assert (outcome.unit, outcome.flops_unit) == ("example", "token")
    told = (tmp_path / "smaller" / PAGE).read_text()
    assert "Mended on 64 examples." in told
    assert "FLOPs per token" in told


def test_flops_of_an_image_are_not_called_those_of_a_token(tmp_path):
    images = {"kind": "labelled_images", "paths": [str(write_bars(tmp_path / "bars", 90, size=9))], "image_size": 8}
    images |= {"num_channels": 1, "labels": list(BARS), "validation_fraction": 0.25}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    build = {"kind": "build", "model_type": "vit", "config": {**sizes, "patch_size": 4}}
    branch = {"name": "main", "title": "main", "stages": [build, {"kind": "evaluate"}]}
    values = {"name": "base", "title": "base", "data": images, "training": {"objective": "classification"}}
    run_recipe(Recipe.parse({**values, "branches": [branch]}), tmp_path / "run", "", announce=lambda line: None)
    model = tmp_path / "run/branches/main/02-evaluate/checkpoint"
    few = {"methods": ["shortgpt", "taylor"], "trials": 2, "samples": 8, "choosing_samples": 12, "budget": 32}
    asked_of = {"model": str(model), "target": {"parameters": 0.8}, "data": images, **few}
    outcome, _ = done(ShrinkSettings.parse(asked_of), tmp_path / "smaller")
    assert (outcome.unit, outcome.flops_unit, outcome.target) == ("image", "image", "example")
    assert outcome.whole.flops == flops_per_token(auxin.load(model), 1).forward  # of all its patches
    told = [(tmp_path / "smaller" / name).read_text() for name in (PAGE, PICTURE)]
    assert "Mended on 32 images." in told[0]
    assert all("FLOPs per image" in text and "per token" not in text for text in told)


def test_no_way_in_the_front_is_beaten_by_another():
    losses_and_sizes = [(3.0, 5), (2.0, 7), (2.5, 6), (2.0, 8), (3.5, 5), (1.0, 9), (1.5, 9)]
    trials = [
        Trial(number=number, steps=[], loss=loss, flops=size) for number, (loss, size) in enumerate(losses_and_sizes)
    ]
    assert [trial.number for trial in front(trials, "flops")] == [0, 2, 1, 5]


def test_the_command_prints_the_choice(trained, tmp_path):
    output = tmp_path / "smaller"
    arguments = ["shrink", str(trained.model), "--target", "0.8", "--of", "flops", "--methods", "taylor", "shortgpt"]
    settings = ["samples=4", "choosing_samples=8", f"data={trained.data}".replace("'", '"')]
    changes = [word for value in settings for word in ("--set", value)]
    result = CliRunner().invoke(app, [*arguments, "--trials", "3", *changes, "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "Chosen: " in result.output
    assert (output / MODEL / "config.json").is_file()
    told = (output / "report.html").read_text()
    assert "auxin shrink" in told
    assert f"-o {output}" in told
