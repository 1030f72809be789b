"""TokenFormer beside dense Transformers of as many parameters, one thing at a time, over seeds.

Three parts: `small` (590,000 parameters, the recipe parity.yaml), `large` (3.3 million in the paper's proportions,
parity_3m.yaml) and `bytes` (some of the small ones on bytes instead of a vocabulary of 512).

    python benchmarks/parity.py --jobs 2
    python benchmarks/parity.py --parts small --seeds 0 --branches dense new

Finished branches are not run again; the page has what is finished. A branch and seed takes a minute and a half of one
core, a large one ten.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from comparing import chosen_recipe, compared, options

from auxin.accounting.comparison import Comparison
from auxin.recipes import load_recipe, read_comparison
from auxin.report.comparison import estimate_text
from auxin.report.markdown import markdown_table, origin

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "parity.json"
TABLE = ROOT / "docs" / "results" / "parity.md"
HEADER = ("model", "parameters", "seeds", "final loss", "minus the dense one's")


@dataclass(frozen=True)
class Part:
    """A recipe and what is changed of it."""

    heading: str
    recipe: str
    changes: tuple[str, ...] = ()
    branches: tuple[str, ...] | None = None
    """The branches to run; None: all."""


PARTS = {
    "small": Part("590,000 parameters", "parity.yaml"),
    "large": Part("3.3 million parameters, the paper's proportions", "parity_3m.yaml"),
    "bytes": Part(
        "590,000 parameters, bytes",
        "parity.yaml",
        ("data.vocab_size=257",),  # the bytes and a separator
        ("dense", "dense-0060", "llama", "published", "new", "new-0060"),
    ),
}


def main() -> None:
    """Run what is missing, then write the results and the tables."""
    parser = options(__doc__, ROOT / "runs" / "parity")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.set_defaults(results=RESULTS, table=TABLE)
    arguments = parser.parse_args()
    if not arguments.read_only:
        for name in arguments.parts:
            run(PARTS[name], arguments.runs / name, arguments)
    found = {name: read_comparison(arguments.runs / name) for name in PARTS if (arguments.runs / name).is_dir()}
    record = {name: comparison.model_dump(mode="json") for name, comparison in found.items()}
    arguments.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    arguments.table.write_text(page(found), encoding="utf-8")
    print(f"Written to {arguments.table} and {arguments.results}", file=sys.stderr)


def run(part: Part, folder: Path, arguments: argparse.Namespace) -> None:
    """Run what is missing of one part."""
    own = {"set": [*part.changes, *arguments.set], "runs": folder, "branches": arguments.branches or part.branches}
    changed = argparse.Namespace(**{**vars(arguments), **own})
    compared(chosen_recipe(str(ROOT / "benchmarks" / part.recipe), changed), changed)


def page(found: dict[str, Comparison]) -> str:
    """The results as Markdown."""
    lines = [
        "# TokenFormer beside dense Transformers, one thing at a time",
        "",
        "Held-out loss in nats per token at the end: mean over the seeds and 95 % interval (Student's t). Differences "
        "are taken seed by seed. What follows from it is in [parity.md](../parity.md).",
    ]
    for name, comparison in found.items():
        order = sorted(comparison.branches, key=lambda branch: branch.value.mean if branch.value else float("inf"))
        rows = [
            [
                branch.title,
                f"{branch.parameters:,}",
                str(len(branch.seeds)),
                estimate_text(branch.value, 3),
                "-" if branch.name == comparison.main_branch else estimate_text(branch.difference, 3, signed=True),
            ]
            for branch in order
        ]
        part = PARTS[name]
        lines += ["", f"## {part.heading}", "", comparison.description, "", origin(comparison), ""]
        lines += markdown_table(HEADER, rows)
        recipe, run_already = load_recipe(str(ROOT / "benchmarks" / part.recipe)), {branch.name for branch in order}
        wanted = [branch for branch in recipe.branches if part.branches is None or branch.name in part.branches]
        if missing := [branch.title for branch in wanted if branch.name not in run_already]:
            lines += ["", f"In the recipe, and not run yet: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
