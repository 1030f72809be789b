"""Linear layers that are products: how many parameters there are then, what is near, and how ranks are divided."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

import auxin
from auxin.accounting import count_parameters, flops_per_token
from auxin.analysis.input_moments import input_moments, read_together
from auxin.edits import MergeModule, Plan
from auxin.errors import ConfigError, PlanError
from auxin.methods.factorize import greenformers
from auxin.methods.factorize.greenformers import Greenformers
from auxin.nn.low_rank import LowRank, LowRankLinear
from auxin.nn.low_rank_convolution import LowRankConvolution
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from auxin.planning.product_times import MULTIPLES, TOKENS, ProductTimes, faster_from, liked, ranks_to_compare
from auxin.planning.ranks import Matrix, after, rank_that_keeps, steps
from byte_language import byte_model, held_out_loss, library, train
from oracles import low_rank as oracle
from outputs import output
from tiny_models import VOCABULARY, inputs, labels, logits, tiny

METHOD = "greenformers"
POOLED = ["encoder.layer.*.attention.self.*", "encoder.layer.*.*.dense", "encoder.layer.*.attention.output.dense"]
POOLED.append("pooler.dense")
LAST = [path.replace("layer.*", f"layer.{number}") for number in range(6, 12) for path in POOLED]


def ids(samples: int = 3, length: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def planned(model: Any, folder: Path, **values: Any) -> Plan:
    data = {}
    if values.get("solver", "activations") == "activations":
        data = {"data": [{**inputs(model), "labels": labels(model)}]}
    return auxin.plan(model, METHOD, folder=folder, **data, **values)


def applied(plan: Plan, model: Any) -> Any:
    auxin.apply(plan, model)
    return model


def of_length_one(hidden: Tensor) -> np.ndarray:
    return (hidden / hidden.square().sum(1, keepdim=True).sqrt()).detach().numpy()


def products(model: nn.Module) -> dict[str, LowRank]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRank)}


@pytest.mark.parametrize(
    ("family", "values", "parameters"),
    [
        ("bert", {"rank": 256, "targets": POOLED}, 66_818_304),
        ("bert", {"rank": 0.4, "targets": POOLED}, 58_052_352),
        ("bert", {"rank": 0.2, "targets": LAST}, 74_965_248),
        ("gpt2", {"rank": 256}, 77_253_888),
        ("gpt2", {"rank": 0.4}, 73_383_168),
        ("gpt2", {"rank": 0.2, "keep": [f"transformer.h.{number}" for number in range(6)]}, 90_414_336),
    ],
)
def test_the_parameters_are_those_of_the_author_s_notebooks(family, values, parameters):
    with torch.device("meta"):
        model = BertModel(BertConfig()) if family == "bert" else GPT2LMHeadModel(GPT2Config())
    plan = greenformers.METHOD.outline(Bench(model), Greenformers(solver="svd", **values))
    assert f"-> {parameters:,}" in plan.findings[0]


def test_what_bert_base_saves_at_a_share_of_the_break_even_rank():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    plan = greenformers.METHOD.outline(Bench(model), Greenformers(rank=0.4, targets=POOLED))
    assert re.findall(r"\((.+?)%\)", plan.findings[0]) == ["53.0", "45.9"]  # parameters, FLOPs of a token


@settings(max_examples=8)
@given(rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_what_a_layer_gives_on_samples_is_the_nearest_that_a_product_can(tmp_path_factory, rank, seed):
    model, text, read = tiny("llama"), ids(seed=seed, samples=9), list[Tensor]()
    path = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].flatten(0, -2)))
    model(text)
    hook.remove()
    given_to, weight = of_length_one(read[0]), layer.weight.detach().numpy().copy()
    folder = tmp_path_factory.mktemp("plan")
    applied(auxin.plan(model, METHOD, rank=rank, targets=[path], data=[text], folder=folder), model)
    found = model.get_submodule(path).weight.detach().numpy()
    # Damping: as if inputs along every axis had come, too.
    damped = np.sqrt(greenformers.DAMPING * (given_to**2).sum() / given_to.shape[1])
    seen = np.vstack([given_to, damped * np.eye(given_to.shape[1])])
    best = oracle.nearest(weight, seen, rank, steps=300)  # a search is never better than the best
    assert oracle.error(weight, found, seen) <= oracle.error(weight, best, seen) * (1 + 1e-9)
    assert np.linalg.matrix_rank(found, tol=1e-9) == rank


def test_it_is_the_one_that_a_search_finds(tmp_path):
    model, text, path = tiny("gpt2"), ids(samples=9), "transformer.h.0.mlp.c_fc"
    read = list[Tensor]()
    layer = model.get_submodule(path)
    layer.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].flatten(0, -2)))
    plan = auxin.plan(model, METHOD, rank=2, targets=[path], data=[text], folder=tmp_path)
    weight, seen = layer.weight.detach().numpy().T.copy(), of_length_one(read[-1])
    seen = np.vstack([seen, np.sqrt(0.01 * (seen**2).sum() / seen.shape[1]) * np.eye(seen.shape[1])])
    found = applied(plan, model).get_submodule(path).weight.detach().numpy().T
    np.testing.assert_allclose(found, oracle.nearest(weight, seen, 2), atol=1e-7)


def test_every_token_counts_alike_whatever_its_size(tmp_path):
    model, text = tiny("llama"), ids(samples=4)
    data = Calibration.of_batches(model, [text])
    reads = read_together(model, ["model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"])
    for _, moments in input_moments(model, data, reads):
        torch.testing.assert_close(moments.trace().item(), float(text.numel()))


def test_padding_and_the_order_of_samples_are_no_matter(tmp_path):
    model, text = tiny("llama"), ids(samples=4)
    mask = torch.ones_like(text)
    mask[:2, 5:] = 0
    other = torch.where(mask.bool(), text, 3)
    plans = [
        auxin.plan(model, METHOD, rank=3, data=data, folder=tmp_path)
        for data in (
            [{"input_ids": text, "attention_mask": mask, "labels": text}],
            [{"input_ids": other[[1, 0, 3, 2]], "attention_mask": mask[[1, 0, 3, 2]], "labels": text}],
        )
    ]
    one, two = (applied(plan, copy.deepcopy(model)) for plan in plans)
    torch.testing.assert_close(logits(one), logits(two), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", ["opt", "qwen2_moe", "deepseek_v3"])
def test_padding_does_not_count_where_tokens_come_in_a_row(tmp_path, family):
    model, text = tiny(family), ids(samples=3)
    mask = torch.ones_like(text)
    mask[:2, 5:] = 0
    other = torch.where(mask.bool(), text, 3)
    plans = [
        auxin.plan(
            model, METHOD, rank=2, data=[{"input_ids": x, "attention_mask": mask, "labels": text}], folder=tmp_path
        )
        for x in (text, other)
    ]
    one, two = (applied(plan, copy.deepcopy(model)) for plan in plans)
    torch.testing.assert_close(logits(one), logits(two), rtol=1e-8, atol=1e-8)


def test_a_pooler_reads_one_place_of_as_many_as_units(tmp_path):
    with torch.random.fork_rng():
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
        model = BertForSequenceClassification(config).double()
    batch = {"input_ids": ids(length=16), "attention_mask": torch.ones(3, 16), "labels": torch.tensor([0, 1, 0])}
    plan = auxin.plan(model, METHOD, rank=2, targets=["pooler.dense"], data=[batch], folder=tmp_path)
    assert set(products(applied(plan, model))) == {"bert.pooler.dense"}


def test_layers_that_read_more_than_others_have_moments_of_their_own(tmp_path):
    """DeBERTa's queries and keys read relative positions, too, and its values do not."""
    model = tiny("deberta-v2")
    together = planned(model, tmp_path, rank=3)
    alone = planned(model, tmp_path, rank=3, targets=["value_proj"])
    path = next(path for path, _ in model.named_modules() if path.endswith("value_proj"))
    one, two = (applied(plan, copy.deepcopy(model)).get_submodule(path).weight + 0 for plan in (together, alone))
    torch.testing.assert_close(one, two)


def test_encoders_and_decoders_are_masked_by_their_own(tmp_path):
    model = tiny("t5")
    given_to = inputs(model) | {"labels": labels(model)}
    mask = torch.ones_like(given_to["input_ids"])
    mask[0, 4:] = 0
    given_to |= {"attention_mask": mask}
    changed = given_to | {"input_ids": torch.where(mask.bool(), given_to["input_ids"], 5)}
    plans = [auxin.plan(model, METHOD, rank=3, data=[batch], folder=tmp_path) for batch in (given_to, changed)]
    one, two = (applied(plan, copy.deepcopy(model)) for plan in plans)
    torch.testing.assert_close(logits(one), logits(two), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", ["svd", "activations"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_matrices_of_that_rank_are_reproduced(tmp_path, family, solver):
    model = tiny(family)
    for path, layer in greenformers._products(model, Greenformers(rank=1)).layers.items():
        generator = torch.Generator().manual_seed(len(path))
        shape = layer.weight.shape
        factors = [torch.randn(size, generator=generator).double() for size in ((shape[0], 2), (2, shape[1]))]
        layer.weight.data.copy_(factors[0] @ factors[1] / 4)
    before, biases = logits(model), {name: p.clone() for name, p in model.named_parameters() if name.endswith("bias")}
    applied(planned(model, tmp_path, rank=2, solver=solver), model)
    assert products(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-8, atol=1e-8)
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in biases.items())


@pytest.mark.parametrize("solver", ["svd", "activations", "random"])
def test_both_factors_of_a_product_are_of_one_size(tmp_path, solver):
    model = applied(planned(tiny("llama"), tmp_path, rank=3, solver=solver), tiny("llama"))
    for layer in products(model).values():
        sizes = layer.output_factor.square().sum(), layer.input_factor.square().sum()
        if solver == "random":
            sizes = tuple(size / size_of.numel() for size, size_of in zip(sizes, layer.parameters(), strict=False))
        torch.testing.assert_close(*sizes, rtol=1.5 if solver == "random" else 1e-9, atol=0)


def test_random_factors_make_matrices_of_the_old_size():
    model, text = byte_model(0, hidden_size=128, intermediate_size=256), library("this")[None, :32]
    sizes = {path: layer.weight.std() for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    before = model(text, output_hidden_states=True).hidden_states[-1].std()
    applied(auxin.plan(model, METHOD, rank=0.5, solver="random"), model)
    for path, layer in products(model).items():
        torch.testing.assert_close(layer.weight.std(), sizes[path], rtol=0.1, atol=0)
    torch.testing.assert_close(model(text, output_hidden_states=True).hidden_states[-1].std(), before, rtol=0.1, atol=0)


def test_other_seeds_draw_others_and_the_same_seed_the_same():
    plan = auxin.plan(tiny("llama"), METHOD, rank=2, solver="random")
    one, two = applied(plan, tiny("llama")), applied(plan, tiny("llama"))
    other = applied(plan.model_copy(update={"seed": 5}), tiny("llama"))
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(other))


@settings(max_examples=30)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
def test_ranks_that_are_divided_lose_no_more_than_any_others(sizes, seed):
    draw = np.random.default_rng(seed)
    matrices = {str(n): Matrix(inputs, outputs) for n, (outputs, inputs) in enumerate(sizes)}
    squares = {n: np.sort(draw.random(min(m.inputs, m.outputs)))[::-1].tolist() for n, m in matrices.items()}
    losses = [[1 - sum(squares[n][:rank]) / sum(squares[n]) for rank in range(m.most + 1)] for n, m in matrices.items()]
    order = steps(matrices, squares)
    assert [step.slope for step in order] == sorted(step.slope for step in order)
    for amount in range(1, len(order) + 1):
        ranks = after(order[:amount])
        assert all(1 <= rank <= matrices[n].most for n, rank in ranks.items())
        size = sum(
            ranks[n] * (m.inputs + m.outputs) if n in ranks else m.inputs * m.outputs for n, m in matrices.items()
        )
        lost = sum(losses[int(n)][rank] for n, rank in ranks.items())
        assert lost <= oracle.least_loss(sizes, losses, size) + 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(sum), st.floats(0.01, 0.99))
def test_the_rank_of_an_energy_is_the_least(squares, share):
    squares = sorted(squares, reverse=True)
    rank = rank_that_keeps(squares, share)
    assert sum(squares[:rank]) >= share * sum(squares) * (1 - 1e-9)
    assert sum(squares[: rank - 1]) < share * sum(squares) * (1 + 1e-9)
    assert rank <= rank_that_keeps(squares, share, 4) < rank + 4


@pytest.mark.parametrize("solver", ["svd", "activations", "random"])
@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_a_target_is_met(tmp_path, solver, of):
    model = tiny("gpt2")
    count = {"parameters": lambda m: count_parameters(m).total, "flops": lambda m: flops_per_token(m, 16).forward}[of]
    before = count(model)
    length = {} if of == "parameters" else {"sequence_length": 16}
    plan = planned(model, tmp_path, target={of: 0.85, **length}, solver=solver)
    smaller = applied(plan, model)
    assert 0.8 * before < count(smaller) <= 0.85 * before


def test_energy_leaves_layers_whole_that_save_nothing(tmp_path):
    model = tiny("llama")
    plan = planned(model, tmp_path, energy=0.6)
    applied(plan, model)
    shares = products(model)
    assert shares
    assert all(layer.rank <= Matrix(layer.in_features, layer.out_features).most for layer in shares.values())
    with pytest.raises(PlanError, match="no layer would have fewer parameters"):
        planned(tiny("llama"), tmp_path, energy=0.999999)


def test_what_is_kept_stays_and_targets_name_the_rest(tmp_path):
    model = tiny("llama")
    plan = planned(model, tmp_path, rank=2, targets=["q_proj", "mlp.*"], keep="model.layers.0", solver="svd")
    assert set(products(applied(plan, model))) == {
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }


def test_a_layer_that_no_multiple_suits_stays_whole(tmp_path):
    for wanted in ({"rank": 6}, {"rank": 0.99}, {"energy": 0.3}, {"target": {"parameters": 0.9}}):
        model = byte_model(0, num_key_value_heads=1)  # keys and values of 16 x 64: 12 at most
        plan = auxin.plan(model, METHOD, multiple_of=13 if "rank" not in wanted else 6, solver="svd", **wanted)
        ranks = {path: layer.rank for path, layer in products(applied(plan, model)).items()}
        assert ranks
        assert all(rank % (13 if "rank" not in wanted else 6) == 0 for rank in ranks.values())
    with pytest.raises(PlanError, match="no layer would have fewer parameters"):
        auxin.plan(tiny("llama"), METHOD, rank=5, multiple_of=64, solver="svd")


def test_steps_of_a_flat_spectrum_go_one_way():
    matrices = {str(n): Matrix(24 + n, 25) for n in range(4)}
    squares = {n: [0.1] * (6 + int(n)) + [0.0] * 14 for n in matrices}
    order, ranks = steps(matrices, squares), dict[str, int]()
    for step in order:
        assert step.rank < ranks.get(step.path, 99)
        ranks[step.path] = step.rank


def test_ranks_are_multiples():
    model = byte_model(0)
    plan = auxin.plan(model, METHOD, target={"parameters": 0.7}, multiple_of=8, solver="svd")
    ranks = {layer.rank for layer in products(applied(plan, model)).values()}
    assert len(ranks) > 1
    assert all(rank % 8 == 0 for rank in ranks)


@pytest.mark.parametrize("solver", ["svd", "activations", "random"])
def test_what_is_saved_loads_to_the_bit_and_holds_no_whole_matrix(tmp_path, solver):
    model = applied(planned(tiny("gpt2", dtype=torch.float32), tmp_path, rank=3, solver=solver), tiny("gpt2"))
    auxin.save(model, tmp_path / "saved")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved").eval()), logits(model))
    stored = load_file(tmp_path / "saved" / "edited_model.safetensors")
    assert not any("mlp.c_fc.weight" in name for name in stored)


def test_a_second_time_there_is_nothing_left(tmp_path):
    model = applied(planned(tiny("llama"), tmp_path, rank=2, solver="svd"), tiny("llama"))
    with pytest.raises(PlanError, match="nothing"):
        auxin.plan(model, METHOD, rank=2, solver="svd")


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({}, ConfigError, "exactly one of rank"),
        ({"rank": 2, "energy": 0.5}, ConfigError, "rank and energy"),
        ({"rank": 1.0}, ConfigError, "no share below 1"),
        ({"energy": 0.5, "solver": "random"}, ConfigError, "Give rank"),
        ({"rank": 9}, PlanError, "saves some here is 7"),
        ({"rank": 0.01}, PlanError, "ask for"),
        ({"rank": 2, "targets": ["q_prj"]}, PlanError, "q_proj"),
        ({"rank": 2, "keep": "model.layers.7"}, PlanError, "names nothing"),
        ({"target": {"parameters": 0.05}}, PlanError, "smallest"),
    ],
)
def test_what_can_t_be_is_one_message(values, error, words):
    with pytest.raises(error, match=words):
        auxin.plan(tiny("llama"), METHOD, **({"solver": "svd"} | values))


def test_a_weight_that_is_not_finite_is_named():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj"):
        auxin.plan(model, METHOD, rank=2, solver="svd")


def test_by_samples_it_loses_less_than_by_weights_and_both_far_less_than_chance(tmp_path):
    text, unseen = library("argparse", "tarfile"), library("smtplib")
    model = byte_model(0)
    train(model, text, 250)
    seen = text[: 32 * 48].view(32, 48)
    losses = {}
    for solver in ("activations", "svd", "random"):
        data = {"data": [seen]} if solver == "activations" else {}
        plan = auxin.plan(model, METHOD, rank=0.5, solver=solver, folder=tmp_path, **data)
        losses[solver] = held_out_loss(applied(plan, copy.deepcopy(model)), unseen)
    assert held_out_loss(model, unseen) < losses["activations"] < losses["svd"] < losses["random"] - 0.5


# On this machine ------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=len(TOKENS), max_size=len(TOKENS)))
def test_a_product_pays_from_the_least_number_of_tokens_on_beyond_which_it_always_does(faster):
    by_tokens = dict(zip(TOKENS, faster, strict=True))
    found = faster_from(lambda tokens: (2.0, 1.0) if by_tokens[tokens] else (1.0, 1.0))
    expected = [start for start in TOKENS if all(by_tokens[tokens] for tokens in TOKENS if tokens >= start)]
    assert found == (min(expected) if expected else None)


def test_a_plan_says_from_how_many_tokens_on_products_are_faster(monkeypatch):
    """By a clock that only counts: calls and multiply-adds."""
    asked = []

    def seconds(self, modules, tokens):
        layer, product = modules
        asked.append((tokens, layer.in_features, layer.out_features, product.rank))
        assert all(parameter.is_meta for module in modules for parameter in module.parameters())
        weights = [layer.weight.numel(), product.rank * (product.in_features + product.out_features)]
        return [calls * 50_000 + tokens * size for calls, size in zip((1, 2), weights, strict=True)]

    monkeypatch.setattr(ProductTimes, "seconds", seconds)
    model = byte_model(0)  # 64 x 64, and 64 x 172 both ways
    plan = auxin.plan(model, METHOD, rank=0.5, solver="random", measure=True)
    told = plan.findings[-1]
    assert told.startswith("Products are faster than their layers on ")
    assert len(asked) == len(set(asked)), "each shape once"
    # 50,000 / (64 * 64 - 16 * 128) = 24.4 and 50,000 / (64 * 172 - 23 * 236) = 9.0, rounded up to what is timed.
    assert "64 -> 64 of rank 16 from 64 tokens on" in told
    assert "64 -> 172 of rank 23 from 16 tokens on" in told
    monkeypatch.setattr(ProductTimes, "seconds", lambda self, modules, tokens: [1.0, 2.0])
    assert (
        "64 -> 64 of rank 16 never" in auxin.plan(model, METHOD, rank=0.5, solver="random", measure=True).findings[-1]
    )
    quiet = auxin.plan(model, METHOD, rank=0.5, solver="random")
    assert "faster" not in " ".join(quiet.findings)
    assert plan.edits == quiet.edits, "what was timed decides nothing"


@given(st.integers(1, 500))
def test_ranks_that_are_compared_are_multiples_of_one_number_and_no_larger(rank):
    found = ranks_to_compare(rank)
    for multiple, near in found.items():
        assert 0 < near <= rank
        assert near % multiple == 0
        assert multiple == 64 or near % (2 * multiple)
        assert rank - near < 2 * multiple
    assert 1 in found


@given(st.dictionaries(st.sampled_from(MULTIPLES), st.floats(0.5, 2), min_size=1))
def test_the_multiple_that_is_liked_is_the_least_that_loses_nothing(each):
    chosen = liked(each)
    assert all(each[chosen] <= 1.03 * each[other] for other in each if other > chosen)
    for less in (multiple for multiple in each if multiple < chosen):
        assert any(each[less] > 1.03 * each[other] for other in each if other >= less)


def test_ranks_are_multiples_of_what_the_machine_likes(monkeypatch):
    """On one whose kernels compute four ranks at once."""
    monkeypatch.setattr(
        ProductTimes, "seconds", lambda self, modules, tokens: [-(-module.rank // 4) * 4.0 for module in modules]
    )
    plan = auxin.plan(byte_model(0), METHOD, rank=0.5, solver="random", multiple_of="machine")
    ranks = {layer.rank for layer in products(applied(plan, byte_model(0))).values()}
    assert ranks == {16, 20}
    assert "Ranks are multiples of 4, as this machine likes them." in plan.findings
    assert plan.settings["multiple_of"] == "machine"
    with pytest.raises(PlanError, match=r"convolutions are not timed\. Give a number"):
        auxin.plan(tiny("vit"), METHOD, rank=2, targets=["projection"], solver="svd", multiple_of="machine")
    with pytest.raises(ConfigError, match="multiple_of"):
        auxin.plan(tiny("vit"), METHOD, rank=2, solver="svd", multiple_of="mashine")


def test_a_recipe_is_priced_without_timing_anything(monkeypatch):
    monkeypatch.setattr(ProductTimes, "seconds", lambda *_: pytest.fail("timed"))
    values = Greenformers(rank=0.5, measure=True, multiple_of="machine")
    assert greenformers.METHOD.outline(Bench(tiny("llama")), values).edits


def test_times_are_of_rows_of_copies_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path))
    with torch.device("meta"):
        layer = nn.Linear(8, 6)
    times = ProductTimes(torch.float32)
    pair = [layer, LowRankLinear.replacing(layer, 2)]
    assert [run.times for run in times.runs(pair, 3)] == [4, 4]
    assert [run.times for run in times.runs(pair, 256)] == [1, 1]
    once = times.seconds(pair, 1)
    assert min(once) > 0
    monkeypatch.setattr(ProductTimes, "runs", lambda *_: pytest.fail("timed again"))
    assert times.seconds(pair, 1) == once
    assert all(parameter.is_meta for module in pair for parameter in module.parameters())


# Convolutions ---------------------------------------------------------------------------------------------------------

NAMED = {"whisper": ["conv1", "conv2"], "vit": ["projection"], "wav2vec2": ["conv_layers.*.conv"]}


@pytest.mark.parametrize("solver", ["svd", "random"])
@pytest.mark.parametrize("family", NAMED)
def test_convolutions_that_are_named_become_products_and_load(tmp_path, family, solver):
    model = tiny(family, dtype=torch.float32)
    whole = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Conv1d | nn.Conv2d)
    }  # fmt: skip
    before, biases = count_parameters(model).total, {n: p.clone() for n, p in model.named_parameters() if "bias" in n}
    plan = auxin.plan(model, METHOD, rank=1, targets=NAMED[family], solver=solver)
    applied(plan, model)
    found = {path: module for path, module in model.named_modules() if isinstance(module, LowRankConvolution)}
    assert found
    saved = 0
    for path, module in found.items():
        outputs, *read = whole[path].weight.shape
        saved += outputs * math.prod(read) - outputs - math.prod(read)
        assert not products(module)
    assert count_parameters(model).total == before - saved
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in biases.items())
    auxin.save(model, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(output(loaded(**inputs(model))), output(model.eval()(**inputs(model))))


def test_convolutions_of_that_rank_are_reproduced_and_merged_back():
    model = tiny("whisper")
    for layer in (model.model.encoder.conv1, model.model.encoder.conv2):
        outputs, *read = layer.weight.shape
        generator = torch.Generator().manual_seed(outputs)
        factors = [torch.randn(size, generator=generator).double() for size in ((outputs, 2), (2, math.prod(read)))]
        layer.weight.data.copy_((factors[0] @ factors[1] / 4).view(layer.weight.shape))
    before, weights = output(model(**inputs(model))), copy.deepcopy(model.state_dict())
    applied(auxin.plan(model, METHOD, rank=2, targets=NAMED["whisper"], solver="svd"), model)
    torch.testing.assert_close(output(model(**inputs(model))), before, rtol=1e-8, atol=1e-8)
    merged = Plan(method="x", promise="none", edits=[MergeModule(module="model.encoder.conv1")])
    applied(merged, model)
    merged = Plan(method="x", promise="none", edits=[MergeModule(module="model.encoder.conv2")])
    applied(merged, model)
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=1e-8, atol=1e-8)


def test_convolutions_that_nobody_named_stay(tmp_path):
    model = applied(planned(tiny("whisper"), tmp_path, rank=2), tiny("whisper"))
    assert not any(isinstance(module, LowRankConvolution) for module in model.modules())
    assert products(model)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"solver": "activations"}, "conv_layers.0.conv is a convolution.*Give solver = svd"),
        ({"targets": ["pos_conv_embed.conv"]}, "pos_conv_embed.conv: .*a ParametrizedConv1d"),
        ({"rank": 40}, "saves some here is"),
    ],
)
def test_convolutions_that_can_t_be_products_are_refused(values, words):
    model, data = tiny("wav2vec2"), {}
    given_to: dict[str, Any] = {"rank": 1, "solver": "svd", "targets": NAMED["wav2vec2"]} | values
    if given_to["solver"] == "activations":
        data = {"data": [{**inputs(model), "labels": labels(model)}]}
    with pytest.raises(PlanError, match=words):
        auxin.plan(model, METHOD, **data, **given_to)
