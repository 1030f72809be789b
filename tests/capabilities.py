"""What every method does to every architecture: the probes behind the tests of all methods and docs/capabilities.md."""

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.accounting.inputs import call_arguments
from auxin.edits import Plan, Promise, Receipt, apply
from auxin.edits.promise import TOLERANCE
from auxin.edits.structure import structural_edits
from auxin.errors import DataError, PlanError
from auxin.methods import methods
from auxin.models.tokenformer.slots import ParameterTokensConfig
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from intents import Figures, missed
from outputs import output
from tiny_models import FAMILIES, VOCABULARY, inputs, tiny

TITLES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "t5": "T5",
    "bert": "BERT",
    "vit": "ViT",
    "tokenformer": "TokenFormer",
}
DECODERS = [family for family in FAMILIES if family not in ("t5", "bert", "vit")]
SEED = 3
PLAN_FILES = tempfile.TemporaryDirectory()
"""Where files of plans (a learned operator) lie as long as the process lives."""


@dataclass(frozen=True)
class Refusal:
    """The method can't do it."""

    reason: str


@dataclass(frozen=True)
class Result:
    """The method was applied."""

    plan: Plan
    receipt: Receipt
    model: PreTrainedModel
    """The edited model; shared, so copy it before changing it."""
    old: Figures
    """Of the model before."""
    before: Tensor
    """The old model's logits on `inputs`."""
    after: Tensor
    """The new model's."""

    @property
    def promise(self) -> Promise:
        return self.plan.promise

    @property
    def change(self) -> float:
        """max |after - before| / max |before|, over the outputs that both models have."""
        return change(self.before, self.after)

    def missed(self, method: Method) -> str | None:
        """What of `method`'s intent was not done; None if nothing."""
        return missed(method.intent, self.old, Figures.of(self.model), self.change)

    @property
    def is_plain(self) -> bool:
        """Whether the config alone says what the model is, so that it loads without auxin."""
        return not structural_edits(self.model.config) and not isinstance(self.model.config, ParameterTokensConfig)


def built_in() -> dict[str, Method]:
    """The methods of this package; what else may be installed beside it is no part of its tests and pages."""
    return {name: method for name, method in methods().items() if method.settings.__module__.startswith("auxin.")}


@cache
def probe(name: str, family: str) -> Result | Refusal:
    """What the method called `name` does to the tiny model of `family`, with its own example settings."""
    return attempt(methods()[name], tiny(family, seed=SEED))


def attempt(method: Method, model: PreTrainedModel) -> Result | Refusal:
    """Apply `method` with its example settings to `model`, in place."""
    before, old = logits(model), Figures.of(model)
    try:
        settings = method.settings.parse(method.examples(model))
        asked = method.calibration is not None and method.calibration(settings) is not None
        data = Calibration.of_batches(model, [labelled(model)]) if asked else None
        plan = method.plan(Bench(model, data, folder=Path(PLAN_FILES.name)), settings)
        twin = model if plan.kept_tokens is None else copy.deepcopy(model)
        receipt = apply(plan, model)
    except (PlanError, DataError) as error:
        return Refusal(str(error))
    if plan.kept_tokens is not None:
        before = of_the_same_text(twin, model, plan.kept_tokens)
    return Result(plan, receipt, model, old, before, logits(model))


def labelled(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs, with labels of the form of what `model` gives where it takes any, or with where answers begin and end."""
    batch = inputs(model)
    if "start_positions" in call_arguments(model):
        tokens = batch["input_ids"].shape[1]
        batch["start_positions"] = torch.arange(len(batch["input_ids"])) % tokens
        batch["end_positions"] = torch.full_like(batch["start_positions"], tokens - 1)
    elif "labels" in call_arguments(model):
        given = logits(model)
        generator = torch.Generator().manual_seed(SEED)
        classes, places = given.shape[-1], given.shape[:-1]
        if given.dim() == 4:  # maps of classes, which are made as large as the images
            classes, places = given.shape[1], (len(given), *batch["pixel_values"].shape[2:])
        batch["labels"] = torch.randint(min(classes, VOCABULARY), places, generator=generator)
    return batch


def check(method: Method, outcome: Result | Refusal) -> None:
    """A refusal gives a reason; a plan keeps its promise and does what the method is for."""
    if isinstance(outcome, Refusal):
        assert len(outcome.reason.split()) >= 6, f"{outcome.reason!r} is no reason"
        assert outcome.reason.endswith("."), outcome.reason
        assert not re.match(r"Edit \d|No edit", outcome.reason), "the method refuses, not the executor"
        return
    assert torch.isfinite(outcome.after).all()
    if outcome.promise == "exact":
        assert outcome.change <= TOLERANCE
    if outcome.receipt.max_relative_change is not None and outcome.promise == "exact":
        assert outcome.receipt.max_relative_change <= outcome.receipt.tolerance
    assert outcome.receipt.parameters_after == sum(p.numel() for p in outcome.model.parameters())
    left = outcome.missed(method)
    assert left is None, left


def check_page(name: str, family: str, outcome: Result | Refusal) -> None:
    """docs/capabilities.md says what happened."""
    said = word(outcome) + (f": {reason(family, outcome)}" if isinstance(outcome, Refusal) else "")
    assert _page()[name, row_title(family)] == said, "run python docs/generate_capabilities.py"


@cache
def _page() -> dict[tuple[str, str], str]:
    return written((Path(__file__).resolve().parents[1] / "docs" / "capabilities.md").read_text(encoding="utf-8"))


def again(method: Method, result: Result) -> Result | Refusal:
    """A second plan of `method` on what the first made; the first's model stays as it is."""
    return attempt(method, copy.deepcopy(result.model))


def logits(model: PreTrainedModel) -> Tensor:
    """Logits on the tiny models' inputs."""
    with torch.no_grad():
        return output(model(**inputs(model)))


def of_the_same_text(old: PreTrainedModel, new: PreTrainedModel, kept: list[int]) -> Tensor:
    """What `old` says to the inputs of `new`, whose token i was kept[i]; of logits over tokens, those of the kept."""
    tokens = torch.tensor(kept)
    batch = {name: tokens[ids] if name.endswith("input_ids") else ids for name, ids in inputs(new).items()}
    with torch.no_grad():
        found = output(old(**batch))
    return found[..., tokens] if found.shape[-1] == old.config.get_text_config().vocab_size else found


def change(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|; outputs that only one has (new words of a vocabulary) are left out."""
    common = min(before.shape[-1], after.shape[-1])
    before, after = before[..., :common], after[..., :common]
    return ((after - before).abs().max() / before.abs().max()).item()


def matrix(found: Mapping[str, Method], families: Iterable[str], notes: dict[str, int]) -> str:
    """The table of architectures by methods in Markdown.

    Args:
        found: the methods by name.
        families: the architectures, names of `tiny_models.MODELS`.
        notes: reasons of refusals by what they say, with their numbers; new ones are added.
    """
    lines = ["| | " + " | ".join(f"`{name}`" for name in found) + " |", "|---|" + ":-:|" * len(found)]
    for family in families:
        cells = [_cell(name, family, notes) for name in found]
        lines.append(f"| {row_title(family)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def counted(found: Iterable[str], families: Iterable[str]) -> Counter[str]:
    """How many cells of the table are "exact", "approximate", "none" (the function changes) or "refused"."""
    return Counter(
        "refused" if isinstance(outcome, Refusal) else outcome.promise
        for outcome in (probe(name, family) for family, name in product(list(families), list(found)))
    )


def row_title(family: str) -> str:
    """What the row of an architecture is called."""
    return TITLES.get(family, f"`{family}`")


def word(outcome: Result | Refusal) -> str:
    """What the table says of an outcome, but for a refusal's number."""
    if isinstance(outcome, Refusal):
        return "no"
    said = {"exact": "exact", "approximate": "approx", "none": "other"}[outcome.promise]
    return f"{said}+" if structural_edits(outcome.model.config) else said


def reason(family: str, outcome: Refusal) -> str:
    """Why something was refused, in one text for all architectures that are refused for the same reason."""
    return outcome.reason.replace(f"of type {tiny(family).config.model_type!r}", "of this type")


def written(page: str) -> dict[tuple[str, str], str]:
    """The cells of a page with tables, by method and title of the row; refusals with their reasons."""
    cells: dict[tuple[str, str], str] = {}
    header: list[str] = []
    reasons = dict(re.findall(r"^(\d+)\. `[^`]+`: (.*)$", page, re.MULTILINE))
    for line in page.splitlines():
        first, *others = [part.strip() for part in line.strip("|").split("|")] if line.startswith("|") else [""]
        if line.startswith("| | `"):
            header = [other.strip("`") for other in others]
        elif len(others) == len(header) and not first.startswith("-"):
            for name, cell in zip(header, others, strict=True):
                number = re.fullmatch(r"no \((\d+)\)", cell)
                cells[name, first] = f"no: {reasons[number[1]]}" if number else cell
    return cells


def _cell(name: str, family: str, notes: dict[str, int]) -> str:
    outcome = probe(name, family)
    if isinstance(outcome, Refusal):
        number = notes.setdefault(f"`{name}`: {reason(family, outcome)}", len(notes) + 1)
        return f"no ({number})"
    return word(outcome)
