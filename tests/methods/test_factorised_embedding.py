"""Tables of embeddings that are products: nearest where tokens come often, and the head with them where it is one."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import auxin
from auxin.accounting import count_parameters
from auxin.edits import MergeModule, Plan
from auxin.edits.structure import structural_edits
from auxin.errors import ConfigError, DataError, PlanError
from auxin.methods.factorize.factorised_embedding import FactorisedEmbedding, factorisable, occurrences
from auxin.nn.low_rank import LowRank, LowRankLinear
from auxin.nn.low_rank_embedding import LowRankEmbedding
from auxin.objectives.calibration import Calibration
from auxin.objectives.masked_language import MaskedLanguage
from byte_language import byte_model, held_out_loss, library, train
from oracles import low_rank_tables as oracle
from tiny_models import VOCABULARY, inputs, labels, logits, tiny

METHOD = "factorised-embedding"
TIED = ("gpt2", "gemma", "t5", "bert", "bart", "cohere")


def some_texts(seed: int = 0, samples: int = 4, length: int = 8) -> Tensor:
    """Tokens of which some come often and some never."""
    chances = 1.0 / torch.arange(1, VOCABULARY + 1) ** 1.5
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(chances.expand(samples, -1), length, replacement=True, generator=generator)


def planned(model: Any, folder: Path, **values: Any) -> Plan:
    data = {"data": [some_texts()]} if values.get("frequencies", True) else {}
    if model.config.is_encoder_decoder or model.config.model_type == "bert":
        # A model makes what its decoder reads of labels.
        given = {name: value for name, value in inputs(model).items() if name != "decoder_input_ids"}
        data = {name: [{**given, "labels": labels(model)}] for name in data}
    return auxin.plan(model, METHOD, folder=folder, **data, **values)


def applied(plan: Plan, model: Any) -> Any:
    auxin.apply(plan, model)
    return model


def product_of(model: Any) -> Tensor:
    brick = model.get_input_embeddings()
    return (brick.output_factor @ brick.input_factor).detach()


@settings(max_examples=10)
@given(rank=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_product_is_the_nearest_for_rows_as_often_as_their_tokens_come(tmp_path_factory, rank, seed):
    model, text = tiny("gpt2"), some_texts(seed)
    table = model.get_input_embeddings().weight.detach().numpy().copy()
    counts = np.array(oracle.counts(text.tolist(), len(table)))
    plan = auxin.plan(model, METHOD, rank=rank, data=[text], folder=tmp_path_factory.mktemp("plan"))
    found = product_of(applied(plan, model)).numpy()
    best = oracle.nearest(table, counts, rank)
    # The search may end in a saddle, never below the best.
    assert oracle.error(table, found, counts) <= oracle.error(table, best, counts) * (1 + 1e-9)
    kept = 1 - oracle.error(table, found, counts) / oracle.error(table, 0 * table, counts)
    assert f"transformer.wte.weight {kept:.1%}" in plan.findings[-1]


def test_it_is_the_one_that_a_search_finds(tmp_path):
    model, text = tiny("gpt2"), some_texts()
    table = model.get_input_embeddings().weight.detach().numpy().copy()
    counts = np.array(oracle.counts(text.tolist(), len(table)))
    found = product_of(applied(auxin.plan(model, METHOD, rank=3, data=[text], folder=tmp_path), model)).numpy()
    np.testing.assert_allclose(found, oracle.nearest(table, counts, 3), atol=1e-6)


def test_rows_count_alike_without_data(tmp_path):
    model = tiny("gpt2")
    table = model.get_input_embeddings().weight.detach().clone()
    plan = planned(model, tmp_path, rank=3, frequencies=False)
    assert not plan.files
    assert not list(tmp_path.iterdir())
    left, roots, right = np.linalg.svd(table.numpy(), full_matrices=False)
    np.testing.assert_allclose(product_of(applied(plan, model)), (left[:, :3] * roots[:3]) @ right[:3], atol=1e-12)
    assert "all rows alike" in plan.findings[-1]


@pytest.mark.parametrize("family", ["llama", *TIED])
def test_the_model_is_that_with_the_product_for_a_table(tmp_path, family):
    model = tiny(family)
    expected = copy.deepcopy(model)
    plan = planned(model, tmp_path, rank=5)
    tied = family != "llama"
    assert any("as before the same table" in finding for finding in plan.findings) == tied
    head = model.get_output_embeddings()
    changed = applied(plan, model)
    brick = changed.get_input_embeddings()
    assert type(brick) is LowRankEmbedding
    with torch.no_grad():  # all that was the table, where it is tied
        expected.get_input_embeddings().weight.copy_(product_of(changed))
    torch.testing.assert_close(logits(changed), logits(expected), rtol=1e-10, atol=1e-10)
    if tied:
        assert type(changed.get_output_embeddings()) is LowRankLinear
        assert changed.get_output_embeddings().output_factor is brick.output_factor
        assert changed.get_output_embeddings().input_factor is brick.input_factor
    else:
        assert changed.get_output_embeddings() is head


@pytest.mark.parametrize("family", ["llama", *TIED])
def test_what_is_saved_holds_the_product_once_and_loads_to_the_bit(tmp_path, family):
    model = tiny(family, dtype=torch.float32)
    applied(planned(model, tmp_path, rank=5), model)
    auxin.save(model, tmp_path / "saved")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved").eval()), logits(model))
    stored = load_file(tmp_path / "saved" / "edited_model.safetensors")
    assert sum(name.endswith("_factor") for name in stored) == 2


def test_a_head_of_its_own_goes_where_asked(tmp_path):
    model = tiny("llama")
    table, head = (module.weight.detach().clone() for module in (model.model.embed_tokens, model.lm_head))
    applied(planned(model, tmp_path, rank=4, head=True, frequencies=False), model)
    for module, old in ((model.model.embed_tokens, table), (model.lm_head, head)):
        left, roots, right = np.linalg.svd(old.numpy(), full_matrices=False)
        product = (module.output_factor @ module.input_factor).detach()
        np.testing.assert_allclose(product, (left[:, :4] * roots[:4]) @ right[:4], atol=1e-12)


def test_a_folder_becomes_what_the_model_in_memory_becomes(tmp_path):
    model = tiny("gpt2", dtype=torch.float32)
    model.save_pretrained(tmp_path / "old")
    plan = planned(model, tmp_path, rank=5)
    auxin.apply(plan, tmp_path / "old", output=tmp_path / "new")
    loaded = type(model).from_pretrained(tmp_path / "new").eval()
    applied(plan, model)
    assert torch.equal(logits(loaded), logits(model))


def counted(model: Any, batch: Any, objective: Any = None) -> list[float]:
    data = Calibration.of_batches(model, [batch], objective)
    return occurrences(model, data, factorisable(model, FactorisedEmbedding(rank=1))).tolist()


def test_padding_does_not_count_and_what_is_hidden_counts_beside_what_hides_it():
    model = tiny("bert")
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 0, 0]])
    asked = torch.tensor([[-100, 9, -100, -100], [-100, -100, -100, -100]])  # 4 stands for a hidden 9
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = counted(model, {"input_ids": ids, "attention_mask": mask, "labels": asked}, MaskedLanguage())
    assert found == pytest.approx(oracle.counts([[3, 4, 5, 6, 9], [3, 4]], VOCABULARY))


@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("family", ["t5", "pegasus"])
def test_both_sides_of_an_encoder_decoder_count(family, values):
    model = tiny(family, **values)
    found = counted(model, {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[7, 7, -100]])})
    assert found == pytest.approx(oracle.counts([[3, 4, 5], [7, 7]], VOCABULARY))


def test_how_much_was_looked_at_changes_no_factor(tmp_path):
    models = tiny("gpt2"), tiny("gpt2")
    every = torch.arange(VOCABULARY).view(1, -1)  # no token is unseen
    text = torch.cat([every, some_texts(length=VOCABULARY)])
    for model, times in zip(models, (1, 3), strict=True):
        applied(auxin.plan(model, METHOD, rank=4, data=[text] * times, folder=tmp_path), model)
    factors = [model.get_input_embeddings() for model in models]
    torch.testing.assert_close(factors[0].output_factor, factors[1].output_factor)
    torch.testing.assert_close(factors[0].input_factor, factors[1].input_factor)


@pytest.mark.parametrize("family", ["gemma", "bart"])
def test_the_scale_of_embeddings_is_that_of_the_class_in_short_types(family):
    module = tiny(family, dtype=torch.bfloat16).get_input_embeddings()
    rank = min(module.weight.shape)
    new = LowRankEmbedding.replacing(module, rank)
    ids = torch.arange(VOCABULARY)
    with torch.no_grad():
        rows = (new.output_factor @ new.input_factor).float()
        torch.testing.assert_close(
            new(ids).float() / rows, (module(ids) / module.weight[ids]).float(), rtol=0.02, atol=0
        )
        exact = new.scale if family == "bart" else torch.tensor(new.scale).bfloat16().item()
        assert (new(ids).float() / rows).median().item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_of_modules_that_share_a_product_one_is_not_merged_alone(tmp_path, family):
    model = applied(planned(tiny(family), tmp_path, rank=3, frequencies=False), tiny(family))
    paths = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LowRank)]
    for left in paths:
        edits = [MergeModule(module=path) for path in paths if path != left]
        with pytest.raises(PlanError, match="Merge all that share them in one plan"):
            applied(Plan(method="merge", promise="exact", edits=edits), model)


def test_a_mask_of_another_shape_is_no_mask_of_tokens():
    model = tiny("gpt2")
    ids = some_texts(samples=1)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    found = counted(model, {"input_ids": ids, "attention_mask": mask, "labels": ids})
    assert found == pytest.approx(oracle.counts(ids.tolist(), VOCABULARY))


def test_a_table_that_is_not_finite_is_refused(tmp_path):
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[3, 2] = torch.nan
    with pytest.raises(PlanError, match="weight holds values that are not finite"):
        planned(model, tmp_path, rank=3)


def test_a_target_takes_the_largest_rank_that_meets_it(tmp_path):
    model = tiny("gpt2")
    whole = count_parameters(model).total
    (table,) = factorisable(model, FactorisedEmbedding(rank=1))
    plan = planned(model, tmp_path, target={"parameters": 0.96}, frequencies=False)
    rank = plan.edits[0].settings["rank"]
    saved = {r: table.tokens * table.width - r * (table.tokens + table.width) for r in (rank, rank + 1)}
    assert saved[rank + 1] < 0.04 * whole <= saved[rank]
    assert count_parameters(applied(plan, model)).total == whole - saved[rank]


def test_the_largest_rank_saves_and_one_more_does_not():
    for family in ("gpt2", "llama", "bert", "albert"):
        model = tiny(family)
        for table in factorisable(model, FactorisedEmbedding(rank=1)):
            entries = table.tokens + table.width
            assert table.most * entries < table.tokens * table.width <= (table.most + 1) * entries


def test_what_it_cannot_do_is_one_message(tmp_path):
    model = tiny("gpt2")
    with pytest.raises(ConfigError, match="or a target"):
        planned(model, tmp_path)
    with pytest.raises(ConfigError, match="no share below 1"):
        planned(model, tmp_path, rank=1.0)
    with pytest.raises(PlanError, match=r"rank = 16: transformer.wte.weight \[19, 16\] .* Give 8 at most"):
        planned(model, tmp_path, rank=16, frequencies=False)
    with pytest.raises(PlanError, match="smallest that factorised-embedding can reach"):
        planned(model, tmp_path, target={"parameters": 0.5}, frequencies=False)
    with pytest.raises(PlanError, match="no vocabulary"):
        planned(tiny("vit"), tmp_path, rank=2, frequencies=False)
    applied(planned(model, tmp_path, rank=4, frequencies=False), model)
    with pytest.raises(PlanError, match=r"is a LowRankEmbedding.*merge_module"):
        planned(model, tmp_path, rank=2, frequencies=False)
    whisper = tiny("whisper")
    nothing = {**inputs(whisper), "labels": torch.full_like(labels(whisper), -100)}
    with pytest.raises(DataError, match="no batch has a token"):
        auxin.plan(whisper, METHOD, rank=2, data=[nothing], folder=tmp_path)


def test_a_product_grows_with_the_model_and_takes_new_tokens(tmp_path):
    model = applied(planned(tiny("gpt2"), tmp_path, rank=5), tiny("gpt2"))
    before = logits(model)
    auxin.apply(auxin.plan(model, "hypercloning", factor=2), model)
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
    auxin.apply(auxin.plan(model, "vocabulary", rows=3), model)
    torch.testing.assert_close(logits(model)[..., :VOCABULARY], before, rtol=1e-9, atol=1e-9)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_merged_it_is_one_dense_table_again(tmp_path, family):
    model = tiny(family)
    ties = model.all_tied_weights_keys
    applied(planned(model, tmp_path, rank=5, frequencies=False), model)
    paths = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LowRank)]
    product = product_of(model)
    applied(Plan(method="merge", promise="exact", edits=[MergeModule(module=path) for path in paths]), model)
    torch.testing.assert_close(model.get_input_embeddings().weight.detach(), product)
    assert model.all_tied_weights_keys == ties
    assert not structural_edits(model.config)


def test_counting_tokens_saves_what_rows_of_no_use_would_take(tmp_path):
    """The effect: of a model that knows more tokens than its text has, as a large vocabulary on one kind of text."""
    model = byte_model(0, tie_word_embeddings=False)
    text, unseen, looked_at = library("argparse", "ast"), library("inspect"), library("tarfile")[:1920].view(40, 48)
    train(model, text, 150)
    table = model.model.embed_tokens.weight.detach()
    never = torch.bincount(torch.cat([text, unseen, looked_at.flatten()]), minlength=256) == 0
    generator = torch.Generator().manual_seed(0)
    table[never] = torch.randn(table[never].shape, generator=generator) * table[~never].std()
    whole = held_out_loss(model, unseen)
    lost = {}
    for frequencies in (True, False):
        smaller = copy.deepcopy(model)
        data = {"data": [looked_at]} if frequencies else {}
        applied(auxin.plan(model, METHOD, rank=24, frequencies=frequencies, folder=tmp_path, **data), smaller)
        lost[frequencies] = held_out_loss(smaller, unseen) - whole
    assert 0 < 2 * lost[True] < lost[False]
