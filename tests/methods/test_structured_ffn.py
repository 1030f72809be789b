"""Feed-forward parts as products, from how many parameters they have to what is left when their guides are gone."""

import copy
import math

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import auxin
from auxin.accounting import count_parameters
from auxin.edits import MergeModule, Plan, ReplaceModule, apply_to_checkpoint
from auxin.edits.structure import structural_edits
from auxin.errors import ConfigError, PlanError
from auxin.methods.factorize.structured_ffn import METHOD, GuideFade, StructuredFeedForward
from auxin.models.loading import load_model
from auxin.nn.block_products import BlockProduct
from auxin.nn.guide import Guided
from auxin.nn.low_rank import LowRank
from auxin.planning.bench import Bench
from auxin.planning.product_times import TOKENS, ProductTimes
from auxin.planning.target import removal
from auxin.recipes import Recipe, run_recipe
from corpora import small_corpus, write_documents
from tiny_models import inputs, labels, output, tiny

NAME = "structured-ffn"
FORMS = ["low-rank", "block-dense", "block-shuffle"]
FAMILIES = ["llama", "gpt2", "bert", "t5", "gpt_neox"]


def changed(model, optimizer=None, **values):
    plan = auxin.plan(model, NAME, first_layer=True, **values)
    auxin.apply(plan, model, optimizer=optimizer)
    return plan


@torch.no_grad()
def logits(model):
    return output(model(**inputs(model)))


def step(model, optimizer, *hooks, number=0):
    loss = model(**inputs(model), labels=labels(model)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    for hook in hooks:
        hook.after_step(number)
    return loss.item()


@pytest.fixture(scope="module")
def largest():
    """The paper's Transformer-xl."""
    config = GPTNeoXConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return GPTNeoXForCausalLM(config)


@pytest.mark.parametrize(
    ("values", "model_millions", "part_millions"),
    [
        ({"rank": 0.5}, 985, 516),
        ({"form": "block-dense", "blocks": 4, "rank": 1536}, 955, 486),
        ({"form": "block-shuffle", "blocks": 2}, 985, 516),
        ({"rank": 0.25}, 744, 275),
        ({"form": "block-dense", "blocks": 4, "rank": 768}, 728, 260),
        ({"form": "block-shuffle", "blocks": 4}, 744, 275),
    ],
)
def test_the_parameters_are_those_of_the_paper_s_table(largest, values, model_millions, part_millions):
    assert round(count_parameters(largest).total / 1e6) == 1274
    plan = METHOD.plan(Bench(largest), StructuredFeedForward(**values))
    model = removal(largest, plan.edits).after
    part = sum(value.numel() for name, value in model.named_parameters() if ".mlp." in name and ".bias" not in name)
    assert round(part / 1e6) == part_millions
    assert round(count_parameters(model).total / 1e6) == model_millions
    assert "gpt_neox.layers.0.mlp.dense_h_to_4h.weight" in model.state_dict()  # the first layer stays as it is


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_with_the_old_matrices_as_guides_nothing_changes(family, form):
    model = tiny(family)
    before = logits(model)
    plan = changed(model, form=form, guide="weight")
    assert plan.promise == "exact"
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("form", FORMS)
def test_with_the_products_as_guides_the_strength_does_not_matter(form):
    model, plain = tiny("llama"), tiny("llama")
    changed(plain, form=form)
    changed(model, form=form, guide="product")
    for guide in (module for module in model.modules() if isinstance(module, Guided)):
        guide.set_strength(0.3)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_guides_fade_and_go_and_nothing_of_them_is_left(family, tmp_path):
    model = tiny(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    form = FORMS[FAMILIES.index(family) % 3]
    changed(model, optimizer, form=form, guide="weight")
    fade, strengths = GuideFade(4), []
    fade.attach(model, optimizer)
    for number in range(6):
        strengths.append(next(float(module.strength) for module in model.modules() if isinstance(module, Guided)))
        step(model, optimizer, fade, number=number)
    expected = [(1 + math.cos(math.pi * min(number / 4, 1))) / 2 for number in range(6)]
    assert strengths == pytest.approx(expected, abs=1e-7)
    before = logits(model)
    model.save_pretrained(tmp_path / "guided")
    kept = {name: optimizer.state[value]["exp_avg"].clone() for name, value in model.named_parameters()}
    finish = auxin.plan(model, NAME, finish=True)
    auxin.apply(finish, model, optimizer=optimizer)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    assert not any(isinstance(module, Guided) for module in model.modules())
    products = {name for name, module in model.named_modules() if isinstance(module, LowRank | BlockProduct)}
    assert products
    assert not any(f"{name}.{key}" in model.state_dict() for name in products for key in ("weight", "strength"))
    assert {id(value) for value in optimizer.state} == {id(value) for value in model.parameters()}
    for name, value in model.named_parameters():
        module, _, key = name.rpartition(".")
        old = f"{module}.product.{key}" if module in products and key != "bias" else name
        assert torch.equal(optimizer.state[value]["exp_avg"], kept[old])
    # The same on the disk, and again after loading.
    apply_to_checkpoint(finish, tmp_path / "guided", tmp_path / "finished")
    assert torch.equal(logits(load_model(tmp_path / "finished")), logits(model))
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]


def test_guides_can_be_merged_at_any_strength(tmp_path):
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    changed(model, optimizer, form="block-shuffle", guide="weight")
    fade = GuideFade(4)
    fade.attach(model, optimizer)
    for number in range(2):
        step(model, optimizer, fade, number=number)
    before = logits(model)
    model.save_pretrained(tmp_path / "guided")
    loaded = load_model(tmp_path / "guided")
    assert torch.equal(logits(loaded), before)
    paths = [name for name, module in loaded.named_modules() if isinstance(module, Guided)]
    auxin.apply(Plan(method="x", promise="exact", edits=[MergeModule(module=path) for path in paths]), loaded)
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-12)
    assert structural_edits(loaded.config) == []


def merging(model) -> Plan:
    paths = [name for name, module in model.named_modules() if isinstance(module, Guided)]
    return Plan(method="x", promise="exact", edits=[MergeModule(module=path) for path in paths])


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.25])
def test_merged_layers_have_the_moments_that_they_would_have_had(strength):
    """Where the strength stands still: what the guides saw at every step, the merged matrices would have seen."""
    model = tiny("llama")
    changed(model, form="low-rank", guide="product")
    guides = {name: module for name, module in model.named_modules() if isinstance(module, Guided)}
    for guide in guides.values():
        guide.set_strength(strength)
    optimizer, twin = torch.optim.AdamW(model.parameters(), lr=0.0), copy.deepcopy(model)  # steps that move nothing
    auxin.apply(merging(twin), twin)
    other = torch.optim.AdamW(twin.parameters(), lr=0.0)
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    receipt = auxin.apply(merging(model), model, optimizer=optimizer)
    assert receipt.fresh_moments == []
    expected = dict(twin.named_parameters())
    for name, value in model.named_parameters():
        assert optimizer.state[value]["step"] == 3
        for moment in ("exp_avg", "exp_avg_sq"):
            ours, theirs = optimizer.state[value][moment], other.state[expected[name]][moment]
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_guides_that_have_faded_are_merged_with_the_moments_of_their_products():
    model = tiny("llama")
    changed(model, form="low-rank", guide="weight")
    for guide in (module for module in model.modules() if isinstance(module, Guided)):
        guide.set_strength(0.0)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3) for one in (model, plain)]
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        step(one, optimizer)
    auxin.apply(auxin.plan(plain, NAME, finish=True), plain, optimizer=optimizers[1])
    paths = [name for name, module in plain.named_modules() if isinstance(module, LowRank)]
    merged = Plan(method="x", promise="exact", edits=[MergeModule(module=path) for path in paths])
    auxin.apply(merged, plain, optimizer=optimizers[1])
    assert structural_edits(plain.config) == []  # nor are the guides there again, which the products had replaced
    receipt = auxin.apply(merging(model), model, optimizer=optimizers[0])
    assert receipt.fresh_moments == []
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(optimizers[0].state[ours]["exp_avg"], optimizers[1].state[theirs]["exp_avg"]), name


def test_the_receipt_names_what_starts_with_fresh_moments():
    model, path = tiny("llama"), "model.layers.1.mlp.down_proj"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    drawn = {"blocks": 2, "rank": 4, "start": "orthogonal"}
    put = ReplaceModule(module=path, brick="block_dense_linear", settings=drawn)
    receipt = auxin.apply(Plan(method="x", promise="none", edits=[put]), model, optimizer=optimizer)
    named = [f"{path}.output_factor", f"{path}.input_factor"]
    assert sorted(receipt.fresh_moments) == sorted(named)
    assert "2 parameters start with fresh moments (" in str(receipt)
    assert all(model.get_parameter(name) not in optimizer.state for name in named)
    back = Plan(method="x", promise="exact", edits=[MergeModule(module=path)])
    follows = auxin.apply(back, model, optimizer=optimizer)
    assert follows.fresh_moments == []  # there was nothing to lose any more
    assert "fresh" not in str(follows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_units_are_not_pruned_behind_products_and_the_mend_that_is_named_works(form, method):
    model = tiny("llama")
    changed(model, form=form)
    path = "model.layers.0.mlp.gate_proj"
    said = rf"{path} of the llama model is (low_rank|block_\w+)_linear since an earlier change, .* First merge it back"
    with pytest.raises(PlanError, match=said) as told:
        auxin.plan(model, method, ffn=0.5)
    assert "Or make this change before that one" in str(told.value)
    products = [name for name, module in model.named_modules() if isinstance(module, LowRank | BlockProduct)]
    merged = Plan(method="x", promise="exact", edits=[MergeModule(module=name) for name in products])
    auxin.apply(merged, model)
    auxin.apply(auxin.plan(model, method, ffn=0.5), model)
    other = tiny("llama")
    auxin.apply(auxin.plan(other, method, ffn=8), other)
    changed(other, form=form, **({"rank": 2} if form != "block-shuffle" else {}))


def test_a_target_is_met_by_the_largest_rank_that_meets_it():
    model, before = tiny("gpt_neox", hidden_size=32, intermediate_size=128), None
    for share in (0.9, 0.8):
        smaller = copy.deepcopy(model)
        plan = changed(smaller, target={"parameters": share})
        assert count_parameters(smaller).total <= share * count_parameters(model).total
        rank = plan.edits[0].settings["rank"]
        larger = copy.deepcopy(model)
        changed(larger, rank=rank + 1)
        assert count_parameters(larger).total > share * count_parameters(model).total
        assert before is None or rank < before
        before = rank


def test_a_recipe_trains_beside_guides_and_without_them(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {**sizes, "max_position_embeddings": 16, "tie_word_embeddings": True}
    values = {
        "name": "guided",
        "title": "Guided",
        "seed": 3,
        "data": small_corpus(write_documents(tmp_path / "corpus")),
        "training": {"batch_size": 4, "steps": 4, "decay_fraction": 0.0, "tensorboard": False},
        "branches": [
            {
                "name": "main",
                "title": "main",
                "stages": [
                    {"kind": "build", "model_type": "gpt_neox", "config": config},
                    {
                        "kind": "change",
                        "method": NAME,
                        "settings": {"guide": "product", "guide_steps": 4, "skip_guide": True},
                    },
                    {"kind": "train", "name": "beside"},
                    {"kind": "change", "name": "alone", "method": NAME, "settings": {"finish": True}},
                    {"kind": "train", "name": "after"},
                ],
            }
        ],
        "main_branch": "main",
    }
    run_recipe(Recipe.model_validate(values), tmp_path / "run", "", lambda line: None)
    model = load_model(sorted((tmp_path / "run").rglob("checkpoints/*"))[-1])
    assert not any(isinstance(module, Guided) for module in model.modules())
    assert "gpt_neox.layers.1.mlp.dense_h_to_4h.output_factor" in model.state_dict()
    assert "gpt_neox.layers.0.mlp.dense_h_to_4h.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 13}, "no fewer parameters than the whole matrix. Give 9 or less."),
        ({"rank": 1.5}, "rank = 1.5 is no share below 1"),
        ({"rank": 4, "target": {"parameters": 0.9}}, "give rank or target, and not both"),
        ({"form": "block-shuffle", "rank": 4}, "Give blocks alone."),
        ({"form": "block-shuffle", "blocks": 3}, "blocks = 3 does not divide"),
        ({"form": "block-dense", "blocks": 4, "rank": 6}, "blocks = 4 does not divide the rank, 6."),
        ({"blocks": 2}, "low-rank has no blocks"),
        ({"multiple_of": 16}, "multiple_of = 16: model.layers.0.mlp.gate_proj would have 16 inner units"),
        ({"multiple_of": 16, "target": {"parameters": 0.9}}, "Keep it (keep: [model.layers.0.mlp.gate_proj])."),
        ({"form": "block-shuffle", "multiple_of": 2}, "Give blocks alone."),
        ({"start": "orthogonal"}, "start = orthogonal is for forms that have"),
        ({"guide_steps": 5}, "guide_steps is about guides, and there are none."),
        ({"skip_guide": True}, "skip_guide is about guides"),
        ({"finish": True}, "no guides that could be taken off"),
        ({"finish": True, "rank": 3}, "goes with no other setting"),
        ({"keep": ["model.layers.*.mlp"]}, "keep: all of the 6 that could go are kept"),
    ],
)
def test_what_can_not_be_is_refused(values, said):
    model = tiny("llama", hidden_size=16, intermediate_size=24)
    first = {} if values.get("finish") else {"first_layer": True}
    with pytest.raises((PlanError, ConfigError)) as error:
        auxin.plan(model, NAME, **first, **values)
    assert said in str(error.value)


def test_guides_that_have_not_faded_stay():
    model = tiny("llama")
    changed(model, guide="weight")
    with pytest.raises(PlanError, match="is at 1; without it the function would jump"):
        auxin.plan(model, NAME, finish=True)
    with pytest.raises(PlanError, match="guides of an earlier change"):
        auxin.plan(model, NAME, first_layer=True)
    with pytest.raises(PlanError, match="has no guides"):
        GuideFade(3).attach(tiny("llama"), torch.optim.SGD(model.parameters()))
    with pytest.raises(ConfigError, match="at least 1"):
        GuideFade(0)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ({"rank": 4}, "low-rank of rank 4"),
        ({"form": "block-dense", "rank": 4, "blocks": 2}, "block-dense of rank 4 in 2 blocks"),
        ({"form": "block-shuffle", "blocks": 2}, "block-shuffle of 2 blocks"),
    ],
)
def test_a_plan_says_from_how_many_tokens_on_products_are_faster(values, form, monkeypatch):
    """By a clock of calls and multiply-adds."""

    def seconds(self, modules, tokens):
        sizes = [sum(value.numel() for value in module.parameters()) for module in modules]
        return [calls * 1000 + tokens * size for calls, size in zip((1, 2), sizes, strict=True)]

    monkeypatch.setattr(ProductTimes, "seconds", seconds)
    model = tiny("gpt_neox")
    quiet = auxin.plan(model, "structured-ffn", **values)
    plan = auxin.plan(model, "structured-ffn", **values, measure=True)
    assert plan.edits == quiet.edits
    layer = model.gpt_neox.layers[1].mlp.dense_h_to_4h
    changed = copy.deepcopy(model)
    auxin.apply(quiet, changed)
    product = changed.gpt_neox.layers[1].mlp.dense_h_to_4h
    saved = layer.weight.numel() - sum(value.numel() for name, value in product.named_parameters() if name != "bias")
    start = next(tokens for tokens in TOKENS if tokens * saved > 1000)
    widths = f"{layer.in_features} -> {layer.out_features}"
    assert f"{widths} {form} from {start:,} tokens on" in plan.findings[-1]


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ({"multiple_of": 6}, 30),  # half of 64, rounded down
        ({"multiple_of": 6, "rank": 20}, 18),
        ({"multiple_of": 3, "form": "block-dense", "blocks": 4}, 24),
        ({"multiple_of": "machine"}, 32),
        ({"multiple_of": "machine", "rank": 31}, 28),
        ({"multiple_of": "machine", "rank": 31, "form": "block-dense", "blocks": 2}, 24),
    ],
)
def test_ranks_are_multiples_of_what_is_asked_for_or_of_what_the_machine_likes(values, rank, monkeypatch):
    """On a machine whose kernels compute four units of a product, or of a block, at once."""

    def seconds(self, modules, tokens):
        units = [len(module.input_factor) // getattr(module, "blocks", 1) for module in modules]
        return [-(-count // 4) * 4.0 for count in units]

    monkeypatch.setattr(ProductTimes, "seconds", seconds)
    model = tiny("gpt_neox", hidden_size=64, intermediate_size=256)
    plan = auxin.plan(model, NAME, **values)
    assert {edit.settings["rank"] for edit in plan.edits} == {rank}
    per_block = 4 * values.get("blocks", 1)
    assert (f"Ranks are multiples of {per_block}, as this machine likes them." in plan.findings) == (
        values["multiple_of"] == "machine"
    )


def test_a_target_is_met_by_the_largest_multiple_that_meets_it():
    model, target = tiny("gpt_neox", hidden_size=64, intermediate_size=256), {"parameters": 0.8}
    plan = auxin.plan(model, NAME, target=target, multiple_of=8)
    (rank,) = {edit.settings["rank"] for edit in plan.edits}
    assert rank % 8 == 0
    left = [
        count_parameters(removal(model, auxin.plan(model, NAME, rank=one).edits).after).total
        for one in (rank, rank + 8)
    ]
    assert left[0] <= 0.8 * count_parameters(model).total < left[1]
