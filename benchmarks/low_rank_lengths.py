"""From which length on shorter attention pays more than smaller matrices: one BERT layer, dense, with linear layers as
products (`greenformers`), with Linformer's attention, and with both.

    python benchmarks/low_rank_lengths.py            all lengths; writes docs/results/low_rank_lengths.md
    python benchmarks/low_rank_lengths.py --quick    a small layer and short texts; prints

Of each length 64 to 4,096: the time of a forward pass over one text with the model's eager attention and with torch's
(sdpa), what is allocated at most, parameters, and the file. Weights are random and times do not depend on them. All
take turns in shuffled order; CPU time of one thread counts, so that a busy machine matters less. A Linformer is made
for the length that it is timed at, or for k where that is more.
"""

import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from drawing import COLOURS, GREY
from measuring import asked_quick, made_by, made_by_line, peak_bytes, publish, quartiles
from transformers import BertConfig, BertModel

import auxin
from auxin.accounting import count_parameters, flops_per_token
from auxin.edits import Plan, ReplaceModule
from auxin.report.svg import document, text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "low_rank_lengths.json"
PAGE = ROOT / "docs" / "results" / "low_rank_lengths.md"
PICTURE = ROOT / "docs" / "images" / "low_rank_lengths.svg"
COMMAND = "python benchmarks/low_rank_lengths.py"
WAYS = ("dense", "low rank", "Linformer", "both")
IMPLEMENTATIONS = ("sdpa", "eager")
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
QUICK_LENGTHS = (32, 64)
ROUNDS = {64: 15, 128: 15, 256: 11, 512: 9, 1024: 7, 2048: 5, 4096: 5}
SEED = 0


class Layer(NamedTuple):
    """A size: of the residual, how many heads, the rank of products, and k."""

    width: int
    heads: int
    rank: int
    kept: int

    @property
    def crossing(self) -> int:
        """The length below which low rank takes fewer multiply-adds: 18 r d + 2 n d = 12 d^2 + 4 k d."""
        return 6 * self.width + 2 * self.kept - 9 * self.rank

    def __str__(self) -> str:
        return f"d = {self.width}, {self.heads} heads, r = {self.rank}, k = {self.kept}"


LAYERS = (Layer(768, 12, 256, 256), Layer(256, 4, 64, 64))
QUICK_LAYERS = (Layer(64, 2, 16, 16),)


def models(size: Layer, length: int, implementation: str) -> dict[str, BertModel]:
    """The four, with one layer, a small vocabulary and positions for this length."""
    found = {}
    for way in WAYS:
        torch.manual_seed(SEED)
        config = BertConfig(
            vocab_size=64,
            hidden_size=size.width,
            num_hidden_layers=1,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
            max_position_embeddings=max(length, size.kept),
        )
        model = BertModel(config).eval()
        model.set_attn_implementation(implementation)
        if way in ("low rank", "both"):
            auxin.apply(auxin.plan(model, "greenformers", rank=size.rank, solver="random"), model)
        if way in ("Linformer", "both"):
            settings = {"projected_length": size.kept, "max_length": max(length, size.kept)}
            edit = ReplaceModule(
                module="encoder.layer.0.attention.self", brick="linformer_attention", settings=settings
            )
            auxin.apply(Plan(method="Linformer's attention", promise="none", edits=[edit]), model)
        found[way] = model
    return found


def file_bytes(model: BertModel) -> int:
    """Of the weights on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        auxin.save(model, folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def measure(size: Layer, length: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one size and length."""
    entries = {
        (implementation, way): model
        for implementation in IMPLEMENTATIONS
        for way, model in models(size, length, implementation).items()
    }
    ids = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(SEED))
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in entries}
    order, shuffle = list(entries), random.Random(SEED)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for key in order:
            began = time.thread_time()
            entries[key](input_ids=ids)
            if number:  # the first round warms up
                seconds[key].append(time.thread_time() - began)
    rows = []
    for (implementation, way), model in entries.items():
        own, dense = seconds[implementation, way], seconds[implementation, "dense"]
        low, middle, high = quartiles([one / other for one, other in zip(own, dense, strict=True)])
        rows.append(
            {
                "layer": size._asdict(),
                "length": length,
                "attention": implementation,
                "way": way,
                "median_seconds": statistics.median(own),
                "least_seconds": min(own),
                "ratio_to_dense": middle,
                "ratio_quartiles": [low, high],
                "peak_bytes": peak_bytes(partial(model, input_ids=ids), "cpu"),
                "layer_parameters": count_parameters(model.encoder).total,
                "file_bytes": file_bytes(model),
                "flops_per_token": flops_per_token(model, length).forward,
            }
        )
    return rows


def crossing(rows: Sequence[dict[str, Any]], value: str) -> float | None:
    """The length from which on Linformer's attention takes less than low rank, between two that were measured by a
    straight line over the logarithm of the length; None: at none of them it does, 0: at all."""
    by_length: dict[int, dict[str, float]] = {}
    for row in rows:
        by_length.setdefault(row["length"], {})[row["way"]] = row[value]
    gaps = [(length, math.log(of["low rank"] / of["Linformer"])) for length, of in sorted(by_length.items())]
    above = next((place for place, (_, gap) in enumerate(gaps) if gap > 0), None)
    if above is None:
        return None
    if above == 0:
        return 0.0
    (left, before), (right, after) = gaps[above - 1 : above + 1]
    return float(left * (right / left) ** (before / (before - after)))


def told(length: float | None, lengths: Sequence[int]) -> str:
    """A crossing, in words."""
    if length is None:
        return f"none up to {max(lengths):,}"
    return f"{length:,.0f}" if length else f"below {min(lengths):,}"


def chosen(rows: Sequence[dict[str, Any]], size: Layer, attention: str) -> list[dict[str, Any]]:
    """The rows of one size with one attention."""
    return [row for row in rows if row["layer"] == size._asdict() and row["attention"] == attention]


def page(results: dict[str, Any]) -> str:
    """The page."""
    rows = results["rows"]
    sizes = [Layer(**size) for size in results["layers"]]
    lengths = sorted({row["length"] for row in rows})
    lines = [
        "# Low rank or shorter attention: where one gets cheaper than the other",
        "",
        "One layer of BERT's kind, dense, with all its linear layers as products of rank r",
        "([greenformers](../greenformers.md)), with attention that reads k mixtures of the n tokens",
        "([Linformer's](../greenformers.md#beside-linformers-attention)), and with both. A forward pass over one",
        "text of float32, one thread; the median CPU time of 5 to 15 turns, in each of which all ran in shuffled",
        "order, and the quartiles of the ratios to the dense layer of the same turn. CPU time leaves out what other",
        "processes took, but not that they emptied the caches. Peak memory is what a forward pass allocates beyond",
        "the weights. Parameters are the layer's; the file holds embeddings of 64 tokens and of all positions, and",
        "BERT's pooler, too.",
        "",
        "![Time per token over the length](../images/low_rank_lengths.svg)",
        "",
        "## Where they cross",
        "",
        "Low rank takes fewer multiply-adds below n* = 6 d + 2 k - 9 r. By time and memory the crossing is told from",
        "the lengths on both sides of it.",
        "",
        "| layer | n* | by counted FLOPs | by time, sdpa | by time, eager | by the least times, sdpa | eager "
        "| by peak memory, sdpa | eager |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for size in sizes:
        cells = [told(crossing(chosen(rows, size, "sdpa"), "flops_per_token"), lengths)]
        for value in ("median_seconds", "least_seconds", "peak_bytes"):
            cells += [told(crossing(chosen(rows, size, of), value), lengths) for of in IMPLEMENTATIONS]
        lines.append(f"| {size} | {size.crossing:,} | {' | '.join(cells)} |")
    for size in sizes:
        lines += [
            "",
            f"## {size}",
            "",
            "| n | attention | way | time, ms | of dense | quartiles | MFLOPs per token | peak memory, MiB "
            "| parameters | file, MiB |",
            "|--:|---|---|--:|--:|---|--:|--:|--:|--:|",
        ]
        for row in (row for row in rows if row["layer"] == size._asdict()):
            low, high = row["ratio_quartiles"]
            lines.append(
                f"| {row['length']:,} | {row['attention']} | {row['way']} | {1e3 * row['median_seconds']:.1f} "
                f"| {row['ratio_to_dense']:.2f} | {low:.2f} - {high:.2f} | {row['flops_per_token'] / 1e6:.2f} "
                f"| {row['peak_bytes'] / 2**20:.1f} | {row['layer_parameters']:,} | {row['file_bytes'] / 2**20:.1f} |"
            )
    return "\n".join([*lines, "", made_by_line(results), ""])


def picture(rows: Sequence[dict[str, Any]], size: Layer) -> str:
    """Microseconds per token over the length, both on logarithmic axes; dashed with eager attention."""
    width, height, left, right, top, bottom = 720, 420, 64, 130, 56, 52
    shown = {of: chosen(rows, size, of) for of in IMPLEMENTATIONS}
    values = [1e6 * row["median_seconds"] / row["length"] for of in shown.values() for row in of]
    lengths = sorted({row["length"] for row in rows})
    low, high = math.log2(min(values)) - 0.1, math.log2(max(values)) + 0.1

    def x(length: float) -> float:
        first, last = math.log2(lengths[0]), math.log2(lengths[-1])
        return left + (width - left - right) * (math.log2(length) - first) / (last - first)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - math.log2(value)) / (high - low)

    title = f"Time of a layer per token, {size}"
    parts = [text(left, 24, title, size=15, weight=600)]
    parts.append(text(left, 42, "microseconds per token; dashed: eager attention, else torch's", size=12))
    for power in range(math.ceil(low), math.floor(high) + 1):
        place = y(2.0**power)
        parts.append(f'<path d="M{left} {place:.1f}H{width - right}" stroke="{GREY}" stroke-opacity="0.22"/>')
        parts.append(text(left - 8, place + 4, f"{2.0**power:g}", size=12, anchor="end"))
    below = height - bottom + 20
    parts += [text(x(length), below, f"{length:,}", size=12, anchor="middle") for length in lengths]
    parts.append(text((left + width - right) / 2, height - 12, "tokens of the text", size=12, anchor="middle"))
    labels = []
    for way, colour in zip(WAYS, COLOURS, strict=False):
        for implementation, of in shown.items():
            points = [(row["length"], 1e6 * row["median_seconds"] / row["length"]) for row in of if row["way"] == way]
            path = " ".join(f"{x(length):.1f},{y(value):.1f}" for length, value in points)
            dash = ' stroke-dasharray="6 4"' if implementation == "eager" else ""
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
            if implementation == "sdpa":
                labels.append((y(points[-1][1]), way, colour))
    last = -math.inf
    for place, way, colour in sorted(labels):
        last = max(place, last + 16)
        parts.append(text(width - right + 8, last + 4, way, size=12, weight=600, colour=colour))
    return document(title, width, height, parts)


def main() -> None:
    """Measure, print, write."""
    quick = asked_quick(__doc__)
    torch.set_num_threads(1)
    sizes, lengths = (QUICK_LAYERS, QUICK_LENGTHS) if quick else (LAYERS, LENGTHS)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for length in lengths:
            began = time.perf_counter()
            rows += measure(size, length, ROUNDS.get(length, 5))
            print(f"{size}, {length} tokens: {time.perf_counter() - began:.0f} s", flush=True)
    results = {"rows": rows, "layers": [size._asdict() for size in sizes], **made_by(COMMAND)}
    publish(results, RESULTS, page(results), PAGE, quick)
    if not quick:
        PICTURE.write_text(picture(rows, sizes[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
