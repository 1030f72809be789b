"""Files of a plan lie beside it, travel into the checkpoint, and are what they were when the plan was made."""

import hashlib

import pytest
import torch
from safetensors.torch import save as safetensors_bytes

from auxin.edits import Plan, ProjectParameter, SetConfig, apply, apply_to_checkpoint, inverse_plan
from auxin.edits.plan_files import PlanFile
from auxin.errors import ConfigError, PlanError
from tiny_models import tiny


def projecting(folder, width: int = 48) -> Plan:
    """Other feed-forward units, by a random matrix in a file."""
    matrix = torch.randn(width, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 5
    file = PlanFile.write(folder, "operator.safetensors", safetensors_bytes({"B": matrix}))
    parts = [("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)]
    edits = [
        ProjectParameter(
            parameter=f"model.layers.*.mlp.{name}", axis=axis, file=file.name, tensor="B", shape=(width, 24)
        )
        for name, axis in parts
    ]
    plan = Plan(
        method="by hand",
        promise="none",
        edits=[SetConfig(values={"intermediate_size": width}), *edits],
        files=[file],
    )
    return plan.beside(folder)


def model():
    return tiny("llama", mlp_bias=False, intermediate_size=24)


def test_a_file_is_named_with_the_hash_of_its_content(tmp_path):
    file = PlanFile.write(tmp_path / "deeper", "tokenizer.json", b"{}")
    assert file.sha256 == hashlib.sha256(b"{}").hexdigest()
    assert file.name == f"tokenizer-{file.sha256[:8]}.json"
    assert file.find(tmp_path / "deeper").read_bytes() == b"{}"


def test_plan_and_file_may_be_moved_together(tmp_path):
    plan = projecting(tmp_path / "made")
    (tmp_path / "other").mkdir()
    plan.to_yaml(tmp_path / "other" / "plan.yaml")
    (tmp_path / "made").rename(tmp_path / "gone")
    read = Plan.from_yaml(tmp_path / "other" / "plan.yaml")
    assert read == plan
    first, second = model(), model()
    apply(read, first)
    apply(plan.beside(tmp_path / "gone"), second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_file_travels_in_the_checkpoint(tmp_path):
    plan = projecting(tmp_path / "plan")
    model().save_pretrained(tmp_path / "old")
    apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    (file,) = plan.files
    kept = tmp_path / "new" / "plan-files" / file.name
    assert kept.read_bytes() == (tmp_path / "plan" / file.name).read_bytes()
    again = projecting(tmp_path / "plan", width=24)
    apply(plan.beside(tmp_path / "new"), model())
    assert again.files[0].name != file.name


def test_a_shape_needs_no_file(tmp_path):
    plan = Plan.model_validate(projecting(tmp_path).model_dump(mode="json"))
    assert "project axis 0 by B" in plan.table(model())
    with pytest.raises(PlanError, match=r"where the plan lies is not known.*beside"):
        apply(plan, model())


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_other_content_or_none_is_refused_before_anything_changes(tmp_path, where):
    plan = projecting(tmp_path)
    path = tmp_path / plan.files[0].name
    victim = model()
    victim.save_pretrained(tmp_path / "old")
    weights = {name: tensor.clone() for name, tensor in victim.state_dict().items()}

    def attempt():
        apply(plan, victim) if where == "memory" else apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")

    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(PlanError, match="has other content than the plan was made with"):
        attempt()
    path.unlink()
    with pytest.raises(PlanError, match=r"operator-\w{8}\.safetensors is not in .* it belongs beside the plan"):
        attempt()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in victim.state_dict().items())
    assert not (tmp_path / "new").exists()


def test_a_file_takes_the_place_of_the_one_it_was_made_for_only(tmp_path):
    model().save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "tokenizer.json").write_text("old")
    (tmp_path / "old" / "merges.txt").write_text("stale")
    told = hashlib.sha256(b"old").hexdigest()
    file = PlanFile.write(tmp_path, "tokenizer.json", b"new", into="tokenizer.json", instead_of=told)
    plan = Plan(method="x", promise="exact", edits=[], files=[file], drops=["merges.txt"]).beside(tmp_path)
    apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "new"
    assert not (tmp_path / "new" / "merges.txt").exists()
    with pytest.raises(PlanError, match="is not the file that the plan was made for"):
        apply_to_checkpoint(plan, tmp_path / "new", tmp_path / "newer")
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.json", "a/../../b"])
def test_a_file_lies_within_its_folder(name):
    with pytest.raises(ConfigError, match="must lie in the folder"):
        PlanFile.parse({"name": "f", "sha256": "0" * 64, "into": name})
    with pytest.raises(ConfigError, match="must lie in the folder"):
        PlanFile.parse({"name": name, "sha256": "0" * 64})
    with pytest.raises(ConfigError, match="must lie in the folder"):
        Plan.parse({"method": "x", "promise": "none", "edits": [], "drops": [name]})


@pytest.mark.parametrize("name", [".", "", "config.json", "training/state.json", "x.safetensors", "a\0b", "n" * 300])
def test_a_plan_touches_no_file_that_it_makes_itself(name):
    with pytest.raises(ConfigError, match="must name a file beside"):
        PlanFile.parse({"name": "f", "sha256": "0" * 64, "into": name})
    with pytest.raises(ConfigError, match="must name a file beside"):
        Plan.parse({"method": "x", "promise": "none", "edits": [], "drops": [name]})


def test_a_plan_that_changes_files_has_no_inverse(tmp_path):
    plan = Plan(method="x", promise="exact", edits=[], drops=["merges.txt"])
    with pytest.raises(PlanError, match=r"changes files of the checkpoint \(merges\.txt\)"):
        inverse_plan(plan, model())
