"""The tables of a recipe with several seeds as Markdown, to be read in a repository or pasted into a page."""

from collections.abc import Sequence
from pathlib import Path

from auxin.accounting.comparison import Comparison
from auxin.files import write_text
from auxin.report.comparison import (
    comparison_findings,
    comparison_growths,
    comparison_rows,
    estimate_text,
    measure_words,
    unit_words,
)
from auxin.report.curves import word_for
from auxin.report.formatting import DASH, change, short


def write_markdown(comparison: Comparison, path: str | Path) -> Path:
    """Write the tables of `comparison` to `path`, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, comparison_markdown(comparison))
    return path


def comparison_markdown(comparison: Comparison) -> str:
    """The page: what was measured and how, the table of results between markers, growths, and what the seeds show."""
    words = measure_words(comparison.measure)
    lines = [f"# {comparison.title}", "", *([comparison.description, ""] if comparison.description else [])]
    lines += [
        origin(comparison),
        "",
        f"{words.capitalize()} in{unit_words(comparison.measure) or ' plain numbers'}: mean over the seeds and 95 % "
        "interval (Student's t). Differences from the main branch, the first row, are taken seed by seed. "
        f"{comparison.unit.capitalize()}s, FLOPs and seconds include all ancestors.",
        "",
        "<!-- results:begin -->",
        *results_table(comparison),
        "<!-- results:end -->",
        *_growth_lines(comparison),
        "",
        *comparison_findings(comparison),
    ]
    return "\n".join(lines) + "\n"


def origin(comparison: Comparison) -> str:
    """Command, seeds, machine and versions in a line, to stand under a table's title."""
    machine = ", ".join(f"{name} {value}" for name, value in comparison.machine.items())
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    seeds = ", ".join(map(str, comparison.seeds))
    return f"Command: `{comparison.command}`. Seeds: {seeds}. Machine: {machine}. Versions: {versions}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """The lines of a table, of which the first columns (`words` many) hold words and the others numbers."""
    lines = [header, ["---" if column < words else "--:" for column in range(len(header))], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def results_table(comparison: Comparison) -> list[str]:
    """The table of results, the main branch first."""
    header = ["branch", "parameters", f"{comparison.unit}s", "training FLOPs", "seconds"]
    header += [measure_words(comparison.measure), "minus main branch"]
    header += [other.with_unit for other in comparison.other_measures]
    optional = [name for name in ("perplexity", "bits_per_byte") if any(getattr(b, name) for b in comparison.branches)]
    rows = []
    for branch, standing in comparison_rows(comparison):
        row = [branch.title, f"{branch.parameters:,}", short(branch.units), f"{branch.flops:.3g}"]
        row += [f"{branch.seconds:.0f}", estimate_text(branch.value, 3)]
        row += [DASH if standing == "main" else estimate_text(branch.difference, 3, signed=True)]
        row += [estimate_text(branch.measures.get(other.kind), 3) for other in comparison.other_measures]
        rows.append(row + [estimate_text(getattr(branch, name), 3) for name in optional])
    return markdown_table([*header, *(name.replace("_", " ") for name in optional)], rows)


def _growth_lines(comparison: Comparison) -> list[str]:
    rows = [
        [
            f"{title}: {growth.stage}",
            f"{growth.parameters_before:,} to {growth.parameters_after:,}",
            DASH if growth.value_before is None else f"{growth.value_before:.6f}",
            DASH if growth.value_after is None else f"{growth.value_after:.6f}",
            DASH if growth.largest_change is None else change(growth.largest_change).lstrip("+"),
            growth.promise,
        ]
        for title, growth, _ in comparison_growths(comparison)
    ]
    if not rows:
        return []
    header = [
        word_for(growth for _, growth, _ in comparison_growths(comparison)),
        *("parameters", "mean before", "mean after", "largest difference of a seed", "promise"),
    ]
    return ["", "What the growths did to the measure:", "", *markdown_table(header, rows)]
