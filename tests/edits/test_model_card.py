"""The card of a model that needs auxin says so, and the rest of the card is left alone."""

import pytest

from auxin.edits import apply_to_checkpoint
from auxin.edits.model_card import BEGIN, END, mark_model_card
from auxin.edits.runtimes import without_auxin
from auxin.models.loading import load_config
from capabilities import probe
from edits.replaced_linear import MERGED, REPLACED
from tiny_models import tiny


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
