"""What a person reads of a search: the choice, what it is worth, what was tried, and the picture of it."""

from collections.abc import Sequence
from itertools import pairwise

from auxin.errors import shown
from auxin.report.formatting import duration, power
from auxin.report.markdown import markdown_table
from auxin.report.svg import GREY, document, escaped, heading, line, text
from auxin.shrinking.outcome import Measured, Outcome
from auxin.shrinking.settings import ShrinkSettings
from auxin.shrinking.trials import Trial

CHOSEN, FRONT, OTHER = "#d1242f", "#0969da", GREY
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 480.0, 300.0, 60.0, 24.0, 44.0


def other_size(settings: ShrinkSettings) -> str:
    """What a way is judged by beside its loss, which the target does not say already."""
    return "parameters" if settings.target.flops is not None else "flops"


def front(trials: Sequence[Trial], size: str) -> list[Trial]:
    """The trials that no other beats in both its loss and its `size`, the smallest first."""
    found: list[Trial] = []
    known = [trial for trial in trials if trial.loss is not None and getattr(trial, size) is not None]
    for trial in sorted(known, key=lambda trial: (getattr(trial, size), trial.loss, trial.number)):
        assert trial.loss is not None
        if not found or found[-1].loss is None or trial.loss < found[-1].loss:
            found.append(trial)
    return found


def page(outcome: Outcome, settings: ShrinkSettings, trials: Sequence[Trial]) -> str:
    """All of it as Markdown."""
    chosen, whole = outcome.chosen, outcome.whole
    mended = f" Mended on {settings.budget:,} {outcome.unit}s." if settings.budget is not None else " Not mended."
    size, flops = other_size(settings), f"FLOPs per {outcome.flops_unit}"
    lines = [
        f"# {settings.model.resolve().name}: {settings.target}",
        "",
        f"Chosen: **{chosen.title}**, of {len(trials)} ways that were tried.{mended} On the held-out split, which "
        f"nothing looked at before: {chosen.loss:.4f} nats per {outcome.target}, the whole model "
        f"{whole.loss:.4f}.",
        "",
        outcome.verdict,
        "",
        "## What came of it",
        "",
        *markdown_table(
            ("model", settings.target.name, "parameters", flops, "bytes", "loss before mending", "loss"),
            [_measured_row(model, settings) for model in (whole, chosen, outcome.single) if model is not None],
        ),
        "",
        "The chosen model lies in `model`, its plans in the folders of the stages "
        f"(`branches/trial-{chosen.number}/*/plan.yaml`), and the run's report is `report.html`.",
        "",
        "## What was tried",
        "",
        f"Losses on {settings.choosing_samples} samples of the training split that no method looked at; methods looked "
        f"at {settings.samples} others. Nothing was trained, and all of it took {duration(outcome.seconds)}. Shares in "
        "brackets: how far of the way each step goes. Stars: no other way has both a lower loss and fewer "
        f"{size.replace('flops', 'FLOPs')}.",
        "",
        "![Every way that was tried](front.svg)",
        "",
    ]
    best = {trial.number for trial in front(trials, size)}
    done = sorted((t for t in trials if t.loss is not None), key=lambda t: t.loss or 0.0)
    lines += markdown_table(
        ("trial", "what is done", "parameters", flops, "loss", "took"),
        [
            [
                f"{trial.number}{' *' if trial.number in best else ''}",
                trial.candidate.title,
                f"{trial.parameters:,}",
                power(trial.flops),
                f"{trial.loss:.4f}",
                duration(trial.seconds),
            ]
            for trial in done
        ],
        words=2,
    )
    if refused := [trial for trial in trials if trial.loss is None]:
        lines += ["", "Not possible:", ""]
        lines += [f"- {trial.candidate.title}: {shown(trial.refused, quoted=False)}" for trial in refused]
    return "\n".join(lines) + "\n"


def _measured_row(model: Measured, settings: ShrinkSettings) -> list[str]:
    return [
        model.title,
        settings.target.in_words(model.size),
        f"{model.parameters:,}",
        power(model.flops),
        "-" if model.memory is None else f"{model.memory:,}",
        "-" if model.before is None else f"{model.before:.4f}",
        f"{model.loss:.4f}",
    ]


def front_picture(outcome: Outcome, settings: ShrinkSettings, trials: Sequence[Trial]) -> str:
    """Every way as a point: its loss against what it leaves. Those that no other beats are joined; a way is named where
    it is pointed at."""
    size = other_size(settings)
    across_in_words = f"FLOPs per {outcome.flops_unit}, forward" if size == "flops" else size
    points = [t for t in trials if t.loss is not None and getattr(t, size) is not None]
    title = f"Ways to {settings.target}"
    note = f"Loss before mending against {across_in_words}. Joined: no other way is better in both. Red: chosen."
    body, top = heading(title, note)
    top += 16
    if not points:
        return document(title, WIDTH, top + 20, [*body, text(LEFT, top, "No way could be drawn.")])
    xs, ys = [float(getattr(t, size)) for t in points], [float(t.loss or 0) for t in points]
    # What is far above the best tells nothing, and would press the others together.
    highest = min(max(ys), min(ys) + 3 * (sorted(ys)[len(ys) // 2] - min(ys)) or max(ys))
    low_x, high_x, low_y = min(xs), max(xs), min(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        up = (min(y, highest) - low_y) / (highest - low_y) if highest > low_y else 0.0
        return LEFT + 8 + across * (WIDTH - LEFT - RIGHT - 16), top + (HEIGHT - BOTTOM) * (1 - up)

    floor = top + HEIGHT - BOTTOM + 8
    body += [line(LEFT, floor, WIDTH - RIGHT, floor, 0.5), line(LEFT, top, LEFT, floor, 0.5)]
    for y in (low_y, highest):
        body.append(text(LEFT - 6, place(low_x, y)[1] + 4, f"{y:.2f}", size=11, anchor="end"))
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        body.append(text(place(x, low_y)[0], floor + 16, power(x), size=11, anchor=anchor))
    body.append(text((LEFT + WIDTH) / 2, floor + 32, across_in_words, size=11, anchor="middle"))
    joined = front(points, size)
    path = [place(float(getattr(t, size)), float(t.loss or 0)) for t in joined]
    for (x1, y1), (x2, y2) in pairwise(path):
        body.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{FRONT}" stroke-opacity="0.6"/>'
        )
    for trial in points:
        x, y = place(float(getattr(trial, size)), float(trial.loss or 0))
        colour = CHOSEN if trial.number == outcome.chosen.number else FRONT if trial in joined else OTHER
        told = escaped(f"{trial.candidate.title}: {trial.loss:.4f}")
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{told}</title></circle>')
    return document(title, WIDTH, floor + 44, body)
