"""Every registered method on every known architecture: applied and whole, or refused with the reason."""

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline

import auxin
from auxin.accounting.recomputation import recomputed
from auxin.edits import ArrangeLayers, Edit, Plan, apply
from auxin.edits.promise import TOLERANCE
from auxin.methods import methods
from auxin.nn import Pattention
from auxin.planning.method import Intent, Method
from capabilities import (
    DECODERS,
    Refusal,
    Result,
    again,
    attempt,
    built_in,
    change,
    check,
    check_page,
    logits,
    probe,
    written,
)
from covering import covers, families, pairs
from edits.models import assert_same, everything
from tiny_models import FAMILIES, VOCABULARY, inputs, labels, tiny

ROOT = Path(__file__).resolve().parents[1]
METHODS = list(methods())
"""Those of installed plugins too."""
CASES = [(name, family) for name in METHODS for family in FAMILIES]
COVERING = [case for case in CASES if covers(METHODS, case[0], FAMILIES, case[1])]
REST = [case for case in CASES if case not in COVERING]
AUTO = {
    **dict.fromkeys(DECODERS, "AutoModelForCausalLM"),
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
    "vit": "AutoModelForImageClassification",
}

every_case = pytest.mark.parametrize(("name", "family"), CASES)
case_by_case = pytest.mark.parametrize(("name", "family"), pairs(METHODS, FAMILIES))
"""Of what takes long, the covering subset; all with --all."""
decoder_by_decoder = pytest.mark.parametrize(
    ("name", "family"), [case for case in pairs(METHODS, FAMILIES) if case.values[1] not in ("bert", "vit")]
)


def applied(name: str, family: str) -> Result:
    """The result of a method, its model to be changed at will; skips where the method refuses."""
    outcome = probe(name, family)
    if isinstance(outcome, Refusal):
        pytest.skip(f"refused: {outcome.reason}")
    return replace(outcome, model=copy.deepcopy(outcome.model))


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with all parameters elsewhere, as after training: what a method begins with zeros takes part."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def loss(model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs(model), labels=labels(model)).loss


@every_case
def test_the_method_is_applied_as_promised_or_refused_with_the_reason(name, family):
    outcome = probe(name, family)
    check(methods()[name], outcome)
    if name in built_in():
        check_page(name, family, outcome)


def pretending(intent: Intent, *edits: Edit) -> Method:
    """A method that says that it is for `intent`, and always makes the same plan."""
    plan = Plan(method="pretending", promise="none" if edits else "exact", edits=list(edits))
    found = methods()["tokenformer"]
    return replace(found, intent=intent, plan=lambda model, settings: plan, examples=lambda model: {})


LAYERS_TWICE = ArrangeLayers(layers="model.layers", order=[0, 1, 1])
ONE_LAYER_LESS = ArrangeLayers(layers="model.layers", order=[0])


@pytest.mark.parametrize(
    "method",
    [
        *(pretending(intent) for intent in get_args(Intent)),
        *(pretending(intent, LAYERS_TWICE) for intent in ("prune", "factorize", "quantize")),
        pretending("grow", ONE_LAYER_LESS),
    ],
    ids=lambda method: f"{method.intent}-{len(method.plan(None, None).edits)}",
)
def test_a_plan_that_does_nothing_for_its_intent_is_found(method):
    outcome = attempt(method, tiny("llama", seed=3))
    assert isinstance(outcome, Result)
    with pytest.raises(AssertionError, match=f"the intent is '{method.intent}', but the model"):
        check(method, outcome)


@pytest.mark.parametrize(
    "method",
    [
        pretending("grow", LAYERS_TWICE),
        *(pretending(intent, ONE_LAYER_LESS) for intent in get_args(Intent) if intent != "grow"),
    ],
    ids=lambda method: method.intent,
)
def test_a_plan_that_does_something_for_its_intent_is_enough(method):
    check(method, attempt(method, tiny("llama", seed=3)))


def test_no_row_or_column_of_the_page_of_capabilities_is_empty():
    cells = written((ROOT / "docs" / "capabilities.md").read_text(encoding="utf-8"))
    done = {cell for cell, said in cells.items() if not said.startswith("no:")}
    assert {name for name, _ in done} == set(built_in())
    assert {row for _, row in done} == {row for _, row in cells}


def test_the_page_of_capabilities_counts_its_cells():
    text = (ROOT / "docs" / "capabilities.md").read_text(encoding="utf-8")
    cells = written(text)
    assert len(cells) == len(built_in()) * len({row for _, row in cells})
    kinds = Counter(cell.rstrip("+").partition(":")[0] for cell in cells.values())
    assert re.findall(r"^Of (\d+) cells, (\d+) exact", text, re.MULTILINE) == [(str(len(cells)), str(kinds["exact"]))]
    assert f"{kinds['no']} refused." in text


def lines_run(name: str, family: str) -> set[tuple[str, int]]:
    """The lines of this package that a plan, its application and a training step run."""
    root, lines = str(Path(auxin.__file__).parent), set()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(root):
            return None
        lines.add((frame.f_code.co_filename.removeprefix(root), frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        outcome = attempt(methods()[name], tiny(family, seed=3))
        if isinstance(outcome, Result):
            loss(outcome.model.train()).backward()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.whole
def test_the_covering_subset_runs_every_line_that_the_whole_product_runs():
    built = [case for case in (*COVERING, *REST) if case[0] in built_in()]
    run = {case: lines_run(*case) for case in built}
    covered = set().union(*(lines for case, lines in run.items() if case in COVERING))
    missing = {case: sorted(lines - covered) for case, lines in run.items()}
    assert {case: lines for case, lines in missing.items() if lines} == {}, "put one of them into covering.OWN"


@case_by_case
def test_the_edited_model_trains_as_any_other(name, family):
    """A loss, gradients that are the same where layers are computed again, and a step of AdamW that changes the
    function."""
    model = applied(name, family).model.train()
    loss(model).backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert plain
    assert all(torch.isfinite(gradient).all() for gradient in plain.values())
    model.zero_grad()
    with recomputed(model):
        loss(model).backward()
    assert all(torch.equal(p.grad, plain[key]) for key, p in model.named_parameters() if key in plain)
    before = loss(model).item()
    torch.optim.AdamW(model.parameters(), lr=1e-4).step()
    assert loss(model).item() < before


@case_by_case
def test_what_fails_at_the_very_end_leaves_model_and_optimizer_as_they_were(name, family, monkeypatch):
    outcome = probe(name, family)
    if isinstance(outcome, Refusal):
        pytest.skip(f"refused: {outcome.reason}")
    model = tiny(family, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss(model).backward()
    optimizer.step()
    before = everything(model, optimizer)

    def stop(*arguments):
        raise KeyboardInterrupt

    # It compares the logits after all edits with those before.
    monkeypatch.setattr(f"{apply.__module__}.measured_change", stop)
    with pytest.raises(KeyboardInterrupt):
        apply(outcome.plan, model, optimizer)
    assert_same(everything(model, optimizer), before)
    optimizer.step()


@decoder_by_decoder
def test_the_edited_model_generates_with_and_without_a_cache(name, family):
    model = moved(applied(name, family).model)
    ids = inputs(model)["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)  # else generate() hides whatever is token 0
    written = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(written, model.generate(ids, use_cache=False, **settings))


def trained_lora(model: PreTrainedModel, **targets: Any) -> Any:
    """The model with a LoRA that has been trained a little."""
    peft = pytest.importorskip("peft")
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    adapted.eval()
    assert torch.equal(logits(adapted), before), "an adapter starts as nothing"
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the first step moves only one factor away from zero
        optimizer.zero_grad()
        loss(adapted).backward()
        optimizer.step()
    assert change(before, logits(adapted)) > 1e-4
    return adapted


@pytest.mark.parametrize(
    ("name", "family"), [case for case in pairs(METHODS, FAMILIES) if case.values[1] != "tokenformer"]
)
def test_lora_goes_on_top(name, family):
    # Products have no linear layers inside, and take adapters on their factors.
    factors = {"target_modules": [], "target_parameters": ["output_factor", "input_factor"]}
    where = factors if name == "greenformers" else {"target_modules": "all-linear"}
    adapted = trained_lora(moved(applied(name, family).model), **where)
    trained = logits(adapted)
    merged = adapted.merge_and_unload()
    assert change(trained, logits(merged)) < TOLERANCE
    assert merged.state_dict().keys() == probe(name, family).model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "family"),
    [case for case in pairs(METHODS, FAMILIES) if case.values[1] == "tokenformer" or case.values[0] == "graft"],
)
def test_lora_goes_on_parameter_tokens(name, family, tmp_path):
    """It trains, reloads on the model that it was trained on, and merges into a checkpoint of that model's form."""
    model = moved(applied(name, family).model)
    base = copy.deepcopy(model)
    tokens = [module for module in model.modules() if isinstance(module, Pattention)]
    adapted = trained_lora(model, target_modules=[], target_parameters=["key_tokens", "value_tokens"])
    assert sum(key.endswith("lora_A.default.weight") for key, _ in adapted.named_parameters()) == 2 * len(tokens) > 0
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(type(adapted).from_pretrained(base, tmp_path / "adapter").eval()), trained)
    merged = adapted.merge_and_unload()
    assert change(trained, logits(merged)) <= 1e-12
    assert merged.state_dict().keys() == probe(name, family).model.state_dict().keys()
    merged.save_pretrained(tmp_path / "merged")
    loaded = getattr(transformers, AUTO[family]).from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.equal(logits(loaded), logits(merged))


@pytest.mark.parametrize(("name", "family"), [case for case in CASES if case[1] in ("llama", "gpt2", "tokenformer")])
def test_the_edited_model_writes_in_a_pipeline(name, family):
    model = applied(name, family).model
    words = {f"w{number}": number for number in range(VOCABULARY)}
    vocabulary = Tokenizer(WordLevel(words, unk_token="w2"))
    vocabulary.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="w2", pad_token="w2", eos_token="w1")
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (written,) = writer("w3 w4 w5", max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written["generated_text"].startswith("w3 w4 w5")


# Compiling is slow: one case with other modules and one with longer parameters stand for all.
@pytest.mark.parametrize(("name", "family"), [("graft", "llama"), ("tokenformer", "tokenformer")])
def test_a_compiled_model_is_edited_in_place(name, family):
    torch.compiler.reset()
    model = tiny(family, seed=3)
    compiled = torch.compile(model, backend="aot_eager")
    logits(compiled)
    apply(applied(name, family).plan, compiled)
    assert change(logits(model), logits(compiled)) <= TOLERANCE


def save(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Save a model with what it says on some inputs; a case for reload.py."""
    model.save_pretrained(folder)
    save_file({**inputs(model), "expected": logits(model).contiguous()}, folder / "probe.safetensors")
    return {"folder": str(folder), "model_class": AUTO[model.config.model_type]}


@pytest.mark.parametrize(
    "chosen", [pytest.param(COVERING, id="covering"), pytest.param(REST, id="rest", marks=pytest.mark.whole)]
)
def test_every_result_loads_in_a_new_process_bit_by_bit(chosen, tmp_path):
    """After one plan, and after a second one on top, each trained on; what is plain in a process without auxin."""
    cases = {"plain": {}, "replayed": {}}
    found = methods()
    for name, family in chosen:
        result = probe(name, family)
        if isinstance(result, Refusal):
            continue
        twice = again(found[name], result)
        for number, outcome in enumerate((result, twice), start=1):
            check(found[name], outcome)
            if isinstance(outcome, Result):
                case = save(moved(copy.deepcopy(outcome.model)), tmp_path / f"{name}-{family}-{number}")
                cases["plain" if outcome.is_plain else "replayed"][f"{name} on {family}, plan {number}"] = case
    assert all(cases.values())
    task = tmp_path / "cases.json"
    task.write_text(json.dumps({kind: list(of_kind.values()) for kind, of_kind in cases.items()}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "reload.py"), str(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    wrong = dict(zip([*cases["plain"], *cases["replayed"]], json.loads(done.stdout), strict=True))
    assert {name: error for name, error in wrong.items() if error} == {}


@pytest.mark.parametrize("family", families(FAMILIES))
def test_methods_follow_each_other(family):
    """Every method that keeps the function, one after the other on one model."""
    model = tiny(family, seed=3)
    first, done = logits(model), []
    for name, method in methods().items():
        if method.promise == "none":
            continue
        following = attempt(method, copy.deepcopy(model))
        is_exact = isinstance(following, Result) and following.promise == "exact"
        if is_exact and following.plan.kept_tokens is None:  # else the text would have other ids
            model = following.model
            done.append(name)
    assert len(done) >= 2
    assert change(first, logits(model)) <= TOLERANCE, done
