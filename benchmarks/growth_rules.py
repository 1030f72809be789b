"""Which rule for new parameter tokens is best? The recipe `growth-rules`, for several growth factors and seeds.

    python benchmarks/growth_rules.py --jobs 2
    python benchmarks/growth_rules.py --factors 4 --seeds 0 --set data.max_bytes=1000000

Finished branches are not run again. About 25 minutes of one core per factor and seed.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from auxin.accounting.results import BranchResult, RunResults
from auxin.accounting.statistics import Spread, written
from auxin.recipes import load_recipe, run_seeds

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "growth-rules"
RESULTS = ROOT / "benchmarks" / "results" / "growth_rules.json"
TABLE = ROOT / "docs" / "results" / "growth_rules.md"
TOKENS = 64
"""Parameter tokens of a projection after the growth; four times as many in the feed-forward part."""


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of auxin run")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/growth_rules.py", *sys.argv[1:]])
    found = {}
    for factor in arguments.factors:
        sizes = {"qkv_tokens": TOKENS // factor, "proj_tokens": TOKENS // factor, "ffn_tokens": 4 * TOKENS // factor}
        changes = [f"branches.0.stages.0.config.{name}={size}" for name, size in sizes.items()]
        recipe = load_recipe("growth-rules", [*changes, *arguments.set])
        folder = arguments.runs / f"factor-{factor}"
        found[factor] = run_seeds(recipe, folder, command, seeds=arguments.seeds, jobs=arguments.jobs)
    rows = {factor: [_row(branch) for branch in results.branches] for factor, results in found.items()}
    arguments.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    arguments.table.write_text(page(found, command), encoding="utf-8")
    print(arguments.table.read_text(encoding="utf-8"))


def page(found: dict[int, RunResults], command: str) -> str:
    """The results as Markdown."""
    first = next(iter(found.values()))
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    lines = [
        "# Growth rules compared",
        "",
        f"{first.description} Held-out loss in nats per byte (token): mean over the seeds with its 95 % interval. All "
        "branches of a factor end at the same total training FLOPs.",
        "",
        f"Command: `{command}`. Seeds: {', '.join(map(str, first.seeds))}. Machine: {first.machine['processor']}, "
        f"{first.machine['cores']} cores, one thread per branch. Versions: {versions}. Data: {first.data['source']}, "
        f"fingerprint {first.data['fingerprint'][:16]}.",
    ]
    for factor, results in found.items():
        lines += [
            "",
            f"## Growth by a factor of {factor} ({TOKENS // factor} -> {TOKENS} tokens)",
            "",
            "| rule | change at growth | after a third | final loss | final minus grouped, seed by seed |",
            "|---|--:|--:|--:|--:|",
        ]
        for branch in sorted(results.branches, key=lambda branch: branch.value or 0.0):
            row = _row(branch)
            title = f"**{branch.title}**" if branch.name == results.main_branch else branch.title
            lines.append(f"| {title} | {row['change']} | {row['third']} | {row['final']} | {row['gap']} |")
    return "\n".join(lines) + "\n"


def _row(branch: BranchResult) -> dict[str, str]:
    """The cells of one branch."""
    assert branch.spread is not None
    changes = branch.growths[-1].changes if branch.growths else None
    # The first measurement after the growth, which is a third of the way.
    later = [point for point in branch.curve if point.stage == "after" and point.value is not None][1:2]
    third = later[0] if later and branch.growths else None
    return {
        "rule": branch.title,
        "change": "-" if changes is None else written(changes, 5, sign=True),
        "third": "-" if third is None else written(Spread(values=[], mean=third.value, half_width=third.half_width), 4),
        "final": written(branch.spread.value, 4),
        "gap": "-" if branch.spread.gap is None else written(branch.spread.gap, 4, sign=True),
    }


if __name__ == "__main__":
    main()
