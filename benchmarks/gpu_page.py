"""The results of `gpu.py` as a page."""

from collections.abc import Callable, Sequence
from typing import Any

from measuring import made_by_line

from auxin.report.formatting import DASH
from auxin.report.markdown import markdown_table

AIM = 0.5
"""Model FLOPs utilisation of a training step that is aimed at."""
Row = dict[str, Any]


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown; of a rehearsal it says first that they are none of a GPU."""
    lines = ["# On a GPU", "", "Written by `benchmarks/gpu.py`."]
    if results["quick"]:
        lines = [
            "# A rehearsal on a CPU",
            "",
            "**Nothing here is a figure of a GPU, or of a model that anybody uses, or compiled.**",
        ]
    for name, (title, table) in TABLES.items():
        part = results["parts"].get(name)
        lines += ["", f"## {title}", ""]
        if part is None:
            lines.append("Not run.")
            continue
        if "command" in part:
            lines += [made_by_line(part), ""]
        lines.append(f"The part: {part['ended']}, {part['seconds']:.0f} s.{_failure(part)}")
        if part["rows"]:
            lines += ["", *table(part["rows"])]
    return "\n".join(lines) + "\n"


def _failure(part: dict[str, Any]) -> str:
    """What went wrong; not what a part that was cut off said to that."""
    went_wrong = "failed" in part and part["ended"].startswith("ended")
    return f" It failed: {' '.join(part['failed'].split())}" if went_wrong else ""


def tests_table(rows: Sequence[Row]) -> list[str]:
    """How many passed, and what each of the others said."""
    count = {name: sum(row["outcome"] == name for row in rows) for name in ("passed", "failed", "skipped")}
    lines = [", ".join(f"{number} {name}" for name, number in count.items()) + "."]
    others = [[row["test"], row["outcome"], " ".join(row["message"].split())[:200]] for row in rows]
    others = [row for row in others if row[1] != "passed"]
    return [*lines, "", *markdown_table(("test", "outcome", "message"), others, words=3)] if others else lines


def training_table(rows: Sequence[Row]) -> list[str]:
    """What a step takes, and in which memory."""
    header = ("model", "kind", "parameters", "batch x context", "step, ms", "tokens/s", "TFLOP/s", "MFU")
    header += ("products alone", "peak, GiB", "told, GiB", "first step, s")
    found = [
        [
            *(row["model"], row["kind"], f"{row['parameters'] / 1e6:.1f}M", f"{row['batch']} x {row['context']}"),
            *(f"{1e3 * row['step_seconds']:.1f}", f"{row['tokens_per_second']:,.0f}"),
            f"{row['flops_per_second'] / 1e12:.1f}",
            DASH if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['products_alone']:.0%}",
            *(_gibibytes(row["peak_bytes"]), _gibibytes(row["told_bytes"])),
            f"{row['first_step_seconds']:.1f}",
        ]
        for row in rows
    ]
    notes = [
        f"- {row['model']}, {row['kind']}: memory ended with {', '.join(map(str, row['out_of_memory_at']))} contexts; "
        f"with {row['batch']} it did not."
        for row in rows
        if row["out_of_memory_at"]
    ]
    below = [f"{row['model']}, {row['kind']}" for row in rows if row["mfu"] is not None and row["mfu"] < AIM]
    if below:
        notes.append(f"- Below the aim of {AIM:.0%} of the device's peak: {'; '.join(below)}.")
    return [
        "Steps of `auxin.training.train` with the settings of the recipe tokenformer-124m-to-1.4b: autocast in "
        "bfloat16, fused AdamW, a whole batch in one pass; medians of the steps behind the warm-up. MFU: model FLOPs "
        "per second, as the engine writes them, of the dense peak in the device's data sheet; attention counts over "
        "the whole square. Products alone: the share of the step that its products of matrices, attention left out, "
        "take each by itself. Peak: most memory that torch had allocated; told: what `auxin run --dry-run` computes, "
        "with activations in float32.",
        "",
        *markdown_table(header, found, words=2),
        *(["", *notes] if notes else []),
    ]


def _gibibytes(size: int | None) -> str:
    return DASH if size is None else f"{size / 2**30:.2f}"


def pattention_table(rows: Sequence[Row]) -> list[str]:
    """The layer beside the dense one."""
    header = ("rows x width x tokens", "layer", "kind", "forward, ms", "ratio", "forward and backward, ms", "ratio")
    header += ("quartiles", "GEMMs alone", "peak, MiB")
    found = [
        [
            " x ".join(map(str, row["shape"].values())),
            *(row["name"], row["kind"], f"{1e3 * row['forward']['median_seconds']:.3f}"),
            f"{row['forward']['ratio_to_dense']:.3f}",
            f"{1e3 * row['forward_backward']['median_seconds']:.3f}",
            f"{row['forward_backward']['ratio_to_dense']:.3f}",
            " to ".join(f"{number:.3f}" for number in row["forward_backward"]["ratio_quartiles"]),
            *(f"{row['gemm_fraction']:.0%}", f"{row['peak_bytes'] / 2**20:,.0f}"),
        ]
        for row in rows
    ]
    return [
        "One layer in bfloat16, by the GPU's clock: ratios to the dense layer of the same kind and repetition; GEMMs "
        "alone: the share of forward and backward that its six products take without anything between them.",
        "",
        *markdown_table(header, found, words=3),
    ]


def altup_table(rows: Sequence[Row]) -> list[str]:
    """Alternating updates beside the plain model."""
    header = ("width", "layers", "batch x tokens", "model", "kind", "parameters", "forward, ms", "ratio")
    header += ("forward and backward, ms", "ratio", "products alone", "a token, ms", "peak, MiB")
    found = [
        [
            *(str(row["width"]), str(row["layers"]), f"{row['batch']} x {row['tokens']}", row["name"], row["kind"]),
            f"{row['parameters'] / 1e6:.1f}M",
            *(f"{1e3 * row['forward']['seconds']:.2f}", f"{row['forward']['ratio']:.3f}"),
            *(f"{1e3 * row['both']['seconds']:.2f}", f"{row['both']['ratio']:.3f}"),
            f"{row['products_alone']:.0%}",
            f"{1e3 * row['decode']['seconds']:.2f}" if "decode" in row else DASH,
            f"{row['peak_bytes'] / 2**20:,.0f}",
        ]
        for row in rows
    ]
    return [
        "Llamas in bfloat16, by the GPU's clock: ratios to the plain model of the same kind and repetition; products "
        "alone: the share of forward and backward that all products of matrices but attention's take each by itself.",
        "",
        *markdown_table(header, found, words=5),
    ]


TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "tests": ("Tests", tests_table),
    "training": ("Training steps", training_table),
    "pattention": ("Pattention", pattention_table),
    "altup": ("Alternating updates", altup_table),
}
"""By part: its title, and how its rows are shown."""
