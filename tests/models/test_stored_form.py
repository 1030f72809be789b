"""The form in which transformers keeps tensors in files, for one tensor at a time."""

import pytest
import torch
from safetensors.torch import load_file

from auxin.models.loading import load_model
from auxin.models.stored_form import StoredForm
from tiny_models import tiny


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("mixtral", {"num_local_experts": 12}),  # 10 comes behind 9
        *((family, {}) for family in ("qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "llama")),
    ],
)
def test_one_tensor_at_a_time_is_saved_and_merged_as_transformers_does_all(family, values, tmp_path):
    tiny(family, seed=3, dtype=torch.float32, **values).save_pretrained(tmp_path)
    model, stored = load_model(tmp_path), load_file(tmp_path / "model.safetensors")
    form = StoredForm(model)
    pieces = form.pieces(name for name in stored if form.loaded_as(name) not in model.state_dict())
    assert bool(pieces) == (family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"))
    written = {}
    for name, tensor in model.state_dict().items():
        parts = form.saved(name, tensor)
        written |= parts
        if name in pieces:
            assert set(parts) == set(pieces[name])
            assert torch.equal(form.merged(name, {part: stored[part] for part in pieces[name]}), tensor)
        else:
            assert [form.loaded_as(part) for part in parts] == [name]
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())


def test_tensors_that_lie_in_one_are_whole_where_all_of_them_are_there():
    model = tiny("dinov2 gated")
    assert StoredForm(model).incomplete() == {}
    part = model.dinov2.encoder.layer[1].mlp
    part.gate_proj = torch.nn.Identity()
    found = StoredForm(model).incomplete()
    start = "dinov2.encoder.layer.1.mlp"
    assert found == {f"{start}.weights_in.{kind}": [f"{start}.up_proj.{kind}"] for kind in ("bias", "weight")}
    part.up_proj = torch.nn.Identity()
    assert StoredForm(model).incomplete() == {}
