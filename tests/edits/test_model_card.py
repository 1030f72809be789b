"""The card of a model that needs auxin says so, and the rest of the card is left alone."""

import json
import os
import subprocess
import sys

import pytest

import auxin
from auxin.edits import MergeModule, Plan, ReplaceModule, apply_to_checkpoint
from auxin.edits.model_card import BEGIN, END, mark_model_card
from auxin.edits.runtimes import about_runtimes, without_auxin
from auxin.models.loading import load_config
from capabilities import probe
from tiny_models import tiny

LINEAR = "model.layers.*.mlp.down_proj"
REPLACED = Plan(
    method="by hand",
    promise="none",
    edits=[ReplaceModule(module=LINEAR, brick="low_rank_linear", settings={"rank": 4})],
)
MERGED = Plan(method="by hand", promise="exact", edits=[MergeModule(module=LINEAR)])


@pytest.fixture(scope="module")
def edited():
    return probe("graft", "llama").model.config


@pytest.fixture(scope="module")
def plain():
    return tiny("llama").config


@pytest.mark.parametrize(
    "card",
    [
        b"# A model\n\nIts text.\n",
        b"\n\nno heading, no end of line",
        b"---\nlicense: mit\n---\n\n# A model\n",
        b"---\nlicense: mit\ntags:\n- a\n---\n",
        b"---\r\nlicense: mit\r\n---\r\n# Lines of another system\r\n",
        b"# Latin-1: \xe4\xf6\xfc\n",
    ],
)
def test_the_section_comes_and_goes_and_the_rest_stays(card, edited, plain, tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(card)
    mark_model_card(tmp_path, plain)
    assert path.read_bytes() == card
    mark_model_card(tmp_path, edited)
    marked = path.read_bytes()
    section = marked[marked.index(BEGIN.encode()) : marked.index(END.encode())]
    assert without_auxin(edited).encode() in section
    if card.startswith(b"---"):
        assert marked.startswith(card[: card.rindex(b"---") + 3]), "the data for the Hub stays at the top"
    else:
        assert marked.startswith(BEGIN.encode())
    mark_model_card(tmp_path, edited)
    assert path.read_bytes() == marked, "it is there once"
    mark_model_card(tmp_path, plain)
    assert path.read_bytes() == card


def test_a_card_that_holds_nothing_else_is_made_and_goes_again(edited, plain, tmp_path):
    mark_model_card(tmp_path, edited)
    assert (tmp_path / "README.md").read_text().startswith(BEGIN)
    mark_model_card(tmp_path, plain)
    assert not (tmp_path / "README.md").exists()


def test_a_checkpoint_has_it_until_a_plan_makes_it_plain(tmp_path):
    source, replaced, merged = (tmp_path / name for name in ("source", "replaced", "merged"))
    tiny("llama").save_pretrained(source)
    (source / "README.md").write_text("# A model\n")
    apply_to_checkpoint(REPLACED, source, replaced)
    card = (replaced / "README.md").read_text()
    assert card.endswith("\n# A model\n")
    assert without_auxin(load_config(replaced)) in card
    apply_to_checkpoint(MERGED, replaced, merged)
    assert (merged / "README.md").read_text() == "# A model\n"
    assert (source / "README.md").read_text() == "# A model\n"


LOAD = """
import json, sys
import transformers
from transformers import AutoModelForCausalLM

model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert "auxin" not in sys.modules
found = {"parameters": sum(p.numel() for p in model.parameters()), "brick": type(model.model.layers[0].mlp.down_proj)}
print(json.dumps({**found, "brick": found["brick"].__name__, **{k: sorted(report[k]) for k in report}}, default=str))
"""


def test_without_auxin_transformers_does_what_is_written(tmp_path):
    """In a process of its own: the warning, the plain model, and what is reported of weights that don't fit."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "source")
    auxin.apply(REPLACED, tmp_path / "source", output=tmp_path / "edited")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "edited")],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    note = about_runtimes(load_config(tmp_path / "edited"))
    assert note.endswith(without_auxin(load_config(tmp_path / "edited")))
    logged = "Unknown quantization type, got auxin"
    assert logged in done.stderr
    assert logged in note
    found = json.loads(done.stdout)
    assert found["brick"] == "Linear"
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert all(key.endswith("down_proj.weight") for key in found["missing_keys"])
    assert all("_factor" in key for key in found["unexpected_keys"])
    assert found["missing_keys"]
    assert found["unexpected_keys"]
