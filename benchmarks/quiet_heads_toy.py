"""One attention head that is to do nothing for half of its tokens: how far apart its scores go for that.

A linear layer, an attention with one head and a linear layer learn a task without a residual stream, so that a head
that is to give nothing has to read what is nothing: how "Quantizable Transformers" (arXiv 2306.12929) explains
outliers. The page says what the task is.

    python benchmarks/quiet_heads_toy.py --seeds 0 1 2
    python benchmarks/quiet_heads_toy.py --quick

About half a minute of one core for each way and seed.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import made_by, made_by_line, mean_and_range, publish
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertSelfAttention

from auxin.methods.restructure.clipped_softmax import GammaRamp
from auxin.nn.clipped_softmax import ClippedSoftmax
from auxin.nn.gated_attention import GatedAttention
from auxin.report.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quiet_heads_toy.json"
PAGE = ROOT / "docs" / "results" / "quiet_heads_toy.md"
LENGTH, WIDTH, CLASSES, PAYLOAD = 32, 32, 4, 8
STEPS, BATCH, RATE = 1000, 32, 3e-3
TASK = (
    f"A text has {LENGTH} tokens of {CLASSES} classes, each with a payload of {PAYLOAD} numbers, N(0, 1). Half of them "
    "are marked: for these the answer is zeros, for the others the mean payload of their class. The first token has no "
    f"class. A linear layer, an attention with one head of width {WIDTH} and a linear layer learn that, without a "
    "residual stream: a head that is to give nothing has to read what is nothing."
)


def gated(module: nn.Module) -> nn.Module:
    """With a gate of the whole input."""
    return GatedAttention.replacing(module, heads=1, head_width=WIDTH, width=WIDTH)


def clipped(alpha: float, begin: float = 1.0) -> Callable[[nn.Module], nn.Module]:
    """With gamma = -alpha / 32."""
    return lambda module: ClippedSoftmax.replacing(module, gamma=-alpha / LENGTH, begin=begin)


WAYS: dict[str, tuple[str, Callable[[nn.Module], nn.Module], int]] = {
    "softmax": ("softmax", lambda module: module, 0),
    "gated": ("a gate on the head", gated, 0),
    "clipped-0.9": ("clipped, alpha 0.9", clipped(0.9), 0),
    "clipped-4": ("clipped, alpha 4", clipped(4.0), 0),
    "clipped-4-ramp": ("clipped, alpha 4, ramped over half of the steps", clipped(4.0, begin=0.0), STEPS // 2),
}
"""By name a title, what becomes of the attention, and steps of a ramp."""
Row = dict[str, float]


class Head(nn.Module):
    """The model."""

    def __init__(self, change: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        config = BertConfig(hidden_size=WIDTH, num_attention_heads=1, attention_probs_dropout_prob=0.0)
        config._attn_implementation = "eager"
        self.embedding = nn.Linear(CLASSES + PAYLOAD + 2, WIDTH)
        self.attention: Any = BertSelfAttention(config)
        self.output = nn.Linear(WIDTH, PAYLOAD)
        self.attention = change(self.attention)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (samples, tokens, features) the answers, the scores and the weights, (samples, tokens, tokens)."""
        hidden = self.embedding(x)
        read, weights = self.attention(hidden)
        scores = self.attention.query(hidden) @ self.attention.key(hidden).mT / WIDTH**0.5
        return self.output(read), scores, weights[:, 0]


def batch(draw: torch.Generator, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, answers, and which tokens are to be given nothing."""
    classes = nn.functional.one_hot(torch.randint(CLASSES, (samples, LENGTH), generator=draw), CLASSES).float()
    payload = torch.randn(samples, LENGTH, PAYLOAD, generator=draw)
    quiet = torch.rand(samples, LENGTH, generator=draw) < 0.5
    first = torch.zeros(samples, LENGTH)
    first[:, 0], classes[:, 0], payload[:, 0], quiet[:, 0] = 1, 0, 0, True
    same = classes @ classes.mT
    means = same @ payload / same.sum(-1, keepdim=True).clamp(min=1)
    x = torch.cat([classes, payload, quiet[..., None].float(), first[..., None]], dim=-1)
    return x, torch.where(quiet[..., None], 0, means), quiet


def trained(way: str, seed: int, steps: int) -> Row:
    """What one way has learnt, on samples that it has not seen."""
    _, change, ramp = WAYS[way]
    torch.manual_seed(seed)
    model, draw = Head(change), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    hook = GammaRamp(max(ramp * steps // STEPS, 1)) if ramp else None
    if hook is not None:
        hook.attach(model, optimizer)
    for step in range(steps):
        if hook is not None:
            hook.before_step(step)
        x, answers, _ = batch(draw, BATCH)
        loss = (model(x)[0] - answers).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, answers, quiet = batch(torch.Generator().manual_seed(10_000 + seed), 64)
        given, scores, weights = model(x)
        errors, apart = (given - answers).square().mean(-1), scores.amax(-1) - scores.amin(-1)
    return {
        "apart": apart[quiet].mean().item(),
        "nothing": errors[quiet].mean().item(),
        "mean": errors[~quiet].mean().item(),
        "zeros": (weights == 0).float().mean().item(),
    }


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    found: dict[str, list[Row]] = {way: list(seeds.values()) for way, seeds in results["ways"].items()}
    rows = []
    for way, seeds in found.items():
        columns = [[row[key] for row in seeds] for key in ("apart", "nothing", "mean", "zeros")]
        forms = (".1f", ".4f", ".4f", ".2f")
        rows.append([WAYS[way][0], *(mean_and_range(one, form) for one, form in zip(columns, forms, strict=True))])
    header = (
        "attention", "scores apart where nothing is wanted", "error there", "error elsewhere", "weights that are zero",
    )  # fmt: skip
    ratio = statistics.mean(row["apart"] for row in found["gated"]) / statistics.mean(
        row["apart"] for row in found["softmax"]
    )
    lines = [
        "# One head that is to do nothing",
        "",
        f"{TASK} {results['steps']} steps of {BATCH} texts, Adam with {RATE:g}. Mean over the seeds, the least and the "
        "largest. Errors are squares.",
        "",
        made_by_line(results),
        "",
        *markdown_table(header, rows),
        "",
        f"The gated head's scores lie {ratio:.2f} times as far apart as those of softmax where it is to do nothing.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train all ways, write what they learnt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = ([0], 5) if arguments.quick else (arguments.seeds, STEPS)
    ways = {way: {str(seed): trained(way, seed, steps) for seed in seeds} for way in WAYS}
    command = f"python benchmarks/quiet_heads_toy.py --seeds {' '.join(map(str, seeds))}"
    results = {**made_by(command), "steps": steps, "ways": ways}
    publish(results, RESULTS, page(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
