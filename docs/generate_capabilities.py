"""Write docs/capabilities.md: what every method does to every architecture, probed on tiny models.

python docs/generate_capabilities.py           rewrites the page
python docs/generate_capabilities.py --check   changes nothing, exits with 1 when the page is out of date
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from capabilities import built_in, counted, matrix  # noqa: E402 - from the tests' folder
from tiny_models import FAMILIES, GROUPS  # noqa: E402

PAGE = ROOT / "docs" / "capabilities.md"
INTRODUCTION = """# What works on what

Written by `python docs/generate_capabilities.py`, which applies every method, with settings of its own choice, to a
tiny model of every architecture with nothing trivial in it: random gains and biases, windows shorter than the inputs,
multipliers that are not 1. `tests/test_every_method.py` and `tests/test_architectures.py` go over the same cases:
nothing moves under a promise, cached decoding is full decoding, and what is saved loads in a new process to the bit.

| cell | meaning |
|---|---|
| exact | the function is the same, and the executor has checked it |
| approx, other | it is nearly the same, or another one, and the method says so |
| + | replayed: the config alone can't say what the model is; it loads in transformers after `import auxin` |
| no (1) | refused, for the reason of that number; numbers in it (layers, heads, widths) are the tiny model's |

What has no + loads without auxin (a TokenFormer always needs it). Names in code letters are model types, with a word
behind where there are several models of one. Any other architecture of transformers: methods that need a list of layers
and no more (`stacking`, `solar`, `llama-pro`), or single modules (`graft`, `vocabulary`), take it where they can.
"""


def page() -> str:
    """The whole page."""
    found, notes = built_in(), dict[str, int]()
    kinds = {"In every way": FAMILIES} | {group.TITLE: list(group.MODELS) for group in GROUPS}
    families = [family for kind in kinds.values() for family in kind]
    total = counted(found, families)
    parts = [INTRODUCTION, f"\nOf {total.total()} cells, {_in_words(total)}.\n"]
    for title, kind in kinds.items():
        parts.append(f"\n## {title}\n\n{_in_words(counted(found, kind)).capitalize()}.\n\n")
        parts.append(matrix(found, kind, notes))
    parts.append("\n## Refused because\n\n" + "".join(f"{number}. {text}\n" for text, number in notes.items()))
    promises = "".join(f"- `{name}`: {method.promise}.\n" for name, method in found.items())
    return "".join(parts) + f"\n## What each promises, and when\n\n{promises}"


def _in_words(cells: Counter[str]) -> str:
    words = {"exact": "exact", "approximate": "approximate", "none": "another function", "refused": "refused"}
    return ", ".join(f"{cells[key]} {word}" for key, word in words.items() if cells[key])


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
