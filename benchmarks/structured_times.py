"""How long the products of structured-ffn take beside the dense layer, from 1 to 4,096 tokens at once.

    python benchmarks/structured_times.py

The widths are those of a feed-forward part of 768 and 3,072 units (BERT-base, GPT-2, the paper's smallest). A few
minutes of one core. With few tokens at once layers lie in a row of copies, so that each reads its weights anew.
"""

import os
from pathlib import Path
from typing import Any

# Times are of one thread; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import asked_quick, made_by, made_by_line, publish
from torch import nn

from auxin.nn.bricks import find_brick
from auxin.planning.product_times import TOKENS, ProductTimes, faster_from
from auxin.report.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "structured_times.json"
PAGE = ROOT / "docs" / "results" / "structured_times.md"
FORMS: dict[str, tuple[str, dict[str, int]]] = {
    "low-rank, 63 %": ("low_rank_linear", {"rank": 384}),
    "low-rank, 32 %": ("low_rank_linear", {"rank": 192}),
    "block-dense, 2 blocks, 56 %, or 37 % to fewer units": ("block_dense_linear", {"rank": 384, "blocks": 2}),
    "block-shuffle, 2 blocks, 63 %": ("block_shuffle_linear", {"blocks": 2}),
    "block-shuffle, 4 blocks, 31 %": ("block_shuffle_linear", {"blocks": 4}),
}


def measure(quick: bool) -> dict[str, Any]:
    """Seconds of the dense layer and of each product, by widths, form and tokens."""
    found: dict[str, Any] = {}
    for inputs, outputs in ((768, 3072), (3072, 768)):
        with torch.device("meta"):
            dense = nn.Linear(inputs, outputs, bias=False)
        products: list[nn.Module] = [find_brick(name).replacing(dense, **sizes) for name, sizes in FORMS.values()]  # type: ignore[attr-defined]
        times = ProductTimes(torch.float32)
        rows = {tokens: times.seconds([dense, *products], tokens) for tokens in (TOKENS[:1] if quick else TOKENS)}
        found[f"{inputs} -> {outputs}"] = {str(tokens): row for tokens, row in rows.items()}
    return {**made_by("python benchmarks/structured_times.py"), "seconds": found}


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Products of feed-forward parts beside the dense layer: time",
        "",
        "Time of a forward pass as a share of the dense layer's, one thread, float32, by tokens at once. Shares behind "
        "the names are those of the parameters. Where a share is above 1, the whole matrix is faster: `pre_merge` "
        "keeps it beside the factors, and multiplies by it ([there](../structured_ffn.md#few-tokens-at-once)).",
        "",
        made_by_line(results),
    ]
    for name, rows in results["seconds"].items():
        table = []
        for number, form in enumerate(FORMS, 1):
            pairs = {int(tokens): (row[0], row[number]) for tokens, row in rows.items()}
            start = faster_from(pairs.__getitem__) if set(pairs) == set(TOKENS) else None
            shares = [f"{product / whole:.2f}" for whole, product in pairs.values()]
            table.append([form, *shares, "never" if start is None else f"{start:,}"])
        lines += ["", f"## {name}", ""]
        lines += markdown_table(("form", *(f"{int(tokens):,}" for tokens in rows), "faster from"), table)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, then write the results and the page."""
    quick = asked_quick(__doc__)
    torch.set_num_threads(1)
    results = measure(quick)
    publish(results, RESULTS, page_of(results), PAGE, quick)


if __name__ == "__main__":
    main()
