"""Layers of random features in models: their sizes, what stays and what changes, bundling, and what is refused."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import auxin
from auxin.edits import Plan, apply_to_checkpoint
from auxin.errors import ConfigError, PlanError
from auxin.methods.adapt.snnk import METHOD, RandomFeatureLayers
from auxin.models.loading import load_model
from auxin.nn.feature_layers import FeatureAdapter, ReluFeatureLayer, ReluFeatures
from auxin.planning.bench import Bench
from auxin.planning.target import removal
from auxin.recipes import Recipe, run_recipe
from corpora import small_corpus, write_documents
from oracles import random_features as oracle
from tiny_models import inputs, labels, output, tiny

NAME = "snnk"
FAMILIES = ["bert", "vit", "llama", "gpt2", "t5"]


@torch.no_grad()
def logits(model):
    return output(model(**inputs(model)))


def changed(model, optimizer=None, **values):
    plan = auxin.plan(model, NAME, **values)
    auxin.apply(plan, model, optimizer=optimizer)
    return plan


def of_class(model, cls):
    return {path: module for path, module in model.named_modules() if isinstance(module, cls)}


def step(model, optimizer):
    loss = model(**inputs(model), labels=labels(model)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.fixture(scope="module")
def base():
    """BERT-base."""
    with torch.device("meta"):
        return BertModel(BertConfig())


def planned(model, **values):
    """A skeleton of what a plan makes, and the plan."""
    plan = METHOD.plan(Bench(model), RandomFeatureLayers.parse(values))
    return removal(model, plan.edits).after, plan


def counted(model, cls):
    return sum(value.numel() for module in of_class(model, cls).values() for value in module.parameters())


def test_adapters_of_bert_have_as_many_parameters_as_the_paper_says(base):
    model, plan = planned(base, features=8)
    adapters = [module.adapter for module in of_class(model, FeatureAdapter).values()]
    assert {sum(value.numel() for value in adapter.parameters()) for adapter in adapters} == {768 * 8 + 768}
    assert (len(adapters), sum(p.numel() for a in adapters for p in a.parameters())) == (24, 165_888)
    assert plan.findings == ["24 adapters with 165,888 parameters."]
    # Pfeiffer's adapters, one a layer: two matrices of a bottleneck of 48 with their biases.
    pfeiffer = 12 * (2 * 768 * 48 + 48 + 768)
    assert pfeiffer == 894_528
    assert round(pfeiffer / 165_888, 1) == 5.4
    assert len(of_class(planned(base, features=8, after=["feed-forward"])[0], FeatureAdapter)) == 12
    assert len(of_class(planned(base, features=8, blocks=2)[0], FeatureAdapter)) == 4


def test_parts_of_bert_shrink_as_the_paper_says(base):
    part = sum(value.numel() for name, value in base.named_parameters() if "layer.11" in name and "dense.w" in name)
    assert part - 768**2 == 2 * 2_359_296  # without the attention's
    model, _ = planned(base, place="feed-forward", blocks=6, features=16)
    assert sorted(of_class(model, ReluFeatureLayer)) == sorted(
        f"encoder.layer.{n}.intermediate.dense" for n in range(6, 12)
    )
    assert counted(model, ReluFeatureLayer) == 6 * 49_152
    last = planned(model, bundle=True)[0].encoder.layer[11]
    assert last.output.dense.weight.numel() == 12_288
    assert last.intermediate.dense.directions.numel() == 12_288
    assert not list(last.intermediate.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_first_then_learn_and_stay_what_they_are_on_the_disk(family, tmp_path):
    model = tiny(family)
    before = logits(model)
    assert changed(model, features=4).promise == "exact"
    assert torch.equal(logits(model), before)
    directions = {path: module.adapter.directions.clone() for path, module in of_class(model, FeatureAdapter).items()}
    model.requires_grad_(False)
    for module in of_class(model, FeatureAdapter).values():
        module.adapter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    for path, module in of_class(model, FeatureAdapter).items():
        assert torch.equal(module.adapter.directions, directions[path])
    assert len({tuple(value.flatten().tolist()) for value in directions.values()}) == len(directions)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    undone = copy.deepcopy(model)
    paths = list(of_class(undone, FeatureAdapter))
    edits = [{"kind": "remove_module", "module": path, "leaves": "inner"} for path in paths]
    auxin.apply(Plan(method="off", promise="none", edits=edits), undone)
    assert torch.equal(logits(undone), before)


def test_directions_are_the_seeds():
    def drawn(seed, **values):
        model = tiny("bert")
        changed(model, seed=seed, **values)
        return {name: value for name, value in model.state_dict().items() if name.endswith("directions")}

    for values in ({}, {"place": "feed-forward"}):
        first, again, other = (drawn(seed, **values) for seed in (1, 1, 2))
        assert first
        for name in first:
            assert torch.equal(first[name], again[name])
            assert not torch.equal(first[name], other[name])


def test_the_first_half_of_the_last_parts_becomes_features_and_no_more(tmp_path):
    model, old = tiny("bert", num_hidden_layers=3), tiny("bert", num_hidden_layers=3)
    plan = changed(model, place="feed-forward", blocks=2, features=5, threshold=-0.5)
    assert plan.promise == "none"
    part, old_part = model.bert.encoder.layer[2].intermediate, old.bert.encoder.layer[2].intermediate
    x = torch.randn(16, dtype=torch.float64)
    told = oracle.layer(x.numpy(), old_part.dense.weight.detach().numpy(), part.dense.directions.numpy(), -0.5)
    assert part(x).tolist() == pytest.approx(told.tolist())  # and no activation
    replaced = of_class(model, ReluFeatureLayer)
    assert list(replaced) == [f"bert.encoder.layer.{n}.intermediate.dense" for n in (1, 2)]
    one, two = replaced.values()
    assert one is not two
    assert not torch.equal(one.directions, two.directions)
    others = {name: value for name, value in model.state_dict().items() if ".intermediate." not in name}
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in others.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "t5"])
def test_bundled_layers_give_what_they_gave(family, tmp_path):
    model = tiny(family)
    changed(model, place="feed-forward", blocks=2, features=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    before = logits(model)
    model.save_pretrained(tmp_path / "trained")
    plan = changed(model, optimizer, bundle=True)
    assert plan.promise == "exact"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    assert not of_class(model, ReluFeatureLayer)
    assert not any(list(module.parameters()) for module in of_class(model, ReluFeatures).values())
    # The same on the disk, and again after loading; then it is trained on with the moments that it has.
    apply_to_checkpoint(plan, tmp_path / "trained", tmp_path / "bundled")
    assert torch.equal(logits(load_model(tmp_path / "bundled")), logits(model))
    assert {id(value) for value in optimizer.state} == {id(value) for value in model.parameters()}
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "plans", [[{}], [{"place": "feed-forward"}], [{"place": "feed-forward"}, {"bundle": True}]], ids=str
)
def test_who_initialises_the_weights_and_biases_of_all_layers_finds_them(plans, tmp_path):
    """SigLIP, when it loads."""
    model = tiny("siglip")
    for values in plans:
        changed(model, **values)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_moments_of_a_bundled_matrix_are_those_that_the_chain_rule_allows():
    """Of plain gradients as moments: both of its factors find what they had."""
    model = tiny("bert")
    changed(model, place="feed-forward", blocks=1, features=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.0, 0.0))
    step(model, optimizer)
    layer = model.bert.encoder.layer[1]
    first, second = layer.intermediate.dense.weight_features, layer.output.dense.weight
    old = {name: optimizer.state[value]["exp_avg"].clone() for name, value in (("Y", first), ("W", second))}
    features, weight = first.detach().clone(), second.detach().clone()
    changed(model, optimizer, bundle=True)
    moment = optimizer.state[model.bert.encoder.layer[1].output.dense.weight]["exp_avg"]
    torch.testing.assert_close(moment @ features.mT, old["W"], rtol=0, atol=1e-9)
    torch.testing.assert_close(weight.mT @ moment, old["Y"], rtol=0, atol=1e-9)


def test_of_a_gated_part_the_gate_is_replaced_and_nothing_bundled():
    model, old = tiny("llama"), tiny("llama")
    plan = changed(model, place="feed-forward", features=5)
    part, x = model.model.layers[1].mlp, torch.randn(16, dtype=torch.float64)
    gate = oracle.layer(
        x.numpy(), old.model.layers[1].mlp.gate_proj.weight.detach().numpy(), part.gate_proj.directions.numpy(), 0.0
    )
    torch.testing.assert_close(part(x), part.down_proj(torch.tensor(gate) * part.up_proj(x)), rtol=0, atol=1e-12)
    assert "can't be bundled" in plan.findings[-1]
    with pytest.raises(PlanError, match="a gated part multiplies it"):
        auxin.plan(model, NAME, bundle=True)


def classifier(**values):
    return tiny("bert", head="BertForSequenceClassification", num_labels=3, **values)


def test_a_pooler_becomes_features(tmp_path):
    model, old = classifier(), classifier()
    plan = changed(model, place="pooler", features=5)
    assert plan.promise == "none"
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    told = oracle.layer(
        x[0, 0].numpy(), old.bert.pooler.dense.weight.detach().numpy(), model.bert.pooler.dense.directions.numpy(), 0.0
    )
    assert model.bert.pooler(x)[0].tolist() == pytest.approx(told.tolist())
    with torch.no_grad():
        found = model(**inputs(model)).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            BertForSequenceClassification.from_pretrained(tmp_path, dtype="auto")(**inputs(model)).logits, found
        )
    with pytest.raises(PlanError, match="what reads it, classifier, lies in no common part of the model"):
        auxin.plan(model, NAME, bundle=True)
    changed(model, place="feed-forward", features=5)
    assert auxin.plan(model, NAME, bundle=True).findings[-1].endswith("reads them: bert.pooler.dense.")


def test_in_a_recipe_adapters_are_trained_with_what_is_named_and_nothing_else(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {
        "name": "adapters",
        "title": "Adapters",
        "data": small_corpus(write_documents(tmp_path / "corpus")),
        "training": {"batch_size": 4, "steps": 4, "decay_fraction": 0.0, "tensorboard": False},
        "branches": [
            {
                "name": "main",
                "title": "main",
                "stages": [
                    {"kind": "build", "model_type": "gpt_neox", "config": sizes},
                    {"kind": "change", "method": NAME, "settings": {"features": 4, "train_with": ["lm_head"]}},
                    {"kind": "train", "name": "adapting"},
                ],
            }
        ],
        "main_branch": "main",
    }
    run_recipe(Recipe.model_validate(values), tmp_path / "run", "", lambda line: None)
    weights = load_model(sorted((tmp_path / "run").rglob("checkpoints/*"))[-1]).state_dict()
    assert all(value.any() for name, value in weights.items() if name.endswith("adapter.gate"))
    norms = {name: value for name, value in weights.items() if "layernorm" in name or "layer_norm" in name}
    assert norms
    for name, value in norms.items():
        assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), "as they were made"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": 0}, "features: must be 1 or more"),
        ({"threshold": 0.5}, "threshold: must be 0 or less"),
        ({"bundle": True, "features": 4}, "goes with no other setting; leave out features"),
        ({"place": "pooler", "blocks": 2}, "blocks counts layers of stacks, and a pooler is in none"),
        ({"place": "feed-forward", "after": ["attention"]}, "after is about adapters, and place is feed-forward"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RandomFeatureLayers.parse(values)


def test_what_is_there_already_is_refused():
    model = tiny("bert")
    changed(model)
    with pytest.raises(PlanError, match="has an adapter of random features already"):
        auxin.plan(model, NAME)
    model = classifier()
    changed(model, place="feed-forward")
    with pytest.raises(
        PlanError, match=r"bert.encoder.layer.1.intermediate.dense is a layer of random features already"
    ):
        auxin.plan(model, NAME, place="feed-forward")
    changed(model, place="pooler")
    with pytest.raises(PlanError, match="The pooler is a layer of random features already"):
        auxin.plan(model, NAME, place="pooler")


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (lambda: tiny("llama"), {"place": "pooler"}, "LlamaForCausalLM has no pooler that is made of a linear layer"),
        (lambda: tiny("bert"), {"bundle": True}, "the model has no layers of random features. Ask for place = feed"),
        (lambda: tiny("bert"), {"blocks": 3}, "blocks = 3 is more than the 2 layers of bert.encoder.layer. Give 2"),
        (lambda: tiny("bert"), {"train_with": ["head"]}, "train_with: 'head' is no part of the model with parameters"),
        (lambda: tiny("phi3"), {"place": "feed-forward"}, "behind model.layers.1.mlp.gate_up_proj is no activation"),
        (
            lambda: tiny("mixtral"),
            {"place": "feed-forward"},
            "has no feed-forward part that begins with a linear layer",
        ),
        (lambda: tiny("resnet"), {}, "No attention or feed-forward part of the resnet model is known whose result"),
        (
            lambda: tiny("roberta", head="RobertaForSequenceClassification"),
            {"place": "pooler"},
            "RobertaForSequenceClassification has no pooler",
        ),
        (
            lambda: tiny("deberta-v2", head="DebertaV2ForSequenceClassification"),
            {"place": "pooler"},
            "pooler.dense: behind it is no activation that is a module",
        ),
    ],
)
def test_models_that_can_not_be_changed_so_are_refused(model, values, message):
    with pytest.raises(PlanError, match=message):
        auxin.plan(model(), NAME, **values)


def test_bundling_with_an_adapter_between_or_a_layer_of_another_class_is_refused():
    model, other = tiny("bert"), tiny("falcon")
    changed(model, place="feed-forward", features=5)
    changed(other, place="feed-forward", features=5)
    changed(model, features=3)
    for one in (model, other):
        with pytest.raises(PlanError, match=r"no plain linear layer reads it as it is .*an adapter stands between"):
            auxin.plan(one, NAME, bundle=True)
