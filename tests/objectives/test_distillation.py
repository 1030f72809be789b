"""Distillation: the loss and its gradient are those of the papers, nothing of the teacher's is trained, and what can't
be compared is refused."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForSequenceClassification, BertLMHeadModel, BertModel

from auxin.accounting.flops import forward_flops
from auxin.errors import ConfigError
from auxin.objectives.causal import Causal
from auxin.objectives.distillation import Distillation, DistillationObjective
from auxin.objectives.layer_matching import fitted, mean_squared_distance
from auxin.objectives.masked_language import MaskedLanguage
from auxin.objectives.measures import Accuracy, Loss
from auxin.objectives.objective import IGNORED, Reference, training_noise
from auxin.objectives.span_corruption import SpanCorruption
from auxin.objectives.wrapping import Wrapping
from auxin.training.checkpoint import write_checkpoint_folder
from objectives.tiny_encoders import tiny_bert
from oracles.distillation import best_map, hard_loss, soft_gradient, soft_loss, squared_distance
from training.tiny import VOCABULARY, TinyData, tiny_gpt2, tiny_llama, tiny_t5

DATA = TinyData()
WRAPPED = {
    "causal": (Causal(), tiny_llama),
    "masked_language": (MaskedLanguage(mask_probability=0.3), tiny_bert),
    "span_corruption": (SpanCorruption(noise_density=0.3, mean_span_length=2.0), tiny_t5),
}


def bound(student, teacher, wrapped=None, layers=None, form=DATA.form, **settings):
    """The objective for `student`, with a teacher that is given."""
    made = Distillation(teacher="main/base", objective=wrapped or Causal(), **settings)
    return made.bind(student.config, form, {"main/base": Reference(teacher, "f", layers)})


def inputs_of(objective, rows=3):
    return objective.inputs(DATA.split("train").rows(range(rows)), training_noise(0, 0))


def gradients(objective, model, parts):
    """Of the mean loss over the targets of all parts, put together as the loop does it."""
    model.zero_grad()
    total = sum(objective.targets(part) for part in parts)
    for part in parts:
        (objective.loss(model, part) * (objective.targets(part) / total)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(value.abs().max() for value in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max() / scale) for name in ours)


def arrays(tensors, *numbers):
    return [tensors[number].numpy() for number in numbers]


@given(
    rows=st.integers(1, 5),
    classes=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    temperature=st.floats(0.3, 8.0),
    seed=st.integers(0, 2**32),
)
def test_the_soft_loss_and_its_gradient_are_hintons(rows, classes, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(1, rows, count, generator=generator, dtype=torch.float64) for count in classes]
    labels = torch.randint(2, (1, rows), generator=generator)
    labels[0, 1:][torch.rand(rows - 1, generator=generator) < 0.4] = IGNORED
    objective = bound(tiny_bert(), tiny_bert(), MaskedLanguage(), temperature=temperature)
    student = logits[0].requires_grad_()
    loss = objective.soft_loss(student, logits[1], {"labels": labels})
    loss.backward()
    hand = (logits[0][0].detach().numpy(), logits[1][0].numpy(), labels[0].numpy(), temperature)
    assert loss.item() == pytest.approx(soft_loss(*hand), rel=1e-4, abs=1e-5)
    assert student.grad[0].numpy() == pytest.approx(soft_gradient(*hand), rel=1e-3, abs=1e-5)


def test_the_whole_loss_is_the_sum_made_by_hand():
    student, teacher = tiny_bert(0).eval(), tiny_bert(1, num_hidden_layers=3)
    objective = Distillation(
        teacher="t",
        objective=MaskedLanguage(mask_probability=0.3),
        temperature=3.0,
        weight=0.7,
        hidden_states=0.5,
        attentions=2.0,
        layers={0: 0, 1: 2},
    ).bind(student.config, DATA.form, {"t": Reference(teacher, "f")})
    inputs = inputs_of(objective)
    # Samples of different numbers of targets.
    first = (inputs["labels"][0] != IGNORED).nonzero()[1:].flatten()
    inputs["labels"][0, first] = IGNORED
    given = {"input_ids": inputs["input_ids"], "output_hidden_states": True, "output_attentions": True}
    models = [copy.deepcopy(model) for model in (student, teacher)]
    for model in models:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (model(**given) for model in models)
    flat = [output.logits.flatten(0, 1).numpy() for output in (ours, theirs)]
    labels = inputs["labels"].flatten().numpy()
    targets = (inputs["labels"] != IGNORED).sum(1).numpy()
    # A BERT's norm ends each layer, so that transformers' hidden states are what the layers give.
    hidden = squared_distance(
        [ours.hidden_states[i].numpy() for i in (1, 2)], [theirs.hidden_states[i].numpy() for i in (1, 3)], targets
    )
    maps = squared_distance(
        [ours.attentions[i].numpy() for i in (0, 1)], [theirs.attentions[i].numpy() for i in (0, 2)], targets
    )
    expected = 0.3 * hard_loss(flat[0], labels) + 0.7 * soft_loss(*flat, labels, 3.0) + 0.5 * hidden + 2.0 * maps
    assert objective.loss(student, inputs).item() == pytest.approx(expected, rel=1e-5)
    # Outside of learning, attention is what it was, and nobody listens but what transformers has put there.
    assert {student.config._attn_implementation, teacher.config._attn_implementation} == {"sdpa"}
    layers = [*student.bert.encoder.layer, *teacher.bert.encoder.layer]
    listeners = [len(layer._forward_hooks) for layer in layers]
    with objective.learning(student):
        assert sum(len(layer._forward_hooks) for layer in layers) == sum(listeners) + 4
        assert student.config._attn_implementation == teacher.config._attn_implementation == "eager"
    assert [len(layer._forward_hooks) for layer in layers] == listeners


@pytest.mark.parametrize("kind", WRAPPED)
def test_without_weight_it_is_the_wrapped_objective_to_the_bit(kind):
    wrapped, make = WRAPPED[kind]
    student = make(0)
    objective = bound(student, make(1), wrapped, weight=0.0)
    plain = wrapped.bind(student.config, DATA.form)
    inputs = inputs_of(objective)
    assert all(torch.equal(value, inputs[name]) for name, value in inputs_of(plain).items())
    assert torch.equal(objective.loss(student, inputs), plain.loss(student, inputs))
    assert objective.training_flops(student) == plain.training_flops(student)


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(kind):
    wrapped, make = WRAPPED[kind]
    student, teacher = make(0).eval(), make(0)
    objective = bound(student, teacher, wrapped, weight=1.0, hidden_states=1.0, attentions=1.0)
    inputs = inputs_of(objective)
    assert objective.loss(student, inputs).item() == pytest.approx(0, abs=1e-6)
    worst = max(float(value.abs().max()) for value in gradients(objective, student, [inputs]).values())
    assert worst < 1e-6
    other = bound(student, make(1), wrapped, weight=1.0)
    assert other.loss(student, inputs).item() > 1e-3


@pytest.mark.parametrize("kind", WRAPPED)
def test_measures_and_counts_are_the_wrapped_objectives(kind):
    wrapped, make = WRAPPED[kind]
    student, teacher = make(0), make(1)
    objective, plain = bound(student, teacher, wrapped), wrapped.bind(student.config, DATA.form)
    names = ("target", "shifted", "whole_text", "noisy", "call")
    assert [getattr(objective, name) for name in names] == [getattr(plain, name) for name in names]
    for measure in (Loss(), Accuracy()):
        held_out = DATA.split("validation")
        assert measure(student, held_out, objective, 4) == measure(student, held_out, plain, 4)
    asked = forward_flops(teacher, {**plain.example(1), **plain.call})
    assert objective.training_flops(student) == plain.training_flops(student) + asked


def test_what_processes_have_to_know_of_the_wrapped_objective_is_said_of_the_wrapper():
    """Whether parts of a batch add up, and whether it looks into attentions: else they would be divided."""
    student = tiny_llama()
    plain = Causal().bind(student.config, DATA.form)
    assert (Wrapping(plain).adds_up, Wrapping(plain).sees_heads) == (True, False)
    plain.adds_up, plain.sees_heads = False, True
    assert (Wrapping(plain).adds_up, Wrapping(plain).sees_heads) == (False, True)
    distilled = DistillationObjective(Distillation(teacher="main/base"), plain, Reference(student, "f1"))
    assert (distilled.adds_up, distilled.sees_heads) == (False, True)


@pytest.mark.parametrize("kind", ["causal", "masked_language"])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1]])
def test_parts_of_different_numbers_of_targets_make_the_gradient_of_the_whole(kind, sizes):
    wrapped, make = WRAPPED[kind]
    student, teacher = make(0).eval(), make(1)
    objective = bound(student, teacher, wrapped, weight=0.6, hidden_states=0.8, attentions=3.0)
    inputs = inputs_of(objective, 4)
    inputs["labels"] = inputs["labels"].clone()  # the inputs themselves, where each next token is learnt
    for row, kept in enumerate((3, 5, 2, 4)):
        inputs["labels"][row, (inputs["labels"][row] != IGNORED).nonzero()[kept:].flatten()] = IGNORED
    pieces = {name: value.split(sizes) for name, value in inputs.items()}
    parts = [{name: piece[i] for name, piece in pieces.items()} for i in range(len(sizes))]
    assert len({objective.targets(part) for part in parts}) > 1
    assert difference(gradients(objective, student, parts), gradients(objective, student, [inputs])) < 1e-5


def test_only_the_student_learns():
    student, teacher = tiny_llama(0), tiny_llama(1)
    before = copy.deepcopy(teacher.state_dict())
    objective = bound(student, teacher, hidden_states=1.0)
    assert not teacher.training
    objective.loss(student, inputs_of(objective)).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_without_a_class_gives_it_no_chance_and_one_with_more_is_cut():
    small, large = tiny_llama(0), tiny_llama(1, vocab_size=VOCABULARY + 6)
    for student, teacher in ((small, large), (large, small)):
        objective = bound(student.eval(), teacher, weight=1.0, temperature=1.5)
        inputs = inputs_of(objective)
        with torch.no_grad():
            logits = [model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1) for model in (student, teacher)]
            found = objective.loss(student, inputs).item()
        labels = inputs["labels"][:, 1:].flatten().numpy()
        assert found == pytest.approx(soft_loss(*(x.numpy() for x in logits), labels, 1.5), rel=1e-5)


def test_layers_are_paired_by_what_they_were_made_from():
    student, teacher = tiny_llama(0, num_hidden_layers=2), tiny_llama(1, num_hidden_layers=4)
    with torch.no_grad():
        for number, source in ((0, 1), (1, 3)):
            teacher.model.layers[number].load_state_dict(teacher.model.layers[number].state_dict())
            student.model.layers[number].load_state_dict(teacher.model.layers[source].state_dict())
    objective = bound(student, teacher, hidden_states=1.0, weight=0.0, layers={0: 1, 1: 3})
    assert objective._pairs(student) == {0: 1, 1: 3}
    new = bound(student, teacher, hidden_states=1.0, weight=0.0, layers={1: 3})
    assert new._pairs(student) == {1: 3}
    asked = Distillation(teacher="t", hidden_states=1.0, layers={0: 2})
    known = {"t": Reference(teacher, "f", {0: 1, 1: 3})}
    assert asked.bind(student.config, DATA.form, known)._pairs(student) == {0: 2}
    equal = bound(student, tiny_llama(2), hidden_states=1.0)
    assert equal._pairs(student) == {0: 0, 1: 1}


def test_units_are_compared_with_those_that_they_were_made_from():
    student, teacher = tiny_llama(0, hidden_size=16).eval(), tiny_llama(1, hidden_size=32)
    units = [3, *range(14), 31]
    settings = Distillation(teacher="t", weight=0.0, hidden_states=2.0, layers={0: 1})
    objective = settings.bind(student.config, DATA.form, {"t": Reference(teacher, "f", units=units)})
    objective.training_flops(student)
    inputs, seen = inputs_of(objective), []
    layers = (student.model.layers[0], teacher.model.layers[1])
    handles = [layer.register_forward_hook(lambda m, a, output: seen.append(output.detach())) for layer in layers]
    with torch.no_grad():
        plain, _ = student(**inputs).loss, teacher(**inputs)
        ours, theirs = seen
        expected = plain + 2 * squared_distance([ours.numpy()], [theirs[..., units].numpy()], [1, 1, 1])
    for handle in handles:
        handle.remove()
    assert objective.loss(student, inputs).item() == pytest.approx(expected.item(), rel=1e-5)


@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(2, 4), st.integers(8, 12)),
    seed=st.integers(0, 999),
    padded=st.booleans(),
)
def test_hidden_states_are_mapped_by_the_best_map_there_is(sizes, seed, padded):
    width, wanted, samples, places = sizes
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(samples, places, size, generator=generator) for size in (width, wanted))
    weights = torch.randint(1, 9, (samples,), generator=generator).float()
    mask = torch.ones(samples, places)
    if padded:
        mask[0, places // 2 :] = 0
    of_places = (mask / mask.sum(1, keepdim=True) * weights[:, None]).flatten().double().numpy()
    found = fitted({0: ours}, {3: theirs}, {0: 3}, weights, mask)[0]
    flat = (ours.flatten(0, 1).double().numpy(), theirs.flatten(0, 1).double().numpy())
    best = best_map(*flat, of_places)
    # The ridge r, a millionth of the mean variance, moves what the slope M makes of a centred x by r x'(C + r)^-1 M.
    x, mapped = (of - np.average(of, axis=0, weights=of_places) for of in (flat[0], best))
    variances = np.linalg.eigvalsh(x.T @ (of_places[:, None] * x))
    slope = np.linalg.norm(np.linalg.pinv(x) @ mapped, 2)
    moved = 1e-6 * variances.mean() / variances.min() * np.linalg.norm(x, axis=1) * slope
    assert (np.abs(found.flatten(0, 1).numpy() - best).max(1) <= moved + 1e-5).all()


def test_the_gradient_of_a_mapped_distance_is_that_of_the_least_one():
    """No gradient goes through the fit: at its minimum there is none."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 9, size, generator=generator) for size in (4, 6))
    weights = torch.tensor([1.0, 2.0])

    def least(states):
        mapped = fitted({0: states}, {0: theirs}, {0: 0}, weights, None)
        return mean_squared_distance(mapped, {0: theirs}, {0: 0}, weights, None)

    states = ours.clone().requires_grad_()
    least(states).backward()
    direction = torch.randn(ours.shape, generator=generator)
    step = 1e-2
    slope = (least(ours + step * direction) - least(ours - step * direction)) / (2 * step)
    assert (states.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("width", [3, 4, 6])
def test_states_that_are_all_alike_are_mapped_to_the_mean(width):
    theirs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    for ours in (torch.zeros(2, 5, width), torch.full((2, 5, width), 7.0)):
        found = fitted({0: ours}, {0: theirs}, {0: 0}, torch.ones(2), None)[0]
        torch.testing.assert_close(found, theirs.mean((0, 1)).expand_as(theirs))


def test_a_map_that_fits_anything_is_refused():
    ours, theirs = torch.randn(2, 4, 8), torch.randn(2, 4, 3)
    with pytest.raises(ConfigError, match=r"8 places, which a map of 8 units fits .* raise micro_batch_size"):
        fitted({0: ours}, {0: theirs}, {0: 0}, torch.ones(2), None)


def test_a_narrower_student_is_compared_by_a_map_and_learns_what_a_turned_teacher_knows():
    student, teacher = tiny_llama(0, hidden_size=16).eval(), tiny_llama(1, hidden_size=32)
    objective = bound(student, teacher, weight=0.0, hidden_states=1.0, projected=True)
    plain = bound(student, teacher, weight=0.0)
    asked = forward_flops(teacher, {**plain.example(1), **plain.call})
    places, pairs = plain.example(1)["input_ids"].shape[1], 2
    maps = pairs * 2 * places * 16 * (3 * 32 + 16)
    assert objective.training_flops(student) == plain.training_flops(student) + asked + maps
    inputs = inputs_of(objective)
    assert objective.loss(student, inputs) > plain.loss(student, inputs)
    # A teacher is itself in any basis: its hidden states are a map of its own.
    same = bound(teacher, copy.deepcopy(teacher), weight=0.0, hidden_states=1.0, projected=True)
    alone = bound(teacher, teacher, weight=0.0)
    assert same.loss(teacher, inputs).item() == pytest.approx(alone.loss(teacher, inputs).item(), abs=1e-4)


def test_students_and_teachers_of_other_families_can_be_compared():
    student, teacher = tiny_llama(0), tiny_gpt2(1, dropout=0.0)
    objective = bound(student, teacher, hidden_states=1.0, attentions=1.0)
    objective.training_flops(student)
    assert torch.isfinite(objective.loss(student, inputs_of(objective)))


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "message"),
    [
        (
            tiny_llama,
            lambda: tiny_llama(hidden_size=48),
            {"hidden_states": 1.0},
            "layer 0 of the student gives 32 .*48.*projected: true",
        ),
        (tiny_llama, lambda: tiny_llama(num_attention_heads=4), {"attentions": 1.0}, "has 2 heads over 16.*4 heads"),
        (
            tiny_llama,
            lambda: tiny_llama(num_hidden_layers=3),
            {"hidden_states": 1.0},
            "student has 2 layers and .*3",
        ),
        (
            tiny_llama,
            tiny_llama,
            {"hidden_states": 1.0, "layers": {0: 2}},
            "teacher has no layer 2; its layers are 0",
        ),
        (tiny_llama, tiny_llama, {"hidden_states": 1.0, "layers": {5: 0}}, "student has no layer 5"),
        (tiny_llama, tiny_llama, {"hidden_states": 1.0, "layers": {}}, "no layer of the student was made"),
        (tiny_t5, tiny_t5, {"hidden_states": 1.0, "layers": {0: 3}}, "at each of 13 places"),
    ],
)
def test_layers_that_can_not_be_compared_are_refused_before_anything_is_learnt(student, teacher, settings, message):
    model = student()
    wrapped = SpanCorruption(noise_density=0.3, mean_span_length=2.0) if student is tiny_t5 else Causal()
    made = Distillation(teacher="t", objective=wrapped, **settings)
    objective = made.bind(model.config, DATA.form, {"t": Reference(teacher(), "f")})
    with pytest.raises(ConfigError, match=message):
        objective.training_flops(model)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (tiny_t5, "teacher: 't': objective: 'causal' is for decoders, and t5"),
        (lambda: tiny_llama(vocab_size=32), "teacher: 't': The data's tokenizer has 64 tokens, but the model's .* 32"),
        (lambda: tiny_llama(max_position_embeddings=8), "teacher: 't': data.context_length is 16"),
    ],
)
def test_teachers_that_do_not_know_what_is_asked_are_refused(teacher, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(teacher="t").bind(tiny_llama().config, DATA.form, {"t": Reference(teacher(), "f")})


def test_teachers_of_another_task_are_refused():
    settings = Distillation(teacher="t", objective="masked_language")
    for cls in (BertModel, BertForSequenceClassification):
        with pytest.raises(
            ConfigError, match=rf"teacher: 't': a {cls.__name__} does not answer what 'masked_language'"
        ):
            settings.bind(tiny_bert().config, DATA.form, {"t": Reference(cls(tiny_bert().config), "f")})
    encoder = Reference(BertLMHeadModel(tiny_bert().config), "f")
    objective = Distillation(teacher="t").bind(tiny_llama().config, DATA.form, {"t": encoder})
    with pytest.raises(ConfigError, match="objective: teacher: 't': BertLMHeadModel is not causal"):
        objective.check(tiny_llama())
    classes, teacher = replace(DATA.form, labels=("a", "b", "c")), Reference(tiny_llama(num_labels=5), "f")
    with pytest.raises(ConfigError, match="it tells 5 classes apart, and the student 3"):
        Distillation(teacher="t").bind(tiny_llama(num_labels=3).config, classes, {"t": teacher})


def test_a_teacher_in_a_folder_is_read_and_known_by_its_weights(tmp_path):
    folders = [write_checkpoint_folder(tmp_path / str(seed), tiny_llama(seed)) for seed in (1, 2)]
    student = tiny_llama()
    found = [Distillation(teacher=str(folder)).bind(student.config, DATA.form) for folder in folders]
    assert torch.equal(found[0].teacher.lm_head.weight, tiny_llama(1).lm_head.weight)
    names = [objective.identity()["teacher"] for objective in found]
    assert [len(name) for name in names] == [64, 64]
    assert names[0] != names[1]
    again = write_checkpoint_folder(tmp_path / "again", tiny_llama(1))
    assert Distillation(teacher=str(again)).bind(student.config, DATA.form).identity()["teacher"] == names[0]
    with pytest.raises(ConfigError, match=r"objective: teacher: .*nowhere does not exist"):
        Distillation(teacher=str(tmp_path / "nowhere")).bind(student.config, DATA.form)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "teacher: required"),
        ({"teacher": "t", "temperature": 0}, "temperature"),
        ({"teacher": "t", "weight": 1.5}, "weight"),
        ({"teacher": "t", "layers": {0: 0}}, "layers says what hidden_states and attentions compare, and both are 0"),
        ({"teacher": "t", "hidden_states": 1, "layers": {-1: 0}}, "layers"),
        ({"teacher": "t", "projected": True}, "projected says how hidden_states are compared, which is 0"),
        ({"teacher": "t", "objective": {"kind": "distillation", "teacher": "u"}}, "goes by another model itself"),
        ({"teacher": "t", "objective": "masked_langage"}, "Did you mean 'masked_language'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Distillation.parse(values)


def test_the_settings_go_through_yaml_and_keep_the_wrapped_ones(tmp_path):
    made = Distillation(
        teacher="a/b", objective=MaskedLanguage(mask_probability=0.2), hidden_states=1.0, layers={0: 1, 1: 3}
    )
    made.to_yaml(tmp_path / "o.yaml")
    assert Distillation.from_yaml(tmp_path / "o.yaml") == made
    assert Distillation.parse(made.model_dump(mode="json")) == made


@pytest.mark.parametrize("field", ["temperature", "weight", "hidden_states", "attentions"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_factors_are_finite(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Distillation.parse({"teacher": "a/one", field: value})
