"""The rows of the benchmark on SmolLM2: which methods with which settings, what a row has to hold, and the page."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from measuring import made_by_line

from auxin.accounting.results import perplexity_of
from auxin.methods import methods
from auxin.training import TrainingSettings

KINDS = ("english", "python")
NO_EDIT = "no-edit"


@dataclass(frozen=True)
class Trial:
    """Lengths and rates, the same for every row but for the learning rate of those that train new parameters alone."""

    windows: int = 6
    """Held-out windows of each kind, spread evenly over the held-out text."""
    window: int = 256
    """Tokens of a held-out window."""
    probe: int = 128
    """Tokens of each of the two texts (one of each kind) on which the logits are compared."""
    steps: int = 200
    sequence: int = 32
    """Tokens per step, one sequence of English or of Python."""
    learning_rate: float = 3e-5
    warmup: int = 20
    decay: float = 0.25
    """Share of the steps over which the rate falls to zero, at the end."""
    seed: int = 0

    ramp: int = 100
    """Steps in which the masks of masked growth go up; the rest trains the plain architecture."""

    def training(self, rate: float) -> TrainingSettings:
        """As the package's own training takes it; nothing is saved but the start and the end."""
        return TrainingSettings(
            steps=self.steps,
            batch_size=1,
            learning_rate=rate,
            warmup_steps=self.warmup,
            decay_fraction=self.decay,
            weight_decay=0.01,
            checkpoint_interval=None,
            keep_checkpoints=1,
            tensorboard=False,
            seed=self.seed,
            # One sequence's loss is no sign of trouble.
            guard={"spike_multiple": None},
        )


QUICK = Trial(windows=1, steps=4, warmup=1, ramp=2)


@dataclass(frozen=True)
class Case:
    """One row: a method with settings for this model."""

    title: str
    method: str = ""
    """Empty: no edit."""
    settings: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    """None: the trial's."""
    branches_only: bool = False
    """Train a graft's branches and nothing else."""
    masks: bool = False
    """Masks open in the training's first part and are taken off after it."""


WIDER = {"hidden_size": 648, "num_attention_heads": 12, "intermediate_size": 1728}
"""The least hidden size above 576 that 12 heads divide, as a Llama's config wants it."""

CASES: dict[str, Case] = {
    NO_EDIT: Case("no edit, trained on"),
    "net2net-width": Case(
        "Net2Net, 12 heads, FFN 1920", "net2net", {"num_attention_heads": 12, "intermediate_size": 1920}
    ),
    "net2net-depth": Case("Net2Net, 32 layers", "net2net", {"num_hidden_layers": 32}),
    "bert2bert-fpi": Case("bert2BERT FPI, width 648, 12 heads", "bert2bert", {**WIDER, "initialisation": "fpi"}),
    "bert2bert-aki": Case("bert2BERT AKI, width 648, 12 heads", "bert2bert", {**WIDER, "initialisation": "aki"}),
    "stacking": Case("stacking, 36 layers", "stacking", {"layers": 36}),
    "interleaving": Case("interleaving, 36 layers", "stacking", {"layers": 36, "order": "interleave"}),
    "llama-pro": Case("LLaMA Pro, 33 layers", "llama-pro", {"group_size": 10, "train_only_new": True}, 2e-4),
    "solar": Case("SOLAR, 36 layers", "solar", {"layers": 36}),
    "lemon": Case("LEMON, width 648, 12 heads, 32 layers", "lemon", {**WIDER, "num_hidden_layers": 32}),
    "hypercloning-inner": Case(
        "HyperCloning, heads and FFN x2",
        "hypercloning",
        {"num_attention_heads": 18, "intermediate_size": 3072, "variant": "noisy"},
    ),
    "masked": Case("MSG, FFN 1920, 32 layers", "masked", {"intermediate_size": 1920, "layers": 32}, masks=True),
    "masked-ffn": Case("MSG, FFN 1600", "masked", {"intermediate_size": 1600}, 1e-4, masks=True),
    "masked-depth": Case("MSG, 31 layers", "masked", {"layers": 31}, 1e-4, masks=True),
    "graft": Case("Graft, 16 tokens beside every linear", "graft", {"tokens": 16}, 1e-3, True),
    "vocabulary": Case(
        "vocabulary, 512 tokens more",
        "vocabulary",
        {"tokens_from": "stdlib", "num_tokens": 512, "max_bytes": 2_000_000},
    ),
    "altup": Case("Recycled-AltUp, 2 blocks", "altup", {"blocks": 2}),
    "altup-4": Case("Recycled-AltUp, 4 blocks", "altup", {"blocks": 4}),
    "altup-copies": Case("AltUp, 2 blocks, copies", "altup", {"blocks": 2, "conversion": "copies"}),
    "ligo": Case("LiGO, width 648, 12 heads", "ligo", {**WIDER, "steps": 0}),
    "tokenformer": Case("TokenFormer tokens", "tokenformer", {"ffn_tokens": 64}),
    "hypercloning": Case("HyperCloning, everything x2", "hypercloning", {"factor": 2, "variant": "noisy"}),
}


def measured(stage: str, row: dict[str, Any]) -> bool:
    """Whether a row has what `stage` measures, or can't have it."""
    return "refused" in row or ("drift" if stage == "edit" else "loss_after_training") in row


def mean_loss(loss: dict[str, float]) -> float:
    """Nats per token, both kinds weighing the same."""
    return statistics.mean(loss.values())


def broken(row: dict[str, Any]) -> list[str]:
    """What a row breaks of what it has to hold."""
    found = [row["error"]] if "error" in row else []
    if "drift" not in row:
        return found
    if row.get("promise") == "exact" and row["drift"] > row["tolerance"]:
        found.append(f"exact, but the logits moved by {row['drift']:.2g}")
    if not row["reloaded_equal"]:
        found.append("the saved copy computes other bits")
    if row.get("block_distance", 1.0) < 1e-3:
        found.append(f"the blocks are still equal after training: they differ by {row['block_distance']:.1e}")
    if "loss_after_training" in row:
        before, after = mean_loss(row["loss_after_edit"]), mean_loss(row["loss_after_training"])
        if not after < before:
            found.append(f"training took the held-out loss from {before:.4f} to {after:.4f}")
    return found


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    trial, source, rows = results["trial"], results["source"], results["rows"]
    rows = {name: rows[name] for name in CASES if name in rows}
    problems = [f"- {CASES[name].title}: {problem}" for name, row in rows.items() for problem in broken(row)]
    missing = sorted(set(methods()) - {CASES[name].method for name in rows})
    lines = [
        "# Growth methods on SmolLM2-135M-Instruct",
        "",
        f"Held-out perplexity of the model as it is: English {perplexity_of(source['loss']['english']):.3f}, Python "
        f"{perplexity_of(source['loss']['python']):.3f} ({trial['windows']} windows of {trial['window']} tokens of "
        f"each). Training: {trial['steps']} steps of one sequence of {trial['sequence']} tokens, float32, AdamW, "
        f"learning rate {trial['learning_rate']:g} where the row names no other, warm-up {trial['warmup']} steps, "
        f"linear decay over the last {trial['decay']:.0%}, seed {trial['seed']}; every row sees the same tokens in the "
        "same order. What each column means: [smollm2.md](../smollm2.md).",
        "",
        f"{made_by_line(results)} Text: {source['corpus']}.",
        "",
        "| method | promise | drift at the edit | parameters (trained) | English: edit, trained "
        "| Python: edit, trained | held-out loss: edit, trained | reload | s per step | peak GB |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    lines += [_row(CASES[name], row) for name, row in rows.items() if "drift" in row]
    refused = [f"- {CASES[name].title}: {row['refused']}" for name, row in rows.items() if "refused" in row]
    if refused:
        lines += ["", "Refused, with the reason that is given:", "", *refused]
    if missing:
        lines += ["", f"Without a row: {', '.join(missing)}."]
    distances = [
        f"{CASES[name].title} {row['block_distance']:.1%}" for name, row in rows.items() if "block_distance" in row
    ]
    if distances:
        lines += [
            "",
            f"How far the blocks are from their mean behind the last layer, after training: {', '.join(distances)}.",
        ]
    untrained = [CASES[name].title for name, row in rows.items() if not measured("training", row)]
    if untrained:
        lines += ["", f"Measured at the edit, and not trained: {'; '.join(untrained)}."]
    for processor, names in trained_otherwise(results).items():
        lines += [
            "",
            f"Trained by an earlier version, on random stretches of the same text, the kinds in turns, and timed on "
            f"{processor}: {'; '.join(CASES[name].title for name in names)}.",
        ]
    lines += ["", *(["Broken:", "", *problems] if problems else ["Every row holds what it has to."])]
    return "\n".join(lines) + "\n"


def trained_otherwise(results: dict[str, Any]) -> dict[str, list[str]]:
    """Rows that were trained on other data than this version's, by the processor on which."""
    found: dict[str, list[str]] = {}
    for name, row in results["rows"].items():
        if "loss_after_training" in row and row.get("training_data") != results["source"]["training_data"]:
            found.setdefault(row["processor"], []).append(name)
    return found


def _row(case: Case, row: dict[str, Any]) -> str:
    losses = [row["loss_after_edit"]] + ([row["loss_after_training"]] if "loss_after_training" in row else [])
    millions = f"{row['parameters'] / 1e6:.1f}M"
    if row.get("trained_parameters", row["parameters"]) < row["parameters"]:
        millions += f" ({row['trained_parameters'] / 1e6:.1f}M)"
    title = case.title
    if case.learning_rate is not None:
        title += f", learning rate {case.learning_rate:g}"
    cells = [
        title,
        row.get("promise", "-"),
        f"{row['drift']:.1e}",
        millions,
        *(", ".join(f"{perplexity_of(loss[kind]):.2f}" for loss in losses) for kind in KINDS),
        ", ".join(f"{mean_loss(loss):.4f}" for loss in losses),
        "equal" if row["reloaded_equal"] else "different",
        f"{row['cpu_seconds_per_step']:.2f}" if len(losses) > 1 else "not trained",
        f"{row['peak_bytes'] / 1e9:.1f}" if len(losses) > 1 else "-",
    ]
    return f"| {' | '.join(cells)} |"
