"""What alternating updates buy: runs the recipe `altup` (a decoder) or `altup-t5` over seeds.

    python benchmarks/altup.py decoder --jobs 2
    python benchmarks/altup.py t5 --jobs 2
    python benchmarks/altup.py decoder --seeds 0 --branches baseline altup-2

Finished branches are not run again.
"""

from pathlib import Path

from branches import run_all

from auxin.recipes import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]


def decoder(seed: int) -> Recipe:
    """The decoder's recipe with a seed."""
    return load_recipe("altup", [f"seed={seed}"])


def t5(seed: int) -> Recipe:
    """The T5's recipe with a seed."""
    return load_recipe("altup-t5", [f"seed={seed}"])


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--branches", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    o = parser.parse_args()
    run_all({"decoder": decoder, "t5": t5}[o.model], o.seeds, ROOT / "runs" / f"altup-{o.model}", o.branches, o.jobs)
