"""Write docs/capabilities.md: what every method does to every architecture, probed on tiny models.

python docs/generate_capabilities.py           rewrites the page
python docs/generate_capabilities.py --check   changes nothing, exits with 1 when the page is out of date
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from capabilities import built_in, matrix  # noqa: E402 - from the tests' folder
from tiny_models import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "capabilities.md"
INTRODUCTION = """# What works on what

Written by `python docs/generate_capabilities.py`, which applies every method, with settings of its own choice, to a
tiny model of every architecture: random gains and biases, grouped-query heads, tied heads where the architecture has
them. `tests/test_every_method.py` goes over the same cases.

- **exact**: the function is the same, and the executor has checked it.
- **approximate**, **changes the function**: it is not, and the method does not claim it.
- **replayed**: the config alone can't say what the model is; it loads in transformers after `import auxin`, and
  runtimes that don't know auxin refuse it. All others load without auxin (a TokenFormer always needs it).
- **refused**: with the reason below. A number in it (layers, heads, widths) is the tiny model's.

"""


def page() -> str:
    """The whole page."""
    return INTRODUCTION + matrix(built_in(), FAMILIES)


def main() -> None:
    """Rewrite or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when the page is out of date")
    check = parser.parse_args().check
    text = page()
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    if stale and not check:
        PAGE.write_text(text, encoding="utf-8")
    if stale:
        print("out of date" if check else "rewritten:", PAGE)
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
