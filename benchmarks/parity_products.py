"""Whether it is their rank, or that they are products, which makes the projections of a TokenFormer's attention learn
less than matrices do.

The models, data and rates are those of `parity.yaml`, over 1,400 steps instead of 700: where a new TokenFormer has just
fallen behind. Every way changes the four projections of the attention, or some of them, and nothing else:

- linear: the scores go on as they are, without GELU, so that a projection is a product of two matrices;
- leaky: half of the scores as they are, half through GELU;
- dense: a projection is one matrix;
- fast, slow: keys and values are three times, or a third, of what is stored and learnt, so that the optimizer's steps
  are three times as large, or a third; slow keys, slow values: a tenth, of the one or the other alone;
- fixed: keys are orthogonal and not learnt, so that of the two factors of a product values alone are;
- with input: beside each projection goes its input, each dimension times a gain that is learnt and begins at 0.2, so
  that it has full rank;
- guided: a matrix beside each projection, of which all comes at first, and which fades by half a cosine over the first
  half of the training; what is left is what it is without a guide.

"Square" models are of width 104 with 104 tokens in the attention, where a product can be any matrix, and 228 in the
feed-forward part; they have as many parameters.

    python benchmarks/parity_products.py --seeds 0 --jobs 2
    python benchmarks/parity_products.py --quick

Finished cells are not measured again. About four minutes of one core per way and seed.
"""

from typing import Any

import torch
from measuring import publish
from parity_cells import ROOT, Cell, Same, Task, Way, asked, learnt, losses_page, measured, with_attention
from parity_linear import PROJ, QKV, dense, linear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from auxin.methods.factorize.structured_ffn import faded
from auxin.nn import Pattention
from auxin.planning.hooks import Ramp

RESULTS = ROOT / "benchmarks" / "results" / "parity_products.json"
PAGE = ROOT / "docs" / "results" / "parity_products.md"
TWICE = ["training.steps=1400", "training.evaluation_interval=350"]
ALL = f"{QKV} {PROJ}"
WAYS = {
    "gpt-neox": Way("GPT-NeoX, rate 6e-3", "dense-0060"),
    "new": Way("TokenFormer, a new model's constants, rate 3e-3", "new"),
    "dense": Way("its four projections dense, of rank 128", "new", f"dense {ALL}"),
    "dense-value-proj": Way("its value and output projection dense", "new", "dense value proj"),
    "leaky": Way("half of its scores linear", "new", f"leaky {ALL}"),
    "linear": Way("its scores linear, of rank 64", "new", f"linear {ALL}"),
    "fast": Way("steps of its keys and values three times as large", "new", f"fast {ALL}"),
    "slow": Way("steps of its keys and values a third as large", "new", f"slow {ALL}"),
    "slow-keys": Way("steps of its keys alone a tenth as large", "new", f"slow-keys {ALL}"),
    "slow-values": Way("steps of its values alone a tenth as large", "new", f"slow-values {ALL}"),
    "guided": Way("guided by a matrix in the first half", "new", f"guided {ALL}"),
    "linear-guided": Way("its scores linear, guided by a matrix in the first half", "new", f"linear-guided {ALL}"),
    "with-input": Way("its input beside each of them, times a gain", "new", f"with-input {ALL}"),
    "square": Way("square, of rank 104", "new-square"),
    "square-leaky": Way("square, half of its scores linear", "new-square", f"leaky {ALL}"),
    "square-linear": Way("square, its scores linear, of rank 104", "new-square", f"linear {ALL}"),
    "square-guided": Way("square, linear, guided in the first half", "new-square", f"linear-guided {ALL}"),
    "square-fixed": Way("square, linear, its keys orthogonal and not learnt", "new-square", f"fixed {ALL}"),
    "square-dense": Way("square, its four projections dense", "new-square", f"dense {ALL}"),
    "square-dense-large": Way(
        "square, dense, as large at the start as its products", "new-square", f"dense-large {ALL}"
    ),
    "square-linear-slow": Way("square, its scores linear, rate 1e-3", "new-square-0010", f"linear {ALL}"),
    "square-half": Way("square, but with 52 tokens, of rank 52", "new-square-half"),
}
"""All but the first change the attention of a TokenFormer."""


class Leaky(Same):
    """Half of the scores go on as they are, half through GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        scores = F.linear(x, self.key_tokens)
        return (0.5 * scores + 0.5 * F.gelu(scores)) @ self.value_tokens


class Scaled(Same):
    """Keys and values are multiples of what is stored and learnt."""

    keys, values = 1.0, 1.0

    def __init__(self, module: Pattention) -> None:
        super().__init__(module)
        with torch.no_grad():
            self.key_tokens.div_(self.keys)
            self.value_tokens.div_(self.values)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        scores = F.gelu(F.linear(x, self.key_tokens * self.keys))
        return scores @ (self.value_tokens * self.values)


class Fast(Scaled):
    """Three times as large steps."""

    keys, values = 3.0, 3.0


class Slow(Scaled):
    """A third."""

    keys, values = 1 / 3, 1 / 3


class SlowKeys(Scaled):
    """A tenth, of the keys."""

    keys = 0.1


class SlowValues(Scaled):
    """A tenth, of the values."""

    values = 0.1


class Fixed(Same):
    """Linear, with orthogonal keys that are not learnt."""

    def __init__(self, module: Pattention) -> None:
        super().__init__(module, score_function="linear")
        nn.init.orthogonal_(self.key_tokens).requires_grad_(False)


class WithInput(nn.Module):
    """`product`, and beside it its input, each dimension times a gain."""

    def __init__(self, product: Pattention) -> None:
        super().__init__()
        self.product, self.gain = product, nn.Parameter(torch.full((product.in_features,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), as many as go in."""
        return x * self.gain + self.product(x)


def dense_large(module: Pattention) -> nn.Linear:
    """One matrix in the place of `module`, its entries drawn as large as those of the product of keys and values."""
    made = dense(module)
    with torch.no_grad():
        nn.init.normal_(made.weight, std=(module.key_tokens.T @ module.value_tokens).std().item())
    return made


class Guided(nn.Module):
    """`product`, and beside it a matrix of which there is a share."""

    def __init__(self, product: Pattention) -> None:
        super().__init__()
        self.product, self.guide, self.share = product, dense(product), 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.share == 0:
            return self.product(x)
        return self.share * self.guide(x) + (1 - self.share) * self.product(x)


class Fading(Ramp):
    """Training hook: lets these guides fade as those of structured feed-forward parts do."""

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find them."""
        self._guides = [module for module in model.modules() if isinstance(module, Guided)]

    def move(self, step: int) -> None:
        """Set the share that `step` sees."""
        for guide in self._guides:
            guide.share = faded(step, self.steps)


FORMS: dict[str, Any] = {
    "linear": linear,
    "leaky": Leaky,
    "dense": dense,
    "dense-large": dense_large,
    "fast": Fast,
    "slow": Slow,
    "slow-keys": SlowKeys,
    "slow-values": SlowValues,
    "fixed": Fixed,
    "with-input": WithInput,
    "guided": Guided,
    "linear-guided": lambda module: Guided(linear(module)),
}


def measure(task: Task) -> Cell:
    """Train one way with one seed."""
    hooks = [Fading(task.settings().steps // 2)] if "guided" in (task.way.form or "") else []
    return learnt(task, with_attention(task, FORMS), hooks)


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    header = ("model", "parameters", "final loss", "minus a new TokenFormer's")
    return losses_page(
        results, WAYS, "Projections of the attention that are products", "rank-or-products", 1400, header
    )


def main() -> None:
    """Measure what is missing, then write the results and the page."""
    arguments = asked(__doc__, ROOT / "runs" / "parity-products")
    results = measured(arguments, WAYS, measure, "parity_products.py", TWICE)
    publish(results, RESULTS, page_of(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
