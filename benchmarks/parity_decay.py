"""Whether the weight decay of its keys matters to a TokenFormer.

Under a norm of scores the common length of the keys changes nothing, so that decay can only make a step turn them
further; in a new model, without norms, their length counts. The models, data, steps and rates are those of
`parity.yaml`; beside each stands itself with keys left out of the decay.

    python benchmarks/parity_decay.py --jobs 2
    python benchmarks/parity_decay.py --quick

Finished cells are not measured again: after a change of the recipe give another --runs. About two minutes of one core
per way and seed.
"""

from typing import Any

from measuring import made_by_line, publish
from parity_cells import ROOT, Cell, Task, Way, asked, excess, learnt, measured, values
from torch import nn
from torch.optim import Optimizer

from auxin.accounting.statistics import Estimate
from auxin.report.markdown import markdown_table

RESULTS = ROOT / "benchmarks" / "results" / "parity_decay.json"
PAGE = ROOT / "docs" / "results" / "parity_decay.md"
WAYS = {
    "new": Way("TokenFormer, a new model's constants, rate 3e-3", "new"),
    "keys": Way("and no weight decay of keys", "new", "undecayed"),
    "rotated": Way("TokenFormer with norms of scores, all rotated, rate 1.7e-3", "rotated"),
    "rotated-keys": Way("and no weight decay of keys", "rotated", "undecayed"),
}
AGAINST = {"keys": "new", "rotated-keys": "rotated"}
"""With which way each is compared."""


class UndecayedKeys:
    """Training hook: the keys of parameter tokens leave the optimizer's group that decays."""

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Move them to a group of their own."""
        keys = {parameter for name, parameter in model.named_parameters() if name.endswith("key_tokens")}
        for group in list(optimizer.param_groups):
            if found := [parameter for parameter in group["params"] if parameter in keys]:
                group["params"] = [parameter for parameter in group["params"] if parameter not in keys]
                optimizer.add_param_group({**group, "params": found, "weight_decay": 0.0})

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: an attached optimizer has its groups."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def measure(task: Task) -> Cell:
    """Train one way with one seed."""
    return learnt(task, task.model(), [UndecayedKeys()] if task.way.form else [])


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        [
            way.title,
            Estimate.of(values(results, name, "loss")).text(3),
            Estimate.of(excess(results, name, AGAINST[name])).text(3, True) if name in AGAINST else "-",
        ]
        for name, way in WAYS.items()
    ]
    lines = [
        "# Weight decay of keys",
        "",
        "Models, data, steps and rates are those of [parity.md](parity.md). Held-out loss in nats per token: mean over "
        "the seeds and 95 % interval (Student's t); differences, from the model above, are taken seed by seed.",
        "",
        f"{made_by_line(results)} Seeds: {results['seeds']}.",
        "",
        *markdown_table(("model", "final loss", "difference"), rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and write the page."""
    arguments = asked(__doc__, ROOT / "runs" / "parity-decay")
    results = measured(arguments, WAYS, measure, "parity_decay.py")
    publish(results, RESULTS, page_of(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
