"""Which files of a folder hold the model's weights, as from_pretrained has it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from auxin.errors import CheckpointError
from auxin.models.weight_files import read_tensor, stored_tensors, weight_files


def write(folder, *names):
    for name in names:
        save_file({f"{name}.weight": torch.ones(2)}, folder / name)


def indexed(folder, *names):
    places = {f"{name}.weight": name for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_the_whole_file_goes_before_the_index_and_that_before_others(tmp_path):
    write(tmp_path, "adapter_model.safetensors", "consolidated.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["adapter_model.safetensors", "consolidated.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write(tmp_path, *shards)
    indexed(tmp_path, *shards)
    assert [path.name for path in weight_files(tmp_path)] == shards
    assert stored_tensors(tmp_path) == {f"{name}.weight": tmp_path / name for name in shards}
    write(tmp_path, "model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    places = stored_tensors(tmp_path)
    assert places == {"model.safetensors.weight": tmp_path / "model.safetensors"}
    assert torch.equal(read_tensor(tmp_path / "model.safetensors", "model.safetensors.weight"), torch.ones(2))


def test_an_edited_models_weights_have_a_name_of_their_own(tmp_path):
    write(tmp_path, "edited_model.safetensors", "adapter_model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["edited_model.safetensors"]
    write(tmp_path, "model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"], "what save_pretrained wrote later"


def test_an_index_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json can't be read"):
        weight_files(tmp_path)
    assert stored_tensors(tmp_path) == {}
