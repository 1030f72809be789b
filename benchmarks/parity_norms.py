"""What norms with parameters, and a norm on queries and keys, would bring a TokenFormer and a dense Transformer.

The models, data, steps and rates are those of `parity.yaml`. The norms inside a TokenFormer's layers have no
parameters, those of a GPT-NeoX have; here each gets a weight and a bias. A norm on queries and keys divides each head's
query and key by its root mean square before the rotation, times a weight per dimension, as Qwen3 and others have it.

    python benchmarks/parity_norms.py --jobs 2
    python benchmarks/parity_norms.py --quick

Finished cells are not measured again: after a change of the recipe give another --runs. About two minutes of one core
per way and seed.
"""

from typing import Any

import torch
from measuring import made_by_line, publish
from parity_cells import ROOT, Cell, Task, Way, asked, excess, learnt, measured, values
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.accounting.statistics import Estimate
from auxin.report.markdown import markdown_table

RESULTS = ROOT / "benchmarks" / "results" / "parity_norms.json"
PAGE = ROOT / "docs" / "results" / "parity_norms.md"
WAYS = {
    "new": Way("TokenFormer, a new model's constants, rate 3e-3", "new"),
    "weights": Way("and norms with parameters", "new", "weights"),
    "heads": Way("and a norm on queries and keys", "new", "heads"),
    "both": Way("and both", "new", "weights heads"),
    "dense": Way("GPT-NeoX, rate 6e-3", "dense-0060"),
    "dense-heads": Way("and a norm on queries and keys", "dense-0060", "heads"),
}
AGAINST = {"weights": "new", "heads": "new", "both": "new", "dense": "new", "dense-heads": "dense"}
"""With which way each is compared."""


class Affine(nn.Module):
    """The parameters of a layer norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and move x (..., size)."""
        return x * self.weight + self.bias


def with_norm_parameters(model: PreTrainedModel) -> None:
    """Give every norm inside the layers of a TokenFormer a weight and a bias."""

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return module.norm_parameters(args[0]), *args[1:]

    for layer in model.base_model.layers:
        for module in (layer.attention, layer.mlp):
            module.norm_parameters = Affine(model.config.hidden_size)
            module.register_forward_pre_hook(before)


def with_head_norms(model: PreTrainedModel) -> None:
    """Give every attention a norm on the queries and keys of each head."""
    heads = model.config.num_attention_heads
    size = model.config.hidden_size // heads

    def after(module: Any, args: Any, output: Tensor) -> Tensor:
        # A fused projection gives query, key and value of a head one after the other.
        pieces = list(output.unflatten(-1, (heads, -1)).split(size, dim=-1))
        pieces[: len(module.head_norms)] = [norm(x) for norm, x in zip(module.head_norms, pieces, strict=False)]
        return torch.cat(pieces, dim=-1).flatten(-2)

    for layer in model.base_model.layers:
        if model.config.model_type == "tokenformer":
            projections = {layer.attention.query: 1, layer.attention.key: 1}
        else:
            projections = {layer.attention.query_key_value: 2}
        for module, count in projections.items():
            module.head_norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for _ in range(count))
            module.register_forward_hook(after)


CHANGES = {"weights": with_norm_parameters, "heads": with_head_norms}


def measure(task: Task) -> Cell:
    """Train one way with one seed."""
    model = task.model()
    for change in (task.way.form or "").split():
        CHANGES[change](model)
    return learnt(task, model)


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = []
    for name, way in WAYS.items():
        gap = "-"
        if name in AGAINST:
            found = Estimate.of(excess(results, name, AGAINST[name]))
            gap = f"{found.text(3, True)} ({WAYS[AGAINST[name]].title.partition(',')[0]})"
        loss = Estimate.of(values(results, name, "loss")).text(3)
        rows.append([way.title, f"{values(results, name, 'parameters')[0]:,}", loss, gap])
    lines = [
        "# Norms with parameters, and a norm on queries and keys",
        "",
        "Models, data, steps and rates are those of [parity.md](parity.md). Held-out loss in nats per token: mean over "
        "the seeds and 95 % interval (Student's t); differences are taken seed by seed.",
        "",
        f"{made_by_line(results)} Seeds: {results['seeds']}.",
        "",
        *markdown_table(("model", "parameters", "final loss", "minus"), rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and write the page."""
    arguments = asked(__doc__, ROOT / "runs" / "parity-norms")
    results = measured(arguments, WAYS, measure, "parity_norms.py")
    publish(results, RESULTS, page_of(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
