"""Question answering: the loss is transformers' own, a teacher is heard at both ends, answers are looked for where they
may lie, measures are SQuAD's, and what does not fit is refused."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForQuestionAnswering, BertForSequenceClassification, PreTrainedModel

from auxin.accounting import count_parameters, training_memory
from auxin.accounting.flops import forward_flops
from auxin.data.dataset import SampleForm
from auxin.data.question_answering import QuestionRows
from auxin.data.question_source import ANSWER, CONTEXT, LONGEST
from auxin.errors import ConfigError
from auxin.models.loading import load_model
from auxin.objectives.calibration import Calibration, CalibrationSettings
from auxin.objectives.causal import Causal
from auxin.objectives.classification import Classification
from auxin.objectives.distillation import Distillation
from auxin.objectives.masked_language import MaskedLanguage
from auxin.objectives.measures import Accuracy, ExactMatch, Loss, MacroF1, TokenF1
from auxin.objectives.objective import NOT_A_NUMBER, Objective, Reference
from auxin.objectives.question_answering import QuestionAnswering
from auxin.training import train
from labelled import Images, TinyLabelled, TinyQuestions
from oracles import answers as oracle
from oracles.distillation import hard_loss, soft_loss
from training.tiny import tiny_settings

DATA = TinyQuestions()
FORM = DATA.form
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "max_position_embeddings": 16},
    "roberta": {**SIZES, "max_position_embeddings": 20},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16},
    "llama": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
}
EXACT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def config_of(family: str, form: SampleForm = FORM, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**SMALL[family], **form.config_values, **changes})


def answering(family: str, seed: int = 0, **changes: Any) -> tuple[PreTrainedModel, Objective]:
    torch.manual_seed(seed)
    config = config_of(family, **changes)
    return AutoModelForQuestionAnswering.from_config(config), QuestionAnswering().bind(config, FORM)


def inputs_of(objective: Objective, rows: int = 16) -> dict[str, torch.Tensor]:
    return objective.inputs(DATA.split("validation").rows(range(rows)), np.random.default_rng(0))


@pytest.mark.parametrize("family", SMALL)
def test_the_loss_of_an_example_is_transformers_own_and_a_softmax_written_out(family: str) -> None:
    model, objective = answering(family, initializer_range=0.5)
    inputs = inputs_of(objective)
    assert CONTEXT not in inputs
    expected, own = [], []
    with torch.no_grad():
        for row in range(16):
            output = model.eval()(**{name: value[row : row + 1] for name, value in inputs.items()})
            own.append(float(output.loss))
            logits = [of[0].double().tolist() for of in (output.start_logits, output.end_logits)]
            expected.append(oracle.loss(*logits, *(int(inputs[name][row]) for name in ANSWER)))
        found = objective.losses(model, inputs)
        assert float(objective.loss(model, inputs)) == pytest.approx(np.mean(expected), rel=1e-4)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert found.tolist() == pytest.approx(own, rel=1e-4)
    assert np.std(expected) > 0.1, "examples differ"
    assert objective.targets(inputs) == 16
    assert objective.sample_targets(inputs).tolist() == [1] * 16
    for size in (3, 100):
        assert Loss()(model, DATA.split("validation"), objective, size) == pytest.approx(np.mean(expected), rel=1e-4)
    assert Loss().unit(objective) == "nats/example"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_learns_to_find_answers(tmp_path, family: str) -> None:
    model, _ = answering(family, **(EXACT if family == "bert" else {}))
    data = TinyQuestions(512)
    wanted = tiny_settings(objective="question_answering", steps=300, batch_size=32, learning_rate=5e-3)
    measures = (ExactMatch(), TokenF1(), Loss())
    result = train(model, data, wanted, tmp_path, measures=measures, progress=False, stage_name="learn")
    # The question stands before the context, so that a decoder can find the answer, too.
    assert result.measures["exact_match"] > 0.7
    assert 1 >= result.measures["token_f1"] >= result.measures["exact_match"] == result.value
    record = result.ledger.stages[-1]
    assert record.value_before < 0.4
    assert (record.units, record.unit, record.measure) == (300 * 32, "example", "exact_match")
    assert type(load_model(result.checkpoint)) is type(model)


@pytest.mark.parametrize("family", SMALL)
def test_costs_are_those_of_the_batches_that_are_learnt(family: str) -> None:
    model, objective = answering(family)
    inputs, example = inputs_of(objective, 3), objective.example(3)
    assert {name: (x.shape, x.dtype) for name, x in example.items()} == {
        name: (x.shape, x.dtype) for name, x in inputs.items()
    }
    assert objective.training_flops(model) == pytest.approx(forward_flops(model, {**inputs, **objective.call}))
    memory = training_memory(model, 3, inputs={**inputs, **objective.call})
    assert memory == training_memory(model, 3, inputs={**example, **objective.call})
    assert memory.weights == 4 * count_parameters(model).total


# Teachers -------------------------------------------------------------------------------------------------------------


def test_a_teacher_is_heard_at_both_ends() -> None:
    """The soft loss is the mean over both ends of T^2 KL over all tokens, computed by hand from both models' logits."""
    student, plain = answering("bert", initializer_range=0.5, **EXACT)
    teacher, _ = answering("bert", seed=1, num_hidden_layers=3, initializer_range=0.5)
    made = Distillation(teacher="t", objective=QuestionAnswering(), weight=0.7, temperature=3.0)
    objective = made.bind(student.config, FORM, {"t": Reference(teacher, "f")})
    inputs = inputs_of(plain)
    with torch.no_grad():
        ours, theirs = (model.eval()(**inputs) for model in (student, teacher))
        found = objective.loss(student, inputs).item()
    hard, soft = [], []
    for logits, position in zip(("start_logits", "end_logits"), ANSWER, strict=True):
        s, t, labels = (x.numpy() for x in (ours[logits], theirs[logits], inputs[position]))
        hard.append(hard_loss(s, labels))
        soft.append(soft_loss(s, t, labels, 3.0))
    assert found == pytest.approx(0.3 * np.mean(hard) + 0.7 * np.mean(soft), rel=1e-5)
    assert abs(soft[0] - soft[1]) > 1e-3, "both ends count"
    assert (objective.answers, objective.target) == ("spans", "example")
    # A student that is its teacher learns nothing from it.
    same = Distillation(teacher="t", objective=QuestionAnswering(), weight=1.0)
    bound = same.bind(student.config, FORM, {"t": Reference(copy.deepcopy(student), "f")})
    bound.loss(student.requires_grad_(), inputs).backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-5


def test_parts_of_a_batch_make_the_gradient_of_the_whole() -> None:
    student, plain = answering("bert", **EXACT)
    teacher, _ = answering("bert", seed=1)
    made = Distillation(teacher="t", objective=QuestionAnswering(), hidden_states=0.5)
    objective = made.bind(student.config, FORM, {"t": Reference(teacher, "f")})
    inputs = inputs_of(plain, 7)
    parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 2), slice(2, 7))]
    found = []
    for several in ([inputs], parts):
        student.zero_grad()
        for part in several:
            (objective.loss(student, part) * objective.targets(part) / 7).backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert torch.allclose(*found, atol=1e-6)


def test_a_student_comes_nearer_to_its_teacher(tmp_path) -> None:
    teacher, plain = answering("bert", seed=3, num_hidden_layers=3, initializer_range=0.5)
    student, _ = answering("bert", **EXACT)
    wanted = Distillation(teacher="t", objective=QuestionAnswering(), weight=1.0)
    references = {"t": Reference(teacher, "t")}
    inputs = plain.inputs(DATA.split("train").rows(range(64)), np.random.default_rng(0))

    def distance() -> float:
        with torch.no_grad():
            return wanted.bind(student.config, FORM, references).loss(student.eval(), inputs).item()

    before = distance()
    run = tiny_settings(objective=wanted, steps=200, batch_size=16, decay_fraction=0.0)
    result = train(student, DATA, run, tmp_path, measures=(ExactMatch(), Loss()), references=references, progress=False)
    assert distance() < before / 2
    assert result.measures.keys() == {"exact_match", "loss"}


# Spans and measures ---------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Gives the logits that it was made with, of the samples that its inputs number."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.device_of = logits, nn.Parameter(torch.zeros(1))

    def forward(self, attention_mask: torch.Tensor, **_: torch.Tensor) -> Any:
        start, end = self.logits[attention_mask[:, -1]].unbind(1)
        return SimpleNamespace(start_logits=start, end_logits=end)


class Numbered(QuestionRows):
    """Rows whose number stands where nothing else does, in the mask's last place."""

    def rows(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = super().rows(rows)
        batch["attention_mask"][:, -1] = torch.tensor(list(rows))
        return batch


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 5),
    tokens=st.integers(4, 40),
    ids=st.integers(1, 6),
    levels=st.integers(1, 9),
    size=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_spans_and_measures_are_those_of_an_oracle(samples, tokens, ids, levels, size, seed) -> None:
    draw = np.random.default_rng(seed)
    facts = np.zeros((samples, 6), np.int32)
    for row in facts:
        first, behind = sorted(draw.choice(tokens + 1, 2, replace=False))
        start, end = sorted(draw.integers(first, behind, 2))
        row[:] = start, end, first, behind, tokens, first
    # Few levels, so that sums are often equal.
    logits = torch.from_numpy(draw.integers(0, levels, (samples, 2, tokens)).astype(np.float32))
    split = Numbered(draw.integers(0, ids, (samples, tokens)).astype(np.uint16), facts, FORM.tensors)
    objective, model = answering("bert")[1], Fixed(logits)
    batch = split.rows(range(samples))
    found = objective.spans(model, objective.inputs(batch, np.random.default_rng(0)), batch[CONTEXT]).tolist()
    exact, f1 = [], []
    for row, (span, values) in enumerate(zip(found, facts.tolist(), strict=True)):
        start, end, first, behind, *_ = values
        expected = oracle.best_span(*logits[row].tolist(), range(first, behind), LONGEST)
        assert tuple(span) == expected
        text = split.tokens[row].tolist()
        pair = text[expected[0] : expected[1] + 1], text[start : end + 1]
        exact.append(oracle.exact(*pair))
        f1.append(oracle.f1(*pair))
    assert ExactMatch()(model, split, objective, size) == pytest.approx(np.mean(exact))
    assert TokenF1()(model, split, objective, size) == pytest.approx(np.mean(f1))
    assert ExactMatch()(model, split, objective, size, 1) == pytest.approx(np.mean(exact[:size]))


def test_an_answer_has_thirty_tokens_at_most() -> None:
    logits = torch.zeros(1, 2, 40)
    logits[0, 0, 2], logits[0, 1, 31], logits[0, 1, 32] = 9, 1, 2
    batch = {"attention_mask": torch.zeros(1, 40, dtype=torch.long)}
    batch |= {name: torch.zeros(1, dtype=torch.long) for name in ANSWER}
    found = answering("bert")[1].spans(Fixed(logits), batch, torch.ones(1, 40))
    assert found.tolist() == [[2, 31]]


def test_logits_that_are_no_numbers_give_no_answer() -> None:
    objective, split = answering("bert")[1], Numbered(*vars(DATA.split("validation")).values())
    logits = torch.zeros(16, 2, 12)
    logits[3, 1, 0] = torch.nan
    model, batch = Fixed(logits), split.rows(range(16))
    found = objective.spans(model, objective.inputs(batch, np.random.default_rng(0)), batch[CONTEXT])
    assert (found == NOT_A_NUMBER).all(1).nonzero().flatten().tolist() == [3]
    assert np.isnan([measure(model, split, objective, 5) for measure in (ExactMatch(), TokenF1())]).all()


@pytest.mark.parametrize(("begins", "ends"), [(-torch.inf, -torch.inf), (-torch.inf, 0.0), (torch.inf, 0.0)])
def test_sums_that_are_not_finite_give_no_answer_and_none_outside_of_the_context(begins, ends) -> None:
    logits, context = torch.zeros(2, 2, 12), torch.zeros(2, 12)
    context[:, 4:8] = 1
    logits[0, 0, 4:8], logits[0, 1, 4:8] = begins, ends
    logits[1, :, 5:], logits[1, :, 5] = -torch.inf, 1.0  # what a model rules out is no number that is missing
    batch = {"attention_mask": torch.tensor([[0] * 11 + [0], [0] * 11 + [1]])}
    batch |= {name: torch.zeros(2, dtype=torch.long) for name in ANSWER}
    found = answering("bert")[1].spans(Fixed(logits), batch, context)
    assert found.tolist() == [[NOT_A_NUMBER] * 2, [5, 5]]


def test_looking_for_answers_takes_memory_by_the_tokens_and_not_by_their_square() -> None:
    tokens, sizes = 512, []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(x.untyped_storage().nbytes() for x in tree_leaves(made) if isinstance(x, torch.Tensor))
            return made

    batch = {"attention_mask": torch.zeros(1, tokens, dtype=torch.long)}
    batch |= {name: torch.zeros(1, dtype=torch.long) for name in ANSWER}
    objective, model = answering("bert")[1], Fixed(torch.zeros(1, 2, tokens))
    with Largest():
        objective.spans(model, batch, torch.ones(1, tokens))
    assert 4 * tokens * LONGEST <= max(sizes) <= 8 * tokens * LONGEST


@pytest.mark.parametrize(
    ("measure", "data", "objective", "message"),
    [
        (Accuracy(), DATA, "question_answering", "measures: 'accuracy' is of classes, and here the answers are spans"),
        (MacroF1(), DATA, "question_answering", "Choose of loss, exact_match, token_f1"),
        (ExactMatch(), TinyLabelled(), "classification", "'exact_match' is of spans, and here the answers are classes"),
        (TokenF1(), TinyLabelled(), "classification", "Choose of loss, accuracy, macro_f1"),
    ],
)
def test_a_measure_of_other_answers_is_refused_before_anything_is_learnt(tmp_path, measure, data, objective, message):
    model = answering("bert")[0]
    if objective == "classification":
        model = BertForSequenceClassification(config_of("bert", **Classification().config_values(data.form)))
    wanted = tiny_settings(objective=objective, steps=2)
    with pytest.raises(ConfigError, match=message):
        train(model, data, wanted, tmp_path / "run", measures=(measure,), progress=False)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# What does not fit ----------------------------------------------------------------------------------------------------

PACKED = SampleForm("token", 12, ("input_ids",), length=12, vocab_size=64, config_values={"vocab_size": 64})


@pytest.mark.parametrize(
    ("config", "form", "message"),
    [
        (
            lambda: config_of("bert"),
            PACKED,
            "needs an answer in each sample.*data.kind: question_answering, or",
        ),
        (lambda: config_of("bert"), TinyLabelled().form, "needs an answer.*or training.objective: classification"),
        (lambda: config_of("bert", num_labels=3), FORM, "num_labels: the model's config says 3.*Set it to 2"),
        (lambda: config_of("bert", pad_token_id=5), FORM, "pad_token_id: the model's config has 5.*padded with 0"),
        (lambda: config_of("bert", max_position_embeddings=9), FORM, "context_length is 12.*embeddings is 9"),
        (lambda: config_of("bert", vocab_size=60), FORM, "tokenizer has 64 tokens, but the model's vocab_size is 60"),
        (lambda: AutoConfig.for_model("t5"), FORM, "'question_answering' is for encoders and decoders, and t5"),
        (lambda: AutoConfig.for_model("gemma"), FORM, r"gemma has no class that learns this \(AutoModelForQuestion"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(config, form, message) -> None:
    with pytest.raises(ConfigError, match=message):
        QuestionAnswering().bind(config(), form)


def test_an_architecture_without_a_limit_to_its_positions_is_none_of_no_positions() -> None:
    """XLNet's config says -1."""
    config = AutoConfig.for_model("xlnet", d_model=32, d_inner=64, n_layer=2, n_head=2, **FORM.config_values)
    model, objective = AutoModelForQuestionAnswering.from_config(config).eval(), QuestionAnswering().bind(config, FORM)
    inputs = inputs_of(objective)
    with torch.no_grad():
        assert float(objective.losses(model, inputs).mean()) == pytest.approx(float(objective.loss(model, inputs)))


@pytest.mark.parametrize("made", [Causal(), MaskedLanguage()])
def test_questions_are_no_packed_text(made) -> None:
    with pytest.raises(ConfigError, match=r"Set data.kind: text, or training.objective: question_answering\.$"):
        made.check_form(FORM)


def test_questions_have_no_classes() -> None:
    with pytest.raises(ConfigError, match=r"needs a class for each sample.*objective: question_answering"):
        Classification().check_form(FORM)
    with pytest.raises(ConfigError, match=r"training\.objective: classification"):
        QuestionAnswering().check_form(Images().form)


def test_a_model_without_such_a_head_is_refused_before_the_folder_is_made(tmp_path) -> None:
    model = BertForSequenceClassification(config_of("bert"))
    wanted = tiny_settings(objective="question_answering", steps=2)
    with pytest.raises(ConfigError, match="is learnt by a BertForQuestionAnswering, and this is a BertForSequence"):
        train(model, DATA, wanted, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_methods_look_at_questions_too() -> None:
    model, objective = answering("bert")
    asked = CalibrationSettings(samples=10, batch_size=4)
    found = Calibration.of_split(DATA, model.config, asked, QuestionAnswering())
    batches = list(found.batches())
    assert [len(batch["start_positions"]) for batch in batches] == [4, 4, 2]
    assert all(batch.keys() == objective.example(1).keys() for batch in batches)
    # They are what a Python user may give.
    given = Calibration.of_batches(model, batches)
    assert all(
        torch.equal(one[name], other[name]) for one, other in zip(batches, given.batches(), strict=True) for name in one
    )
    shorter = CalibrationSettings(samples=4, length=6)
    with pytest.raises(ConfigError, match=r"calibration.length: of 6 tokens samples would lose their answers\. Leave"):
        Calibration.of_split(DATA, model.config, shorter, QuestionAnswering())
    whole = CalibrationSettings(samples=4, length=FORM.length)
    assert Calibration.of_split(DATA, model.config, whole, QuestionAnswering()).samples == 4


def test_segments_go_to_models_that_have_some() -> None:
    for family in SMALL:
        left_out = {CONTEXT} if family in ("bert", "roberta") else {CONTEXT, "token_type_ids"}
        assert answering(family)[1].example(1).keys() == set(FORM.tensors) - left_out
    without = replace(FORM, tensors=tuple(name for name in FORM.tensors if name != "token_type_ids"))
    assert "token_type_ids" not in QuestionAnswering().bind(config_of("bert"), without).example(1)
