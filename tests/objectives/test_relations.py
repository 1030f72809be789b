"""Relations of tokens: the loss is MiniLMv2's, between models of any widths, masks hide what they should, and what
can't be compared is refused."""

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auxin.accounting.flops import forward_flops
from auxin.errors import ConfigError
from auxin.models.layers import layer_paths
from auxin.objectives.causal import Causal
from auxin.objectives.classification import Classification
from auxin.objectives.distillation import Distillation
from auxin.objectives.layer_matching import mean_by_sample
from auxin.objectives.masked_language import MaskedLanguage
from auxin.objectives.objective import IGNORED, Reference
from auxin.objectives.relations import Relations, relation_divergence
from auxin.objectives.span_corruption import SpanCorruption
from labelled import TinyLabelled
from objectives.test_classification import classifier
from objectives.test_distillation import DATA, bound, difference, gradients, inputs_of
from objectives.tiny_encoders import tiny_bert
from oracles.distillation import relation_distance, seen_places
from tiny_models import tiny
from training.tiny import CONTEXT, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenformer

PARTS = ("query", "key", "value")
SPANS = SpanCorruption(noise_density=0.3, mean_span_length=2.0)


def drawn(samples, places, widths, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        part: torch.randn(samples, places, width, generator=generator, dtype=torch.float64)
        for part, width in zip(PARTS, widths, strict=True)
    }


def by_hand(ours, theirs, heads, causal, masks, weights):
    """The distance, sample by sample."""
    found = []
    for sample, mask in enumerate(masks):
        real = [place for place, kept in enumerate(mask) if kept]
        student, teacher = ([vectors[part][sample].numpy() for part in PARTS] for vectors in (ours, theirs))
        seen = seen_places(len(mask), causal, real)
        found.append(relation_distance(student, teacher, heads, seen, real))
    return float(np.average(found, weights=weights))


sizes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.integers(0, 2**32))


@given(sizes, st.tuples(*[st.integers(1, 3)] * 6), st.booleans())
def test_the_distance_is_that_of_the_paper(size, dims, padded):
    samples, places, heads, causal, seed = size
    ours = drawn(samples, places, [heads * dim for dim in dims[:3]], seed)
    theirs = drawn(samples, places, [heads * dim for dim in dims[3:]], seed + 1)
    chance = np.random.default_rng(seed)
    masks = np.ones((samples, places), np.int64)
    if padded:
        masks = chance.integers(0, 2, (samples, places))
        masks[np.arange(samples), chance.integers(0, places, samples)] = 1
    weights = chance.integers(1, 5, samples)
    mask = torch.from_numpy(masks) if padded else None
    found = mean_by_sample(relation_divergence(ours, theirs, heads, causal, mask), torch.from_numpy(weights), mask)
    assert found.item() == pytest.approx(by_hand(ours, theirs, heads, causal, masks, weights), rel=1e-9, abs=1e-12)
    assert found.item() >= -1e-12


@settings(max_examples=8)
@given(sizes)
def test_its_gradient_is_the_derivative(size):
    samples, places, heads, causal, seed = size
    ours, theirs = (drawn(samples, places, [2 * heads, heads, 3 * heads], seed + n) for n in (0, 1))
    mask = torch.ones(samples, places)
    mask[0, 1:] = 0

    def distance(*vectors):
        return relation_divergence(dict(zip(PARTS, vectors, strict=True)), theirs, heads, causal, mask)

    assert torch.autograd.gradcheck(distance, [vectors.requires_grad_() for vectors in ours.values()])


@given(sizes)
def test_rotating_a_relation_head_changes_nothing_and_nothing_is_as_near_as_oneself(size):
    samples, places, heads, causal, seed = size
    ours, theirs = drawn(samples, places, [3 * heads] * 3, seed), drawn(samples, places, [2 * heads] * 3, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    turned = {}
    for part, vectors in ours.items():
        turns = torch.linalg.qr(torch.randn(heads, 3, 3, generator=generator, dtype=torch.float64)).Q
        turned[part] = torch.einsum("bnhd,hde->bnhe", vectors.unflatten(-1, (heads, 3)), turns).flatten(-2)
    plain, rotated = (relation_divergence(vectors, theirs, heads, causal, None) for vectors in (ours, turned))
    assert torch.allclose(plain, rotated, atol=1e-10)
    assert torch.allclose(relation_divergence(turned, ours, heads, causal, None), torch.zeros(()).double(), atol=1e-10)


@given(sizes, st.integers(1, 4))
def test_neither_padding_nor_what_comes_later_has_a_part(size, more):
    samples, places, heads, causal, seed = size
    pair = [drawn(samples, places, [2 * heads] * 3, seed + n) for n in (0, 1)]
    longer = [drawn(samples, places + more, [2 * heads] * 3, seed + n) for n in (2, 3)]
    for short, long in zip(pair, longer, strict=True):
        for part in PARTS:
            long[part][:, :places] = short[part]
    mask = torch.cat([torch.ones(samples, places), torch.zeros(samples, more)], 1)
    alone, padded = relation_divergence(*pair, heads, causal, None), relation_divergence(*longer, heads, causal, mask)
    assert torch.allclose(padded[:, :places], alone, atol=1e-12)
    assert torch.isfinite(padded).all()
    if causal:
        assert torch.allclose(relation_divergence(*longer, heads, True, None)[:, :places], alone, atol=1e-12)


def projected(model, inputs, number, split):
    """Queries, keys and values of a layer by its weights, from what enters its attention."""
    entered = []
    layer = model.get_submodule(layer_paths(model)[number])
    module = getattr(layer, "self_attn", None) or layer.attn
    handle = module.register_forward_pre_hook(
        lambda m, arguments, named: entered.append((arguments or (named["hidden_states"],))[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=inputs["input_ids"])
        handle.remove()
        return dict(zip(PARTS, split(module, entered[0]), strict=True))


def of_llama(module, hidden):
    return [hidden @ getattr(module, name).weight.T for name in ("q_proj", "k_proj", "v_proj")]


def of_gpt2(module, hidden):
    return (hidden @ module.c_attn.weight + module.c_attn.bias).chunk(3, -1)


@pytest.mark.parametrize(("layers", "numbers"), [(None, (1, 2)), ((0, 1), (0, 1))])
def test_the_whole_loss_is_the_sum_made_by_hand(layers, numbers):
    """Between a GPT-2 of 32 units and a Llama of 48 whose heads share keys; samples of different numbers of targets."""
    student = tiny_gpt2(0).eval()
    teacher = tiny_llama(
        1, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12
    )
    with torch.no_grad():  # fresh models attend to all tokens nearly alike
        for parameter in (*student.parameters(), *teacher.parameters()):
            parameter *= 5 if parameter.dim() > 1 else 1
    values = {"weight": 0.0, "relations": 3.0, "relation_heads": 4, "relation_layers": layers}
    objective, plain = bound(student, teacher, **values), bound(student, teacher, weight=0.0)
    inputs = inputs_of(objective)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, 5:] = IGNORED
    ours = projected(student, inputs, numbers[0], of_gpt2)
    theirs = projected(teacher, inputs, numbers[1], of_llama)
    weights = (inputs["labels"][:, 1:] != IGNORED).sum(1).numpy()
    expected = by_hand(ours, theirs, 4, True, np.ones((3, CONTEXT), int), weights)
    assert expected > 0.01
    added = objective.loss(student, inputs) - plain.loss(student, inputs)
    assert added.item() == pytest.approx(3.0 * expected, rel=1e-4)


def test_a_padded_text_has_the_relations_that_it_has_alone():
    data = TinyLabelled()
    student, teacher = (
        classifier("bert", data.form, seed=seed, **sizes)[0].eval()
        for seed, sizes in ((0, {}), (1, {"hidden_size": 48, "num_attention_heads": 3}))
    )
    objective = bound(student, teacher, Classification(), form=data.form, weight=0.0, relations=1.0, relation_heads=2)
    plain = Classification().bind(student.config, data.form)
    batch = data.split("train").rows(range(4))
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    together = objective.loss(student, batch) - plain.loss(student, batch)
    alone = []
    for row, length in enumerate(lengths):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask")}
        alone.append((objective.loss(student, one) - plain.loss(student, one)).item())
    assert together.item() == pytest.approx(np.mean(alone), rel=1e-4)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1]])
def test_parts_of_different_numbers_of_targets_make_the_gradient_of_the_whole(sizes):
    student, teacher = tiny_bert(0).eval(), tiny_bert(1, hidden_size=48, num_attention_heads=4)
    objective = bound(student, teacher, MaskedLanguage(mask_probability=0.3), weight=0.5, relations=20.0)
    inputs = inputs_of(objective, 4)
    for row, kept in enumerate((3, 5, 2, 4)):
        inputs["labels"][row, (inputs["labels"][row] != IGNORED).nonzero()[kept:].flatten()] = IGNORED
    pieces = {name: value.split(sizes) for name, value in inputs.items()}
    parts = [{name: piece[i] for name, piece in pieces.items()} for i in range(len(sizes))]
    assert difference(gradients(objective, student, parts), gradients(objective, student, [inputs])) < 1e-5


@pytest.mark.parametrize(
    ("make", "wrapped"),
    [
        (tiny_llama, Causal()),
        (lambda seed: tiny_gpt2(seed, 0.0), Causal()),
        (tiny_tokenformer, Causal()),
        (tiny_bert, MaskedLanguage(mask_probability=0.3)),
        (tiny_t5, SPANS),
    ],
    ids=["llama", "gpt2", "tokenformer", "bert", "t5"],
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(make, wrapped):
    student, teacher = make(0).eval(), make(0)
    objective = bound(student, teacher, wrapped, weight=1.0, relations=1.0)
    inputs = inputs_of(objective)
    assert objective.loss(student, inputs).item() == pytest.approx(0, abs=1e-5)
    assert max(float(value.abs().max()) for value in gradients(objective, student, [inputs]).values()) < 1e-5
    assert bound(student, make(1), wrapped, weight=0.0, relations=1.0).loss(student, inputs).item() > 1e-3


def test_the_last_layers_learn_and_nothing_is_listened_to_afterwards():
    student, teacher = tiny_llama(0, num_hidden_layers=3), tiny_gpt2(1, 0.0)
    objective = bound(student, teacher, weight=1.0, relations=1.0)
    modules = [module for model in (student, teacher) for module in model.modules()]
    before = [len(module._forward_hooks) for module in modules]
    with objective.learning(student):
        # GPT-2's queries, keys and values are one module's.
        assert sum(len(module._forward_hooks) for module in modules) == sum(before) + 6
        objective.loss(student, inputs_of(objective)).backward()
    assert [len(module._forward_hooks) for module in modules] == before
    assert all(p.grad is None for p in teacher.parameters())


def test_the_products_are_counted():
    student = tiny_gpt2(0)
    teacher = tiny_llama(1, hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    objective, plain = bound(student, teacher, relations=1.0), Causal().bind(student.config, DATA.form)
    asked = forward_flops(teacher, {**plain.example(1), **plain.call})
    # A A^T is 2 n^2 w; backward it takes as much again for each of the two factors.
    ours, theirs = (2 * CONTEXT**2 * width for width in (3 * 32, 48 + 24 + 24))
    assert objective.training_flops(student) == plain.training_flops(student) + asked + 3 * ours + theirs


def test_relation_heads_are_what_both_models_heads_have_in_common():
    eight = tiny_llama(0, hidden_size=32, num_attention_heads=8, num_key_value_heads=4)
    twelve = tiny_llama(1, hidden_size=48, num_attention_heads=12, num_key_value_heads=12)
    assert Relations(eight, twelve, None, None).heads == 4
    assert Relations(twelve, twelve, None, None).heads == 12
    assert Relations(twelve, eight, None, 16).heads == 16


def test_an_adapter_that_mends_is_compared_like_any_other_model():
    student, teacher = tiny_llama(0).eval(), tiny_llama(1, hidden_size=48, num_attention_heads=4)
    objective = bound(student, teacher, weight=0.0, relations=5.0)
    inputs = inputs_of(objective)
    plain = objective.loss(student, inputs).item()
    student.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    assert objective.loss(student, inputs).item() == plain
    assert objective.training_flops(student) > 0
    objective.loss(student, inputs).backward()
    last = student.model.layers[-1].self_attn.q_proj.lora_B["default"].weight
    assert last.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("student", "teacher", "values", "message"),
    [
        (tiny_llama, tiny_llama, {"relation_heads": 3}, r"3 does not divide the 32 .* student's query .*divisor of 32"),
        (
            tiny_llama,
            lambda: tiny_llama(hidden_size=48, num_attention_heads=4),
            {"relation_heads": 32},
            r"32 does not divide the 48 numbers of the teacher's query \(model.layers.1.self_attn.q_proj\).* of 8",
        ),
        (tiny_llama, tiny_llama, {"relation_layers": (2, 0)}, "relation_layers: the student has no layer 2; .* 0 to 1"),
        (tiny_llama, tiny_llama, {"relation_layers": (0, 5)}, "relation_layers: the teacher has no layer 5"),
        (tiny_t5, tiny_t5, {"relation_layers": (0, 3)}, "student's attention is over 13 places, .* teacher's over 8"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_anything_is_learnt(student, teacher, values, message):
    model, other = student(), teacher()
    wrapped = SPANS if student is tiny_t5 else Causal()
    made = Distillation(teacher="t", objective=wrapped, relations=1.0, **values)
    objective = made.bind(model.config, DATA.form, {"t": Reference(other, "f")})
    with pytest.raises(ConfigError, match=message):
        objective.training_flops(model)


def test_latent_attention_is_refused_with_what_to_do():
    message = "relations: the teacher: model.layers.1: keys are put together of several vectors.*Set relations: 0"
    with pytest.raises(ConfigError, match=message):
        Relations(tiny_llama(), tiny("deepseek_v3"), None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"relation_heads": 4}, "relation_heads says what relations compares, which is 0"),
        ({"relation_layers": [0, 1]}, "relation_layers says what relations compares, which is 0"),
        ({"relations": 1, "relation_heads": 0}, "relation_heads"),
        ({"relations": 1, "relation_layers": [0]}, "relation_layers"),
        ({"relations": float("nan")}, "relations"),
        ({"relations": 1, "layers": {0: 0}}, "layers says what hidden_states and attentions compare"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Distillation.parse({"teacher": "t", **values})


def test_the_settings_go_through_yaml(tmp_path):
    made = Distillation(teacher="a/b", relations=2.0, relation_heads=8, relation_layers=(3, 7))
    made.to_yaml(tmp_path / "o.yaml")
    assert Distillation.from_yaml(tmp_path / "o.yaml") == made
