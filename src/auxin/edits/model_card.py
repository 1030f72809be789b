"""The model card of a checkpoint whose config holds structural edits says that it needs auxin."""

import re
from pathlib import Path

from transformers import PreTrainedConfig

from auxin.edits.runtimes import without_auxin
from auxin.models.weight_files import first_file

FILE = "README.md"
BEGIN, END = "<!-- auxin:begin -->", "<!-- auxin:end -->"
TITLE = "## Needs auxin"

_SECTION = re.compile(rf"{BEGIN}.*?{END}\n?\n?", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?\n)?---[ \t]*(\r?\n)+", re.DOTALL)
"""The card's data for the Hub, which has to stay at the top."""


def mark_model_card(folder: Path, config: PreTrainedConfig) -> None:
    """Let the model card in `folder` say how a model of `config` is loaded, where its structural edits ask for it.

    The section stands first in the card, behind the data for the Hub, between two comments; a card is made where there
    is none. Where the model is plain the section goes, and with it a card that holds nothing else. The rest of the card
    stays as it is, byte by byte.
    """
    path = folder / FILE
    # What is no UTF-8 is carried through, and so are the ends of lines.
    card = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""
    marked = _SECTION.sub("", card)
    weights = first_file(folder)
    warning = without_auxin(config) if weights is None else without_auxin(config, weights.name)
    if warning is not None:
        front = match[0] if (match := _FRONT_MATTER.match(marked)) else ""
        body = marked.removeprefix(front)
        section = f"{BEGIN}\n{TITLE}\n\nThe config.json of this model keeps edits that Auxin does. {warning}\n{END}\n"
        marked = front + section + (f"\n{body}" if body else "")
    if marked == card:
        return
    # A new file: one that was copied may be read-only.
    path.unlink(missing_ok=True)
    if marked:
        path.write_bytes(marked.encode("utf-8", "surrogateescape"))
