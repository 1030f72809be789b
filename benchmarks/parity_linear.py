"""What it costs a TokenFormer, in a training six times as long, that the projections of its attention are not linear.

The models, data and rates are those of `parity.yaml`, over 4,200 steps instead of 700. Every way changes some of the
projections of the attention in a new model, and nothing else; the number of parameters stays the same:

- linear: the scores go on as they are, without GELU, so that a projection is a product of two matrices;
- dense: a projection is one matrix of full rank (64 keys and values of width 128 have just as many parameters).

    python benchmarks/parity_linear.py --seeds 0 --jobs 2
    python benchmarks/parity_linear.py --quick

Finished cells are not measured again: after a change of the recipe give another --runs. About a quarter of an hour
of one core per way and seed.
"""

from typing import Any

from measuring import publish
from parity_cells import ROOT, Cell, Same, Task, Way, asked, learnt, losses_page, measured, with_attention
from torch import nn

from auxin.nn import Pattention

RESULTS = ROOT / "benchmarks" / "results" / "parity_linear.json"
PAGE = ROOT / "docs" / "results" / "parity_linear.md"
LONG = ["training.steps=4200", "training.evaluation_interval=700"]
QKV, PROJ = "query key value", "proj"
WAYS = {
    "new": Way("TokenFormer, a new model's constants, rate 3e-3", "new"),
    "linear": Way("query, key, value and output projection linear, of rank 64", "new", f"linear {QKV} {PROJ}"),
    "dense": Way("the four dense, of rank 128", "new", f"dense {QKV} {PROJ}"),
    "linear-qkv": Way("query, key and value linear, of rank 64", "new", f"linear {QKV}"),
    "linear-proj": Way("the output projection linear, of rank 64", "new", f"linear {PROJ}"),
}


def linear(module: Pattention) -> Pattention:
    """A Pattention whose weights are its scores; it begins with the tokens of `module`."""
    return Same(module, score_function="linear")


def dense(module: Pattention) -> nn.Linear:
    """One matrix in the place of `module`, drawn like those of a GPT-NeoX."""
    made = nn.Linear(module.in_features, module.out_features, bias=False)
    nn.init.normal_(made.weight, std=0.02)
    return made


FORMS: dict[str, Any] = {"linear": linear, "dense": dense}


def measure(task: Task) -> Cell:
    """Train one way with one seed."""
    return learnt(task, with_attention(task, FORMS))


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    header = ("the projections of the attention", "parameters", "final loss", "minus a new model's")
    return losses_page(results, WAYS, "Projections of the attention that are linear", "six-times-as-long", 4200, header)


def main() -> None:
    """Measure what is missing, then write the results and the page."""
    arguments = asked(__doc__, ROOT / "runs" / "parity-linear")
    results = measured(arguments, WAYS, measure, "parity_linear.py", LONG)
    publish(results, RESULTS, page_of(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
