"""Why the norm in a TokenFormer's output projection costs it: other forms of that norm, and what is inside the models.

The models are those of `parity.yaml`. Each way changes one thing about the output projection of the attention:

- no norm of scores anywhere: a new model, with which all are compared;
- norm in the output projection: the published form there, every row of scores divided by its norm;
- the same, size given back: and the projection's output is multiplied by the root mean square of its input;
- norm of all keys there: scores divided by the norm of all keys, so that keys have no scale, and rows keep their size;
- norm there, not differentiated: the published form, whose gradient takes the norm for a constant.

Beside them, a dense GPT-NeoX. In the trained models the script measures how much the size of what the output projection
gets and adds differs between tokens, how large the scores are and how many of them GELU cuts, and how far a step of the
optimizer moves each kind of parameter.

    python benchmarks/parity_cause.py --jobs 2
    python benchmarks/parity_cause.py --quick

Finished cells are not measured again: after a change of the recipe give another --runs. About two minutes of one core
per way and seed.
"""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measuring import made_by_line, write_results
from parity_cells import ROOT, Cell, Same, Task, Way, asked, excess, measured, values, with_attention
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.accounting.statistics import Estimate
from auxin.files import write_text
from auxin.nn import Pattention
from auxin.report.markdown import markdown_table
from auxin.report.svg import document, text

RESULTS = ROOT / "benchmarks" / "results" / "parity_cause.json"
PAGE = ROOT / "docs" / "results" / "parity_cause.md"
PICTURE = ROOT / "docs" / "images" / "parity_cause.svg"
WAYS = {
    "dense": Way("GPT-NeoX, rate 1.2e-2", "dense"),
    "none": Way("no norm of scores anywhere", "new"),
    "norm": Way("norm in the output projection", "new", "norm proj"),
    "size": Way("the same, size given back", "new", "size proj"),
    "keys": Way("norm of all keys there", "new", "keys proj"),
    "constant": Way("norm there, not differentiated", "new", "constant proj"),
}
GREY, BLUE = "#7D8590", "#2F8AC9"
DRAWN = {"dense": GREY, "none": BLUE, "norm": "#D55E00"}
"""The ways that the picture has beside each other; colours at least 3:1 on white and on black."""
SLOTS = ("query", "key", "value", "proj", "feed-forward")
WIDTH, LABELS, ROW = 640, 230, 22
"""Of the picture, in pixels."""


def entering(form: str, module: Pattention, x: Tensor) -> Tensor:
    """What enters GELU in `module`, of one group, at the input `x`; the product has two of the forms."""
    scores = F.linear(x, module.key_tokens)
    if form == "none":
        return scores
    if form == "keys":
        return scores * (module.tau / module.key_tokens.norm())
    factor = module.tau / (scores.norm(dim=-1, keepdim=True) + 1e-6)
    return scores * (factor.detach() if form == "constant" else factor)


class Projection(Same):
    """A Pattention that computes by a form of `entering`; it begins with the tokens of `module`."""

    def __init__(self, module: Pattention, form: str) -> None:
        super().__init__(module)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        output = F.gelu(entering(self.form, self, x)) @ self.value_tokens
        return output * _size(x).unsqueeze(-1) if self.form == "size" else output


FORMS = {form: partial(Projection, form=form) for form in ("norm", "size", "keys", "constant")}
KINDS = {
    "embedding": r"embed",
    "query, key, value: in": r"attention\.(query|key|value)\.key_tokens|query_key_value\.weight",
    "query, key, value: out": r"attention\.(query|key|value)\.value_tokens",
    "output projection: in": r"attention\.proj\.key_tokens|attention\.dense\.weight",
    "output projection: out": r"attention\.proj\.value_tokens",
    "feed-forward: in": r"mlp\.key_tokens|dense_h_to_4h\.weight",
    "feed-forward: out": r"mlp\.value_tokens|dense_4h_to_h\.weight",
}
"""Parameters of both architectures. A dense projection is one matrix, a Pattention two: what scores (in) and what
answers (out)."""


class Updates:
    """Training hook: by how much of its own size each kind of parameter moves in a step, every `interval` steps."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.shares: dict[str, list[float]] = defaultdict(list)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Watch this training."""
        self._parameters = {
            kind: [p for name, p in model.named_parameters() if re.search(pattern, name)]
            for kind, pattern in KINDS.items()
        }

    def before_step(self, step: int) -> None:
        """Keep what the step moves."""
        if step % self.interval == 0:
            self._before = {kind: _flat(parameters) for kind, parameters in self._parameters.items() if parameters}

    def after_step(self, step: int) -> None:
        """Compare."""
        if step % self.interval == 0:
            for kind, before in self._before.items():
                moved = _flat(self._parameters[kind]) - before
                self.shares[kind].append((moved.norm() / before.norm()).item())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what was measured belongs to this process."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def projections(model: PreTrainedModel) -> list[nn.Module]:
    """The output projections of the attentions, layer by layer."""
    return [m for name, m in model.named_modules() if name.endswith(("attention.proj", "attention.dense"))]


@torch.no_grad()
def inside(model: PreTrainedModel, contexts: Tensor) -> Cell:
    """What a trained model does on held-out `contexts` (batch, length)."""
    got: list[Tensor] = []
    added: list[Tensor] = []
    scores: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for module in projections(model):
        handles.append(module.register_forward_pre_hook(lambda _, args: got.append(_size(args[0]))))
        handles.append(module.register_forward_hook(lambda _, args, output: added.append(_size(output))))
    for name, module in model.named_modules():
        if isinstance(module, Pattention):
            kind = "feed-forward" if name.endswith("mlp") else name.rpartition(".")[2]
            form = "norm" if module.score_function == "l2_norm_gelu" else "none"

            if isinstance(module, Projection):
                form = module.form

            def see(module: Any, args: Any, kind: str = kind, form: str = form) -> None:
                scores[kind].append(entering(form, module, args[0]).flatten())

            handles.append(module.register_forward_pre_hook(see))
        elif name.endswith("dense_h_to_4h"):
            handles.append(module.register_forward_hook(lambda _, args, o: scores["feed-forward"].append(o.flatten())))
    model.eval()(input_ids=contexts)
    for handle in handles:
        handle.remove()
    sizes, results = torch.stack(got), torch.stack(added)  # (layers, batch, length)
    return {
        "spread_got": (sizes.flatten(1).std(dim=1) / sizes.flatten(1).mean(dim=1)).mean().item(),
        "spread_added": (results.flatten(1).std(dim=1) / results.flatten(1).mean(dim=1)).mean().item(),
        "score_size": {kind: torch.cat(found).square().mean().sqrt().item() for kind, found in scores.items()},
        "score_cut": {kind: (torch.cat(found) < 0).float().mean().item() for kind, found in scores.items()},
    }


def _size(x: Tensor) -> Tensor:
    """Root mean square of each vector."""
    return x.square().mean(dim=-1).sqrt()


def measure(task: Task) -> Cell:
    """Train one way with one seed and look inside."""
    settings = task.settings()
    steps = int(settings.steps)
    model, updates = with_attention(task, FORMS), Updates(max(1, steps // 35))
    loss = task.trained(model, hooks=[updates])
    held_out = task.data().split("validation")
    contexts = held_out.rows(range(min(64, len(held_out))))["input_ids"]
    # Between the warmup and the decay the rate stands at its peak.
    flat = slice(
        settings.warmup_steps // updates.interval + 1, (steps - settings.decay_steps(steps)) // updates.interval
    )
    moved = {kind: statistics.median(shares[flat]) for kind, shares in updates.shares.items()}
    return {"loss": loss, "moved": moved, **inside(model, contexts)}


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    of = partial(values, results)

    losses = [
        [
            way.title,
            Estimate.of(of(name, "loss")).text(3),
            "-" if name == "none" else Estimate.of(excess(results, name, "none")).text(3, True),
            *(f"{statistics.mean(of(name, key)):.2f}" for key in ("spread_got", "spread_added")),
        ]
        for name, way in WAYS.items()
    ]

    def row(way: str, part: str, columns: Iterable[str], written: Callable[[str], str]) -> list[str]:
        return [WAYS[way].title, *(written(column) if of(way, part, column) else "-" for column in columns)]

    def share(way: str, part: str, column: str) -> str:
        return f"{100 * statistics.mean(of(way, part, column)):.{2 if part == 'moved' else 0}f} %"

    def score(way: str, slot: str) -> str:
        return f"{statistics.mean(of(way, 'score_size', slot)):.2f}, {share(way, 'score_cut', slot)}"

    moved = [row(way, "moved", KINDS, partial(share, way, "moved")) for way in WAYS]
    seen = [row(way, "score_size", SLOTS, partial(score, way)) for way in WAYS]
    lines = [
        "# The norm in the output projection",
        "",
        "Models, data, steps and rates are those of [parity.md](parity.md); each way changes one thing about the "
        "output projection of the attention in the TokenFormer without a norm. Held-out loss in nats per token: "
        "mean over the seeds and 95 % interval (Student's t); differences are taken seed by seed. Spread: standard "
        "deviation over tokens of the root mean square of a token's vector, relative to its mean, averaged over the "
        "layers, on 64 held-out contexts; of what the projection gets, and of what it adds to the stream.",
        "",
        f"{made_by_line(results)} Seeds: {results['seeds']}.",
        "",
        *markdown_table(("model", "final loss", "minus no norm", "spread got", "spread added"), losses),
        "",
        "![What the forms of the norm cost, what a step moves and what GELU cuts](../images/parity_cause.svg)",
        "",
        "## What a step moves",
        "",
        "Length of a step over length of the parameters; median over the steps at the peak rate, mean over "
        "the seeds. A dense projection is one matrix.",
        "",
        *markdown_table(("model", *KINDS), moved),
        "",
        "## Scores",
        "",
        "Root mean square of what enters GELU, and the share of it that is below zero, in the trained models.",
        "",
        *markdown_table(("model", *SLOTS), seen),
    ]
    return "\n".join(lines) + "\n"


def picture(results: dict[str, Any]) -> str:
    """Three panels, one below the other: what each form costs, what a step moves, and what GELU cuts; means over the
    seeds, the first with intervals."""

    of = partial(values, results)
    losses = [(way.title, [(BLUE, excess(results, name, "none"))]) for name, way in WAYS.items() if name != "none"]
    moved = [(kind, [(colour, [100 * v for v in of(way, "moved", kind)]) for way, colour in DRAWN.items()])
             for kind in KINDS]  # fmt: skip
    shares = [(slot, [(colour, [100 * v for v in of(way, "score_cut", slot)]) for way, colour in DRAWN.items()])
              for slot in SLOTS]  # fmt: skip
    title = "The norm in the output projection, and what is inside"
    body, y = [text(16, 28, title, size=16, weight=600)], 34.0
    for heading, rows, intervals in (
        ("final loss minus that without a norm, nats per token: seeds, mean and 95 % interval", losses, True),
        ("length of a step over length of the parameters, %", moved, False),
        ("scores that GELU cuts (below zero), %", shares, False),
    ):
        drawn, y = _panel(heading, rows, y, intervals)
        body += drawn
    for number, (way, colour) in enumerate(DRAWN.items()):
        body.append(text(16, y + 8 + 18 * number, f"● {WAYS[way].title}", colour=colour, size=12))
    return document(title, WIDTH, y + 62, body)


Dots = list[tuple[str, list[float]]]
"""Colour and values over the seeds."""


def _panel(heading: str, rows: list[tuple[str, Dots]], y: float, intervals: bool) -> tuple[list[str], float]:
    """A panel that begins at `y`, and where it ends."""
    body, top = [text(16, y + 22, heading, weight=600, size=12)], y + 40
    shown = [
        value
        for _, dots in rows
        for _, found in dots
        if found
        for value in (*found, *(_ends(found) if intervals else ()))
    ]
    low, high = min(0.0, *shown), 1.05 * max(shown)

    def x(value: float) -> float:
        return LABELS + (WIDTH - LABELS - 24) * (value - low) / (high - low)

    bottom = top + ROW * len(rows)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if high / step <= 6)
    for tick in (number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)):
        body += [
            f'<path d="M{x(tick):.1f} {top - 8:.1f}V{bottom - 6:.1f}" stroke="{GREY}" stroke-opacity="0.3"/>',
            text(x(tick), bottom + 8, f"{round(tick, 3):g}", anchor="middle", size=11),
        ]
    for number, (label, dots) in enumerate(rows):
        place = top + ROW * (number + 0.5) - 4
        body.append(text(LABELS - 10, place + 4, label, anchor="end", size=12))
        for colour, found in dots:
            if not found:
                continue
            centre = statistics.mean(found)
            if intervals:
                left, right = _ends(found)
                ends = f"M{x(left):.1f} {place:.1f}H{x(right):.1f}"
                body.append(f'<path d="{ends}" stroke="{colour}" stroke-width="1.5" stroke-opacity="0.6"/>')
                body += [f'<circle cx="{x(value):.1f}" cy="{place:.1f}" r="2.5" fill="{colour}"/>' for value in found]
            body.append(f'<circle cx="{x(centre):.1f}" cy="{place:.1f}" r="5" fill="{colour}"/>')
    return body, bottom + 14


def _ends(found: list[float]) -> tuple[float, float]:
    """Of the interval; a single seed has none, and its value is both."""
    centre, half = statistics.mean(found), Estimate.of(found).half_width or 0.0
    return centre - half, centre + half


def main() -> None:
    """Measure what is missing, then write the results, the page and the picture."""
    arguments = asked(__doc__, ROOT / "runs" / "parity-cause")
    results = measured(arguments, WAYS, measure, "parity_cause.py")
    if arguments.quick:
        print(page_of(results))
        return
    write_results(results, RESULTS, page_of(results), PAGE)
    write_text(PICTURE, picture(results))


if __name__ == "__main__":
    main()
