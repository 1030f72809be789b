"""A folder of an edited model loads as what it is or, where auxin is not imported, not at all."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import auxin
from auxin.edits.runtimes import about_runtimes, without_auxin
from auxin.edits.saved import complete
from auxin.errors import CheckpointError, ConfigError
from auxin.models.loading import load_config
from auxin.models.weight_files import weight_files
from auxin.training.checkpoint import write_checkpoint_folder
from edits.replaced_linear import MERGED, REPLACED
from tiny_models import tiny

LOAD = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

for folder in sys.argv[1:]:
    for cls in (AutoModelForCausalLM, LlamaForCausalLM, AutoModel):
        try:
            model = cls.from_pretrained(folder)
            layer = model.get_decoder().layers[0]
            print(json.dumps([folder, cls.__name__, type(layer.mlp.down_proj).__name__]))
        except OSError as error:
            print(json.dumps([folder, cls.__name__, str(error)]))
assert "auxin" not in sys.modules
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain model, and one with replaced modules in each of the ways in which its folder comes to be."""
    path = tmp_path_factory.mktemp("folders")
    tiny("llama").save_pretrained(path / "plain")
    tiny("llama").save_pretrained(path / "plain_shards", max_shard_size="20KB")
    for name in ("plain", "plain_shards"):
        auxin.apply(REPLACED, path / name, output=path / name.replace("plain", "applied"))
    model = auxin.load(path / "applied")
    auxin.save(model, path / "saved")
    write_checkpoint_folder(path / "trained", model)
    model.save_pretrained(path / "bare")
    return path


EDITED = ("applied", "applied_shards", "saved", "trained")


def loaded_without_auxin(*folders):
    """What transformers makes of each folder in a process of its own, and all that it logs."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_without_auxin_the_folder_of_an_edited_model_is_refused(folders):
    found, _ = loaded_without_auxin(*(folders / name for name in EDITED), folders / "plain", folders / "plain_shards")
    for folder, _, told in found:
        if "plain" in folder:
            assert told == "Linear"
        else:
            assert "no file named model.safetensors" in told, folder
    assert len(found) == 6 * 3


def test_with_auxin_it_is_the_edited_model(folders):
    expected = auxin.load(folders / "applied").state_dict()
    for name in (*EDITED, "bare"):
        model = AutoModelForCausalLM.from_pretrained(folders / name)
        assert type(model.model.layers[0].mlp.down_proj).__name__ == "LowRankLinear"
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        assert not hasattr(model.config, "transformers_weights")
        assert "weights" not in model.config.quantization_config


def test_of_a_file_with_the_plain_name_transformers_makes_what_is_written(folders):
    """`save_pretrained` names it so; transformers warns, and drops the edits."""
    found, log = loaded_without_auxin(folders / "bare")
    assert [told for *_, told in found] == ["Linear"] * 3
    logged = "Unknown quantization type, got auxin"
    assert logged in log
    note = about_runtimes(load_config(folders / "bare"), "model.safetensors")
    assert logged in note
    assert note.endswith(without_auxin(load_config(folders / "bare"), "model.safetensors"))


def test_a_model_that_becomes_plain_has_the_plain_name_again(folders, tmp_path):
    for name in ("applied", "applied_shards"):
        auxin.apply(MERGED, folders / name, output=tmp_path / name)
        plain, merged = (
            sorted(path.name for path in folder.iterdir()) for folder in (folders / "plain", tmp_path / name)
        )
        if name == "applied":
            assert set(merged) - {"ledger.json", "SHA256SUMS"} == set(plain)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
    found, _ = loaded_without_auxin(tmp_path / "applied", tmp_path / "applied_shards")
    assert [told for *_, told in found] == ["Linear"] * 6


def test_a_plan_without_structure_keeps_the_name(folders, tmp_path):
    plan = auxin.plan(folders / "applied", "stacking", factor=2)
    auxin.apply(plan, folders / "applied", output=tmp_path / "deeper")
    assert (tmp_path / "deeper" / "edited_model.safetensors").is_file()
    assert auxin.load(tmp_path / "deeper").config.num_hidden_layers == 2 * tiny("llama").config.num_hidden_layers


def test_a_trainers_checkpoint_keeps_the_name_that_a_trainer_looks_for(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}\n")
    (tmp_path / "checkpoint-1" / "scheduler.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"keep the name model\.safetensors.* auxin\.save make one that it refuses"):
        receipt = auxin.apply(REPLACED, tmp_path / "checkpoint-1", output=tmp_path / "edited")
    assert any("keep the name" in note for note in receipt.notes)
    assert (tmp_path / "edited" / "model.safetensors").is_file()
    assert "auxin.load and auxin.save" in (tmp_path / "edited" / "README.md").read_text()
    assert type(auxin.load(tmp_path / "edited").model.layers[0].mlp.down_proj).__name__ == "LowRankLinear"


def test_a_trainers_log_beside_a_finished_model_takes_no_protection_away(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "finished")
    (tmp_path / "finished" / "trainer_state.json").write_text("{}\n")
    assert auxin.apply(REPLACED, tmp_path / "finished", output=tmp_path / "edited").notes == []
    assert (tmp_path / "edited" / "edited_model.safetensors").is_file()


def test_of_two_files_the_one_counts_that_the_config_names(folders, tmp_path):
    """As `from_pretrained` has it."""
    shutil.copytree(folders / "saved", tmp_path / "both")
    shutil.copy(folders / "plain" / "model.safetensors", tmp_path / "both")
    assert [path.name for path in weight_files(tmp_path / "both")] == ["edited_model.safetensors"]
    auxin.apply(MERGED, tmp_path / "both", output=tmp_path / "merged")
    expected = auxin.load(folders / "saved").model.layers[0].mlp.down_proj
    merged = auxin.load(tmp_path / "merged").model.layers[0].mlp.down_proj.weight
    assert torch.allclose(merged, expected.output_factor @ expected.input_factor, atol=1e-6)


def test_save_takes_a_model_and_a_free_folder(folders):
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        auxin.save(tiny("llama"), folders / "plain")
    with pytest.raises(ConfigError, match=r"auxin\.save writes a model in memory"):
        auxin.save(folders / "plain", folders / "other")
    assert not (folders / "other").exists()


@pytest.mark.parametrize("others", [None, {"quant_method": "other", "weights": "int4"}])
def test_what_stands_in_the_place_of_our_edits_is_left_alone(tmp_path, others):
    """Some configs hold a null there, and others the settings of a quantizer."""
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": others}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert complete(tmp_path, model.config) == []
    assert json.loads((tmp_path / "config.json").read_text()) == values


def test_a_config_with_a_null_for_its_quantizer_is_saved_and_changed(folders, tmp_path):
    model = tiny("llama")
    model.config.quantization_config = None
    auxin.save(model, tmp_path / "saved")
    shutil.copytree(folders / "plain", tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    auxin.apply(REPLACED, tmp_path / "source", output=tmp_path / "edited")
    auxin.apply(
        auxin.plan(tmp_path / "source", "hypercloning", factor=2), tmp_path / "source", output=tmp_path / "wide"
    )
    auxin.load(tmp_path / "wide")
