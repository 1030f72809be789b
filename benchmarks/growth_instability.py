"""Why does the loss rise after a growth, and what removes it? One remedy at a time, all together, and all but one.

A small TokenFormer is trained on the Python standard library and grown to four times its parameter tokens, as the
released code does it: new keys and values random as at initialisation, one norm over all tokens with a scale of
sqrt(n') (regime "official"), a fresh optimizer, and a schedule that begins again: warmup to the full peak, then
cosine. Every remedy changes one of these. The small model comes from a cosine schedule that has ended; for
warmup-stable-decay it comes from the stable phase, to which it goes back. All branches end at the same total training
FLOPs.

    python benchmarks/growth_instability.py --jobs 2
    python benchmarks/growth_instability.py --seeds 0 --branches reference all

Finished branches are not run again.
"""

import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from branches import command_line, curve_since, interval, results_of, run_all, seed_folder, where
from drawing import COLOURS, Curve, Line, draw

from auxin.accounting.results import BranchResult
from auxin.recipes import Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "growth_instability.json"
TABLE = ROOT / "docs" / "results" / "growth_instability.md"
PICTURE = ROOT / "docs" / "images" / "growth_instability.svg"
SHOWN = ("control", "control-wsd", "reference", "grouped", "wsd", "lower", "grouped-moments-wsd", "all-but-held")
"""The branches that the picture shows; more would not be told apart."""

PEAK, LOWER = 4e-3, 1e-3
"""Learning rates: that of the small model, and the one that "re-warming lower" goes up to."""
SMALL_STEPS, STEPS, WARMUP, HELD_STEPS, INTERVAL = 600, 160, 20, 40, 16
TOKENS, FACTOR = 16, 4

GROUPED, SCALE, MOMENTS, WSD = "grouped", "scale", "moments", "wsd"
LOWER_PEAK, HELD, AGAIN = "lower", "held", "warmup"
REMEDIES = {
    GROUPED: "grouped norms",
    SCALE: "stored score scale",
    MOMENTS: "carried moments",
    WSD: "warmup-stable-decay",
    LOWER_PEAK: "re-warming lower",
    HELD: "old entries frozen for a while",
    AGAIN: "a warm-up",
}
ALL = (GROUPED, MOMENTS, WSD, LOWER_PEAK, HELD)
"""Together; grouped norms store their scales, so that the stored scale of one norm is no part of it."""
CONTROL, CONTROL_WSD, REFERENCE = "control", "control-wsd", "reference"

BRANCHES: dict[str, tuple[str, ...]] = {
    REFERENCE: (),
    **{remedy: (remedy,) for remedy in REMEDIES if remedy != AGAIN},
    "all": ALL,
    **{f"all-but-{left_out}": tuple(r for r in ALL if r != left_out) for left_out in ALL},
    "grouped-moments": (GROUPED, MOMENTS),
    "grouped-moments-wsd": (GROUPED, MOMENTS, WSD),
    "grouped-moments-wsd-warmup": (GROUPED, MOMENTS, WSD, AGAIN),
}
"""The branches that grow, with the remedies that each takes."""


def title(name: str) -> str:
    """What a branch is called in the table."""
    if name == CONTROL:
        return "no growth: small model, schedule begun again"
    if name == CONTROL_WSD:
        return "no growth: small model, stable phase and decay"
    if name == REFERENCE:
        return "reference behaviour"
    if name == "all":
        return "all (but for one norm's stored scale)"
    if name.startswith("all-but-"):
        return f"all but {REMEDIES[name.removeprefix('all-but-')]}"
    return " + ".join(REMEDIES[remedy] for remedy in BRANCHES[name])


def recipe(seed: int) -> Recipe:
    """The recipe that holds every branch."""
    sizes = {"qkv_tokens": TOKENS, "proj_tokens": TOKENS, "ffn_tokens": 4 * TOKENS}
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    build = {"kind": "build", "model_type": "tokenformer", "config": {**shape, **sizes}}
    cosine = {"schedule": "cosine", "minimum_learning_rate_ratio": 0.1}
    small = {"steps": SMALL_STEPS, "evaluation_interval": 300, "warmup_steps": 50}
    grown = [
        _grown(name, remedies, {key: FACTOR * value for key, value in sizes.items()}, cosine)
        for name, remedies in BRANCHES.items()
    ]
    restart = {"learning_rate": PEAK, "warmup_steps": WARMUP, **cosine}
    branches = [
        {"name": "ended", "title": "small, cosine", "stages": [
            build, {"kind": "train", "name": "small", "settings": {**small, **cosine}}]},
        {"name": "stable", "title": "small, stable phase", "stages": [
            build, {"kind": "train", "name": "small", "settings": {**small, "decay_fraction": 0.0}}]},
        *grown,
        {"name": CONTROL, "title": title(CONTROL), "fork": "ended/small", "stages": [
            {"kind": "train", "name": "after", "flops_of": REFERENCE, "fresh_optimizer": True, "settings": restart}]},
        {"name": CONTROL_WSD, "title": title(CONTROL_WSD), "fork": "stable/small", "stages": [
            {"kind": "train", "name": "after", "flops_of": REFERENCE, "settings": {"decay_fraction": 0.5}}]},
    ]  # fmt: skip
    return Recipe.parse(
        {
            "name": "growth-instability",
            "title": "What removes the rise of the loss after a growth",
            "seed": seed,
            "data": {
                "source": "stdlib",
                "vocab_size": 512,
                "context_length": 128,
                "validation_fraction": 0.008,
                "max_bytes": 4_000_000,
            },
            "training": {
                "batch_size": 8,
                "learning_rate": PEAK,
                "evaluation_interval": INTERVAL,
                "checkpoint_interval": None,
                "tensorboard": False,
                # The rise is what is measured: no step may be left out because of it.
                "guard": {"spike_multiple": None},
            },
            "branches": branches,
        }
    )


def _grown(name: str, remedies: tuple[str, ...], tokens: dict[str, int], cosine: dict[str, Any]) -> dict[str, Any]:
    regime = "grouped" if GROUPED in remedies else "zero_keys" if SCALE in remedies else "official"
    rate = {"learning_rate": LOWER if LOWER_PEAK in remedies else PEAK}
    schedule = {"decay_fraction": 0.5} if WSD in remedies else {**cosine, "warmup_steps": WARMUP}
    if AGAIN in remedies:
        schedule["warmup_steps"] = WARMUP
    train = {"kind": "train", "name": "after", "settings": {"steps": STEPS, **schedule, **rate}}
    if MOMENTS not in remedies:
        train["fresh_optimizer"] = True
    if HELD in remedies:
        train |= {"hooks": [{"kind": "old_rates", "ratio": 0.0, "steps": HELD_STEPS}]}
    return {
        "name": name,
        "title": title(name),
        "fork": f"{'stable' if WSD in remedies else 'ended'}/small",
        "stages": [{"kind": "change", "tokens": {**tokens, "regime": regime}}, train],
    }


def measured(result: BranchResult) -> dict[str, float]:
    """What one branch of one seed shows, losses in nats per token."""
    curve = [loss for _, loss in curve_since(result, {"after"})]
    before = result.ledger.stages[-2].value_before if result.growths else curve[0]
    assert before is not None
    assert result.value is not None
    # A branch that never rose is back at once.
    back = next((i for i, loss in enumerate(curve) if i and loss <= before), None)
    return {
        "before": before,
        "at_growth": curve[0] - before,
        "worst": max(curve) - before,
        "steps_above": math.inf if back is None else float(back * INTERVAL),
        "final": result.value,
        "flops": result.flops,
        "parameters": float(result.parameters),
    }


def table(cells: dict[str, dict[str, dict[str, float]]], command: str) -> str:
    """The results as Markdown."""
    seeds = sorted({int(seed) for by_seed in cells.values() for seed in by_seed})
    some = next(iter(cells[REFERENCE].values()))
    lines = [
        "# What removes the rise of the loss after a growth",
        "",
        f"TokenFormer, 2 layers of width 64, {TOKENS} -> {FACTOR * TOKENS} parameter tokens per projection "
        f"(feed-forward part {4 * TOKENS} -> {4 * FACTOR * TOKENS}; {some['parameters']:,.0f} parameters after the "
        f"growth), byte-level BPE of 512 on the Python standard library; {SMALL_STEPS} steps before and {STEPS} after "
        f"the growth, 8 x 128 tokens a step, AdamW. Peak learning rate {PEAK:g}; re-warming lower goes to {LOWER:g}. "
        f"Frozen: everything that was there before the growth, for {HELD_STEPS} steps. Held-out loss in nats per "
        f"token, measured every {INTERVAL} steps: mean over the seeds and 95 % interval (Student's t). Rises are "
        "against the loss right before the growth, which is that of the stable phase, and higher, with "
        f"warmup-stable-decay. All end at the same training FLOPs ({some['flops']:.3g}).",
        "",
        where(command, seeds),
        "",
        "| remedy | before | rise at growth | worst rise | steps to be back | final loss | minus reference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [CONTROL, CONTROL_WSD, *BRANCHES]:
        if name not in cells:
            continue
        by_seed = cells[name]
        values = {key: [cell[key] for cell in by_seed.values()] for key in some}
        gaps = [cell["final"] - cells[REFERENCE][seed]["final"] for seed, cell in by_seed.items()
                if seed in cells[REFERENCE]]  # fmt: skip
        above = values["steps_above"]
        lines.append(
            f"| {title(name)} | {statistics.mean(values['before']):.3f} | {interval(values['at_growth'], sign=True)} | "
            f"{interval(values['worst'], sign=True)} | "
            f"{'never' if math.inf in above else f'{min(above):.0f} to {max(above):.0f}'} | "
            f"{interval(values['final'])} | {interval(gaps, sign=True)} |"
        )
    return "\n".join(lines) + "\n"


def picture(curves: dict[str, dict[str, Curve]]) -> str:
    """Held-out loss against training FLOPs since the growth."""
    lines = [
        Line(title(name), COLOURS[number], list(curves[name].values()), dashed=name.startswith("control"))
        for number, name in enumerate(SHOWN)
        if name in curves
    ]
    return draw("Held-out loss after a growth of TokenFormer by four times", lines, lines[0].mean[0][0])


def main() -> None:
    """Run what is missing, then write the results and the table."""
    arguments = command_line(__doc__, ROOT / "runs" / "growth-instability", RESULTS, TABLE, PICTURE)
    if not arguments.read_only:
        run_all(recipe, arguments.seeds, arguments.runs, arguments.branches, arguments.jobs)
    cells: dict[str, dict[str, dict[str, float]]] = {}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for seed in arguments.seeds:
        for name, result in results_of(recipe(seed), seed_folder(arguments.runs, seed)).items():
            if name in BRANCHES or name in (CONTROL, CONTROL_WSD):
                cells.setdefault(name, {})[str(seed)] = measured(result)
                curves.setdefault(name, {})[str(seed)] = curve_since(result, {"after"})
    command = shlex.join(["python", "benchmarks/growth_instability.py", "--seeds", *map(str, arguments.seeds)])
    record = {"command": command, "cells": cells, "curves": curves}
    arguments.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    arguments.table.write_text(table(cells, command), encoding="utf-8")
    arguments.picture.write_text(picture(curves), encoding="utf-8")
    print(f"Written to {arguments.table}, {arguments.picture} and {arguments.results}", file=sys.stderr)


if __name__ == "__main__":
    main()
